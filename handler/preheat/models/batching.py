"""Runs batches of strangers: groups what can share a run, splits rows into warmed batch sizes,
keeps failures to themselves.

Knows neither pipelines nor modules: a family derives its engine from `Batcher` and says what a row
is and how a chunk of rows is run.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

import torch

from preheat.buckets import split_rows
from preheat.compilation.attention import attention_backend
from preheat.compilation.backends.base import EngineName, slowest
from preheat.compilation.pace import MARGIN, Budget, Load
from preheat.compilation.router import Router
from preheat.config.pt2 import ShapesConfig
from preheat.device import is_device_lost, is_out_of_memory, release_memory
from preheat.errors import DeadlinePassed, OutOfMemory, PipelineFailure, PutOff, RunError, is_panic
from preheat.models.memory import Unfit

logger = logging.getLogger(__name__)

Exactness = Literal["bitwise", "rounding", "padded"]
"""How equal an answer is to the same request's alone: to the last bit, within rounding, or a little
changed by its padding.
"""


class Queued(Protocol):
    """What is asked of a job here."""

    @property
    def deadline(self) -> float | None:
        """Unix time in seconds after which nobody waits for the answer."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """How one request fared; a family's answer derives from it."""

    engine: EngineName = "eager"
    exact: Exactness = "rounding"
    incident: bool = False
    """Met a shape or guard that warm-up had not foreseen."""
    fell_back: bool = False
    """Ran eagerly because warm-up had found no engine."""
    error: RunError | None = None
    sure: bool = False
    """It was promised a turn, or some of its rows are done: its next run begins if its own seconds
    are left, without the third on top.
    """

    @property
    def is_fallback(self) -> bool:
        """Whether it ran eagerly although compiled code was wanted."""
        return self.incident or self.fell_back

    @property
    def is_planned_eager(self) -> bool:
        """Whether it ran eagerly on purpose (`oversize: eager`)."""
        return False

    @property
    def bucket(self) -> str:
        """Where it ran."""
        return "none"

    @property
    def num_painted(self) -> int:
        """Pixels (elements, of a module's inputs) that the model computed for it."""
        return 0

    @property
    def num_cropped(self) -> int:
        """Of those, how many were padding."""
        return 0

    @property
    def num_flagged(self) -> int:
        """Pictures that a safety checker has blackened."""
        return 0

    def restart(self) -> None:
        """Forget what a failed run has left; a family with more to forget adds it."""
        self.engine, self.incident, self.fell_back, self.sure = "eager", False, False, False

    def raise_if_failed(self) -> None:
        if self.error is not None:
            raise self.error

    def note(self, run: RunReport, *, first: bool) -> None:
        """Add a run that this request had rows in; one whose rows took several is as slow as the
        slowest of them.
        """
        self.engine = run.engine if first else slowest({run.engine, self.engine})
        self.incident |= run.incident
        if run.incident and self.exact == "bitwise":
            self.exact = "rounding"  # it ran on another engine than the same request does otherwise
        self.fell_back |= run.fell_back


@dataclass(frozen=True, slots=True)
class RunReport:
    """One call of the model: how many rows it had and how many of them are real, and how it ran."""

    num_rows: int
    num_real_rows: int
    engine: EngineName
    seconds: float
    incident: bool
    fell_back: bool


AnswerT = TypeVar("AnswerT", bound=Outcome)
RowT = TypeVar("RowT")
T = TypeVar("T")


