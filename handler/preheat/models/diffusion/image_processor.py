"""Pictures placed in a bucket, and cut from it, as their plan says."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from preheat.models.diffusion.geometry import Plan, inner_size


def fit_to(image: Image.Image, height: int, width: int) -> Image.Image:
    """`image` resampled (Lanczos) to cover `height` x `width` pixels, with the middle cut out:
    exactly that size.
    """
    if image.size == (width, height):
        return image
    # Cut first: a sliver scaled up to cover would be a thousand times what is left of it.
    rows, columns = inner_size(image.height, image.width, height, width)
    top, left = (image.height - rows) // 2, (image.width - columns) // 2
    return image.resize(
        (width, height), Image.Resampling.LANCZOS, box=(left, top, left + columns, top + rows)
    )


def place(image: Image.Image, plan: Plan) -> Image.Image:
    """An input image of the asked size placed in its bucket, its edges continued as far as needed.

    Raises:
        ValueError: the image has not the plan's asked size.
    """
    if image.size != (plan.width, plan.height):
        raise ValueError(
            f"the image is {image.height}x{image.width}, the plan is for {plan.height}x{plan.width}"
        )
    rows, columns = plan.image_size
    if image.size != (columns, rows):
        image = image.resize((columns, rows), Image.Resampling.LANCZOS)
    top, left = plan.image_at
    bottom, right = plan.bucket.height - top - rows, plan.bucket.width - left - columns
    pixels = np.asarray(image)  # (rows, columns, 3), or (rows, columns) of a mask
    margins = ((top, bottom), (left, right), (0, 0))[: pixels.ndim]
    return Image.fromarray(np.pad(pixels, margins, mode="edge"))


def unmasked(image: Image.Image, mask: Image.Image) -> Image.Image:
    """`image` as RGBA, transparent where the mask says that it is made anew: from 128 on, as
    diffusers reads it.
    """
    kept = image.copy()
    kept.putalpha(mask.point(lambda value: 0 if value >= 128 else 255))
    return kept


def finish(pixels: NDArray[np.uint8], plan: Plan) -> Image.Image:
    """The picture asked for, from the generated bucket: (bucket height, bucket width, 3).

    Raises:
        ValueError: the pixels are not a bucket of 8-bit RGB.
    """
    bucket, painted, crop = plan.bucket, plan.painted, plan.crop
    if pixels.shape != (bucket.height, bucket.width, 3) or pixels.dtype != np.uint8:
        raise ValueError(
            f"generated {pixels.dtype} {pixels.shape}, the plan is for 8-bit RGB of {bucket}"
        )
    pixels = pixels[: painted.height, : painted.width]
    if not plan.resampled:
        return Image.fromarray(
            np.ascontiguousarray(pixels[crop.top : crop.bottom, crop.left : crop.right])
        )
    # Resampling to `scaled` and cutting `crop` in one: parts outside are not made.
    box = _cut_from(plan, painted.height, painted.width)
    return Image.fromarray(np.ascontiguousarray(pixels)).resize(
        (plan.width, plan.height), Image.Resampling.LANCZOS, box=box
    )


def preview(cells: NDArray[np.uint8], plan: Plan) -> Image.Image:
    """The picture asked for, small, from a bucket generated with a pixel per latent cell: (latent
    height, latent width, 3).
    """
    high = max(1, len(cells) * plan.painted.height // plan.bucket.height)
    broad = max(1, cells.shape[1] * plan.painted.width // plan.bucket.width)
    cells = np.ascontiguousarray(cells[:high, :broad])
    size = (
        max(1, plan.width * broad // plan.painted.width),
        max(1, plan.height * high // plan.painted.height),
    )
    box = _cut_from(plan, high, broad)
    return Image.fromarray(cells).resize(size, Image.Resampling.BILINEAR, box=box)


def _cut_from(plan: Plan, high: int, broad: int) -> tuple[float, float, float, float]:
    """The plan's `crop` as (left, top, right, bottom), seen from what is painted, of this size."""
    (tall, wide), crop = plan.scaled, plan.crop
    # Multiplied before divided: exact at the far edges, past which Pillow refuses a box.
    return (
        crop.left * broad / wide,
        crop.top * high / tall,
        crop.right * broad / wide,
        crop.bottom * high / tall,
    )
