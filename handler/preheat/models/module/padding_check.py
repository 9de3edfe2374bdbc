"""What padding changes in a module's answers, measured by running it with and without."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from preheat.buckets import Bucket, smallest_covering
from preheat.compilation.closeness import PADDED, Closeness, compare
from preheat.config.module import ModuleConfig
from preheat.errors import ConfigError

if TYPE_CHECKING:
    from preheat.models.module.runner import ModuleRunner


def measure(
    runner: ModuleRunner, buckets: Sequence[Bucket], config: ModuleConfig, dtype: torch.dtype
) -> list[Closeness]:
    """How far padding takes an answer from that of the unpadded module run eagerly, in the
    smallest and the largest of the buckets.

    Raises:
        ConfigError: an output grows with the padding, and the YAML does not cut it.
    """
    found = []
    ends = (buckets[0], buckets[-1])
    for sizes in {each for bucket in ends for each in _measured(bucket, config.choices)}:
        covering = smallest_covering(buckets, Bucket(**dict(sizes)))
        # as beside a larger row, where one graph serves all sizes
        job = replace(runner.sample(dict(sizes), seed=0), bucket=covering)
        (ours,), alone = runner.batches.run([job]), runner.alone(job)
        for answer in (ours, alone):
            answer.raise_if_failed()
        for name, tensor in alone.outputs.items():
            _check_cut(name, ours.outputs[name], tensor, config)
            found.append(compare(ours.outputs[name], tensor, PADDED, dtype))
    return found


def document(found: Sequence[Closeness]) -> Mapping[str, float | str]:
    """As the state shows it."""
    exact = "rounding" if all(close.ok for close in found) else "padded"
    if not all(math.isfinite(close.max_error) for close in found):  # JSON has no other numbers
        return {"max_error": "not finite", "max_share": "not finite", "exact": exact}
    return {
        "max_error": max((close.max_error for close in found), default=0.0),
        "max_share": round(max((close.share for close in found), default=0.0), 6),
        "exact": exact,
    }


def inside(bucket: Bucket, choices: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Sizes that are padded the most in this bucket: one more than the bucket below holds, or half
    of the smallest.
    """
    sizes = {}
    for name, size in bucket.sizes:
        below = max((other for other in choices[name] if other < size), default=None)
        sizes[name] = below + 1 if below is not None else max(1, size // 2)
    return sizes


def _measured(
    bucket: Bucket, choices: Mapping[str, Sequence[int]]
) -> list[tuple[tuple[str, int], ...]]:
    """Sizes to measure padding with: odd and even ones, since a module that halves them rounds one
    of the two up or down.
    """
    base = inside(bucket, choices)
    beside = {
        name: size + 1 if size < bucket[name] else max(1, size - 1) for name, size in base.items()
    }
    return [tuple(base.items()), tuple(beside.items())]


def _check_cut(name: str, ours: torch.Tensor, alone: torch.Tensor, config: ModuleConfig) -> None:
    if ours.shape == alone.shape:
        return
    dims = [
        dim
        for dim, sizes in enumerate(zip(ours.shape, alone.shape, strict=False))
        if sizes[0] != sizes[1]
    ]
    what = f"is {tuple(ours.shape)} where the module without padding gives {tuple(alone.shape)}"
    if 0 in dims or ours.dim() != alone.dim():
        raise ConfigError(
            f"{what}; its first dimension must be the batch", f"module.outputs.{name}"
        )
    grown = ", ".join(f"{dim}: ..." for dim in dims)
    raise ConfigError(
        f"{what}; cut it: crop: {{{grown}}} with {' or '.join(config.choices)}, divided where the "
        "module shrinks it, rounded up",
        f"module.outputs.{name}.crop",
    )
