"""What a worker needs of a family of models: one that is loaded, and one that runs behind its
routers. A family's jobs and results pass through the worker unread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from preheat.buckets import Bucket
from preheat.compilation.pace import Budget, Pace, Timing
from preheat.compilation.router import Router
from preheat.compilation.variants import Variant
from preheat.config.model import ModelConfig
from preheat.config.pt2 import ShapesConfig
from preheat.models.batching import Outcome, RunReport
from preheat.models.memory import Unfit
from preheat.protocol.call import Call
from preheat.protocol.responses import Response

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT", bound=Outcome)
Manifest = Mapping[str, Any]
"""TorchServe's MAR-INF/MANIFEST.json; of it `model.modelFile` and `model.serializedFile`."""


class LoadedModel(Protocol[JobT, ResultT]):
    """A model that is in memory as the YAML says."""

    @classmethod
    def load(
        cls, config: ModelConfig, model_dir: Path, manifest: Manifest, device: torch.device
    ) -> LoadedModel[JobT, ResultT]:
        """The model that `config`, or else the archive's `manifest`, names.

        Raises:
            ConfigError, ModuleError, PipelineError: it cannot be served as the YAML says.
        """

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shapes(self) -> ShapesConfig:
        """`pt2.shapes` as the model has resolved it."""

    @property
    def sizes(self) -> Collection[Bucket]:
        """Every bucket."""

    @property
    def fields(self) -> Collection[str]:
        """The names that a refusal may have in metrics: none of a client's own."""

    def targets(self) -> Mapping[str, nn.Module]:
        """The modules that `pt2.targets` names, or the family's default."""

    def settings(self) -> Mapping[str, Any]:
        """What of the family's own section decides what is compiled, as plain data."""

    def structure(self) -> Mapping[str, Any]:
        """What compiled code depends on: classes and configs, without the weights."""

    def runner(
        self, routers: Mapping[str, Router], report: Callable[[RunReport], None], budget: Budget
    ) -> ModelRunner[JobT, ResultT]:
        """What serves it, now that the routers stand in for their targets.

        Raises:
            ConfigError: a first eager run shows that the YAML is wrong about it.
        """


class ModelRunner(ABC, Generic[JobT, ResultT]):
    """Serves a loaded model, in warm-up as ever after. What is not abstract suits a family whose
    every variant has a static graph of its own.
    """

    unfit: Unfit

    @abstractmethod
    def variants(self, batch_sizes: Iterable[int]) -> Sequence[Variant]:
        """Every variant in these batch sizes, the largest first; none where nothing can be
        warmed.
        """

    def covering(self, variants: Sequence[Any]) -> Sequence[Variant]:
        """A few of `variants` that meet every shape: enough where nothing is compiled."""
        return variants

    def extremes(self, variants: Sequence[Any]) -> Sequence[Variant]:
        """The variants whose shapes show which dimensions one graph must cover; none where every
        graph is static.
        """
        return ()

    def between(self, variants: Sequence[Any]) -> Sequence[Variant]:
        """Variants beside these that must be served too, and so proven."""
        return ()

    @abstractmethod
    def run_variant(self, variant: Any) -> Timing:
        """Run one variant as requests would; how long it took."""

    def overload(self, pace: Pace, timeout: float) -> str | None:
        """Why legal requests, `batchSize` of them, may take longer than an answer has (seconds);
        None where they cannot.
        """
        return None

    def measure_padding(self) -> Mapping[str, Any]:
        """What padding changes in an answer, measured on the warm model; empty where that is not a
        question.
        """
        return {}

    @abstractmethod
    def preprocess(self, call: Call) -> JobT:
        """A request as a job.

        Raises:
            RequestError: anything about it that cannot be served.
        """

    @abstractmethod
    def inference(self, jobs: Sequence[JobT]) -> Sequence[ResultT]:
        """Results in the order of the jobs."""

    @abstractmethod
    def postprocess(self, results: Sequence[ResultT]) -> list[Response]: ...

    def close(self) -> None:
        """Let go of threads; nothing is served afterwards."""
