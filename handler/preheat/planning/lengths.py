"""The best lengths to compile, where one dimension is bucketed: exact, by dynamic programming."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np


def best_lengths(
    counts: Mapping[int, int],
    cost: Callable[[int], float],
    most: int,
    *,
    must: Collection[int] = (),
    may_be_left: float = 0.0,
) -> dict[int, tuple[tuple[int, ...], float]]:
    """By number of buckets, up to `most`: the cheapest ones, ascending, and what all requests cost.

    `counts` are requests by length. A length is served in the smallest bucket that holds it; of
    those longer than every bucket there may be `may_be_left`, and each costs what a bucket of its
    own length would. Numbers for which there is no choice, such as fewer than `must`, are left out.
    """
    lengths = sorted({*counts, *must})
    weights = np.array([0.0, *(counts.get(length, 0) for length in lengths)])
    costs = np.array([0.0, *map(cost, lengths)])
    upto, alone = np.cumsum(weights), np.cumsum(weights * costs)
    allowed = upto[-1] - upto <= may_be_left
    last_must = max((lengths.index(length) + 1 for length in must), default=0)
    allowed[:last_must] = False
    allowed[0] &= len(counts) == 0
    # cheapest[j]: all up to j served, j the largest bucket (0: none); before[j]: the one below it
    cheapest = np.full(len(weights), np.inf)
    cheapest[0] = 0.0
    must_at = [lengths.index(length) + 1 for length in sorted(must)]
    steps, found = [], {}
    for number in range(1, most + 1):
        cheapest, before = _one_more(cheapest, costs, upto, must_at)
        steps.append(before)
        totals = np.where(allowed, cheapest + alone[-1] - alone, np.inf)
        end = int(totals.argmin())
        if np.isfinite(totals[end]):
            found[number] = (_walked(steps, end, lengths), float(totals[end]))
    return found


def _one_more(
    cheapest: np.ndarray[tuple[int], np.dtype[np.float64]],
    costs: np.ndarray[tuple[int], np.dtype[np.float64]],
    upto: np.ndarray[tuple[int], np.dtype[np.float64]],
    must_at: list[int],
) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], list[int]]:
    more, before = np.full_like(cheapest, np.inf), [0] * len(cheapest)
    for at in range(1, len(cheapest)):
        first = max((index for index in must_at if index < at), default=0)  # none is skipped
        totals = cheapest[first:at] + costs[at] * (upto[at] - upto[first:at])
        best = int(totals.argmin())
        more[at], before[at] = totals[best], first + best
    return more, before


def _walked(steps: list[list[int]], end: int, lengths: list[int]) -> tuple[int, ...]:
    found = []
    for before in reversed(steps):
        found.append(lengths[end - 1])
        end = before[end]
    return tuple(reversed(found))
