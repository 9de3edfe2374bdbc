"""Plans: properties over sizes, buckets and policies, and the few numbers worth reading."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from preheat.buckets import Bucket, nearest_aspect, round_up, smallest_covering
from preheat.config.pt2 import Fit, Oversize
from preheat.errors import RequestError
from preheat.models.diffusion.geometry import (
    Box,
    Plan,
    cover_size,
    inner_size,
    pad_into,
    plan,
    resize_into,
)

MULTIPLE = 8
SDXL = (Bucket(1024, 1024), Bucket(1152, 896), Bucket(896, 1152))

SHRUNK_AND_RESIZED: tuple[tuple[Fit, Oversize], ...] = (("pad", "downscale"), ("resize", "reject"))

sides = st.integers(1, 4096)
bucket_sets = st.lists(
    st.builds(
        Bucket, st.integers(1, 256).map(lambda n: 8 * n), st.integers(1, 256).map(lambda n: 8 * n)
    ),
    min_size=1,
    max_size=8,
    unique=True,
)
fits: st.SearchStrategy[Fit] = st.sampled_from(get_args(Fit))
oversizes: st.SearchStrategy[Oversize] = st.sampled_from(get_args(Oversize))


def planned(
    height: int,
    width: int,
    fit: Fit = "pad",
    oversize: Oversize = "reject",
    *,
    has_image: bool = False,
) -> Plan:
    return plan(
        height,
        width,
        buckets=SDXL,
        fit=fit,
        oversize=oversize,
        multiple=MULTIPLE,
        has_image=has_image,
    )


@settings(max_examples=2000, deadline=None)
@given(sides, sides, bucket_sets, fits, oversizes, st.booleans())
def test_every_plan_gives_exactly_the_asked_size_from_inside_what_was_painted(
    height: int, width: int, buckets: list[Bucket], fit: Fit, oversize: Oversize, has_image: bool
) -> None:
    try:
        made = plan(
            height,
            width,
            buckets=buckets,
            fit=fit,
            oversize=oversize,
            multiple=MULTIPLE,
            has_image=has_image,
        )
    except RequestError as error:
        assert (
            fit != "resize"
            and oversize == "reject"
            and smallest_covering(buckets, Bucket(height, width)) is None
        )
        assert error.code == 400 and error.field in ("height", "width")
        return
    assert (made.crop.height, made.crop.width) == (made.height, made.width) == (height, width)
    assert 0 <= made.crop.top and made.crop.bottom <= made.scaled[0]
    assert 0 <= made.crop.left and made.crop.right <= made.scaled[1]
    assert 1 <= made.image_size[0] and 0 <= made.image_at[0]
    assert 1 <= made.image_size[1] and 0 <= made.image_at[1]
    assert made.image_at[0] + made.image_size[0] <= made.painted.height
    assert made.image_at[1] + made.image_size[1] <= made.painted.width
    assert made.painted == made.bucket or (fit == "mask" and made.bucket.covers(made.painted))
    assert 0 <= made.padding < 1
    assert made.num_computed >= made.scaled[0] * made.scaled[1] >= height * width
    assert not made.bypass or made.bucket == round_up(Bucket(height, width), MULTIPLE)
    assert made.bypass or made.bucket in buckets


@settings(max_examples=1000, deadline=None)
@given(sides, sides, bucket_sets, st.booleans())
def test_pad_paints_the_least_covering_bucket_and_resamples_nothing(
    height: int, width: int, buckets: list[Bucket], has_image: bool
) -> None:
    holding = [bucket for bucket in buckets if bucket.height >= height and bucket.width >= width]
    if not holding:
        return
    made = plan(
        height,
        width,
        buckets=buckets,
        fit="pad",
        oversize="reject",
        multiple=MULTIPLE,
        has_image=has_image,
    )
    assert made.bucket in holding
    assert made.bucket.height * made.bucket.width == min(
        bucket.height * bucket.width for bucket in holding
    )
    assert not made.resampled and not made.bypass


@given(sides, sides, bucket_sets, st.booleans())
def test_with_pad_the_cut_lies_where_the_image_was_laid(
    height: int, width: int, buckets: list[Bucket], has_image: bool
) -> None:
    made = plan(
        height,
        width,
        buckets=buckets,
        fit="pad",
        oversize="eager",
        multiple=MULTIPLE,
        has_image=has_image,
    )
    assert made.image_at == (made.crop.top, made.crop.left)
    assert made.image_size == (made.crop.height, made.crop.width)
    if has_image:
        assert made.image_at == (0, 0)
    # centred: the margins differ by no more than the odd pixel, which goes below and to the right
    else:
        assert made.bucket.height - made.crop.bottom - made.crop.top in (0, 1)
        assert made.bucket.width - made.crop.right - made.crop.left in (0, 1)


@settings(max_examples=2000, deadline=None)
@given(sides, sides, bucket_sets)
def test_resize_scales_both_sides_alike_and_only_just_covers(
    height: int, width: int, buckets: list[Bucket]
) -> None:
    made = plan(
        height,
        width,
        buckets=buckets,
        fit="resize",
        oversize="reject",
        multiple=MULTIPLE,
        has_image=False,
    )
    bucket, (tall, wide) = made.bucket, made.scaled
    assert bucket == nearest_aspect(buckets, height, width)
    assert tall >= height and wide >= width and (tall == height or wide == width)
    # one side is exact, the other was rounded up by less than a pixel
    exact = wide * bucket.height - tall * bucket.width
    assert 0 <= exact < bucket.height if tall == height else 0 <= -exact < bucket.width
    assert tall - made.crop.bottom - made.crop.top in (0, 1)
    assert wide - made.crop.right - made.crop.left in (0, 1)


@settings(max_examples=2000, deadline=None)
@given(sides, sides, bucket_sets)
def test_resize_lays_the_image_where_the_output_map_brings_it_back(
    height: int, width: int, buckets: list[Bucket]
) -> None:
    made = plan(
        height,
        width,
        buckets=buckets,
        fit="resize",
        oversize="reject",
        multiple=MULTIPLE,
        has_image=True,
    )
    for start, stop, at, size, scaled, side in (
        (
            made.crop.top,
            made.crop.bottom,
            made.image_at[0],
            made.image_size[0],
            made.scaled[0],
            made.bucket.height,
        ),
        (
            made.crop.left,
            made.crop.right,
            made.image_at[1],
            made.image_size[1],
            made.scaled[1],
            made.bucket.width,
        ),
    ):
        # Within half a bucket pixel at both ends, or a single pixel where less than one was left.
        slack = scaled if size > 1 else 2 * scaled
        assert abs(at * scaled - start * side) * 2 <= slack
        assert abs((at + size) * scaled - stop * side) * 2 <= slack


@given(sides, sides, bucket_sets)
def test_downscale_is_resize_once_nothing_covers(
    height: int, width: int, buckets: list[Bucket]
) -> None:
    if smallest_covering(buckets, Bucket(height, width)) is not None:
        return
    shrunk, resized = (
        plan(
            height,
            width,
            buckets=buckets,
            fit=fit,
            oversize=oversize,
            multiple=MULTIPLE,
            has_image=True,
        )
        for fit, oversize in SHRUNK_AND_RESIZED
    )
    assert shrunk == resized and not shrunk.bypass


@settings(max_examples=500, deadline=None)
@given(sides, sides, bucket_sets)
def test_mask_and_downscale_paint_the_largest_picture_of_the_asked_proportions(
    height: int, width: int, buckets: list[Bucket]
) -> None:
    if smallest_covering(buckets, round_up(Bucket(height, width), MULTIPLE)) is not None:
        return
    made = plan(
        height,
        width,
        buckets=buckets,
        fit="mask",
        oversize="downscale",
        multiple=MULTIPLE,
        has_image=False,
    )
    inner = {each: inner_size(each.height, each.width, height, width) for each in buckets}
    areas = {each: tall * wide for each, (tall, wide) in inner.items()}
    most = max(areas.values())
    assert areas[made.bucket] == most
    assert made.bucket.volume == min(b.volume for b, area in areas.items() if area == most)
    assert made.painted == round_up(Bucket(*inner[made.bucket]), MULTIPLE)


def test_mask_and_downscale_by_example() -> None:
    """Of nearest shape is 512x512, where a third as much would be painted as in 1024x640."""
    buckets = [Bucket(512, 512), Bucket(1024, 640)]
    made = plan(
        2000,
        2000,
        buckets=buckets,
        fit="mask",
        oversize="downscale",
        multiple=8,
        has_image=False,
    )
    assert made.bucket == Bucket(1024, 640) and made.painted == Bucket(640, 640)
    # the bucket's pixels at the scale of the picture
    assert made.num_computed == 1024 * 640 * 2000**2 // 640**2


@given(sides, sides, sides, sides)
def test_cover_size_is_the_smallest_that_covers(
    height: int, width: int, over_height: int, over_width: int
) -> None:
    tall, wide = cover_size(height, width, over_height, over_width)
    assert (
        tall >= over_height and wide >= over_width and (tall == over_height or wide == over_width)
    )
    assert cover_size(width, height, over_width, over_height) == (wide, tall)


@given(sides, sides, sides, sides)
@example(1, 4096, 4096, 1)
@example(4096, 1, 1, 4096)
def test_inner_size_is_the_largest_inside_to_the_nearest_pixel(
    height: int, width: int, like_height: int, like_width: int
) -> None:
    tall, wide = inner_size(height, width, like_height, like_width)
    assert 1 <= tall <= height and 1 <= wide <= width and (tall == height or wide == width)
    # in halves of a pixel of the side that was rounded
    off = abs(tall * like_width - wide * like_height) * 2
    assert min(tall, wide) == 1 or off <= (like_height if tall == height else like_width)
    assert inner_size(width, height, like_width, like_height) == (wide, tall)


def test_a_size_that_is_a_bucket_is_painted_as_it_is() -> None:
    for fit in get_args(Fit):
        made = planned(1152, 896, fit)
        assert made.bucket == Bucket(1152, 896) and made.padding == 0.0 and not made.resampled
        assert (
            made.crop == Box(0, 0, 1152, 896)
            and made.image_at == (0, 0)
            and made.image_size == (1152, 896)
        )


def test_pad_by_example() -> None:
    made = planned(1000, 911)
    assert made.bucket == Bucket(1024, 1024) and made.crop == Box(12, 56, 1000, 911)
    assert made.padding == pytest.approx(1 - 1000 * 911 / 1024**2)
    assert planned(1000, 911, has_image=True).crop == Box(0, 0, 1000, 911)


def test_resize_by_example() -> None:
    # 0.586 wide as tall: 1152x896 is nearest; it covers at 512 x 399
    made = planned(512, 300, "resize")
    assert made.bucket == Bucket(1152, 896) and made.scaled == (512, 399) and made.resampled
    assert made.crop == Box(0, 49, 512, 300)
    assert made.image_at == (0, 110) and made.image_size == (1152, 674)
    assert made.padding == pytest.approx(1 - 300 / 399)


def test_a_hair_of_a_picture_still_keeps_a_pixel_of_its_image() -> None:
    made = resize_into(Bucket(64, 64), 1, 4096)
    assert made.scaled == (4096, 4096) and made.crop == Box(2047, 0, 1, 4096)
    assert made.image_size == (1, 64) and made.image_at == (32, 0)


@pytest.mark.parametrize(
    ("height", "width", "field"),
    [
        (100, 1153, "width"),
        (1153, 100, "height"),
        (2000, 3000, "width"),
        (1152, 1152, "width"),
        (1152, 1000, "height"),
    ],
)
def test_a_refusal_names_the_side_and_the_largest_buckets(
    height: int, width: int, field: str
) -> None:
    with pytest.raises(RequestError) as caught:
        planned(height, width)
    assert caught.value.field == field
    assert f"height {height} and width {width}" in caught.value.message
    assert "downscale" in caught.value.message
    assert f"nearest is {nearest_aspect(SDXL, height, width)} " in caught.value.message
    assert all(str(bucket) in caught.value.message for bucket in SDXL)


def test_a_refusal_leaves_out_buckets_that_lie_inside_others() -> None:
    small, large = Bucket(256, 256), Bucket(512, 512)
    with pytest.raises(RequestError) as caught:
        plan(
            600,
            100,
            buckets=[small, large],
            fit="pad",
            oversize="reject",
            multiple=8,
            has_image=False,
        )
    assert "512x512" in caught.value.message and "256x256" not in caught.value.message


def test_eager_rounds_the_size_up_to_what_the_pipeline_can_paint() -> None:
    made = planned(1025, 1300, oversize="eager")
    assert made.bypass and made.bucket == Bucket(1032, 1304)
    assert made.crop == Box(3, 2, 1025, 1300) and not made.resampled
    assert planned(1024, 1024, oversize="eager").bypass is False


def test_what_cannot_be_planned_is_a_fault_of_the_caller() -> None:
    with pytest.raises(ValueError, match="positive"):
        planned(0, 10)
    with pytest.raises(ValueError, match="no buckets"):
        plan(10, 10, buckets=[], fit="pad", oversize="reject", multiple=8, has_image=False)
    with pytest.raises(ValueError, match="does not cover"):
        pad_into(Bucket(64, 64), 65, 10, has_image=False)