class Batcher(ABC, Generic[AnswerT, RowT]):
    """What the engines of all families do alike.

    Args:
        routers: what stands in for the targets, by target name.
        shapes: batch sizes, and whether one alone is used.
        max_rows: most rows of one run where `batch_sizes: dynamic` names none.
        device: where it runs.
        attention: `pt2.attention`, the same in warm-up and serving because both come through here.
        report: told of every run.
        budget: what a call has time for; None: for everything.
    """

    def __init__(
        self,
        routers: Mapping[str, Router],
        shapes: ShapesConfig,
        *,
        max_rows: int,
        device: torch.device,
        attention: str = "default",
        report: Callable[[RunReport], None] = lambda _: None,
        budget: Budget | None = None,
    ) -> None:
        self._budget = budget or Budget()
        self._routers, self._report, self._device, self._attention = (
            routers,
            report,
            device,
            attention,
        )
        # The sizes a run is filled up to; any number of rows up to the largest where one graph
        # serves them all.
        self._batch_sizes: Sequence[int] = (
            range(1, max_rows + 1) if shapes.batch_sizes == "dynamic" else shapes.batch_sizes
        )
        if shapes.invariant:
            self._batch_sizes = (max(self._batch_sizes),)
        self.unfit = Unfit(self._budget.now)

    @abstractmethod
    def _job(self, answer: AnswerT) -> Queued:
        """The job that this answers."""

    @abstractmethod
    def _grouped(self, answers: Sequence[AnswerT]) -> Iterable[list[AnswerT]]:
        """The answers whose rows may share a run."""

    @abstractmethod
    def _rows(self, answer: AnswerT) -> Sequence[RowT]: ...

    @abstractmethod
    def _kind(self, answer: AnswerT) -> str:
        """What decides, beside the number of rows, how much memory this answer's runs take."""

    @abstractmethod
    def _load(self, answers: Sequence[AnswerT], size: int) -> Load:
        """What the time of a run of `size` rows that are these answers' depends on."""

    @abstractmethod
    def _identity(self, answer: AnswerT) -> int:
        """The same for a request that is sent again."""

    @abstractmethod
    def _run_chunk(self, chunk: Sequence[tuple[AnswerT, RowT]], size: int) -> None:
        """Run these rows, filled up to `size`, and give each answer what is its own."""

    def answer(self, answers: Sequence[AnswerT], *, retry: bool = True) -> None:
        """Fill the answers. A run that fails for one request's sake is no reason to fail its
        company: each is run again, alone.

        Without `retry`, as warm-up wants it, the whole group has failed.
        """
        self._budget.begin()
        try:
            for group in self._admitted(answers):
                self._answer_group(group, retry)
        finally:
            self._promise_turns(answers)
            self._budget.end()

    def _promise_turns(self, answers: Sequence[AnswerT]) -> None:
        """At the call's end, from when on clients count their seconds."""
        for answer in answers:
            if isinstance(answer.error, PutOff):
                identity, alone = self._identity(answer), self.seconds([answer])
                answer.error.retry_after = self._budget.promise_turn(identity, alone)

    def seconds(self, answers: Sequence[AnswerT], *, generous: bool = False) -> float:
        """What their runs take together, as far as it is known."""
        return sum(
            self._budget.pace.seconds(
                self._load([answer for answer, _ in chunk], size), generous=generous
            )
            for group in self._grouped(answers)
            for chunk, size in self._chunks(self._paired(group), self._sizes(group[0]))
        )

    def _admitted(self, answers: Sequence[AnswerT]) -> list[list[AnswerT]]:
        """The groups of those whose runs end in time, in their order; the first one's always do.

        First who was promised a turn, each by itself, so that it takes what was kept for it; then
        the others as they stand in the batch.
        """
        if self._budget.promising:
            for answer in answers:
                answer.sure = self._budget.take_turn(self._identity(answer))
        promised = [[answer] for answer in answers if answer.sure]
        ahead = sum(map(self.seconds, promised))
        admitted: list[AnswerT] = []
        for answer in (each for each in answers if not each.sure):
            seconds = ahead + self.seconds([*admitted, answer])
            if (promised or admitted) and not self._budget.fits(seconds):
                answer.error = PutOff()
            else:
                admitted.append(answer)
        return [*promised, *self._grouped(admitted)]

    def _due(
        self, chunk: Sequence[tuple[AnswerT, RowT]], size: int
    ) -> Sequence[tuple[AnswerT, RowT]]:
        """The rows that are still worth a run, looked at before each: somebody waits for them, and
        they end in time.
        """
        self._drop_late(answer for answer, _ in chunk)
        chunk = [(answer, row) for answer, row in chunk if answer.error is None]
        load = self._load([answer for answer, _ in chunk], size) if chunk else None
        seconds = self._budget.pace.seconds(load) if load else 0.0
        margin = MARGIN if any(answer.sure for answer, _ in chunk) else 1.0
        if self._budget.running and not self._budget.fits(seconds / margin):
            for answer, _ in chunk:
                if answer.error is None:
                    answer.error = PutOff()
            return []
        self._budget.running = True
        return chunk

    def _answer_group(self, group: list[AnswerT], retry: bool) -> None:
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

    def _drop_late(self, answers: Iterable[AnswerT]) -> None:
        for answer in answers:
            deadline = self._job(answer).deadline
            if answer.error is None and deadline is not None and time.time() > deadline:
                answer.error = DeadlinePassed(
                    "the deadline had passed before the request's turn came"
                )

    def _run_group(self, group: Sequence[AnswerT], retry: bool) -> None:
        self._drop_late(group)
        rows = self._paired([answer for answer in group if answer.error is None])
        if rows:
            self._run_rows(rows, self._sizes(rows[0][0]), retry)

    def _paired(self, answers: Sequence[AnswerT]) -> list[tuple[AnswerT, RowT]]:
        return [(answer, row) for answer in answers for row in self._rows(answer)]

    def _sizes(self, answer: AnswerT) -> Sequence[int]:
        """The sizes that runs of rows like this answer's are filled up to."""
        return self._batch_sizes

    def _chunks(
        self, rows: Sequence[tuple[AnswerT, RowT]], batch_sizes: Sequence[int]
    ) -> Iterator[tuple[Sequence[tuple[AnswerT, RowT]], int]]:
        """The rows of each run, and what it is filled up to."""
        start = 0
        for size in split_rows(self.unfit.fitting(self._kind(rows[0][0]), batch_sizes), len(rows)):
            yield rows[start : start + size], size
            start += size

    def _run_rows(
        self, rows: Sequence[tuple[AnswerT, RowT]], batch_sizes: Sequence[int], retry: bool
    ) -> None:
        """Run rows in these batch sizes; a run that does not fit into memory is retried in smaller
        ones, and so is its like for a while; without `retry` for ever.
        """
        kind, seen = self._kind(rows[0][0]), 0
        for planned, size in self._chunks(rows, batch_sizes):
            seen += len(planned)
            chunk = self._due(planned, size)
            if not chunk:
                continue
            load = self._load([answer for answer, _ in chunk], size)
            began = self._budget.now()
            try:
                self._run_chunk(chunk, size)
                self._budget.pace.saw(load, self._budget.now() - began)
                self.unfit.fitted(kind, size)
                for answer, _ in chunk:
                    answer.sure = True
                continue
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                logger.warning("a run of %d rows ran out of memory", size)
            release_memory(self._device)
            smaller = [other for other in batch_sizes if other < size]
            if smaller:
                self.unfit.failed(kind, size, lasting=not retry)
                self._run_rows([*chunk, *rows[seen:]], smaller, retry)
                return
            for answer, _ in chunk:
                answer.error = OutOfMemory(self._too_large(answer))

    @abstractmethod
    def _too_large(self, answer: AnswerT) -> str:
        """What to tell a client whose request does not fit into memory alone."""

    def _called(
        self, call: Callable[[], T], *, num_rows: int, num_real_rows: int, planned_eager: bool
    ) -> tuple[T, RunReport]:
        """What `call`, one run of the model, gives under the served global state, and how it ran;
        the report is told.
        """
        smallest = num_rows <= min(self._batch_sizes)
        for router in self._routers.values():
            router.start_run(bypass=planned_eager, smallest=smallest)
        started = time.perf_counter()
        # One grad mode for warm-up and serving: a graph warmed under another one would be compiled
        # again.
        with torch.inference_mode(), attention_backend(self._attention):
            result = call()
        runs = [router.run for router in self._routers.values()]
        run = RunReport(
            num_rows=num_rows,
            num_real_rows=num_real_rows,
            engine=slowest({engine for run in runs for engine in run.engines}),
            seconds=time.perf_counter() - started,
            incident=any(run.incidents for run in runs),
            fell_back=any(run.fallen for run in runs),
        )
        self._report(run)
        return result, run
