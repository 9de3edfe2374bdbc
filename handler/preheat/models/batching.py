"""Runs batches of unrelated requests: groups what can share a run, splits rows into warmed batch
sizes, keeps failures to themselves.

Knows neither pipelines nor modules: a `BatchRunner` has a family's `ModelRunner`, which says what
may share a run and how a chunk of rows is run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import torch

from preheat.buckets import Bucket, split_rows
from preheat.compilation.attention import attention_backend
from preheat.compilation.backends.base import EngineName, slowest
from preheat.compilation.pace import MARGIN, Budget, Load
from preheat.compilation.router import Router
from preheat.config.pt2 import Attention
from preheat.device import is_device_lost, is_out_of_memory, release_memory
from preheat.errors import (
    DeadlinePassed,
    OutOfMemory,
    PipelineFailure,
    PutOff,
    RequestError,
    RunError,
    is_panic,
)
from preheat.models.memory import Unfit

if TYPE_CHECKING:
    from preheat.models.base import ModelRunner

logger = logging.getLogger(__name__)

Exactness = Literal["bitwise", "rounding", "padded"]
"""How equal an answer is to the same request's alone: to the last bit, within rounding, or a little
changed by its padding.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseJob:
    """A request that can be run; a family's own derives from it. What is not overridden suits one
    row of one size, which may share its runs with every other.
    """

    deadline: float | None = None
    """Unix time in seconds after which nobody waits for the answer."""
    bypass: bool = False
    """Runs eagerly on purpose: outside every bucket (`oversize: eager`), or because that is
    quicker.
    """

    @property
    def num_rows(self) -> int:
        return 1

    @property
    def asked(self) -> Bucket | None:
        """The size that it asks for; None where there is none to plan buckets by."""
        return None

    @property
    def group_key(self) -> Hashable:
        """Equal for jobs whose rows may share a run."""
        return self.bypass

    @property
    def kind(self) -> str:
        """What decides, beside the number of rows, how much memory its runs take."""
        return "fixed"

    @property
    def identity(self) -> int:
        """The same for a request that is sent again."""
        return hash(repr(replace(self, deadline=None)))

    def load(self, size: int) -> Load:
        """What the time of a run of `size` rows like its own depends on."""
        return Load(1, size, size, 1)

    def batch_sizes(self, served: Sequence[int]) -> Sequence[int]:
        """Of the batch sizes that are served those that its runs may have."""
        return served


@dataclass(slots=True)
class Outcome:
    """How one request fared; a family's answer derives from it."""

    job: BaseJob
    _: KW_ONLY
    engine: EngineName = "eager"
    exact: Exactness = "rounding"
    unwarmed: bool = False
    """Met a shape or guard that warm-up had not foreseen."""
    fallback: bool = False
    """Ran eagerly because warm-up had found no engine."""
    error: RunError | RequestError | None = None
    """Why there is no good answer; a RequestError where another form of it would do."""
    begun: bool = False
    """Some of its rows are done."""
    promised: bool = False
    """It was put off before, and a turn was kept for it."""
    late: bool = False
    """It was put off before, and came after its turn."""

    @property
    def done(self) -> bool:
        """Whether it needs no further step; see `models.base.StepRunner`."""
        return True

    @property
    def is_fallback(self) -> bool:
        """Whether it ran eagerly although compiled code was wanted."""
        return self.unwarmed or self.fallback

    @property
    def bucket(self) -> str:
        """Where it ran."""
        return self.job.kind

    @property
    def num_computed(self) -> int:
        """Pixels (elements, of a module's inputs) that the model computed for it."""
        return 0

    @property
    def num_padding(self) -> int:
        """Of those, how many were padding."""
        return 0

    @property
    def num_flagged(self) -> int:
        """Pictures that a safety checker has blackened."""
        return 0

    def restart(self) -> None:
        """Forget what a failed run has left; a family with more to forget adds it."""
        self.engine, self.unwarmed, self.fallback, self.begun = "eager", False, False, False

    def raise_if_failed(self) -> None:
        if self.error is not None:
            raise self.error

    def note(self, run: RunReport) -> None:
        """Add a run that this request had rows in; one whose rows took several is as slow as the
        slowest of them.
        """
        self.engine = slowest({run.engine, self.engine}) if self.begun else run.engine
        self.begun = True
        self.unwarmed |= run.unwarmed
        if run.unwarmed and self.exact == "bitwise":
            self.exact = "rounding"  # it ran on another engine than the same request does otherwise
        self.fallback |= run.fallback


