"""Equal but for rounding: the one place that compares a result with eager's."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from preheat.compilation.signatures import leaves

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The largest difference that counts as rounding, by dtype: a share of the largest magnitude,
    which counts as `floor` where it is less.
    """

    shares: Mapping[torch.dtype, float]
    floor: float


# Two, because two things differ. Compiled code has other kernels, which add up in another order at
# every layer (bfloat16 on a small UNet: 0.04 off); other weights or a wrong kernel are off by more,
# however small the numbers are. Padding runs the same kernels on more elements, so less is let
# through; but its answers are what clients read, where 1e-5 for 0 is no change.
COMPILED = Tolerance({torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 8e-2}, floor=0.0)
PADDED = Tolerance({torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}, floor=1.0)


@dataclass(frozen=True, slots=True)
class Closeness:
    """`max_error` is 0 between equal infinities, NaN where one side is none; `share` is of the
    largest finite magnitude expected.
    """

    max_error: float
    share: float
    ok: bool


def compare(
    actual: torch.Tensor,
    expected: torch.Tensor,
    tolerance: Tolerance = COMPILED,
    dtype: torch.dtype | None = None,
) -> Closeness:
    """How far `actual`, of the same shape, is from `expected`; `dtype` is what was computed in,
    where that is not the dtype of the result.
    """
    if not expected.numel():
        return Closeness(0.0, 0.0, ok=True)
    ours, theirs = actual.double(), expected.double()
    error = float((ours - theirs).abs().masked_fill(ours == theirs, 0.0).max())
    magnitude = float(theirs.nan_to_num(0.0, 0.0, 0.0).abs().max())
    allowed = tolerance.shares.get(dtype or expected.dtype, 0.0)
    ok = error <= allowed * max(magnitude, tolerance.floor)  # of NaN, which is no number, not so
    return Closeness(error, error / magnitude if magnitude else error, ok)


def mismatch(result: Any, expected: Any, name: str = "") -> str | None:
    """Why what compiled code gave is not what eager gave, or None where it is close enough; the log
    then says how close, if the code has a name.
    """
    worst = 0.0, 0.0
    ours, theirs = dict(leaves((result,), {})), dict(leaves((expected,), {}))
    if ours.keys() != theirs.keys():
        return f"it returns {sorted(ours)}, eager returns {sorted(theirs)}"
    for path, tensor in theirs.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        own = ours[path]
        if own.shape != tensor.shape or own.dtype != tensor.dtype:
            return (
                f"it returns {tuple(own.shape)} {own.dtype}, "
                f"eager {tuple(tensor.shape)} {tensor.dtype}"
            )
        close, allowed = compare(own, tensor), COMPILED.shares.get(tensor.dtype, 0.0)
        if not close.ok:
            return (
                f"its result differs from eager by {close.share:.2g} of the largest magnitude; "
                f"{allowed:g} is let through"
            )
        worst = max(worst, (close.share, allowed))
    if name:
        logger.info(
            "%s: differs from eager by %.2g of the largest magnitude; %g is let through",
            name,
            *worst,
        )
    return None
