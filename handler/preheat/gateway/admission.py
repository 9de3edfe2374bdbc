"""A host's places in asyncio: who waits for one in the queue, and what a request will cost."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import median

from preheat.errors import DeadlinePassed
from preheat.gateway.queue import Entry, Limits, Queue
from preheat.torchserve.overview import BucketView

UNKNOWN_SECONDS = 1.0
"""A request's work where nothing was measured: keys then share by requests."""
HELD_AT_MOST = 120.0
"""Seconds; TorchServe's own `responseTimeout`. A client names its steps, not how long others wait.
"""


class Admission:
    """The places of one model's host, in the running event loop."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.queue = Queue(limits, clock)
        self._clock = clock
        self._turns: dict[Entry, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def resize(self, limits: Limits) -> None:
        """Workers came or went."""
        self.queue.limits = limits
        self._serve()

    def run_seconds(self, seconds: float) -> float:
        """For which the host is busy at most with a request of so much work: the run that it is
        in, and the one before that.
        """
        return min(2 * seconds * self.queue.limits.batch_size, HELD_AT_MOST)

    @asynccontextmanager
    async def place(
        self,
        key: str,
        group: Hashable,
        seconds: float,
        patience: float = math.inf,
        held: float = 0.0,
    ) -> AsyncIterator[Entry]:
        """Wait for a place inside the host, which is given back on leaving, as is one in the queue
        by who is cancelled there.

        Args:
            patience: seconds after which nobody waits for the answer.
            held: seconds for which who is cancelled inside still fills its place, since the host
                goes on painting for it.

        Raises:
            QueueFull: too many wait already.
            DeadlinePassed: it cannot be answered in time, at once or after having waited.
        """
        entry = self.queue.offer(key, group, seconds, self._clock() + patience)
        turn = self._turns[entry] = asyncio.get_running_loop().create_future()
        kept = 0.0
        try:
            self._serve()
            await turn
            try:
                yield entry
            except (asyncio.CancelledError, GeneratorExit):
                kept = held
                raise
        finally:
            del self._turns[entry]
            if kept:
                asyncio.get_running_loop().call_later(kept, self._give_back, entry)
            else:
                self._give_back(entry)

    def _give_back(self, entry: Entry) -> None:
        self.queue.remove(entry)
        self._serve()

    def _serve(self) -> None:
        for entry in self.queue.take():
            turn = self._turns[entry]
            if not turn.done():  # else cancelled just now: it gives its place back itself
                turn.set_result(None)
        for entry in self.queue.expired():
            turn = self._turns[entry]
            if not turn.done():
                turn.set_exception(DeadlinePassed("its turn did not come before its deadline"))
        if self._timer is not None:
            self._timer.cancel()
        later = self.queue.next_event() - self._clock()
        self._timer = (
            asyncio.get_running_loop().call_later(max(0.0, later), self._serve)
            if math.isfinite(later)
            else None
        )


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of a denoising step (of a module's run), by the pictures of a run."""

    by_rows: Mapping[int, float]

    def seconds(self, rows: int) -> float:
        """Of a picture's share in runs that are as full as they get."""
        size, seconds = max(self.by_rows.items())
        return rows * seconds / size


class Costs:
    """What requests take, from what the workers say of themselves."""

    def __init__(self, steps: Mapping[str, Step] | None = None) -> None:
        self._steps = dict(steps or {})
        self._typical = (
            median(step.seconds(1) for step in self._steps.values())
            if self._steps
            else UNKNOWN_SECONDS
        )

    @classmethod
    def of(cls, rows: Iterable[BucketView]) -> Costs:
        """From what the workers say of their buckets; of several targets the slowest counts."""
        found: dict[str, dict[int, float]] = {}
        for row in rows:
            if row.seconds_per_step > 0:
                own = found.setdefault(row.bucket, {})
                own[row.batch_size] = max(own.get(row.batch_size, 0.0), row.seconds_per_step)
        return cls({bucket: Step(by_rows) for bucket, by_rows in found.items()})

    def seconds(self, bucket: str, steps: int = 1, rows: int = 1) -> float:
        """Of work; of a bucket that was not measured as of the median one."""
        step = self._steps.get(bucket)
        return max(1, steps) * (step.seconds(rows) if step else max(1, rows) * self._typical)
