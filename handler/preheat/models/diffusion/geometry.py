"""Geometry: how a picture of the asked size is placed in a bucket and cut out of it again.

A plan is made of integers alone, so it loses no pixel: what comes out is always exactly the asked
size. The output's way is bucket -> its upper left, `painted` -> resampled to `scaled` -> cut to
`crop`; an input image goes the same way backwards, so that what was generated over it comes out
where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from preheat.buckets import Bucket, nearest_aspect, round_up, smallest_covering
from preheat.errors import NoBucket

if TYPE_CHECKING:
    from preheat.config.pt2 import Fit, Oversize


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of pixels; `top` and `left` count from the upper left corner of what it is cut
    from.
    """

    top: int
    left: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        """The first row below the rectangle."""
        return self.top + self.height

    @property
    def right(self) -> int:
        """The first column right of the rectangle."""
        return self.left + self.width


@dataclass(frozen=True, slots=True)
class Plan:
    """Where everything lies for one request. All sizes are (height, width), in pixels."""

    height: int
    """What was asked for, and what comes out."""
    width: int
    bucket: Bucket
    """What the pipeline generates."""
    painted: Bucket
    """What of it is the picture, in the bucket's upper left: all of it, unless `fit: mask`."""
    bypass: bool
    """Generated uncompiled on purpose, and without a bucket around it: a size outside every one
    (`oversize: eager`), or one that is quicker so.
    """
    scaled: tuple[int, int]
    """What the picture is resampled to; its own size where it is not."""
    crop: Box
    """What is cut from the scaled picture: exactly `height` x `width`."""
    image_size: tuple[int, int]
    """What an input image, which arrives at the asked size, is resampled to."""
    image_at: tuple[int, int]
    """(top, left) of the input image in the bucket; around it its edges are replicated."""

    @property
    def padding(self) -> float:
        """Share of the generated picture that is thrown away: 0 (none of it) to 1 (not reached)."""
        scaled_height, scaled_width = self.scaled
        generated = scaled_height * scaled_width
        return (generated - self.height * self.width) / generated

    @property
    def num_computed(self) -> int:
        """Pixels of the whole bucket, where the picture is as large as it comes out: as its part of
        the bucket was resampled, so is the rest.
        """
        generated = self.scaled[0] * self.scaled[1]
        return _ceil_div(self.bucket.volume * generated, self.painted.volume)

    @property
    def is_masked(self) -> bool:
        """Whether it is painted in a part of its bucket."""
        return self.painted != self.bucket

    @property
    def resampled(self) -> bool:
        """Whether the output is resampled; if not, it is cut out untouched."""
        return self.scaled != (self.painted.height, self.painted.width)


