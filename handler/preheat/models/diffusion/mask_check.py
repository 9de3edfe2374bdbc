"""Whether a masked network gives what it gives without masks: looked at once, at load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from preheat.buckets import Bucket, round_up
from preheat.compilation.closeness import Closeness, Tolerance, compare
from preheat.errors import ConfigError
from preheat.models.diffusion.masking.painting import Call

MASKED = Tolerance({torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}, floor=0.0)
"""Masks change nothing but the order of sums. In half precision that is as much as compiling does:
see `closeness`.
"""


def odd_size(bucket: Bucket, grid: int) -> Bucket:
    """About five eighths of each side, in pixels: not a size that halves like the bucket does."""
    return round_up(Bucket(bucket.height * 5 // 8, bucket.width * 5 // 8), grid)


def difference(call: Call) -> Closeness:
    """How far the network's own cells are off where all others are NaN, from the same network
    without masks at that size; eagerly.
    """
    with torch.no_grad():
        masked, alone = call.masked(), call.alone()
    return compare(masked, alone, MASKED)


def checked(
    buckets: Sequence[Bucket], grid: int, first_call: Callable[[Bucket, Bucket], Call]
) -> Mapping[str, float | str]:
    """The figures for the state, of an odd size in every bucket.

    Args:
        first_call: gives the first call of the network in a run at a bucket whose rows have a size.

    Raises:
        ConfigError: there is a difference beyond rounding.
    """
    found = {bucket: difference(first_call(bucket, odd_size(bucket, grid))) for bucket in buckets}
    for bucket, close in found.items():
        if not close.ok:
            raise ConfigError(
                f"mask is not exact with this model: in {bucket} it is off by {close.share:.2g} of "
                "the largest magnitude; use pad",
                "pt2.shapes.fit",
            )
    return {
        "max_error": max(close.max_error for close in found.values()),
        "max_share": max(close.share for close in found.values()),
        "exact": "rounding",
    }
