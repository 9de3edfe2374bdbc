"""Whether a masked network gives what it gives without masks: looked at once, at load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from preheat.buckets import Bucket
from preheat.compilation.closeness import Closeness, Tolerance, compare
from preheat.errors import ConfigError
from preheat.models.diffusion.masking.call import Call

MASKED = Tolerance({torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}, floor=0.0)
"""Masks change nothing but the order of sums. In half precision that is as much as compiling does:
see `closeness`.
"""
_BORDER = {4: 2, 3: 1}
"""Latent cells, or tokens of Flux's, that lie beside what is masked, by the dimensions of what is
compared.
"""
_AT_BORDER = 3.0
"""Rounding is the same everywhere: more than so many times that inside is something else, such as
a bias where the row's own border has zeros.
"""


def odd_size(bucket: Bucket, multiple: int) -> Bucket:
    """About five eighths of each side, in pixels: an odd number of `multiple`, so that no halving
    of it is even.
    """
    height, width = (
        max(1, side * 5 // 8 // multiple - 1 | 1) * multiple
        for side in (bucket.height, bucket.width)
    )
    return Bucket(height, width)


@dataclass(frozen=True, slots=True)
class Difference:
    """How far the network's own cells are off from the same network without masks at that size."""

    close: Closeness
    border: float
    """The largest error of the cells beside what is masked, as a share of the largest magnitude."""
    is_border_worse: bool
    """That is more than what rounding is elsewhere."""
    outside: float
    """By how much it matters whether NaN lies outside, or a large number: 0, to the bit."""

    @property
    def reason(self) -> str | None:
        """Why it is not exact; None where it is."""
        if self.outside != 0:  # NaN is none of both
            return f"what lies outside changes it by {self.outside:.2g}"
        if not self.close.ok:
            return f"it is off by {self.close.share:.2g} of the largest magnitude"
        if self.is_border_worse:
            return f"at its border it is off by {self.border:.2g} of the largest magnitude"
        return None


def difference(call: Call) -> Difference:
    """Compare three calls of the network, eagerly: masked twice, with something else outside, and
    without masks.
    """
    with torch.no_grad():
        masked, other, alone = call.masked(torch.nan), call.masked(1e3), call.alone()
    outside = 0.0 if torch.equal(masked, other) else compare(masked, other).max_error
    errors = call.made.grid((masked.double() - alone.double()).abs()).amax((0, 1))
    # down and across, where the row ends before its canvas does
    ends = [own < whole for own, whole in zip(call.place.cells, call.place.canvas, strict=True)]
    wide = -_BORDER[alone.dim()] * call.cells[1]
    inner = errors[: wide if ends[0] else None, : wide if ends[1] else None]
    border = errors.clone()
    border[: inner.shape[0], : inner.shape[1]] = 0.0
    magnitude = float(alone.abs().max()) or 1.0
    worst = float(border.max()) / magnitude
    # a last digit more or less, where all else agrees to the bit
    digit = torch.finfo(alone.dtype).eps
    allowed = _AT_BORDER * float(inner.max()) / magnitude + digit if inner.numel() else torch.inf
    return Difference(compare(masked, alone, MASKED), worst, worst > allowed, outside)


def checked(calls: Iterable[tuple[str, Call]]) -> Mapping[str, float | str]:
    """The figures for the state, the worst of all.

    Args:
        calls: one of each masked network in each of its buckets, at an odd size, with its name.

    Raises:
        ConfigError: there is a difference beyond rounding.
    """
    found = []
    for name, call in calls:
        seen = difference(call)
        if seen.reason is not None:
            raise ConfigError(
                f"mask is not exact with this model: {name}: {seen.reason}; use pad",
                "pt2.shapes.fit",
            )
        found.append(seen)
    return {
        "max_error": max(seen.close.max_error for seen in found),
        "max_share": max(seen.close.share for seen in found),
        "border_share": max(seen.border for seen in found),
        "outside_error": max(seen.outside for seen in found),
        "exact": "rounding",
    }
