"""The question which rectangles to compile, as arithmetic on a grid: sizes with their weights, and
what a bucket at each point would cost.

Rows are the distinct heights, columns the distinct widths. A bucket at (row, column) covers what
lies at or before both, so what it holds is a sum over a corner of the grid, and one pass of running
sums answers for every bucket at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from preheat.errors import PreheatError

Floats: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]
Point: TypeAlias = tuple[int, int]
"""Row and column."""
MAX_POINTS = 500_000
"""Of a grid; a running sum over more takes longer than a search has."""


@dataclass(frozen=True)
class Grid:
    """Sizes, and what each may cost.

    Cost is a number per request, the same everywhere for the same area and never less for more.
    """

    heights: tuple[int, ...]
    widths: tuple[int, ...]
    weights: Floats
    """(rows, columns): requests of exactly this size."""
    costs: Floats
    """(rows, columns): of one request in a bucket of this size."""
    must: tuple[Point, ...] = ()
    """Buckets that every choice has."""
    may_be_left: float = 0.0
    """Requests that need no bucket; one that has none costs what a bucket of its own size would."""
    total: float = field(init=False)
    usable: Mask = field(init=False)
    """(rows, columns): buckets that a smaller one does not serve as well."""

    def __post_init__(self) -> None:
        # A bucket is worth a thought only where something in it is as high and something as wide.
        usable = (np.cumsum(self.weights, 1) > 0) & (np.cumsum(self.weights, 0) > 0)
        for point in self.must:
            usable[point] = True
        object.__setattr__(self, "total", float(self.weights.sum()))
        object.__setattr__(self, "usable", usable)

    @classmethod
    def of(
        cls,
        counts: Mapping[Point, int],
        cost: Callable[[int], float],
        *,
        must: Sequence[Point] = (),
        may_be_left: float = 0.0,
    ) -> Grid:
        """The grid of these sizes (height, width), each with its number of requests.

        Raises:
            PreheatError: it has more than `MAX_POINTS` points.
        """
        sizes = [*counts, *must]
        heights, widths = (tuple(sorted({size[side] for size in sizes})) for side in (0, 1))
        row = {height: index for index, height in enumerate(heights)}
        column = {width: index for index, width in enumerate(widths)}
        if len(heights) * len(widths) > MAX_POINTS:
            raise PreheatError(
                f"{len(heights)} different heights and {len(widths)} different widths are too many "
                "to look at each pair of them: use a coarser --grid"
            )
        weights = np.zeros((len(heights), len(widths)))
        for (height, width), count in counts.items():
            weights[row[height], column[width]] += count
        costs = np.array([[cost(height * width) for width in widths] for height in heights])
        return cls(
            heights,
            widths,
            weights,
            costs,
            tuple((row[height], column[width]) for height, width in must),
            may_be_left,
        )

    def size(self, point: Point) -> tuple[int, int]:
        """(height, width) of a point."""
        return self.heights[point[0]], self.widths[point[1]]

    def cheapest(self, chosen: Sequence[Point]) -> Floats:
        """(rows, columns): the cost of the cheapest of the chosen buckets that covers a size;
        infinite where none does.
        """
        found = np.full(self.weights.shape, np.inf)
        for row, column in chosen:
            corner = found[: row + 1, : column + 1]
            np.minimum(corner, self.costs[row, column], out=corner)
        return found

    def left(self, chosen: Sequence[Point]) -> float:
        """Requests that none of the chosen buckets covers."""
        return float(self.weights[np.isinf(self.cheapest(chosen))].sum())

    def cost(self, chosen: Sequence[Point]) -> float:
        """Of all requests; infinite where more are left than may be."""
        if self.left(chosen) > self.may_be_left:
            return float("inf")
        return float((self.weights * self.paid(chosen)).sum())

    def paid(self, chosen: Sequence[Point]) -> Floats:
        """(rows, columns): what a request of this size costs."""
        found = self.cheapest(chosen)
        return np.where(np.isinf(found), self.costs, found)

    @property
    def may_leave(self) -> Mask:
        """(rows, columns): sizes that could be left. Whoever leaves a size leaves all that would
        cover it.
        """
        beyond = corner_sums(self.weights[::-1, ::-1])[::-1, ::-1]
        return np.asarray(beyond <= self.may_be_left)


def corner_sums(values: Floats) -> Floats:
    """Of each point, the sum over all at or before its row and column."""
    return np.cumsum(np.cumsum(values, -2), -1)
