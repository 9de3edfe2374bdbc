"""Good buckets, soon: one is replaced by the best other there is until nothing gets better, from
several beginnings.

The local search for p-median problems of Teitz and Bart (Operations Research 16, 1968), whose step
running sums make cheap here: what every possible bucket would save beside the others takes a pass
over the grid for each of them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import numpy as np

from preheat.planning.grid import Floats, Grid, Point, corner_sums

_AS_GOOD = 1 + 1e-12


def search(grid: Grid, num: int, seconds: float, start: Sequence[Point] = ()) -> list[Point]:
    """At most `num` buckets whose cost is low; the same for the same input, if time suffices.

    `start` are good ones, at most as many, which others are added to. `num` is not less than
    there are in `grid.must`. Restarts end after `seconds`, or when many in a row found nothing.
    """
    end, rng = time.monotonic() + seconds, random.Random(0)
    best = _grown(grid, num, start or grid.must)
    usable = [(int(row), int(column)) for row, column in np.argwhere(grid.usable)]
    failures = 0
    while time.monotonic() < end and failures < 30 and num > len(grid.must) + 1:
        moved = list(best)
        free = range(len(grid.must), len(best))
        for index in rng.sample(free, min(len(free), rng.choice((1, 2, 2, 3)))):
            moved[index] = rng.choice(usable)
        found = descend(grid, moved)
        better = grid.cost(found) * _AS_GOOD < grid.cost(best)
        best, failures = (found, 0) if better else (best, failures + 1)
    return best


def descend(grid: Grid, chosen: Sequence[Point]) -> list[Point]:
    """`chosen`, of which the free ones (all but `grid.must`, which come first) are replaced one by
    one while that makes it cheaper.
    """
    best = list(chosen)
    cost = grid.cost(best)
    going = True
    while going:
        going = False
        for index in range(len(grid.must), len(best)):
            costs = costs_with_one_more(grid, best[:index] + best[index + 1 :])
            point = _least(costs)
            if costs[point] * _AS_GOOD < cost:
                best[index], cost, going = point, float(costs[point]), True
    return best


def costs_with_one_more(grid: Grid, chosen: Sequence[Point]) -> Floats:
    """(rows, columns): what all requests cost with `chosen` and a bucket there; where that leaves
    too many, more than anything allowed.
    """
    paid = grid.cheapest(chosen)
    none = np.isinf(paid)
    alone = np.where(none, grid.weights, 0.0)
    held = corner_sums(alone)
    costs = float((grid.weights * grid.paid(chosen)).sum()) + grid.costs * held
    costs -= corner_sums(alone * grid.costs)
    for value in {float(grid.costs[point]) for point in chosen}:
        at_value = corner_sums(np.where(paid == value, grid.weights, 0.0))
        costs -= np.maximum(0.0, value - grid.costs) * at_value
    too_many = np.maximum(0.0, alone.sum() - held - grid.may_be_left)
    # Towards the allowed: each request too many costs more than all of them could.
    costs += too_many * (2 * grid.total * grid.costs.max())
    costs[~grid.usable] = np.inf
    return costs


def _grown(grid: Grid, num: int, start: Sequence[Point]) -> list[Point]:
    """The best bucket is added until there are `num`, and each time all are looked over."""
    chosen = list(start)
    while len(chosen) < num:
        chosen = descend(grid, [*chosen, _least(costs_with_one_more(grid, chosen))])
    return chosen


def _least(costs: Floats) -> Point:
    row, column = np.unravel_index(int(costs.argmin()), costs.shape)
    return int(row), int(column)
