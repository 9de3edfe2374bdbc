"""Buckets of named dimensions: what a module's inputs are padded to. Integers only.

A dimension has sizes of its own, and a bucket is one size of each: every combination exists, so the
smallest one that covers a request, or a batch of them, is found dimension by dimension.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod


@dataclass(frozen=True, slots=True)
class Dims:
    """One size of each bucketed dimension, by name, in the YAML's order; empty where every shape is
    fixed.
    """

    sizes: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.sizes) or "fixed"

    def __getitem__(self, name: str) -> int:
        return dict(self.sizes)[name]

    @property
    def volume(self) -> int:
        """The product of the sizes."""
        return prod(size for _, size in self.sizes)

    def document(self) -> dict[str, dict[str, int]]:
        """Its part of a row of the state."""
        return {"dims": dict(self.sizes)}


def combinations(choices: Mapping[str, Sequence[int]]) -> tuple[Dims, ...]:
    """Every bucket, the largest first: one that does not fit into memory shows at once, and memory
    pools grow once.
    """
    every = (Dims(tuple(zip(choices, sizes, strict=True))) for sizes in product(*choices.values()))
    return tuple(sorted(every, key=lambda dims: (-dims.volume, dims.sizes)))


def covering(choices: Mapping[str, Sequence[int]], sizes: Mapping[str, int]) -> Dims | None:
    """The smallest bucket that holds `sizes`; None where a dimension has no size so large."""
    chosen = []
    for name, allowed in choices.items():
        ascending = sorted(allowed)
        index = bisect_left(ascending, sizes[name])
        if index == len(ascending):
            return None
        chosen.append((name, ascending[index]))
    return Dims(tuple(chosen))


def joined(buckets: Sequence[Dims]) -> Dims:
    """The smallest bucket that holds all of `buckets`.

    Raises:
        ValueError: there is none, or they have different dimensions.
    """
    names = [name for name, _ in buckets[0].sizes] if buckets else None
    if names is None or any([name for name, _ in each.sizes] != names for each in buckets):
        raise ValueError(f"no common bucket of {[str(each) for each in buckets]}")
    return Dims(tuple((name, max(each[name] for each in buckets)) for name in names))
