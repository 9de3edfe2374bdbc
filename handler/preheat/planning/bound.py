"""What no choice of buckets can be cheaper than, and which buckets no better choice can have.

Lagrangian relaxation of the p-median problem (Cornuejols, Fisher and Nemhauser, Management Science
23, 1977): "each request has one bucket" is replaced by a price for each size. Then a bucket is
worth what the requests in it would save against their prices, the best buckets by that are the
answer, and its cost is a bound whatever the prices are. Prices are raised where no bucket wants a
size and lowered where several do (subgradient steps).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from preheat.planning.grid import Floats, Grid, Mask, Point, corner_sums

_LEVELS, _FINE_LEVELS = 32, 256
_INERTIA = 0.85
_PATIENCE = 8
"""Steps without a better bound before they become shorter."""
_SHRINK = 0.7
_SHORTEST = 1e-5
_NEARLY = 1 + 1e-9
_CLOSE = 1e-7


@dataclass(frozen=True, slots=True)
class Prices:
    """What is asked for serving a request of each size (rows, columns), and for leaving one."""

    sizes: Floats
    fee: float


@dataclass(frozen=True, slots=True)
class Bound:
    """What has been proven of a number of buckets."""

    cost: float
    """No choice is cheaper."""
    open: Mask
    """(rows, columns): buckets that a choice cheaper than the best known may have."""
    prices: Prices
    """At which it was proven."""


def bound(
    grid: Grid, num: int, best: Sequence[Point], seconds: float, start: Prices | None = None
) -> Bound:
    """The bound for `num` buckets, where `best` are the best known; `start` are prices that were
    good for another number of them.
    """
    return _Ascent(grid, num, best, start).run(time.monotonic() + seconds)


class _Ascent:
    """The prices on their way up. All arrays are (rows, columns)."""

    def __init__(self, grid: Grid, num: int, best: Sequence[Point], start: Prices | None) -> None:
        self._grid, self._num, self._known = grid, num, grid.cost(best)
        self._asked, self._may_leave = grid.weights > 0, grid.may_leave
        # What they pay in the best known choice is close to what they are worth.
        begins = [Prices(grid.paid(best) * 1.02, 0.0), *([start] if start else [])]
        self._best, self._at = max(
            (
                (self._relaxed(prices, _LEVELS).cost, prices)
                for prices in map(self._clipped, begins)
            ),
            key=lambda each: each[0],
        )

    def run(self, end: float) -> Bound:
        step, stalled = 1.0, 0
        prices, direction = self._at, Prices(np.zeros_like(self._at.sizes), 0.0)
        while time.monotonic() < end and step > _SHORTEST:
            relaxed = self._relaxed(prices, _LEVELS)
            stalled = 0 if relaxed.cost > self._best + _CLOSE * self._known else stalled + 1
            if not stalled:
                self._best, self._at = relaxed.cost, prices
            if self._known - self._best < _CLOSE * self._known:
                break
            if stalled == _PATIENCE:
                step, stalled, prices = _SHRINK * step, 0, self._at
                relaxed = self._relaxed(prices, _LEVELS)
                direction = Prices(np.zeros_like(prices.sizes), 0.0)
            slope = self._slope(prices, relaxed.chosen)
            direction = Prices(
                _INERTIA * direction.sizes + (1 - _INERTIA) * slope.sizes,
                _INERTIA * direction.fee + (1 - _INERTIA) * slope.fee,
            )
            norm = float((self._grid.weights * direction.sizes**2).sum())
            norm += direction.fee**2 / self._grid.total
            if not norm:
                break
            length = step * (self._known - relaxed.cost) / norm
            prices = self._clipped(
                Prices(
                    prices.sizes + length * direction.sizes,
                    prices.fee + length * direction.fee / self._grid.total,
                )
            )
        return self._proven()

    def _clipped(self, prices: Prices) -> Prices:
        """No price is above what leaving a size costs, nor below its own bucket's: neither could
        raise the bound.
        """
        costs, fee = self._grid.costs, max(0.0, prices.fee)
        most = np.where(self._may_leave, costs + fee, np.inf)
        sizes = np.minimum(np.maximum(prices.sizes, costs), most)
        return Prices(np.where(self._asked, sizes, 0.0), fee)

    def _relaxed(self, prices: Prices, num_levels: int) -> _Relaxed:
        """The relaxed problem solved: the buckets that are worth most."""
        grid, worth = self._grid, self._worth(prices.sizes, num_levels)
        free = worth.copy()
        for point in grid.must:
            free[point] = -1.0
        num = min(self._num - len(grid.must), free.size)
        best = np.argpartition(-free.ravel(), num - 1)[:num] if num else np.empty(0, np.int64)
        rows, columns = np.unravel_index(best, free.shape)
        chosen = [*grid.must, *zip(rows.tolist(), columns.tolist(), strict=True)]
        paid = float((grid.weights * prices.sizes).sum())
        saved = sum(float(worth[point]) for point in chosen)
        return _Relaxed(worth, chosen, paid - saved - prices.fee * grid.may_be_left)

    def _worth(self, prices: Floats, num_levels: int) -> Floats:
        """Of a bucket, what its requests would save against their prices.

        Prices are sorted into a few levels, each request into the two next to its own so that the
        mean is right. A saving is convex in the price, so this is never too little, and the bound
        never too high.
        """
        grid, (rows, columns) = self._grid, np.nonzero(self._asked)
        asked, weights = prices[self._asked], grid.weights[self._asked]
        levels = np.unique(np.quantile(asked, np.linspace(0, 1, num_levels)))
        if len(levels) == 1:
            levels = np.array([levels[0], levels[0] + 1.0])
        below = np.clip(np.searchsorted(levels, asked, side="right") - 1, 0, len(levels) - 2)
        upper = weights * (asked - levels[below]) / (levels[below + 1] - levels[below])
        worth, order = np.zeros_like(prices), np.argsort(below)
        ends = np.searchsorted(below[order], np.arange(len(levels) + 1))
        for index, level in enumerate(levels):
            part = np.zeros_like(prices)
            own = order[ends[index] : ends[index + 1]]
            part[rows[own], columns[own]] = weights[own] - upper[own]
            if index:
                under = order[ends[index - 1] : ends[index]]
                part[rows[under], columns[under]] = upper[under]
            worth += np.maximum(0.0, level - grid.costs) * corner_sums(part)
        return np.where(grid.usable, worth, 0.0)

    def _slope(self, prices: Prices, chosen: Sequence[Point]) -> Prices:
        """Where prices have to go: how many buckets want a size, against the one it needs."""
        grid, wanted = self._grid, np.zeros_like(prices.sizes)
        for row, column in chosen:
            corner = prices.sizes[: row + 1, : column + 1]
            wanted[: row + 1, : column + 1] += corner > grid.costs[row, column]
        slope = np.where(self._asked, 1.0 - wanted, 0.0)
        # A price at its top cannot rise; the fee for leaving the size can.
        at_top = self._may_leave & (prices.sizes >= grid.costs + prices.fee)
        fee = float((grid.weights * slope)[at_top].sum()) - grid.may_be_left
        return Prices(np.where(at_top, np.minimum(slope, 0.0), slope), fee)

    def _proven(self) -> Bound:
        fine = self._relaxed(self._at, _FINE_LEVELS)
        free = [float(fine.worth[point]) for point in fine.chosen[len(self._grid.must) :]]
        # What choosing a bucket costs at least: it takes the place of the last of the chosen.
        forced = fine.cost + np.maximum(0.0, min(free, default=0.0) - fine.worth)
        cost = min(max(self._best, fine.cost), self._known)
        return Bound(cost, self._grid.usable & (forced < _NEARLY * self._known), self._at)


@dataclass(frozen=True, slots=True)
class _Relaxed:
    worth: Floats
    chosen: list[Point]
    cost: float
