"""How long runs take, measured in warm-up and followed slowly while serving, and what fits into one
call's `responseTimeout`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MARGIN = 4 / 3
"""A run counts as measured and a third more."""
_FOLLOW = 0.05  # weight of one run in the moving estimate
_LEAST = 0.5  # of what was measured: an estimate never falls below it
_MOST_PROMISES = 1000
_PATIENCE = 10
"""Calls of full length that a promise outlasts."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one run: once (text encoders, VAE, encoding), and for each denoising step. A
    module's run is one step.
    """

    fixed: float
    per_step: float


@dataclass(frozen=True, slots=True)
class Load:
    """What a run's time depends on. `rows` are the denoiser's, twice the pictures under guidance;
    area in pixels or elements.
    """

    area: int
    rows: int
    pictures: int
    steps: int


class Pace:
    """Seconds of a run by its load; between and beyond the measured areas and rows they grow in
    proportion.
    """

    def __init__(self) -> None:
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

    def worst(self, rows: int) -> float:
        """Seconds of a step per pixel, where that is slowest, by the denoiser's rows."""
        return max(
            (self.per_step(area, rows) / area for area in self._per_step if area), default=0.0
        )

    def per_step(self, area: int, rows: int) -> float:
        """As estimated now; 0 where nothing was measured."""
        return self._at(self._per_step, area, rows) * self._drift.get(area, 1.0)

    def seconds(self, load: Load, *, generous: bool = False) -> float:
        """Of one run, 0 where nothing was measured. `generous`: at most a third more than
        warm-up saw, when little else ran.
        """
        drift = self._drift.get(self._area(load), 1.0)
        return self._expected(load) * (min(MARGIN, drift) if generous else drift)

    def _expected(self, load: Load) -> float:
        fixed = self._at(self._fixed, load.area, load.pictures)
        return fixed + load.steps * self._at(self._per_step, load.area, load.rows)

    @staticmethod
    def _at(table: Mapping[int, Mapping[int, float]], area: int, number: int) -> float:
        return interpolated(
            {each: interpolated(column, number) for each, column in table.items()}, area
        )


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

    Who is put off is promised a turn: when the same request comes again it goes before everybody
    who is new.

    Args:
        timeout: TorchServe's responseTimeout in seconds; None: any time is right.
        clock: seconds that never go back.
    """

    def __init__(
        self, timeout: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.pace, self.timeout = Pace(), timeout
        self._clock = clock
        self._began: float | None = None
        # who -> (seconds of its runs, until when it is remembered)
        self._promises: dict[int, tuple[float, float]] = {}
        self.running = False  # whether a run of this call has begun; the first one always may

    def begin(self) -> None:
        """A call starts here, unless it has started already."""
        if self._began is None:
            self._began, self.running = self._clock(), False
            now = self._began
            self._promises = {who: each for who, each in self._promises.items() if each[1] > now}

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
        return bool(self._promises)

    def turn(self, who: int) -> int:
        """Its place in the order of promises; all that have none come after them, in the order of
        the batch.
        """
        return next(
            (place for place, each in enumerate(self._promises) if each == who), len(self._promises)
        )

    def keep(self, who: int) -> None:
        self._promises.pop(who, None)

    def put_off(self, who: int, seconds: float) -> int:
        """Promise a turn; returns after how many seconds to come again.

        Promises are packed into calls to come, in their order: one call after the other, each as
        long as one may be.
        """
        timeout = self.timeout or 0.0
        if who in self._promises or len(self._promises) < _MOST_PROMISES:
            self._promises[who] = (seconds, self._clock() + _PATIENCE * timeout)
        calls, filled = 0, 0.0
        for other, (needed, _) in self._promises.items():
            if filled and filled + needed * MARGIN > timeout:
                calls, filled = calls + 1, 0.0
            filled += needed * MARGIN
            if other == who:
                break
        # Who is not back by then has lost the turn (see _PATIENCE), so no one is sent further away.
        return max(1, math.ceil(min(calls, _PATIENCE - 2) * timeout))
