"""The best buckets for a demand, for each number of them, with what has been proven."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from preheat.buckets import Bucket, smallest_covering
from preheat.errors import PreheatError
from preheat.planning.bound import Prices, bound
from preheat.planning.demand import Demand
from preheat.planning.exact import solve
from preheat.planning.grid import Grid, Point
from preheat.planning.lengths import best_lengths
from preheat.planning.search import costs_with_one_more, search

Cost = Callable[[int], float]
"""Of a request, by the cells of its bucket; never less for more of them."""
_SEARCH, _BOUND = 0.35, 0.4
"""Shares of the time; the integer program has the rest, and what they left."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What some buckets compute for a demand. Cells are square pixels, or elements of the
    dimension.
    """

    asked_cells: int
    """Of the requests that have a bucket."""
    computed_cells: int
    left: int
    """Requests that no bucket covers."""
    left_cells: int
    num_requests: int

    @property
    def waste(self) -> float:
        """Share of the computed cells that nobody asked for."""
        return 1 - self.asked_cells / self.computed_cells if self.computed_cells else 0.0

    @property
    def left_share(self) -> float:
        return self.left / self.num_requests


@dataclass(frozen=True, slots=True)
class Choice:
    """The best buckets of a number, the largest first."""

    buckets: tuple[Bucket, ...]
    cost: float
    """Of all requests: of those that are left, that of a bucket of their own size."""
    bound: float
    """No such choice is cheaper."""
    usage: Usage

    @property
    def gap(self) -> float:
        """The most that a better choice could save, as a share of the cost."""
        return max(0.0, 1 - self.bound / self.cost) if self.cost else 0.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of a plan."""

    max_buckets: int
    must: tuple[Bucket, ...] = ()
    may_be_left: float = 0.0
    """Share of the requests that needs no bucket."""
    multiple: int = 8
    """Of every size of a bucket."""
    seconds: float = 45.0
    """For all of it; at the end of it what is known is given."""
    focus: int = 0
    """A number of buckets that gets three times the others' time."""

    def weight(self, num: int) -> int:
        """Of a number of buckets, among all that share the time."""
        return 3 if num == self.focus else 1


def usage(demand: Demand, buckets: Sequence[Bucket]) -> Usage:
    """What these buckets compute."""
    asked = computed = left = left_cells = 0
    for sizes, count in demand.counts.items():
        bucket = smallest_covering(buckets, demand.bucket(sizes))
        if bucket is None:
            left, left_cells = left + count, left_cells + count * prod(sizes)
        else:
            asked += count * prod(sizes)
            computed += count * bucket.volume
    return Usage(asked, computed, left, left_cells, demand.num_requests)


def plan(demand: Demand, cost: Cost, wanted: Wanted) -> Iterator[Choice]:
    """The best choice for each number of buckets, from as few as there can be to `max_buckets`;
    it ends where every size has a bucket of its own.

    Raises:
        PreheatError: there is none.
    """
    _check(demand, wanted)
    counts = demand.rounded(wanted.multiple)
    most_left = int(wanted.may_be_left * demand.num_requests + 1e-9)
    find = _rectangles if demand.is_picture else _lengths
    choices = find(counts, most_left, cost, wanted)
    # what no number of buckets goes below: each size has its own
    least = sum(count * cost(prod(sizes)) for sizes, count in counts.items())
    num_found = 0
    for points, total, proven in choices:
        num_found += 1
        buckets = [demand.bucket(sizes) for sizes in points]
        buckets.sort(key=lambda bucket: (-bucket.volume, bucket.sizes))
        yield Choice(tuple(buckets), total, proven, usage(demand, buckets))
        if total <= least * (1 + 1e-12):
            return
    if not num_found:
        raise PreheatError(
            f"{len(wanted.must)} must-have buckets of {wanted.max_buckets} do not cover enough, "
            "and leave no room for another: allow more buckets"
        )


Counts = Mapping[tuple[int, ...], int]
"""Requests by the sizes that they ask for, rounded up."""
_Found = tuple[Sequence[tuple[int, ...]], float, float]
"""Sizes of the buckets, cost, bound."""


def _check(demand: Demand, wanted: Wanted) -> None:
    for bucket in wanted.must:
        if tuple(name for name, _ in bucket.sizes) != demand.names:
            raise PreheatError(
                f"must-have bucket {bucket}: the sizes are of {', '.join(demand.names)}"
            )
        if any(size % wanted.multiple for _, size in bucket.sizes):
            raise PreheatError(f"must-have bucket {bucket} is not on the grid of {wanted.multiple}")
    if len(set(wanted.must)) > wanted.max_buckets:
        raise PreheatError(
            f"{len(set(wanted.must))} must-have buckets are more than {wanted.max_buckets}"
        )


def _lengths(counts: Counts, most_left: int, cost: Cost, wanted: Wanted) -> Iterator[_Found]:
    lengths = {sizes[0]: count for sizes, count in counts.items()}
    must = {size for bucket in wanted.must for _, size in bucket.sizes}
    found = best_lengths(lengths, cost, wanted.max_buckets, must=must, may_be_left=most_left)
    for chosen, total in found.values():
        yield [(length,) for length in chosen], total, total


def _rectangles(counts: Counts, most_left: int, cost: Cost, wanted: Wanted) -> Iterator[_Found]:
    end = time.monotonic() + wanted.seconds
    must = dict.fromkeys((bucket.height, bucket.width) for bucket in wanted.must)
    sizes = {(height, width): count for (height, width), count in counts.items()}
    grid = Grid.of(sizes, cost, must=[*must], may_be_left=most_left)
    first = len(grid.must) or 1
    best: Sequence[Point] = ()
    prices: Prices | None = None
    for num in range(first, wanted.max_buckets + 1):
        weights = [wanted.weight(each) for each in range(num, wanted.max_buckets + 1)]
        seconds = max(0.0, end - time.monotonic()) * weights[0] / sum(weights)
        best, proven, prices = _best_of(grid, num, best, prices, seconds)
        total = grid.cost(best)
        if total < float("inf"):
            yield [grid.size(point) for point in best], total, proven


def _best_of(
    grid: Grid, num: int, start: Sequence[Point], prices: Prices | None, seconds: float
) -> tuple[Sequence[Point], float, Prices | None]:
    """The best buckets that are found in the time, and what none is cheaper than."""
    if num == len(grid.must):
        return grid.must, grid.cost(grid.must), None
    if num == len(grid.must) + 1:
        costs = costs_with_one_more(grid, grid.must)
        row, column = divmod(int(costs.argmin()), costs.shape[1])
        best = [*grid.must, (row, column)]
        return best, grid.cost(best), None
    end = time.monotonic() + seconds
    best = search(grid, num, _SEARCH * seconds, start)
    found = bound(grid, num, best, _BOUND * seconds, prices)
    proven, cost = found.cost, grid.cost(best)
    exact = solve(grid, num, found.open, best, max(1.0, end - time.monotonic()))
    if exact is not None:
        # What is not open has been shown to be no better than the best known.
        proven = max(proven, min(exact.cost, cost))
        if exact.chosen and grid.cost(exact.chosen) < cost:
            best = [*grid.must, *(each for each in exact.chosen if each not in grid.must)]
    return best, min(proven, grid.cost(best)), found.prices
