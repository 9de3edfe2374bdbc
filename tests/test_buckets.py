"""The chosen bucket against a brute-force reading of the rules, over thousands of sizes."""

from __future__ import annotations

from fractions import Fraction
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preheat.buckets import (
    Bucket,
    combinations,
    joined,
    nearest_aspect,
    round_up,
    smallest_covering,
    split_rows,
)

SDXL = [
    Bucket(1024, 1024),
    Bucket(1152, 896),
    Bucket(896, 1152),
    Bucket(1344, 768),
    Bucket(768, 1344),
]

sides = st.integers(1, 4096)
# Small multiples of 8 collide in area and in aspect all the time, so the ties are really tried.
bucket_sides = st.integers(1, 12).map(lambda cells: 8 * cells) | st.integers(1, 256).map(
    lambda cells: 8 * cells
)
buckets = st.builds(Bucket, bucket_sides, bucket_sides)
bucket_lists = st.lists(buckets, min_size=1, max_size=8)
near_sides = st.integers(1, 100) | sides


def factor(bucket: Bucket, height: int, width: int) -> Fraction:
    """How many times wider than the request the bucket is, or narrower: 1 or more."""
    ratio = Fraction(bucket.width, bucket.height) / Fraction(width, height)
    return max(ratio, 1 / ratio)


@settings(max_examples=2000, deadline=None)
@given(bucket_lists, near_sides, near_sides)
def test_covering_is_the_least_that_covers(choices: list[Bucket], height: int, width: int) -> None:
    chosen = smallest_covering(choices, Bucket(height, width))
    fitting = [b for b in choices if b.height >= height and b.width >= width]
    if not fitting:
        assert chosen is None
        return
    assert chosen in fitting
    assert chosen is not None
    for other in fitting:
        assert chosen.volume <= other.volume
        if chosen.volume == other.volume:
            assert chosen.height <= other.height


@settings(max_examples=2000, deadline=None)
@given(bucket_lists, near_sides, near_sides)
def test_nearest_aspect_is_the_nearest_and_breaks_ties_by_the_rules(
    choices: list[Bucket], height: int, width: int
) -> None:
    chosen = nearest_aspect(choices, height, width)
    assert chosen in choices
    nearest = min(factor(b, height, width) for b in choices)
    assert factor(chosen, height, width) == nearest
    tied = [b for b in choices if factor(b, height, width) == nearest]
    fitting = [b for b in tied if b.covers(Bucket(height, width))]
    if fitting:
        tied, area = fitting, min(b.volume for b in fitting)
    else:
        area = max(b.volume for b in tied)
    assert chosen.volume == area
    assert chosen.height == min(b.height for b in tied if b.volume == area)


@settings(max_examples=300, deadline=None)
@given(bucket_lists, sides, sides, st.data())
def test_the_order_of_the_list_decides_nothing(
    choices: list[Bucket], height: int, width: int, data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(choices))
    size = Bucket(height, width)
    assert smallest_covering(choices, size) == smallest_covering(shuffled, size)
    assert nearest_aspect(choices, height, width) == nearest_aspect(shuffled, height, width)


@settings(max_examples=1000, deadline=None)
@given(sides, sides, st.integers(1, 64))
def test_round_up_is_the_smallest_aligned_size_that_covers(
    height: int, width: int, multiple: int
) -> None:
    size = round_up(Bucket(height, width), multiple)
    assert size.height % multiple == size.width % multiple == 0
    assert size.height - multiple < height <= size.height
    assert size.width - multiple < width <= size.width


def every_split(sizes: set[int], rows: int) -> list[tuple[int, ...]]:
    """Every multiset of batch sizes that holds the rows and from which no run can be left out."""
    if rows <= 0:
        return [()]
    return [
        tuple(sorted((size, *rest))) for size in sizes for rest in every_split(sizes, rows - size)
    ]


@settings(max_examples=300, deadline=None)
@given(st.sets(st.integers(1, 8), min_size=1, max_size=4), st.integers(1, 9))
def test_rows_are_split_with_the_least_filler_in_the_fewest_runs(
    sizes: set[int], rows: int
) -> None:
    split = split_rows(sorted(sizes), rows)
    assert list(split) == sorted(split, reverse=True) and set(split) <= sizes
    assert (sum(split), len(split)) == min((sum(one), len(one)) for one in every_split(sizes, rows))


def test_nothing_can_be_split_into_nothing() -> None:
    with pytest.raises(ValueError, match="3 rows"):
        split_rows([], 3)
    with pytest.raises(ValueError, match="0 rows"):
        split_rows([1], 0)


@pytest.mark.parametrize(
    ("height", "width", "bucket"),
    [
        (1024, 1024, Bucket(1024, 1024)),
        (1, 1, Bucket(768, 1344)),
        (1025, 896, Bucket(1152, 896)),
        (1025, 897, None),
        (1153, 768, Bucket(1344, 768)),
        (768, 1344, Bucket(768, 1344)),
        (1345, 100, None),
    ],
)
def test_covering_among_the_sdxl_buckets(height: int, width: int, bucket: Bucket | None) -> None:
    assert smallest_covering(SDXL, Bucket(height, width)) == bucket


