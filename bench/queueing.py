"""What the gateway's queue could reach in front of a host that costs nothing: the queue's own class
with a simulated clock.

The host is TorchServe's manner of batching alone: a free worker takes what came first, waits a
little for more, runs what can share a run together, and answers when all of it is done.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from preheat.gateway.queue import Entry, Limits, Queue

Seconds = Callable[[Hashable, int], float]
"""Of a run, by its bucket and its number of requests."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """How a policy fared. `wait` is seconds from a request to its answer, of the median and the
    slowest in a hundred.
    """

    seconds: float
    per_second: float
    p50_wait: float
    p99_wait: float


def sorted_beforehand(asked: Sequence[Hashable], batch_size: int, seconds: Seconds) -> float:
    """Requests a second of a loop that has them all before it begins, and runs each bucket's in
    full batches: no queue can do better.
    """
    total = 0.0
    for group, number in Counter(asked).items():
        full, rest = divmod(number, batch_size)
        total += full * seconds(group, batch_size) + (seconds(group, rest) if rest else 0.0)
    return len(asked) / total


def simulate(
    asked: Sequence[Hashable],
    *,
    num_clients: int,
    limits: Limits,
    seconds: Seconds,
    queued: bool = True,
) -> Simulated:
    """`num_clients` ask in turn for the buckets `asked`, each its next request when it has its
    answer. Without `queued` all goes to the host at once, in order.

    Raises:
        ValueError: there are no requests, or no clients.
    """
    if not asked or num_clients < 1:
        raise ValueError(f"{len(asked)} requests of {num_clients} clients")
    return _Simulation(asked, limits, seconds, queued).run(num_clients)


class _Simulation:
    def __init__(
        self, asked: Sequence[Hashable], limits: Limits, seconds: Seconds, queued: bool
    ) -> None:
        self._asked, self._limits, self._seconds = iter(asked), limits, seconds
        self._now = 0.0
        self._queue = Queue(limits, lambda: self._now) if queued else None
        self._waiting: deque[Entry] = deque()  # in the host
        self._num_free = limits.num_workers
        self._collects_until: float | None = None
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._asked_at: dict[Entry, float] = {}
        self._waits: list[float] = []

    def run(self, num_clients: int) -> Simulated:
        for _ in range(num_clients):
            self._ask()
        self._go_on()
        while self._events:
            self._now, _, happens = heapq.heappop(self._events)
            happens()
            self._go_on()
        waits = sorted(self._waits)
        return Simulated(
            self._now,
            len(waits) / self._now,
            waits[len(waits) // 2],
            waits[math.ceil(0.99 * len(waits)) - 1],
        )

    def _at(self, when: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), happens))

    def _ask(self) -> None:
        group = next(self._asked, None)
        if group is None:
            return
        if self._queue is None:
            entry = Entry("client", group, 1.0, math.inf, next(self._order))
            self._waiting.append(entry)
        else:
            work = self._seconds(group, self._limits.batch_size) / self._limits.batch_size
            entry = self._queue.offer("client", group, work)
        self._asked_at[entry] = self._now

    def _go_on(self) -> None:
        """Whatever can happen now does."""
        if self._queue is not None:
            self._waiting += self._queue.take()
            if self._now < (later := self._queue.next_event()) < math.inf:
                self._at(later, lambda: None)
        while self._waiting and self._num_free:
            if self._collects_until is None:
                self._collects_until = self._now + self._limits.settle
                self._at(self._collects_until, lambda: None)
            if len(self._waiting) < self._limits.batch_size and self._now < self._collects_until:
                return
            self._collects_until = None
            self._start()

    def _start(self) -> None:
        size = min(len(self._waiting), self._limits.batch_size)
        batch = [self._waiting.popleft() for _ in range(size)]
        runs = Counter(entry.group for entry in batch)
        self._num_free -= 1
        took = math.fsum(self._seconds(group, number) for group, number in runs.items())
        self._at(self._now + took, lambda: self._answer(batch))

    def _answer(self, batch: Sequence[Entry]) -> None:
        self._num_free += 1
        for entry in batch:
            self._waits.append(self._now - self._asked_at.pop(entry))
            if self._queue is not None:
                self._queue.remove(entry)
            self._ask()
