"""What every section of the YAML that says which model is served answers for itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, TypedDict

from preheat.config.pt2 import Pt2Config
from preheat.config.schema import Dtype, Section, Text


class Manifest(TypedDict, total=False):
    """TorchServe's MAR-INF/MANIFEST.json, as far as it is read."""

    model: Mapping[str, str]
    """Of it `modelFile`, `serializedFile` and `configFile`."""


class FamilyConfig(Section):
    """A family of models: its key in the YAML, what its folders look like, what it cannot serve."""

    name: ClassVar[str]
    """The section's key, in the YAML and in `models.registry`."""
    weights_index: ClassVar[str]
    """The file at the root of a model folder."""
    kind: ClassVar[str]
    """What such a folder is, as in "a diffusers pipeline"."""
    tiny: ClassVar[tuple[str, ...]] = ()
    """What `tiny:` makes (`tiny` in the family's folder), the one to try first."""
    serving_modes: ClassVar[frozenset[str]] = frozenset()
    """The keys of `model.SERVING_MODES` whose contract its handler keeps."""
    fills: ClassVar[str] = "nothing"
    """What of a request makes several rows of it."""

    path: Text | None = None
    """A model folder, or a hub id; `.` is the archive's own."""
    dtype: Dtype = "float32"
    """Of weights and computation."""

    @property
    def made_by(self) -> str | None:
        """`package.module:function` in the archive that makes the model, so that there is no
        folder.
        """
        return None

    @property
    def num_slots(self) -> int | None:
        """Requests that are served a step at a time, together, as they come and go
        (`models.base.StepRunner`); None: they are served in batches.
        """
        return None

    @property
    def streams_over_grpc(self) -> bool:
        """Whether every gRPC client can stand a stream of messages."""
        return False

    @classmethod
    def is_meant_by(cls, manifest: Manifest) -> bool:
        """Whether an archive whose YAML names no family is one of these."""
        return False

    @property
    def always_guided(self) -> bool:
        """Whether a request's rows are never one alone."""
        return False

    def num_graphs(self, pt2: Pt2Config, batches: int) -> int | None:
        """At most so many graphs are compiled, with this many batch sizes in each bucket; None
        where nothing bounds them.
        """
        return None

    def check(self, pt2: Pt2Config) -> None:
        """Raise ConfigError where `pt2` says what this family cannot do."""

    def check_here(self) -> None:
        """Raise ConfigError where the section names what is not on this machine, `path` and
        `made_by` aside: asked before an archive is made.
        """
