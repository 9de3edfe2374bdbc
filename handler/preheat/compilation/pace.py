"""How long runs take, measured in warm-up and followed slowly while serving, and what fits into one
call's `responseTimeout`.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MARGIN = 4 / 3
"""A run counts as measured and a third more."""
_FOLLOW = 0.05  # weight of one run in the moving estimate
_LEAST = 0.5  # of what was measured: an estimate never falls below it
PATIENCE = 2
"""Calls of full length that a turn is kept for: the one that runs when its owner comes back, and
one that others fill who came before.
"""
_FURTHEST = 10  # calls of full length from now: nobody waits longer
_MOST_TURNS = 100
_MOST_LATE = 1000


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one run: once (text encoders, VAE, encoding), and for each denoising step. A
    module's run is one step.
    """

    fixed: float
    per_step: float


@dataclass(frozen=True, slots=True, eq=False)  # those of equal requests are told apart
class Turn:
    """What is kept for a request that was put off, if a call that it comes with begins in between
    `start` and `end`.
    """

    who: int
    seconds: float
    """Of that call's: its own runs and a third more."""
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Load:
    """What a run's time depends on. `rows` are the denoiser's, twice the pictures under guidance;
    area in pixels or elements.
    """

    area: int
    rows: int
    pictures: int
    steps: int
    eager: bool = False
    """It runs eagerly on purpose."""


class Pace:
    """Seconds of a run by its load; between and beyond the measured areas and rows they grow in
    proportion.

    Args:
        overhead: smaller areas than the least that was measured take as long as that.
    """

    def __init__(self, *, overhead: bool = False) -> None:
        self._overhead = overhead
        self._per_step: dict[int, dict[int, float]] = {}  # area -> rows -> seconds
        self._fixed: dict[int, dict[int, float]] = {}  # area -> pictures -> seconds
        self._drift: dict[int, float] = {}  # area -> seconds as served / as measured

    def measured(self, load: Load, timing: Timing) -> None:
        """What warm-up saw; of loads that are alike the slowest counts."""
        for table, key, seconds in (
            (self._per_step, load.rows, timing.per_step),
            (self._fixed, load.pictures, timing.fixed),
        ):
            column = table.setdefault(load.area, {})
            column[key] = max(column.get(key, 0.0), seconds)

    def saw(self, load: Load, seconds: float) -> None:
        """A served run moves the estimate of its area, slowly: one that a neighbour held up is no
        rule.
        """
        expected = self._expected(load)
        if not expected:
            return
        area = self._area(load)
        before = self._drift.get(area, 1.0)
        self._drift[area] = max(_LEAST, before + _FOLLOW * (seconds / expected - before))

    def _area(self, load: Load) -> int:
        """Sizes that were not measured, which are clients' own, share one drift."""
        return load.area if load.area in self._per_step else 0

    @property
    def is_known(self) -> bool:
        return bool(self._per_step)

    def worst(self, rows: int) -> float:
        """Seconds of a step per pixel, where that is slowest, by the denoiser's rows."""
        return max(
            (self.per_step(area, rows) / area for area in self._per_step if area), default=0.0
        )

    def per_step(self, area: int, rows: int) -> float:
        """As estimated now; 0 where nothing was measured."""
        return at_load(self._per_step, area, rows) * self._drift.get(area, 1.0)

    def seconds(self, load: Load, *, generous: bool = False) -> float:
        """Of one run, 0 where nothing was measured. `generous`: at most a third more than
        warm-up saw, when little else ran.
        """
        drift = self._drift.get(self._area(load), 1.0)
        return self._expected(load) * (min(MARGIN, drift) if generous else drift)

    def _expected(self, load: Load) -> float:
        least = min(self._per_step, default=0) if self._overhead else 0
        area = max(load.area, least)
        fixed = at_load(self._fixed, area, load.pictures)
        return fixed + load.steps * at_load(self._per_step, area, load.rows)


def at_load(table: Mapping[int, Mapping[int, float]], area: int, number: int) -> float:
    """The value of a table by area, then by rows or pictures; see `interpolated`."""
    return interpolated({each: interpolated(own, number) for each, own in table.items()}, area)


def interpolated(points: Mapping[int, float], at: int) -> float:
    """The value at `at`: linear between two points, in proportion beyond the first and the last; 0
    without points.
    """
    if not points:
        return 0.0
    if at in points:
        return points[at]
    below = max((each for each in points if each < at), default=None)
    above = min((each for each in points if each > at), default=None)
    if below is None or above is None:
        nearest = next(each for each in (below, above) if each is not None)
        return points[nearest] * at / nearest
    return points[below] + (points[above] - points[below]) * (at - below) / (above - below)


