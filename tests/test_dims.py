"""Buckets of named dimensions, against brute force."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preheat.dims import Dims, combinations, covering, joined
from preheat.status import bucket_name

CHOICES = st.dictionaries(
    st.sampled_from(["height", "width", "sequence"]),
    st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True),
    max_size=3,
)


@given(CHOICES)
def test_every_combination_is_there_once_and_the_largest_first(
    choices: dict[str, list[int]],
) -> None:
    found = combinations(choices)
    assert len(set(found)) == len(found) == prod(len(sizes) for sizes in choices.values())
    assert [dims.volume for dims in found] == sorted((dims.volume for dims in found), reverse=True)


@given(CHOICES, st.data())
def test_the_chosen_bucket_is_the_smallest_that_covers(
    choices: dict[str, list[int]], data: st.DataObject
) -> None:
    sizes = {name: data.draw(st.integers(1, 45)) for name in choices}
    fitting = [
        dims
        for dims in combinations(choices)
        if all(dims[name] >= size for name, size in sizes.items())
    ]
    chosen = covering(choices, sizes)
    assert chosen == (min(fitting, key=lambda dims: dims.volume) if fitting else None)


@given(CHOICES, st.data())
def test_a_batch_shares_the_smallest_bucket_that_holds_all(
    choices: dict[str, list[int]], data: st.DataObject
) -> None:
    every = combinations(choices)
    batch = data.draw(st.lists(st.sampled_from(every), min_size=1, max_size=4))
    holding = [
        dims
        for dims in every
        if all(dims[name] >= each[name] for each in batch for name in choices)
    ]
    assert joined(batch) == min(holding, key=lambda dims: dims.volume)


def test_buckets_of_different_dimensions_have_none_in_common() -> None:
    for batch in ([], [Dims((("a", 1),)), Dims((("b", 1),))]):
        with pytest.raises(ValueError, match="no common bucket"):
            joined(batch)


def test_the_state_names_a_bucket_as_headers_do() -> None:
    dims = Dims((("height", 224), ("width", 384)))
    assert bucket_name(dims.document()) == str(dims) == "height=224 width=384"
    assert bucket_name(Dims().document()) == str(Dims()) == "fixed"
    assert bucket_name({"height": 64, "width": 96}) == "64x96"
