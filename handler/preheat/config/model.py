"""The model YAML as frozen objects: the keys of its top, and the one family that it serves.

TorchServe's keys keep their meaning, `pt2.compile` in every form it knows (pt2_forms); ours stand
beside them. An unknown key or a wrong value is a ConfigError that names the YAML path, the value
and what would be right.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import ValidationError, model_validator

from preheat.config.diffusion import PipelineConfig
from preheat.config.family import FamilyConfig, Manifest
from preheat.config.module import ModuleConfig
from preheat.config.pt2 import Pt2Config, ShapesConfig
from preheat.config.pt2_forms import normalized
from preheat.config.schema import Count, FrozenMapping, Listed, Positive, Section
from preheat.config.text import TextConfig
from preheat.config.yaml_errors import explained, keys_of, shown
from preheat.config.yaml_text import read_yaml
from preheat.errors import ConfigError

FamilyT = TypeVar("FamilyT", bound=FamilyConfig)
SERVING_MODES: dict[str, str] = {
    "continuousBatching": "it is a language model's (text); batchSize and maxBatchDelay make "
    "batches here",
    "sequenceBatching": "requests here have no memory of each other; leave it out",
    "asyncCommunication": "a batch is answered as one here; batchSize and maxBatchDelay make "
    "batches",
    "parallelType": "each worker holds the whole model on one GPU; for more GPUs, minWorkers",
    "torchrun": "each worker is one process on one GPU; for more GPUs, minWorkers",
}
"""TorchServe's other contracts with a handler, by key, and what families that do not keep it
(`FamilyConfig.serving_modes`) have instead.
"""


_RETRY_TIMEOUT = 300
"""TorchServe's maxRetryTimeoutInSec in seconds where the YAML names none."""


