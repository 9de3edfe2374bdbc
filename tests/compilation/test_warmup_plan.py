"""What is warmed and replayed, of any shapes and batch sizes: in numbers alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from preheat.buckets import Bucket
from preheat.compilation.variants import Variant as AnyVariant
from preheat.compilation.warmup_plan import WarmupPlan, served_sizes, warmed_sizes, warmup_plan
from preheat.config.pt2 import ShapesConfig
from preheat.models.diffusion.variants import Variant, covering, own, plan_variants

BATCH_SIZES = st.one_of(
    st.just("dynamic"), st.sets(st.integers(1, 8), min_size=1, max_size=4).map(sorted)
)
SIZES = st.sets(st.integers(1, 8), min_size=1, max_size=4).map(sorted)


@dataclass
class Pictures:
    """A family of which guidance doubles the rows, and tasks are as good as each other."""

    buckets: Iterable[Bucket]

    def variants(self, batch_sizes: Iterable[int]) -> Sequence[Variant]:
        tasks = ["text-to-image", "inpainting"]
        return plan_variants(self.buckets, batch_sizes, [True, False], tasks)

    def covering(self, variants: Sequence[AnyVariant]) -> Sequence[Variant]:
        return covering(own(variants))

    def extremes(self, variants: Sequence[AnyVariant]) -> Sequence[AnyVariant]:
        return [variants[0], variants[-1]]

    def between(self, variants: Sequence[AnyVariant]) -> Sequence[Variant]:
        return []


FAMILIES = st.sets(
    st.builds(Bucket, st.integers(1, 64), st.integers(1, 64)), min_size=1, max_size=3
).map(Pictures)


def planned(
    family: Pictures,
    sizes: Sequence[int],
    *,
    compiles: bool = True,
    idle: bool = False,
    covers: bool = True,
) -> WarmupPlan:
    return warmup_plan(
        family, sizes, sizes, graphs_per_variant=2, compiles=compiles, idle=idle, covers=covers
    )


@given(BATCH_SIZES, st.integers(1, 12), st.booleans(), st.booleans())
def test_every_served_batch_size_is_warmed_or_lies_between_two_that_are(
    batch_sizes: Any, most: int, every: bool, invariant: bool
) -> None:
    shapes = ShapesConfig.model_construct(batch_sizes=batch_sizes, invariant=invariant)
    served, warmed = served_sizes(shapes, most), warmed_sizes(shapes, most, every=every)
    assert set(warmed) <= set(served) and len(set(warmed)) == len(warmed)
    # of 0 and 1 Dynamo makes graphs of their own
    graph = [size for size in warmed if size >= 2]
    assert all(size in warmed or min(graph) < size < max(graph) for size in served)
    assert warmed == served or (batch_sizes == "dynamic" and not every and len(warmed) <= 3)


@given(FAMILIES, SIZES, st.booleans())
def test_where_something_compiles_all_that_is_replayed_was_warmed(
    family: Pictures, sizes: list[int], covers: bool
) -> None:
    plan, every = planned(family, sizes, covers=covers), family.variants(sizes)
    assert set(plan.verify) <= set(plan.warm) <= set(every)
    assert {variant.bucket for variant in plan.verify} == set(family.buckets)
    assert plan.num_graphs >= len(plan.warm)
    assert covers or set(plan.verify) == set(every), "none stands for another"


@given(FAMILIES, SIZES)
def test_that_variants_stand_for_each_other_is_found_out_in_one_bucket(
    family: Pictures, sizes: list[int]
) -> None:
    probe: Sequence[Any] = planned(family, sizes).probe
    assert len({variant.bucket for variant in probe}) == 1
    assert len(covering(probe)) < len(probe), "else it would show nothing"
    assert not planned(family, sizes, covers=False).probe
    assert not planned(family, sizes, compiles=False).probe


@given(FAMILIES, SIZES)
def test_of_packages_one_run_a_bucket_is_replayed_and_of_eager_code_none(
    family: Pictures, sizes: list[int]
) -> None:
    packages = planned(family, sizes, compiles=False).verify
    assert sorted(str(each.bucket) for each in packages) == sorted(map(str, family.buckets))
    assert not planned(family, sizes, compiles=False, idle=True).verify
