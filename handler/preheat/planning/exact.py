"""The best buckets among few: the integer program, given to HiGHS.

What is chosen is a bucket (0 or 1); what follows is which bucket a size is served in, or that it is
left. Sizes that the same buckets cover are one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from preheat.errors import PreheatError
from preheat.planning.grid import Floats, Grid, Mask, Point

MAX_PAIRS = 20_000
"""Of a size and a bucket that covers it: more than HiGHS solves while one waits."""


@dataclass(frozen=True, slots=True)
class Exact:
    """What HiGHS has found; `cost` is what no choice among these buckets is cheaper than."""

    chosen: tuple[Point, ...]
    """Empty where the time was too short for any."""
    cost: float


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Sizes by the buckets that cover them; the first index is the size's."""

    covers: npt.NDArray[np.bool_]
    weights: Floats
    costs_left: Floats
    """Of all its requests, where they are left."""
    may_leave: npt.NDArray[np.bool_]


def solve(grid: Grid, num: int, open_: Mask, best: Sequence[Point], seconds: float) -> Exact | None:
    """The cheapest `num` buckets among those of `open_` and `best`; None where they are too many.

    Raises:
        PreheatError: scipy is not installed.
    """
    points = _candidates(grid, open_, best)
    asked = np.argwhere(grid.weights > 0)
    if len(asked) * len(points) > 100 * MAX_PAIRS:
        return None
    sizes = _merged(grid, points, asked)
    if int(sizes.covers.sum()) > MAX_PAIRS:
        return None
    return _highs(grid, num, points, sizes, seconds)


def _candidates(grid: Grid, open_: Mask, best: Sequence[Point]) -> list[Point]:
    found = {(int(row), int(column)) for row, column in np.argwhere(open_)}
    return sorted(found | set(best) | set(grid.must))


def _merged(grid: Grid, points: Sequence[Point], asked: npt.NDArray[np.int64]) -> _Sizes:
    at = np.array(points)
    covers = np.all(asked[:, None, :] <= at[None, :, :], axis=2)
    rows, columns = asked.T
    weights, costs = grid.weights[rows, columns], grid.costs[rows, columns]
    may_leave = grid.may_leave[rows, columns]
    # Those that may be left stay by themselves: how many are left is counted.
    keys = np.hstack([covers, np.where(may_leave, np.arange(len(asked)) + 1, 0)[:, None]])
    _, first, group = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    group = group.ravel()
    return _Sizes(
        covers[first],
        np.bincount(group, weights).astype(np.float64),
        np.bincount(group, weights * costs).astype(np.float64),
        may_leave[first],
    )


def _highs(
    grid: Grid, num: int, points: Sequence[Point], sizes: _Sizes, seconds: float
) -> Exact | None:
    """Variables: a bucket is chosen (one each); a size is served in a bucket (one a pair); a size
    is left (one each).
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array, eye_array, hstack, vstack
    except ImportError as error:
        raise PreheatError("a proven plan needs scipy: pip install 'preheat[plan]'") from error
    size, bucket = np.nonzero(sizes.covers)
    num_sizes, num_buckets, num_pairs = len(sizes.weights), len(points), len(size)
    per_bucket = grid.costs[tuple(np.array(points).T)]
    ones, pairs = np.ones(num_pairs), np.arange(num_pairs)
    chosen = coo_array((ones, (pairs, bucket)), shape=(num_pairs, num_buckets))
    served = coo_array((ones, (size, pairs)), shape=(num_sizes, num_pairs))
    left = coo_array((ones, (pairs, size)), shape=(num_pairs, num_sizes))
    one_place = hstack([coo_array((num_sizes, num_buckets)), served, eye_array(num_sizes)])
    if_chosen = hstack([-chosen, eye_array(num_pairs), coo_array((num_pairs, num_sizes))])
    # a size that a chosen bucket covers is not left
    if_not = hstack([chosen, coo_array((num_pairs, num_pairs)), left])
    counts = vstack(
        [
            coo_array([[*np.ones(num_buckets), *np.zeros(num_pairs + num_sizes)]]),
            coo_array([[*np.zeros(num_buckets + num_pairs), *sizes.weights]]),
        ]
    )
    lower = np.zeros(num_buckets + num_pairs + num_sizes)
    lower[[points.index(point) for point in grid.must]] = 1.0
    upper = np.ones_like(lower)
    upper[num_buckets + num_pairs :] = sizes.may_leave
    scale = 1.0 / grid.total / float(per_bucket.max())
    objective = np.concatenate(
        [np.zeros(num_buckets), sizes.weights[size] * per_bucket[bucket], sizes.costs_left]
    )
    leaving = np.flatnonzero(sizes.may_leave[size])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's, of options that HiGHS takes and it does not know
        result = milp(
            objective * scale,
            integrality=np.r_[np.ones(num_buckets), np.zeros(num_pairs), np.ones(num_sizes)],
            bounds=Bounds(lower, upper),
            constraints=[
                LinearConstraint(one_place.tocsr(), 1.0, 1.0),
                LinearConstraint(if_chosen.tocsr(), -np.inf, 0.0),
                LinearConstraint(if_not.tocsr()[leaving], -np.inf, 1.0),
                LinearConstraint(counts.tocsr(), -np.inf, [num, grid.may_be_left]),
            ],
            options={"time_limit": seconds, "mip_rel_gap": 0.0},
        )
    proven = result.mip_dual_bound
    if result.status not in (0, 1) or proven is None:
        return None
    picked = () if result.x is None else np.flatnonzero(result.x[:num_buckets] > 0.5)
    return Exact(tuple(points[int(index)] for index in picked), float(proven) / scale)
