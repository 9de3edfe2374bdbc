"""Asked sizes: counted within bounds, as plain data that a plan is made of."""

from __future__ import annotations

import json

import pytest

from preheat.buckets import Bucket
from preheat.errors import LogError
from preheat.planning.demand import PICTURE, counted
from preheat.worker import asked
from preheat.worker.asked import AskedSizes


def test_what_is_counted_is_what_a_plan_reads_over_all_workers() -> None:
    one, other = AskedSizes(), AskedSizes()
    for size in (Bucket(64, 96), Bucket(96, 64), Bucket(64, 96), None):
        one.count(size)
    other.count(Bucket(64, 96))
    documents = [json.loads(json.dumps(each.document())) for each in (one, other, AskedSizes())]
    demand = counted(documents)
    assert demand is not None and demand.names == PICTURE
    assert demand.counts == {(64, 96): 3, (96, 64): 1} and demand.num_uncounted == 0


def test_sizes_past_the_bound_are_counted_by_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked, "MOST_SIZES", 2)
    sizes = AskedSizes()
    for side in (8, 16, 24, 16, 32):
        sizes.count(Bucket(side, 8))
    assert sizes.document()["sizes"] == [[8, 8, 1], [16, 8, 2]]
    assert sizes.document()["uncounted"] == 2


def test_a_dimension_has_its_name_and_two_of_a_module_are_no_picture() -> None:
    lengths, sides = AskedSizes(), AskedSizes()
    lengths.count(Bucket(sequence=77))
    sides.count(Bucket(height=64, width=32))
    sides.count(Bucket(width=16, height=8))
    demand = counted([lengths.document()])
    assert demand is not None and demand.bucket((77,)) == Bucket(sequence=77)
    assert sides.document()["sizes"] == [[64, 32, 1], [8, 16, 1]]
    with pytest.raises(LogError, match="every combination"):
        counted([sides.document()])


def test_nothing_counted_is_no_demand() -> None:
    assert counted([AskedSizes().document()]) is None and counted([]) is None