@dataclass(frozen=True, slots=True)
class RunReport:
    """One call of the model: how many rows it had and how many of them are real, and how it ran."""

    num_rows: int
    num_real_rows: int
    engine: EngineName
    seconds: float
    unwarmed: bool
    fallback: bool


JobT = TypeVar("JobT", bound=BaseJob)
ResultT = TypeVar("ResultT", bound=Outcome)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Execution:
    """How a loaded model is run: the same in warm-up and serving."""

    batch_sizes: Sequence[int]
    """The sizes a run is filled up to."""
    device: torch.device
    routers: Mapping[str, Router] = field(default_factory=dict)
    """What stands in for the targets, by target name."""
    attention: Attention = "default"
    report: Callable[[RunReport], None] = lambda _: None
    """Called with every run's."""
    budget: Budget = field(default_factory=Budget)
    """What a call has time for."""

    def run(
        self, call: Callable[[], T], *, num_rows: int, num_real_rows: int, bypass: bool = False
    ) -> tuple[T, RunReport]:
        """What `call`, one run of the model, gives under the served global state, and how it
        ran.
        """
        smallest = num_rows <= min(self.batch_sizes)
        for router in self.routers.values():
            router.start_run(bypass=bypass, smallest=smallest)
        started = time.perf_counter()
        # One grad mode for warm-up and serving: a graph warmed under another one would be compiled
        # again.
        with torch.inference_mode(), attention_backend(self.attention):
            result = call()
        runs = [router.run for router in self.routers.values()]
        run = RunReport(
            num_rows=num_rows,
            num_real_rows=num_real_rows,
            engine=slowest({engine for run in runs for engine in run.engines}),
            seconds=time.perf_counter() - started,
            unwarmed=any(run.unwarmed for run in runs),
            fallback=any(run.fallbacks for run in runs),
        )
        self.report(run)
        return result, run


Chunk = Sequence[tuple[ResultT, int]]
"""Rows of one run: each is its answer's, and counted in it from 0."""


