"""Plans against every choice there is where that can be tried, and against chance where it
cannot.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations
from math import prod

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preheat.buckets import Bucket, smallest_covering
from preheat.errors import PreheatError
from preheat.planning.bound import bound
from preheat.planning.cost import Curve
from preheat.planning.demand import PICTURE, Demand
from preheat.planning.exact import solve
from preheat.planning.grid import Grid, Point
from preheat.planning.plan import Choice, Cost, Wanted, plan, usage
from preheat.planning.search import search

CELLS = Curve()
ATTENTION = Curve(fixed=3.0, per_cell=0.5, per_square=0.01)
SIDES = st.integers(1, 7)


def total(demand: Demand, buckets: Sequence[Bucket], cost: Cost) -> tuple[float, int]:
    """What all requests cost, by the definition, and how many are left."""
    paid, left = 0.0, 0
    for sizes, count in demand.counts.items():
        bucket = smallest_covering(buckets, demand.bucket(sizes))
        paid += count * cost(bucket.volume if bucket else prod(sizes))
        left += 0 if bucket else count
    return paid, left


def by_trying(demand: Demand, cost: Cost, wanted: Wanted, num: int) -> float | None:
    """The least cost of `num` buckets or fewer, of all that have sides which are asked for."""
    axes = zip(*demand.counts, strict=True)
    sides = [sorted({*axis}) for axis in axes]
    every = [demand.bucket(sizes) for sizes in _product(sides)]
    allowed = int(wanted.may_be_left * demand.num_requests + 1e-9)
    found = []
    for size in range(num + 1 - len(wanted.must)):
        for chosen in combinations(every, size):
            paid, left = total(demand, [*wanted.must, *chosen], cost)
            if left <= allowed:
                found.append(paid)
    return min(found, default=None)


def _product(sides: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    if len(sides) == 1:
        return [(size,) for size in sides[0]]
    return [(height, width) for height in sides[0] for width in sides[1]]


def planned(demand: Demand, cost: Cost, wanted: Wanted) -> list[Choice]:
    return list(plan(demand, cost, wanted))


def demands(names: tuple[str, ...], *sides: st.SearchStrategy[int]) -> st.SearchStrategy[Demand]:
    """Up to five sizes, some asked for more often."""
    sizes: st.SearchStrategy[tuple[int, ...]] = st.tuples(*sides)
    counts = st.dictionaries(sizes, st.integers(1, 9), min_size=1, max_size=5)
    return counts.map(lambda each: Demand(names, each))


pictures = demands(PICTURE, SIDES, SIDES)
lengths = demands(("sequence",), st.integers(1, 30))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    pictures | lengths,
    st.sampled_from([CELLS, ATTENTION]),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.booleans(),
    st.integers(1, 3),
)
def test_no_choice_is_better_and_the_proof_says_so(
    demand: Demand, cost: Curve, may_be_left: float, has_must: bool, num: int
) -> None:
    must = (demand.bucket(min(demand.counts)),) if has_must else ()
    wanted = Wanted(num, must, may_be_left, multiple=1, seconds=20)
    best = by_trying(demand, cost, wanted, num)
    if best is None:
        with pytest.raises(PreheatError, match="do not cover enough"):
            planned(demand, cost, wanted)
        return
    choice = planned(demand, cost, wanted)[-1]
    paid, left = total(demand, choice.buckets, cost)
    assert paid == pytest.approx(choice.cost) == pytest.approx(best)
    assert choice.bound <= choice.cost and choice.gap == pytest.approx(0, abs=1e-6)
    assert left <= may_be_left * demand.num_requests + 1e-9
    assert {*must} <= {*choice.buckets} and len(choice.buckets) <= num


def log(seed: int, num: int = 60) -> Demand:
    """Sizes around a few shapes, some of them often."""
    rng, counts = random.Random(seed), dict[tuple[int, ...], int]()
    while len(counts) < num:
        area, shape = rng.uniform(300, 1100) ** 2, 2 ** rng.gauss(0, 0.5)
        size = round((area * shape) ** 0.5), round((area / shape) ** 0.5)
        counts[size] = 1 + int(rng.paretovariate(1.2))
    return Demand(PICTURE, counts)


def on_grid(demand: Demand) -> Demand:
    return Demand(PICTURE, demand.rounded(8))


def beats_chance(seed: int, num: int = 4, choices: int = 200) -> bool:
    """Whether a plan of one search and one bound is no worse than the best of so many random
    choices, and its bound no more than it.
    """
    demand, rng = on_grid(log(seed)), random.Random(seed + 1)
    counts = {(height, width): count for (height, width), count in demand.counts.items()}
    grid = Grid.of(counts, CELLS)
    best = search(grid, num, 0.0)
    cost = grid.cost(best)
    top = (len(grid.heights) - 1, len(grid.widths) - 1)
    points = [tuple(map(int, point)) for point in zip(*grid.usable.nonzero(), strict=True)]
    tried = (
        grid.cost([top, *((row, column) for row, column in rng.sample(points, num - 1))])
        for _ in range(choices)
    )
    return cost <= min(tried) and bound(grid, num, best, 0.05).cost <= cost


@pytest.mark.parametrize("seed", range(25))
def test_a_plan_is_never_worse_than_the_best_of_many_random_choices(seed: int) -> None:
    assert beats_chance(seed)


def small_grid(seed: int) -> Grid:
    """A dozen sizes in a grid of few sides, of which a part may be left."""
    rng = random.Random(seed)
    counts = {(rng.randint(1, 9), rng.randint(1, 9)): rng.randint(1, 9) for _ in range(12)}
    return Grid.of(counts, CELLS, may_be_left=(seed % 3) * 0.08 * sum(counts.values()))


def points_of(grid: Grid) -> list[Point]:
    return [(int(row), int(column)) for row, column in zip(*grid.usable.nonzero(), strict=True)]


def cheapest_of(grid: Grid, num: int) -> tuple[float, tuple[Point, ...]]:
    every = combinations(points_of(grid), num)
    return min((grid.cost(chosen), chosen) for chosen in every)


@pytest.mark.parametrize("seed", range(12))
def test_bound_and_integer_program_find_the_least_from_a_bad_choice(seed: int) -> None:
    grid = small_grid(seed)
    top = (len(grid.heights) - 1, len(grid.widths) - 1)
    least, _ = cheapest_of(grid, 2)
    proven = bound(grid, 2, [top], 60)  # ends by itself, long before
    assert 0.6 * least < proven.cost <= least * (1 + 1e-9), "no more than there is"
    exact = solve(grid, 2, proven.open, [top], 20)
    assert exact is not None and exact.cost == pytest.approx(least)
    assert grid.cost(exact.chosen) == pytest.approx(least)


@pytest.mark.parametrize("seed", range(12))
def test_a_search_ends_where_no_other_bucket_would_be_better(seed: int) -> None:
    grid = small_grid(seed)
    best = search(grid, 3, 0.0)
    for index in range(3):
        for point in points_of(grid):
            other = [*best[:index], point, *best[index + 1 :]]
            assert grid.cost(other) >= grid.cost(best) * (1 - 1e-9)


def test_more_buckets_never_cost_more_and_as_many_as_sizes_waste_nothing() -> None:
    demand = Demand(PICTURE, {(64, 64): 5, (128, 64): 1, (64, 128): 2})
    choices = planned(demand, CELLS, Wanted(8))
    assert [len(choice.buckets) for choice in choices] == [1, 2, 3], "no fourth is of any use"
    assert choices[-1].usage.waste == 0 and choices[-1].gap == 0
    assert [choice.cost for choice in choices] == sorted((c.cost for c in choices), reverse=True)


def test_waste_counts_pixels_that_were_asked_for_and_sizes_lie_on_the_grid() -> None:
    demand = Demand(PICTURE, {(100, 100): 1})
    (choice,) = planned(demand, CELLS, Wanted(3, multiple=16))
    assert choice.buckets == (Bucket(112, 112),)
    assert choice.usage.waste == pytest.approx(1 - 100 * 100 / 112**2)


def test_what_is_left_is_counted_and_never_more_than_allowed() -> None:
    demand = Demand(PICTURE, {(64, 64): 95, (640, 640): 5})
    (choice,) = planned(demand, CELLS, Wanted(1, may_be_left=0.05))
    assert choice.buckets == (Bucket(64, 64),) and choice.usage.left_share == 0.05
    (choice,) = planned(demand, CELLS, Wanted(1, may_be_left=0.04))
    assert choice.buckets == (Bucket(640, 640),) and choice.usage.left == 0


def test_measured_seconds_can_choose_other_buckets_than_cells() -> None:
    demand = Demand(("sequence",), {(64,): 40, (256,): 20, (512,): 1})
    by_cells = planned(demand, CELLS, Wanted(2))[-1]
    by_seconds = planned(demand, Curve(0, 0.1, 1.0), Wanted(2))[-1]
    assert by_cells.buckets == (Bucket(sequence=512), Bucket(sequence=64))
    assert by_seconds.buckets == (Bucket(sequence=512), Bucket(sequence=256))
    assert usage(demand, by_seconds.buckets).waste > by_cells.usage.waste


@pytest.mark.parametrize(
    ("must", "said"),
    [
        ((Bucket(sequence=64),), "of height, width"),
        ((Bucket(60, 64),), "grid of 8"),
        ((Bucket(64, 64), Bucket(72, 64), Bucket(80, 64)), "3 must-have buckets are more than 2"),
        ((Bucket(64, 64), Bucket(72, 64)), "leave no room"),
    ],
)
def test_must_have_buckets_that_cannot_be_are_refused(must: tuple[Bucket, ...], said: str) -> None:
    with pytest.raises(PreheatError, match=said):
        planned(Demand(PICTURE, {(640, 640): 1}), CELLS, Wanted(2, must))


def test_a_grid_too_fine_for_its_sizes_is_refused() -> None:
    demand = Demand(PICTURE, {(side, side): 1 for side in range(1, 800)})
    with pytest.raises(PreheatError, match="coarser --grid"):
        planned(demand, CELLS, Wanted(2, multiple=1))
