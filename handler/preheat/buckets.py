"""Buckets: the fixed sizes a model is warmed for, and the choice of one for a requested size.

Integers only: a ratio is compared by cross-multiplication, never rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import prod
from typing import overload


@dataclass(frozen=True, init=False)
class Bucket:
    """A size of each dimension, by name and in order; what is padded into a bucket has such sizes,
    too.

    `Bucket(1024, 768)` is a picture's height and width in pixels, `Bucket(sequence=512)` one of the
    YAML's own dimensions, and `Bucket()` that of a module whose shapes are all fixed.
    """

    sizes: tuple[tuple[str, int], ...]
    is_picture: bool

    @overload
    def __init__(self, height: int, width: int, /) -> None: ...

    @overload
    def __init__(self, /, **sizes: int) -> None: ...

    def __init__(self, /, *sides: int, **sizes: int) -> None:
        named = dict(zip(("height", "width"), sides, strict=True)) if sides else sizes
        object.__setattr__(self, "sizes", tuple(named.items()))
        object.__setattr__(self, "is_picture", bool(sides))
        if min(named.values(), default=1) < 1:
            raise ValueError(f"the sizes of a bucket are positive, got {self}")

    def __str__(self) -> str:
        """As headers, metrics and the state name it."""
        if self.is_picture:
            return f"{self.height}x{self.width}"
        return " ".join(f"{name}={size}" for name, size in self.sizes) or "fixed"

    def __getitem__(self, name: str) -> int:
        return next(size for own, size in self.sizes if own == name)

    @property
    def height(self) -> int:
        return self["height"]

    @property
    def width(self) -> int:
        return self["width"]

    @property
    def volume(self) -> int:
        """The product of the sizes: a picture's area in square pixels."""
        return prod(size for _, size in self.sizes)

    def covers(self, other: Bucket) -> bool:
        """Whether what has these sizes fits inside."""
        return all(self[name] >= size for name, size in other.sizes)


def combinations(choices: Mapping[str, Sequence[int]]) -> tuple[Bucket, ...]:
    """A bucket for every choice of one size a dimension, the largest first: one that does not fit
    into memory shows at once, and memory pools grow once.
    """
    every = (
        Bucket(**dict(zip(choices, sizes, strict=True))) for sizes in product(*choices.values())
    )
    return tuple(sorted(every, key=lambda bucket: (-bucket.volume, bucket.sizes)))


def smallest_covering(buckets: Sequence[Bucket], sizes: Bucket) -> Bucket | None:
    """The bucket of least volume that covers `sizes` (ties: the smaller first size); None if none
    does.
    """
    return min(
        (bucket for bucket in buckets if bucket.covers(sizes)),
        key=lambda bucket: (bucket.volume, bucket.sizes),
        default=None,
    )


def joined(buckets: Sequence[Bucket]) -> Bucket:
    """The smallest sizes that cover all of `buckets`.

    Raises:
        ValueError: there is none, or they have different dimensions.
    """
    names = {tuple(name for name, _ in bucket.sizes) for bucket in buckets}
    if len(names) != 1:
        raise ValueError(f"no common bucket of {[str(each) for each in buckets]}")
    largest = {name: max(each[name] for each in buckets) for name in names.pop()}
    return Bucket(*largest.values()) if buckets[0].is_picture else Bucket(**largest)


def nearest_aspect(buckets: Sequence[Bucket], height: int, width: int) -> Bucket:
    """The bucket whose aspect ratio is nearest to that of `height` x `width` pixels.

    Near is a matter of factors: twice too wide is as far as twice too tall. Among equally near
    buckets one that covers goes before one that does not, then the least area among those that
    cover (less to compute) or the greatest among those that do not (less to invent), then the
    smaller height.

    Raises:
        ValueError: there are no buckets.
    """
    if not buckets:
        raise ValueError("no buckets to choose from")

    def distance(bucket: Bucket) -> tuple[Fraction, bool, int, int]:
        wide, tall = bucket.width * height, width * bucket.height
        covers = bucket.covers(Bucket(height, width))
        area = bucket.volume if covers else -bucket.volume
        return Fraction(max(wide, tall), min(wide, tall)), not covers, area, bucket.height

    return min(buckets, key=distance)


def round_up(size: Bucket, multiple: int) -> Bucket:
    """The smallest picture that covers `size` with both sides on `multiple` (pixels).

    Raises:
        ValueError: `multiple` is not positive.
    """
    if multiple < 1:
        raise ValueError(f"multiple must be positive, got {multiple}")
    return Bucket(*(-(-side // multiple) * multiple for side in (size.height, size.width)))


def split_rows(batch_sizes: Sequence[int], rows: int) -> tuple[int, ...]:
    """The batch sizes of the runs for `rows` rows, largest first.

    The fewest rows are computed as padding; among equals, in the fewest runs.

    Raises:
        ValueError: there is no batch size, or no row.
    """
    if rows < 1 or not batch_sizes:
        raise ValueError(f"cannot split {rows} rows into runs of {list(batch_sizes)}")
    # best[n]: (rows generated, runs) and the runs for at least n rows; every n is reached from a
    # smaller one by one more run.
    best: list[tuple[int, int, tuple[int, ...]]] = [(0, 0, ())]
    for num in range(1, rows + 1):
        fewer = ((size, *best[max(0, num - size)]) for size in batch_sizes)
        best.append(
            min(
                (generated + size, runs + 1, (size, *sizes))
                for size, generated, runs, sizes in fewer
            )
        )
    return tuple(sorted(best[rows][2], reverse=True))