class Budget:
    """The time of one call: its answers go back together, so all its runs have to end within
    `timeout` of its start.

    Who is put off is promised a turn: when a call begins with the same request after that, there is
    time for it, whoever it comes with. Turns that can meet in one call fit into it together, so
    they lie as far apart as that takes, and none is kept for ever, for its owner may wait
    elsewhere, or be gone: one that has expired gives nothing but precedence over who was promised
    none. Equal requests are one and the same here, and their turns anyone's of them: who comes
    before its turn, and is put off again, has no second one.

    Args:
        timeout: TorchServe's responseTimeout in seconds; None: any time is right.
        most: requests of one call.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        timeout: float | None = None,
        most: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pace, self.timeout = Pace(), timeout
        self._eager = Pace(overhead=True)
        self._most, self._clock = most, clock
        self._began: float | None = None
        self._turns: list[Turn] = []
        self._told: list[Turn] = []  # those that requests of this call were put off to
        self._late: deque[int] = deque(maxlen=_MOST_LATE)  # whose turns have expired
        self.running = False  # whether a run of this call has begun; the first one always may

    def pace_of(self, load: Load) -> Pace:
        """What knows its seconds: of eager code its own pace, where some was measured."""
        return self._eager if load.eager and self._eager.is_known else self.pace

    def measured(self, load: Load, timing: Timing) -> None:
        """What warm-up saw."""
        (self._eager if load.eager else self.pace).measured(load, timing)

    def begin(self) -> None:
        """A call starts here, unless it has started already."""
        if self._began is None:
            self._began, self.running = self._clock(), False
            self._late.extend(turn.who for turn in self._turns if turn.end <= self._began)
            self._turns = [turn for turn in self._turns if turn.end > self._began]
            self._told.clear()

    def end(self) -> None:
        self._began = None

    def now(self) -> float:
        return self._clock()

    def fits(self, seconds: float) -> bool:
        """Whether `seconds` more, and a third of them, end in time."""
        if self.timeout is None or self._began is None or seconds == 0:
            return True
        return self._clock() - self._began + seconds * MARGIN <= self.timeout

    @property
    def promising(self) -> bool:
        return bool(self._turns or self._late)

    def take_turn(self, who: int) -> bool:
        """Whether one was promised to this request and had come when the call began; it has it
        now.
        """
        began = self._began if self._began is not None else self._clock()
        turn = next((each for each in self._turns if each.who == who and each.start <= began), None)
        if turn is not None:
            self._turns.remove(turn)
        return turn is not None

    def take_precedence(self, who: int) -> bool:
        """Whether a turn of this request's has expired; what that gives it has now."""
        if who not in self._late:
            return False
        self._late.remove(who)
        return True

    def promise_turn(self, who: int, seconds: float, *, late: bool = False) -> int | None:
        """Keep a turn for a request whose runs take `seconds` by themselves; after how many
        seconds to come again for it, or None where those promised already leave none: then who
        was `late` keeps its precedence.
        """
        turn = self._to_come(who) or self._new_turn(who, seconds)
        if turn is not None:
            self._told.append(turn)
            return math.ceil(turn.start - self._clock())
        if late:
            self._late.append(who)
        return None

    def _to_come(self, who: int) -> Turn | None:
        """A turn of this request's that it has come too early for, and no other one of the call."""
        now = self._clock()
        return next(
            (
                turn
                for turn in self._turns
                if turn.who == who and turn.start > now and turn not in self._told
            ),
            None,
        )

    def _new_turn(self, who: int, seconds: float) -> Turn | None:
        if self.timeout is None or len(self._turns) == _MOST_TURNS:
            return None
        patience, cost = PATIENCE * self.timeout, min(seconds * MARGIN, self.timeout)
        soonest = self._clock() + 1
        for start in sorted({soonest, *(turn.end for turn in self._turns)}):
            if soonest <= start <= soonest + _FURTHEST * self.timeout and self._is_free(
                cost, start, start + patience
            ):
                self._turns.append(Turn(who, cost, start, start + patience))
                return self._turns[-1]
        return None

    def _is_free(self, cost: float, start: float, end: float) -> bool:
        """Whether `cost` seconds are left in a call of the dearest turns in between."""
        met = [turn.seconds for turn in self._turns if turn.start < end and start < turn.end]
        return cost + sum(sorted(met, reverse=True)[: self._most - 1]) <= (self.timeout or 0)
