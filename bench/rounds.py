"""What is compared takes turns, round after round: whatever disturbs the machine disturbs all
alike. Ratios are made within a round; what is told of them is their median and how far they spread.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
TOO_WIDE = 0.10
"""Spread of the rounds' ratios, as a share of their median, from which on a run is not to be
trusted.
"""


def turns(names: Sequence[T], index: int) -> list[T]:
    """The order of one round or turn: who begins changes."""
    first = index % len(names) if names else 0
    return [*names[first:], *names[:first]]


@dataclass(frozen=True, slots=True)
class Spread:
    """A ratio as the rounds gave it."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Spread | None:
        """None without rounds."""
        if not ratios:
            return None
        return cls(statistics.median(ratios), min(ratios), max(ratios), len(ratios))

    @property
    def width(self) -> float:
        return (self.high - self.low) / self.median

    def to_json(self) -> dict[str, float | int]:
        digits = {name: round(getattr(self, name), 3) for name in ("median", "low", "high")}
        return {**digits, "rounds": self.rounds}


def doubts(spreads: Mapping[str, Spread | None], most: float = TOO_WIDE) -> list[str]:
    """A sentence for each ratio that the rounds do not agree on."""
    return [
        f"{name}: the rounds spread over {spread.width:.0%} of their median ({spread.low:.2f} to "
        f"{spread.high:.2f}): measure again on a quieter machine"
        for name, spread in spreads.items()
        if spread is not None and spread.width > most
    ]