@pytest.mark.parametrize(
    ("choices", "size", "bucket"),
    [
        # Twice too wide is as far as twice too tall; neither covers, both have the same area: the
        # smaller height.
        ([(16, 8), (8, 16)], (100, 100), (8, 16)),
        # The same shape three times: the least that covers,
        ([(64, 64), (32, 32), (16, 16)], (20, 20), (32, 32)),
        # or, where none does, the greatest.
        ([(64, 64), (32, 32), (16, 16)], (100, 100), (64, 64)),
        # Equally near, one covers: it goes first although it is larger.
        ([(80, 160), (240, 120)], (120, 120), (240, 120)),
    ],
)
def test_ties_of_aspect(
    choices: list[tuple[int, int]], size: tuple[int, int], bucket: tuple[int, int]
) -> None:
    assert nearest_aspect([Bucket(*choice) for choice in choices], *size) == Bucket(*bucket)


def test_a_ratio_that_floats_cannot_tell_apart_is_told_apart() -> None:
    exact, close = Bucket(10**17, 10**17 - 1), Bucket(10**17, 10**17)
    assert (10**17 - 1) / 10**17 == 1.0
    # Neither covers, so the larger `close` would win if the two shapes were taken for the same.
    assert nearest_aspect([close, exact], 2 * 10**17, 2 * (10**17 - 1)) == exact


def test_a_bucket_is_a_value() -> None:
    bucket = Bucket(1152, 896)
    assert str(bucket) == "1152x896"
    assert bucket.volume == 1152 * 896
    assert bucket.covers(Bucket(1152, 896))
    assert not bucket.covers(Bucket(896, 1152))
    assert {bucket: 1}[Bucket(1152, 896)] == 1
    with pytest.raises(AttributeError):
        bucket.height = 8  # type: ignore[misc]


@pytest.mark.parametrize(("height", "width"), [(0, 8), (8, 0), (-8, 8)])
def test_a_bucket_without_pixels_is_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        Bucket(height, width)


def test_nothing_to_choose_from() -> None:
    assert smallest_covering([], Bucket(8, 8)) is None
    with pytest.raises(ValueError, match="no buckets"):
        nearest_aspect([], 8, 8)
    with pytest.raises(ValueError, match="multiple"):
        round_up(Bucket(8, 8), 0)


CHOICES = st.dictionaries(
    st.sampled_from(["height", "width", "sequence"]),
    st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True),
    max_size=3,
)


@settings(deadline=None)
@given(CHOICES)
def test_every_combination_is_there_once_and_the_largest_first(
    choices: dict[str, list[int]],
) -> None:
    found = combinations(choices)
    assert len(set(found)) == len(found) == prod(len(sizes) for sizes in choices.values())
    assert [bucket.volume for bucket in found] == sorted(
        (bucket.volume for bucket in found), reverse=True
    )


@settings(deadline=None)
@given(CHOICES, st.data())
def test_the_chosen_bucket_is_the_smallest_that_covers(
    choices: dict[str, list[int]], data: st.DataObject
) -> None:
    sizes = {name: data.draw(st.integers(1, 45)) for name in choices}
    fitting = [
        bucket
        for bucket in combinations(choices)
        if all(bucket[name] >= size for name, size in sizes.items())
    ]
    chosen = smallest_covering(combinations(choices), Bucket(**sizes))
    assert chosen == (min(fitting, key=lambda bucket: bucket.volume) if fitting else None)


@settings(deadline=None)
@given(CHOICES, st.data())
def test_a_batch_shares_the_smallest_bucket_that_holds_all(
    choices: dict[str, list[int]], data: st.DataObject
) -> None:
    every = combinations(choices)
    batch = data.draw(st.lists(st.sampled_from(every), min_size=1, max_size=4))
    holding = [
        bucket
        for bucket in every
        if all(bucket[name] >= each[name] for each in batch for name in choices)
    ]
    assert joined(batch) == min(holding, key=lambda bucket: bucket.volume)


def test_buckets_of_different_dimensions_have_none_in_common() -> None:
    for batch in ([], [Bucket(a=1), Bucket(b=1)]):
        with pytest.raises(ValueError, match="no common bucket"):
            joined(batch)


@settings(deadline=None)
@given(st.lists(buckets, min_size=1, max_size=4))
def test_pictures_share_a_picture(batch: list[Bucket]) -> None:
    shared = joined(batch)
    assert all(shared.covers(each) for each in batch)
    assert str(shared) == f"{max(b.height for b in batch)}x{max(b.width for b in batch)}"


def test_a_bucket_is_named_as_it_was_made() -> None:
    assert str(Bucket(height=224, width=384)) == "height=224 width=384"
    assert str(Bucket(224, 384)) == "224x384"
    assert str(Bucket()) == "fixed" and Bucket().volume == 1


@pytest.mark.parametrize("sides", [(8,), (8, 8, 8)])
def test_a_picture_has_two_sides(sides: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="zip"):
        Bucket(*sides)
