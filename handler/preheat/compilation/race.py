"""How long compiled code takes beside eager: what `backend: auto` may veto a road by, and what the
state says of any.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

SLOWER = 1.05
"""A road that takes more of eager's time than this has lost: the rest is noise."""
_PAIRS = 5
_SECONDS = 2.0
_MOST_PAIRS = 400

Clock = Callable[[], float]
"""Seconds that never go back."""


@dataclass(frozen=True, slots=True)
class Race:
    """Medians of pairs that were run in turn; seconds of one call."""

    seconds: float
    eager_seconds: float
    ratio: float
    """Of the two in one pair: a machine that slows down does so for both."""
    num_pairs: int

    @property
    def is_lost(self) -> bool:
        return self.ratio > SLOWER


def run(
    code: Callable[[], object],
    eager: Callable[[], object],
    *,
    patient: bool,
    clock: Clock = time.perf_counter,
) -> Race:
    """Race `code` against `eager`: five pairs, or as many as two seconds hold.

    Args:
        code: one call of it; it has to be warm, and back when it is done.
        patient: before a race is lost, what is left of the two seconds is run too.
    """
    pairs: list[tuple[float, float]] = []
    began = clock()
    while True:
        forwards = len(pairs) % 2 == 0  # neither is always the one that finds the other's caches
        first, second = (code, eager) if forwards else (eager, code)
        start = clock()
        first()
        middle = clock()
        second()
        end = clock()
        took = (middle - start, end - middle)
        pairs.append(took if forwards else took[::-1])
        race = Race(
            seconds=median(own for own, _ in pairs),
            eager_seconds=median(eagers for _, eagers in pairs),
            ratio=median(own / max(eagers, 1e-9) for own, eagers in pairs),
            num_pairs=len(pairs),
        )
        enough = len(pairs) >= _PAIRS and not (patient and race.is_lost)
        if enough or end - began >= _SECONDS or len(pairs) == _MOST_PAIRS:
            return race