class ModelConfig(Section):
    """A whole model YAML.

    The camelCase keys are TorchServe's: the 23 that its frontend reads
    (frontend/archive/src/main/java/org/pytorch/serve/archive/model/ModelConfig.java of 0.12.0), of
    which it ignores wrong values with a log line, and `handler`, where BaseHandler looks for
    `profile` (ts/handler_utils/timer.py).
    """

    minWorkers: Count | None = None
    """Worker processes at start; each holds the model once. Say `maxWorkers` too; without them
    TorchServe starts one for each GPU, or core."""
    maxWorkers: Count | None = None
    """Most that the model may be scaled to."""
    batchSize: Positive = 1
    """Most requests that a worker gets at once."""
    maxBatchDelay: Count | None = None
    """Milliseconds that a request waits for others; a lone one always waits as long. TorchServe's
    default is 100; with `batchSize` 1 nobody waits."""
    responseTimeout: Positive | None = None
    """Seconds a batch may take; TorchServe's default is 120."""
    startupTimeout: Positive | None = None
    """Seconds that import and initialize() may take, compiling included; TorchServe's default is
    120."""
    maxRetryTimeoutInSec: Positive | None = None
    """Seconds in which a worker that dies or fails to start is started again; must exceed
    startupTimeout. TorchServe's default is 300."""
    deviceType: Literal["cpu", "gpu"] | None = None
    """Where workers run; `gpu` insists on one. Default: a GPU where there is one."""
    deviceIds: Listed[Count] | None = None
    """Numbers of the GPUs that are dealt out to workers. Default: all."""
    parallelType: Literal["pp", "tp", "pptp", "custom"] | None = None
    """One model over several GPUs: refused, each worker holds the whole model on one."""
    parallelLevel: Positive | None = None
    """Processes a worker; with `parallelType`."""
    torchrun: FrozenMapping | None = None
    """Arguments of torchrun: refused, each worker is one process."""
    clientTimeoutInMills: Count | None = None
    """Milliseconds a client waits; what queued longer is dropped. 0, TorchServe's default: for
    ever."""
    jobQueueSize: Positive | None = None
    """Requests that may wait; one more is a 503. Default: `job_queue_size` of config.properties,
    100."""
    useJobTicket: bool | None = None
    """Refuse with a 503 what no idle worker can take at once, rather than queue it."""
    continuousBatching: bool | None = None
    """TorchServe's mode for language models, in which requests come and go while others run:
    `true` with `text`, else refused."""
    sequenceBatching: bool | None = None
    """TorchServe's mode for stateful models: refused, requests have no memory of each other."""
    sequenceMaxIdleMSec: Positive | None = None
    """Milliseconds; with `sequenceBatching`."""
    sequenceTimeoutMSec: Positive | None = None
    """Milliseconds; with `sequenceBatching`."""
    maxNumSequence: Positive | None = None
    """Sequences at a time; with `sequenceBatching`."""
    maxSequenceJobQueueSize: Positive | None = None
    """Requests of a sequence that may wait; with `sequenceBatching`."""
    asyncCommunication: bool | None = None
    """TorchServe's mode for asynchronous handlers: refused, a batch is answered as one."""
    useVenv: bool | None = None
    """Run workers in an environment of their own, made from the archive's requirements."""
    handler: FrozenMapping | None = None
    """Where TorchServe's BaseHandler looks for `profile`."""

    pt2: Pt2Config = Pt2Config()
    """How the model is compiled and which sizes are warmed."""
    pipeline: PipelineConfig | None = None
    """A diffusers pipeline."""
    module: ModuleConfig | None = None
    """Any other nn.Module, instead of `pipeline`."""
    text: TextConfig | None = None
    """A causal language model, instead of `pipeline`."""

    @classmethod
    def families(cls) -> dict[str, type[FamilyConfig]]:
        """The sections that say what is served, by their keys."""
        kinds = {key: get_args(field.annotation) for key, field in cls.model_fields.items()}
        return {
            key: kind
            for key, forms in kinds.items()
            for kind in forms
            if isinstance(kind, type) and issubclass(kind, FamilyConfig)
        }

    @classmethod
    def names_a_family(cls, keys: Collection[str]) -> bool:
        """Whether these keys of a YAML say what is served; if none does, the YAML may be
        TorchServe's own, and the archive's manifest may say it, as with BaseHandler.
        """
        return not cls.families().keys().isdisjoint(keys)

    @property
    def family(self) -> FamilyConfig:
        """The one section that says what is served; without one, the archive's own pipeline."""
        return next(self._sections(), PipelineConfig())

    def section(self, kind: type[FamilyT]) -> FamilyT:
        """The family's section, for who serves that family."""
        family = self.family
        assert isinstance(family, kind), f"a {family.name} is no {kind.name}"
        return family

    def _sections(self) -> Iterator[FamilyConfig]:
        return filter(None, (getattr(self, key) for key in self.families()))

    def in_archive(self, manifest: Manifest) -> ModelConfig:
        """This config where `manifest`, the archive's, may say what is served."""
        if self.names_a_family(self.model_fields_set):
            return self
        meant = {key: kind() for key, kind in self.families().items() if kind.is_meant_by(manifest)}
        return self.model_copy(update=meant)

    def with_shapes(self, shapes: ShapesConfig) -> ModelConfig:
        """This config with `pt2.shapes` as a loaded model has resolved them."""
        return self.model_copy(update={"pt2": self.pt2.model_copy(update={"shapes": shapes})})

    @property
    def warnings(self) -> tuple[str, ...]:
        """What loads, and is hardly meant; each begins with its YAML path."""
        legacy = (
            "pt2: this form is deprecated by TorchServe; use pt2: {compile: {enable: true, ...}}"
        )
        said = (
            self.pt2.compile.warning,
            legacy if self.pt2.compile.legacy else None,
            self._odd_dtype(),
            self._short_retries(),
            *self._odd_batches(),
        )
        return tuple(filter(None, said))

    def _odd_dtype(self) -> str | None:
        compile_ = self.pt2.compile
        if not compile_.enable or compile_.kwargs.get("backend") != "openvino":
            return None
        if self.family.dtype != "float16":
            return None
        return (
            f"{self.family.name}.dtype: under openvino float16 often differs from eager by more "
            "than is let through, and is then served eagerly; use float32"
        )

    def _short_retries(self) -> str | None:
        if self.maxRetryTimeoutInSec or (self.startupTimeout or 0) < _RETRY_TIMEOUT:
            return None
        return (
            f"maxRetryTimeoutInSec: TorchServe's {_RETRY_TIMEOUT} must exceed startupTimeout "
            f"({self.startupTimeout}), or it gives up on a slow start after too few tries"
        )

    def _odd_batches(self) -> Iterator[str]:
        """Where `batch_sizes`, the rows of a run, and `batchSize`, the requests that come together,
        do not go together.
        """
        shapes, most = self.pt2.shapes, self.batchSize
        if shapes.batch_sizes == "dynamic" or self.family.num_slots is not None:
            return
        sizes = (max(shapes.batch_sizes),) if shapes.invariant else shapes.batch_sizes
        path = "pt2.shapes.batch_sizes"
        if max(sizes) < most:
            yield (
                f"{path}: a batch of {most} requests (batchSize) is split into runs of {max(sizes)}"
            )
        if min(sizes) > most:
            yield (
                f"{path}: every run is filled up to {min(sizes)} rows, and a batch has {most} "
                "requests at most (batchSize)"
            )
        elif max(sizes) > most:
            filled = f"{self.family.fills} fills"
            yield (
                f"{path}: {filled} runs of {max(sizes)}, since batches are of {most} requests at "
                "most (batchSize)"
            )

    @model_validator(mode="after")
    def _one_family(self) -> ModelConfig:
        names = [section.name for section in self._sections()]
        if len(names) > 1:
            raise ConfigError(f"stands beside {names[0]}; a YAML has one of the two", names[1])
        self.family.check(self.pt2)
        return self

    @model_validator(mode="after")
    def _serve_as_asked(self) -> ModelConfig:
        for key, instead in SERVING_MODES.items():
            if getattr(self, key) and key not in self.family.serving_modes:
                raise ConfigError(f"is not for a {self.family.name}: {instead}", key)
        slots, name = self.family.num_slots, self.family.name
        if slots is not None and not self.continuousBatching:
            raise ConfigError(
                f"must be true for {name}: its requests come and go while others run",
                "continuousBatching",
            )
        if slots is not None and self.batchSize != slots:
            raise ConfigError(
                f"must be {slots}, as many as {name}.slots, got {self.batchSize}", "batchSize"
            )
        return self

    @model_validator(mode="after")
    def _agree(self) -> ModelConfig:
        if (
            self.minWorkers is not None
            and self.maxWorkers is not None
            and self.minWorkers > self.maxWorkers
        ):
            raise ConfigError(
                f"{self.minWorkers} is over maxWorkers ({self.maxWorkers})", "minWorkers"
            )
        if (
            self.startupTimeout
            and self.maxRetryTimeoutInSec
            and self.maxRetryTimeoutInSec <= self.startupTimeout
        ):
            raise ConfigError(
                f"{self.maxRetryTimeoutInSec} must exceed startupTimeout ({self.startupTimeout}), "
                "or TorchServe gives up on a slow start after too few tries",
                "maxRetryTimeoutInSec",
            )
        return self

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, ours: bool = False) -> ModelConfig:
        """The config a parsed YAML means. `data` is left as it is (TorchServe's own reading deletes
        from it).

        Args:
            ours: read it as a YAML that names what it serves, even if it does not; see
                `pt2_forms.normalized`.

        Raises:
            ConfigError: an unknown key or a wrong value, with its YAML path.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"a model YAML is a mapping of keys to values, got {shown(data)}")
        if "pt2" in data:
            ours = ours or cls.names_a_family(data)
            data = {**data, "pt2": normalized(data["pt2"], keys_of(Pt2Config), ours=ours)}
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise explained(error, data, cls) from None

    @classmethod
    def load(cls, path: Path, *, ours: bool = False) -> ModelConfig:
        """The config in the YAML file at `path`; see `parse`.

        Raises:
            ConfigError: the file cannot be read, is no YAML, or holds an unknown key, one key
                twice, or a wrong value.
        """
        return cls.parse(read_yaml(path), ours=ours)