def plan(
    height: int,
    width: int,
    *,
    buckets: Sequence[Bucket],
    fit: Fit,
    oversize: Oversize,
    multiple: int,
    has_image: bool,
) -> Plan:
    """The plan for a picture of `height` x `width` pixels.

    `multiple` is what the pipeline's sides must be divisible by: `fit: mask` rounds up to it, and
    what lies outside every bucket.

    Raises:
        NoBucket: no bucket covers the size, and `oversize` is `reject`.
        ValueError: a side is not positive, or there are no buckets.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a picture needs a positive height and width, got {height}x{width}")
    if not buckets:
        raise ValueError("no buckets to plan with")
    if fit == "resize":
        return resize_into(nearest_aspect(buckets, height, width), height, width)
    own = round_up(Bucket(height, width), multiple) if fit == "mask" else None
    bucket = smallest_covering(buckets, own or Bucket(height, width))
    if bucket is not None:
        return replace(pad_into(own or bucket, height, width, has_image=has_image), bucket=bucket)
    if oversize == "downscale":
        if fit == "mask":
            bucket, inner = _roomiest(buckets, height, width)
            return replace(resize_into(round_up(inner, multiple), height, width), bucket=bucket)
        return resize_into(nearest_aspect(buckets, height, width), height, width)
    if oversize == "eager":
        own = round_up(Bucket(height, width), multiple)
        return pad_into(own, height, width, has_image=has_image, bypass=True)
    raise _too_large(height, width, buckets)


def alone(plan: Plan) -> Plan:
    """The same picture, generated uncompiled and without a canvas around it."""
    return replace(plan, bucket=plan.painted, bypass=True)


def smaller(bucket: Bucket, multiple: int) -> Bucket | None:
    """The largest size, sides multiples of `multiple`, that does not fill the bucket; None where
    there is none.
    """
    if bucket.height > multiple:
        return Bucket(bucket.height - multiple, bucket.width)
    return Bucket(bucket.height, bucket.width - multiple) if bucket.width > multiple else None


def pad_into(
    bucket: Bucket,
    height: int,
    width: int,
    *,
    has_image: bool,
    bypass: bool = False,
) -> Plan:
    """The plan that generates more than asked for and cuts the surplus off, resampling nothing.

    An input image lies at the upper left, continued to the right and down; without one the cut is
    centred, where a model puts its subject.

    Raises:
        ValueError: the bucket does not cover the size.
    """
    if not bucket.covers(Bucket(height, width)):
        raise ValueError(f"bucket {bucket} does not cover {height}x{width}")
    top, left = (
        (0, 0) if has_image else ((bucket.height - height) // 2, (bucket.width - width) // 2)
    )
    return Plan(
        height=height,
        width=width,
        bucket=bucket,
        painted=bucket,
        bypass=bypass,
        scaled=(bucket.height, bucket.width),
        crop=Box(top, left, height, width),
        image_size=(height, width),
        image_at=(top, left),
    )


def resize_into(bucket: Bucket, height: int, width: int) -> Plan:
    """The plan that resamples the generated bucket until it just covers the size, and cuts the
    middle out of it.
    """
    scaled_height, scaled_width = cover_size(bucket.height, bucket.width, height, width)
    crop = Box((scaled_height - height) // 2, (scaled_width - width) // 2, height, width)
    top, image_height = _unscaled(crop.top, crop.bottom, scaled_height, bucket.height)
    left, image_width = _unscaled(crop.left, crop.right, scaled_width, bucket.width)
    return Plan(
        height=height,
        width=width,
        bucket=bucket,
        painted=bucket,
        bypass=False,
        scaled=(scaled_height, scaled_width),
        crop=crop,
        image_size=(image_height, image_width),
        image_at=(top, left),
    )


def cover_size(height: int, width: int, over_height: int, over_width: int) -> tuple[int, int]:
    """(height, width) scaled by one factor, up or down, to the smallest size that covers the other
    (pixels).
    """
    if over_height * width >= over_width * height:  # the height decides the factor
        return over_height, _ceil_div(width * over_height, height)
    return _ceil_div(height * over_width, width), over_width


def inner_size(height: int, width: int, like_height: int, like_width: int) -> tuple[int, int]:
    """The largest (height, width) inside the one size with the aspect ratio of the other, to the
    nearest pixel.
    """
    if height * like_width <= width * like_height:  # the height is what there is least of
        return height, max(1, _round_div(height * like_width, like_height))
    return max(1, _round_div(width * like_height, like_width)), width


def _roomiest(buckets: Sequence[Bucket], height: int, width: int) -> tuple[Bucket, Bucket]:
    """The bucket that holds the largest picture of these proportions, of equals the smallest, and
    that picture's size.
    """
    holding = [
        (bucket, Bucket(*inner_size(bucket.height, bucket.width, height, width)))
        for bucket in buckets
    ]
    return max(holding, key=lambda each: (each[1].volume, -each[0].volume, -each[0].height))


def _unscaled(start: int, stop: int, scaled: int, side: int) -> tuple[int, int]:
    """(start, length) of the stretch start..stop of a `scaled` side, taken back to a side of `side`
    pixels.

    Both ends are rounded to the nearest pixel; at least one pixel is left. None lies outside, since
    a centred stretch starts before the middle.
    """
    first = _round_div(start * side, scaled)
    last = max(_round_div(stop * side, scaled), first + 1)
    return first, last - first


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _round_div(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def _too_large(height: int, width: int, buckets: Sequence[Bucket]) -> NoBucket:
    """The refusal, which names the side that no bucket can hold (the longer one, where each alone
    would fit).
    """
    if all(bucket.width < width for bucket in buckets):
        field = "width"
    elif all(bucket.height < height for bucket in buckets):
        field = "height"
    else:
        field = "width" if width >= height else "height"
    largest = ", ".join(str(bucket) for bucket in _largest(buckets))
    nearest = nearest_aspect(buckets, height, width)
    return NoBucket(
        f"is too much: no bucket covers height {height} and width {width}; the nearest is "
        f"{nearest} (height x width), the largest: {largest}; with pt2.shapes.oversize: downscale "
        "the server would generate a bucket and scale it up",
        field,
        Bucket(height, width),
    )


def _largest(buckets: Sequence[Bucket]) -> list[Bucket]:
    """The buckets that no other one covers: the reach of the model."""
    outer = [
        one for one in set(buckets) if not any(other.covers(one) for other in set(buckets) - {one})
    ]
    return sorted(outer, key=lambda bucket: (-bucket.volume, bucket.height))
