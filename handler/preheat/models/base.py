"""What a service needs of a family of models: pipelines (`pipeline_work`) or any other module
(`module_work`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from preheat.buckets import Bucket
from preheat.compilation.pace import Budget, Pace, Timing
from preheat.compilation.router import Router
from preheat.compilation.variants import Variant
from preheat.config.pt2 import ShapesConfig
from preheat.models.batching import RunReport
from preheat.protocol.responses import Response


class Work(Protocol):
    """A loaded model of one family. Its jobs and answers (`batching.Outcome`) pass through the
    service unread.
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

    def default_targets(self) -> tuple[str, ...]: ...

    def target(self, name: str) -> nn.Module:
        """The module that `pt2.targets` names."""

    def settings(self) -> Mapping[str, Any]:
        """What of the family's own section decides what is compiled, as plain data."""

    def structure(self) -> Mapping[str, Any]:
        """What compiled code depends on: classes and configs, without the weights."""

    def engage(
        self, routers: Mapping[str, Router], report: Callable[[RunReport], None], budget: Budget
    ) -> None:
        """Build the engine, now that the routers stand in for their targets; called once, before
        anything is served.
        """

    def variants(self, batch_sizes: Iterable[int]) -> Sequence[Variant]:
        """Every variant in these batch sizes, the largest first; none if nothing can be warmed."""

    def covering(self, variants: Sequence[Any]) -> Sequence[Variant]:
        """A few of `variants` that meet every shape: enough where nothing is compiled."""

    def extremes(self, variants: Sequence[Any]) -> Sequence[Variant]:
        """The variants whose shapes show which dimensions one graph must cover; none where every
        graph is static.
        """

    def between(self, variants: Sequence[Any]) -> Sequence[Variant]:
        """Variants beside these that must be served too, and so proven."""

    def serve_variant(self, variant: Any) -> Timing:
        """Run one variant as requests would; how long it took."""

    def overload(self, pace: Pace, timeout: float) -> str | None:
        """Why legal requests, `batchSize` of them, may take longer than an answer has (seconds);
        None where they cannot.
        """

    def measure_padding(self) -> Mapping[str, Any]:
        """What padding changes in an answer, measured on the warm model; empty where that is not a
        question.
        """

    def unfit(self) -> Mapping[str, int]:
        """By kind of run, the smallest batch size that has not fitted into memory."""

    def parse(
        self,
        row: Mapping[str, object],
        headers: Mapping[str, str],
        deadline: float | None,
        send: Callable[[Response], None] | None,
    ) -> Any:
        """A TorchServe input row as a job.

        Raises:
            RequestError: anything about it that cannot be served.
        """

    def run(self, jobs: Sequence[Any]) -> Sequence[Any]:
        """Answers in the order of the jobs."""

    def respond(self, answers: Sequence[Any]) -> list[Response]: ...
