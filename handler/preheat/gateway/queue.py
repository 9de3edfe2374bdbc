"""Who goes to the host next: a queue without I/O, whose clock is given.

The host (TorchServe, Ray) runs what it gets first come, first served, in batches; what it has once
it cannot give back. So it gets a run for each free worker, and one more for each that is busy, if
that is full: the rest waits here, where the order is free and a run may still fill. A run is
requests that can share one (`group`); the request at the head of the queue says which.

Keys (clients) share by start-time fair queuing (Goyal, Vin, Cheng 1996): a key's tag grows by the
seconds of work that it was given, and the least tag's oldest request is the head. Who rides along
in another's run pays too. A key's oldest request is overtaken by its own younger ones riding along
`OVERTAKEN` times `batch_size` at most; then they wait behind it, so it comes to its turn.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

from preheat.errors import DeadlinePassed, QueueFull

OVERTAKEN = 4
"""Full runs of younger requests of its own key that may pass a key's oldest."""
RUNS_A_WORKER = 2
"""One that runs, and one that is ready when it ends."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`batch_size` requests a run, as the host collects them; at most `num_workers` x `batch_size`
    x 2 requests are inside.
    """

    num_workers: int = 1
    batch_size: int = 1
    settle: float = 0.0
    """Seconds for which a free worker waits for its run to fill (`maxBatchDelay`)."""
    max_queued: int = 100
    max_queued_per_key: int = 100

    def __post_init__(self) -> None:
        for name in ("num_workers", "batch_size", "max_queued", "max_queued_per_key"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.settle < math.inf:
            raise ValueError(f"settle must be 0 s or more, got {self.settle}")


@dataclass(slots=True, eq=False)
class Entry:
    """A request, from when it is taken until it is answered."""

    key: str
    group: Hashable
    seconds: float
    latest: float
    """On the queue's clock: after it there is no time left to run it."""
    number: int
    overtaken: int = 0
    """Younger requests of its key that went while it was the key's oldest."""
    run: _Run | None = None


@dataclass(slots=True, eq=False)
class _Run:
    group: Hashable
    inside: set[Entry] = field(default_factory=set)
    num_sent: int = 0
    open_until: float = -math.inf
    """Until then its worker waits for it to fill."""


class _Line:
    """What one key has queued, oldest first."""

    def __init__(self, tag: float) -> None:
        self.tag = tag
        self.entries: OrderedDict[Entry, None] = OrderedDict()
        self.groups: dict[Hashable, OrderedDict[Entry, None]] = {}

    def append(self, entry: Entry) -> None:
        self.entries[entry] = None
        self.groups.setdefault(entry.group, OrderedDict())[entry] = None

    def remove(self, entry: Entry) -> None:
        del self.entries[entry]
        own = self.groups[entry.group]
        del own[entry]
        if not own:
            del self.groups[entry.group]

    @property
    def head(self) -> Entry:
        return next(iter(self.entries))

    def oldest(self, group: Hashable) -> Entry | None:
        own = self.groups.get(group)
        return next(iter(own)) if own else None


class Queue:
    """Everything a host is asked for. `clock` gives seconds and never goes back."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self.limits = limits
        """May be replaced at any time; what is inside stays there."""
        self._clock = clock
        self._lines: dict[str, _Line] = {}
        self._runs: list[_Run] = []
        self._late: list[Entry] = []
        self._virtual = 0.0  # the tag of the last head
        self._count = 0

    @property
    def num_queued(self) -> int:
        return sum(len(line.entries) for line in self._lines.values())

    @property
    def num_inside(self) -> int:
        return sum(len(run.inside) for run in self._runs)

    @property
    def seconds_queued(self) -> float:
        """Of work, whatever the number of workers."""
        return math.fsum(entry.seconds for entry in self._queued())

    def offer(self, key: str, group: Hashable, seconds: float, deadline: float = math.inf) -> Entry:
        """Take a request for `seconds` of work, which is to be answered by `deadline` on the
        queue's clock.

        Raises:
            QueueFull: there are too many, or too many of its key.
            DeadlinePassed: run at once it would come too late.
            ValueError: `seconds` is not positive.
        """
        if not 0 < seconds < math.inf:
            raise ValueError(f"a request takes some seconds of work, got {seconds}")
        if self._clock() >= deadline - seconds:
            raise DeadlinePassed(f"the answer takes {seconds:.3g} s, and its deadline is sooner")
        self._forget()
        line = self._lines.setdefault(key, _Line(self._virtual))
        if len(line.entries) >= self.limits.max_queued_per_key:
            raise QueueFull(f"{len(line.entries)} requests of this key wait", self._wait(line))
        if self.num_queued >= self.limits.max_queued:
            raise QueueFull(f"{self.num_queued} requests wait", self._wait())
        self._count += 1
        entry = Entry(key, group, seconds, deadline - seconds, self._count)
        line.append(entry)
        return entry

    def take(self) -> list[Entry]:
        """Those that go to the host now, in this order; each is inside until it is removed."""
        now, taken = self._clock(), list[Entry]()
        self._sweep(now)
        while self.num_queued:
            more = self._fill(self._runs[-1]) if self._is_open(now) else self._begin(now)
            if not more:  # the host would put what is not alike into a batch that is open
                break
            taken += more
        return taken

    def expired(self) -> list[Entry]:
        """Those whose time is over; they are gone from the queue, and each is told once."""
        self._sweep(self._clock())
        late, self._late = self._late, []
        return late

    def remove(self, entry: Entry) -> None:
        """It is answered, or nobody waits for it any more; one that is gone stays so."""
        if (run := entry.run) is not None:
            entry.run = None
            run.inside.remove(entry)
            run.open_until = -math.inf
            if not run.inside:
                self._runs.remove(run)
        elif (line := self._lines.get(entry.key)) and entry in line.entries:
            line.remove(entry)
        elif entry in self._late:
            self._late.remove(entry)

    def next_event(self) -> float:
        """When, on the queue's clock, `expired` or `take` has something to say though nothing else
        happens; infinity: never.
        """
        first = min((entry.latest for entry in self._queued()), default=math.inf)
        if self.num_queued and self._is_open(self._clock()):
            return min(first, self._runs[-1].open_until)
        return first

    def _queued(self) -> Iterator[Entry]:
        return (entry for line in self._lines.values() for entry in line.entries)

    def _begin(self, now: float) -> list[Entry]:
        """A run of what may go with the head of the queue, if the host takes one."""
        lead = min((line for line in self._lines.values() if line.entries), key=_turn)
        group, size = lead.head.group, self.limits.batch_size
        run = _Run(group)
        if len(self._runs) < self.limits.num_workers:
            run.open_until = now + self.limits.settle
        elif len(self._runs) >= RUNS_A_WORKER * self.limits.num_workers:
            return []
        elif sum(len(line.groups.get(group, ())) for line in self._lines.values()) < size:
            return []  # no worker is free, and it may fill meanwhile
        self._virtual = max(self._virtual, lead.tag)
        self._runs.append(run)
        return [self._send(lead, lead.head, run), *self._fill(run)]

    def _is_open(self, now: float) -> bool:
        """Whether the host adds what it gets now to the run that it got last."""
        return bool(self._runs) and (
            self._runs[-1].num_sent < self.limits.batch_size and self._runs[-1].open_until > now
        )

    def _fill(self, run: _Run) -> list[Entry]:
        """What joins a run: of the keys that have such, the least tag's oldest."""
        joined: list[Entry] = []
        while run.num_sent < self.limits.batch_size:
            riders = [
                (line.tag, entry.number, line, entry)
                for line in self._lines.values()
                if (entry := line.oldest(run.group)) and self._may_pass(entry, line.head)
            ]
            if not riders:
                break
            *_, line, entry = min(riders, key=lambda rider: rider[:2])
            joined.append(self._send(line, entry, run))
        return joined

    def _may_pass(self, entry: Entry, head: Entry) -> bool:
        return entry is head or head.overtaken < OVERTAKEN * self.limits.batch_size

    def _send(self, line: _Line, entry: Entry, run: _Run) -> Entry:
        if entry is not line.head:
            line.head.overtaken += 1
        line.remove(entry)
        line.tag += entry.seconds
        entry.run = run
        run.inside.add(entry)
        run.num_sent += 1
        return entry

    def _sweep(self, now: float) -> None:
        late = [entry for entry in self._queued() if entry.latest <= now]
        for entry in late:
            self.remove(entry)
        self._late += late

    def _wait(self, line: _Line | None = None) -> float:
        """Seconds until the work before a new request is done; of a key, its own share of it."""
        inside = math.fsum(entry.seconds for run in self._runs for entry in run.inside)
        work = self.seconds_queued
        if line is not None:
            num_keys = sum(bool(each.entries) for each in self._lines.values())
            work = min(work, num_keys * math.fsum(entry.seconds for entry in line.entries))
        return (inside + work) / self.limits.num_workers

    def _forget(self) -> None:
        """A key is remembered while it has had more than its share, and saves up none."""
        if not self._runs and not self.num_queued:
            self._lines.clear()  # nobody waits: all start anew
        for key in [k for k, l in self._lines.items() if not l.entries and l.tag <= self._virtual]:
            del self._lines[key]


def _turn(line: _Line) -> tuple[float, int]:
    return line.tag, line.head.number