class BatchRunner(Generic[JobT, ResultT]):
    """Runs a family's jobs."""

    def __init__(self, execution: Execution, family: ModelRunner[JobT, ResultT]) -> None:
        self._execution, self._budget, self._family = execution, execution.budget, family
        self.unfit = Unfit(self._budget.now)

    def run(self, jobs: Iterable[JobT], *, retry: bool = True) -> list[ResultT]:
        """Results in the order of the jobs. A run that fails for one request's sake is no reason to
        fail the others: each is run again, alone.

        Without `retry`, as warm-up wants it, the whole group has failed.
        """
        answers = [self._family.result(job) for job in jobs]
        self._budget.begin()
        try:
            for group in self._admitted(answers):
                self._answer_group(group, retry)
        finally:
            self._promise_turns(answers)
            self._budget.end()
        return answers

    def timed(self, jobs: Sequence[JobT]) -> tuple[list[ResultT], float]:
        """As warm-up runs them: a failure raises. The results, and how many seconds they took."""
        began = time.perf_counter()
        answers = self.run(jobs, retry=False)
        seconds = time.perf_counter() - began
        for answer in answers:
            answer.raise_if_failed()
        return answers, seconds

    def seconds(self, jobs: Iterable[JobT], *, generous: bool = False) -> float:
        """What their runs take together, as far as it is known."""
        return self._seconds([self._family.result(job) for job in jobs], generous=generous)

    def _seconds(self, answers: Sequence[ResultT], *, generous: bool = False) -> float:
        loads = (
            group[0].job.load(size)
            for group in self._family.groups(answers)
            for size in split_rows(
                self.fitting(group[0].job), sum(answer.job.num_rows for answer in group)
            )
        )
        return sum(self._budget.pace_of(load).seconds(load, generous=generous) for load in loads)

    def _admitted(self, answers: Sequence[ResultT]) -> list[Sequence[ResultT]]:
        """The groups of those whose runs end in time, in their order; the first one's always do.

        First who was promised a turn, each by itself, so that it takes what was kept for it; then
        who comes after its turn; then the others as they stand in the batch.
        """
        if self._budget.promising:
            for answer in answers:
                identity = answer.job.identity
                answer.promised = self._budget.take_turn(identity)
                answer.late = not answer.promised and self._budget.take_precedence(identity)
        promised = [[answer] for answer in answers if answer.promised]
        ahead = sum(map(self._seconds, promised))
        admitted: list[ResultT] = []
        others = [answer for answer in answers if not answer.promised]
        for answer in sorted(others, key=lambda answer: not answer.late):
            seconds = ahead + self._seconds([*admitted, answer])
            if (promised or admitted) and not self._budget.fits(seconds):
                answer.error = PutOff()
            else:
                admitted.append(answer)
        return [*promised, *self._family.groups(admitted)]

    def _promise_turns(self, answers: Sequence[ResultT]) -> None:
        """At the call's end, from when on clients count their seconds."""
        for answer in answers:
            if isinstance(answer.error, PutOff):
                identity, alone = answer.job.identity, self._seconds([answer])
                answer.error.retry_after = self._budget.promise_turn(
                    identity, alone, late=answer.late
                )

    def _due(self, chunk: Chunk[ResultT], size: int) -> Chunk[ResultT]:
        """The rows that are still worth a run, looked at before each: somebody waits for them, and
        they end in time.
        """
        self._drop_late(answer for answer, _ in chunk)
        chunk = [(answer, row) for answer, row in chunk if answer.error is None]
        load = chunk[0][0].job.load(size) if chunk else None
        seconds = self._budget.pace_of(load).seconds(load) if load else 0.0
        # Who has begun is not asked for the third on top: it was admitted, and would begin anew.
        # Nor is who was promised the time.
        sure = any(answer.begun or answer.promised for answer, _ in chunk)
        margin = MARGIN if sure else 1.0
        if self._budget.running and not self._budget.fits(seconds / margin):
            for answer, _ in chunk:
                if answer.error is None:
                    answer.error = PutOff()
            return []
        self._budget.running = True
        return chunk

    def _answer_group(self, group: Sequence[ResultT], retry: bool) -> None:
        try:
            self._run_group(group, retry)
        # the model's own failure: it belongs to this group, not to the batch
        except BaseException as error:
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            if is_device_lost(error):
                raise SystemExit("the device is lost; TorchServe starts a new worker") from error
            logger.exception("a run of %d request(s) failed", len(group))
            text = (
                f"the model failed on this request ({type(error).__name__}); the server's log says "
                "more"
            )
            for answer in group:
                if retry and len(group) > 1:
                    answer.restart()
                    self._answer_group([answer], retry)
                else:
                    answer.error = PipelineFailure(text)

    def _drop_late(self, answers: Iterable[ResultT]) -> None:
        for answer in answers:
            deadline = answer.job.deadline
            if answer.error is None and deadline is not None and time.time() > deadline:
                answer.error = DeadlinePassed(
                    "the deadline had passed before the request's turn came"
                )

    def _run_group(self, group: Sequence[ResultT], retry: bool) -> None:
        self._drop_late(group)
        rows = [
            (answer, row)
            for answer in group
            if answer.error is None
            for row in range(answer.job.num_rows)
        ]
        if rows:
            self._run_rows(rows, self.fitting(rows[0][0].job), retry)

    def _run_rows(self, rows: Chunk[ResultT], batch_sizes: Sequence[int], retry: bool) -> None:
        """Run rows in these batch sizes; a run that does not fit into memory is retried in smaller
        ones, and so is its like for a while; without `retry` for ever.
        """
        start, job = 0, rows[0][0].job
        for size in split_rows(batch_sizes, len(rows)):
            chunk = rows[start : start + size]
            start += size
            chunk = list(self._due(chunk, size))
            if not chunk:
                continue
            load, began = chunk[0][0].job.load(size), self._budget.now()
            try:
                run = self._family.run_chunk(chunk, size)
                self._budget.pace_of(load).saw(load, self._budget.now() - began)
                self.unfit.fitted(job.kind, size)
                for answer, _ in chunk:
                    answer.note(run)
                continue
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                logger.warning("a run of %d rows ran out of memory", size)
            release_memory(self._execution.device)
            if size > min(batch_sizes):
                self.unfit.failed(job.kind, size, lasting=not retry)
                smaller = [other for other in batch_sizes if other < size]
                self._run_rows([*chunk, *rows[start:]], smaller, retry)
                return
            for answer, _ in chunk:
                answer.error = OutOfMemory(f"{job.kind}: one row does not fit into memory")

    def fitting(self, job: BaseJob) -> Sequence[int]:
        """Those of the job's batch sizes that are worth a try."""
        return self.unfit.fitting(job.kind, job.batch_sizes(self._execution.batch_sizes))
