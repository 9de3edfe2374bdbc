"""What a worker needs of a family of models: one that is loaded, and one that runs behind its
routers. A family's jobs and results pass through the worker unread.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import torch
from torch import nn

from preheat.buckets import Bucket
from preheat.compilation.backends.base import slowest
from preheat.compilation.pace import Pace, Timing
from preheat.compilation.variants import Variant
from preheat.config.family import Manifest
from preheat.config.model import ModelConfig
from preheat.models.batching import BatchRunner, Chunk, Execution, JobT, ResultT, RunReport
from preheat.protocol.call import Call
from preheat.protocol.responses import Response


@dataclass(frozen=True, slots=True)
class TimedPart:
    """Of a model, for who measures where the time goes: the calls that it is entered by, each an
    object and the name of its method.
    """

    calls: Sequence[tuple[object, str]]
    is_target: bool = False
    """Whether `pt2.targets` may name it."""


class LoadedModel(ABC, Generic[JobT, ResultT]):
    """A model that is in memory as the YAML says."""

    config: ModelConfig
    """The YAML's, `pt2.shapes` as the model has resolved them."""
    sizes: Sequence[Bucket] = ()
    """Every bucket."""
    fields: Collection[str] = ()
    """The names that a refusal may have in metrics: none of a client's own."""
    dtype = torch.float32

    @classmethod
    @abstractmethod
    def load(
        cls, config: ModelConfig, model_dir: Path, manifest: Manifest, device: torch.device
    ) -> LoadedModel[JobT, ResultT]:
        """The model that `config`, or else the archive's `manifest`, names.

        Raises:
            ConfigError, ModelError: it cannot be served as the YAML says.
        """

    @abstractmethod
    def targets(self) -> Mapping[str, nn.Module]:
        """The modules that `pt2.targets` names, or the family's default."""

    @abstractmethod
    def fingerprint_facts(self) -> Mapping[str, object]:
        """What compiled code depends on beside `pt2`: what the family's own section says of it,
        classes and configs, without the weights.
        """

    def parts(self) -> Mapping[str, TimedPart]:
        """Where the time of a request may go, by name; a target by its own."""
        return {
            name: TimedPart([(target, "forward")], is_target=True)
            for name, target in self.targets().items()
        }

    def num_dropped(self, text: str) -> int:
        """Tokens at the end of a prompt that nobody would read."""
        return 0

    @abstractmethod
    def runner(self, execution: Execution) -> ModelRunner[JobT, ResultT]:
        """What serves it, now that routers stand in for its targets.

        Raises:
            ConfigError: a first eager run shows that the YAML is wrong about it.
        """


class ModelRunner(ABC, Generic[JobT, ResultT]):
    """Serves a loaded model, in warm-up as ever after. What is not abstract suits a family whose
    every variant has a static graph of its own, and whose requests may share any run.
    """

    def __init__(self, execution: Execution, buckets: Sequence[Bucket]) -> None:
        self.execution, self.buckets = execution, buckets
        self.batches = BatchRunner(execution, self)

    def variants(self, batch_sizes: Iterable[int]) -> Sequence[Variant]:
        """Every variant in these batch sizes, the largest first; none where nothing can be
        warmed.
        """
        descending = sorted(batch_sizes, reverse=True)
        return [Variant(bucket, size) for bucket in self.buckets for size in descending]

    def covering(self, variants: Sequence[Variant]) -> Sequence[Variant]:
        """A few of `variants` that meet every shape: enough where nothing is compiled."""
        return variants

    def extremes(self, variants: Sequence[Variant]) -> Sequence[Variant]:
        """The variants whose shapes show which dimensions one graph must cover; none where every
        graph is static.
        """
        return ()

    def between(self, variants: Sequence[Variant]) -> Sequence[Variant]:
        """Variants beside these that must be served too, and so verified."""
        return ()

    @abstractmethod
    def run_variant(self, variant: Variant) -> Timing:
        """Run one variant as requests would; how long it took."""

    @abstractmethod
    def example(self, bucket: Bucket, steps: int | None = None) -> JobT:
        """A usual request of exactly this size, in so many steps where it has any (None: as many
        as requests have that do not say).
        """

    def num_steps(self, steps: int | None) -> int | None:
        """Those of such an example; None where runs have none."""
        return None

    def overload(self, pace: Pace, timeout: float) -> str | None:
        """Why legal requests, `batchSize` of them, may take longer than an answer has (seconds);
        None where they cannot.
        """
        return None

    def measure_alone(self, timings: Mapping[Variant, Timing]) -> Mapping[Variant, Timing]:
        """How long eager code takes that serves beside what was warmed on purpose, measured now;
        empty where there is none.

        Args:
            timings: of the variants that run compiled code.
        """
        return {}

    def measure_padding(self) -> Mapping[str, float | str]:
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
    def result(self, job: JobT) -> ResultT:
        """What the job's results are written to."""

    def groups(self, results: Sequence[ResultT]) -> Iterable[Sequence[ResultT]]:
        """The results whose rows may share a run."""
        groups: dict[Hashable, list[ResultT]] = {}
        for result in results:
            groups.setdefault(result.job.group_key, []).append(result)
        return groups.values()

    @abstractmethod
    def run_chunk(self, chunk: Chunk[ResultT], size: int) -> RunReport:
        """Run these rows, filled up to `size`, by `execution.run`, and give each result what is its
        own; how it ran.
        """

    def inference(self, jobs: Sequence[JobT]) -> Sequence[ResultT]:
        """Results in the order of the jobs."""
        return self.batches.run(jobs)

    @abstractmethod
    def postprocess(self, results: Sequence[ResultT]) -> list[Response]: ...

    def close(self) -> None:
        """Let go of threads; nothing is served afterwards."""


class StepRunner(ModelRunner[JobT, ResultT]):
    """Serves a loaded model whose requests come and go in the middle of each other's: a step takes
    each of those that have begun a little further. Hosts that bring requests in batches get a whole
    batch at once, as from any runner.
    """

    @abstractmethod
    def join(self, result: ResultT) -> None:
        """Begin it, in order of arrival, as soon as there is room."""

    @abstractmethod
    def leave(self, result: ResultT) -> None:
        """Nobody waits for it any more: its room is free at the next step."""

    @abstractmethod
    def step(self) -> None:
        """Take everyone who has begun one step further; who is through, or has failed, is `done`
        and has left.
        """

    def run_chunk(self, chunk: Chunk[ResultT], size: int) -> RunReport:
        answers, began = [answer for answer, _ in chunk], time.perf_counter()
        for answer in answers:
            self.join(answer)
        while not all(answer.done for answer in answers):
            self.step()
        return RunReport(
            num_rows=size,
            num_real_rows=len(answers),
            engine=slowest({answer.engine for answer in answers}),
            seconds=time.perf_counter() - began,
            unwarmed=any(answer.unwarmed for answer in answers),
            fallback=any(answer.fallback for answer in answers),
        )
