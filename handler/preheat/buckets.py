"""Buckets: the fixed sizes a model is warmed for, and the choice of one for a requested size.

Integers only: a size is compared by cross-multiplication, never by a rounded ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A size the pipeline paints at, in pixels."""

    height: int
    width: int

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"a bucket needs a positive height and width, got {self}")

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    def document(self) -> dict[str, int]:
        """Its part of a row of the state."""
        return {"height": self.height, "width": self.width}

    @property
    def area(self) -> int:
        """Height times width, in square pixels."""
        return self.height * self.width

    def covers(self, height: int, width: int) -> bool:
        """Whether a picture of `height` x `width` pixels fits inside."""
        return self.height >= height and self.width >= width


def covering(buckets: Sequence[Bucket], height: int, width: int) -> Bucket | None:
    """The bucket of least area that covers `height` x `width` pixels (ties: smaller height); None
    if none does.
    """
    return min(
        (bucket for bucket in buckets if bucket.covers(height, width)),
        key=lambda bucket: (bucket.area, bucket.height),
        default=None,
    )


def nearest_aspect(buckets: Sequence[Bucket], height: int, width: int) -> Bucket:
    """The bucket whose aspect ratio is nearest to that of `height` x `width` pixels.

    Near is a matter of factors: twice too wide is as far as twice too tall. Among equally near
    buckets one that covers goes before one that does not, then the least area among those that
    cover (less to paint) or the greatest among those that do not (less to invent), then the smaller
    height.

    Raises:
        ValueError: there are no buckets.
    """
    if not buckets:
        raise ValueError("no buckets to choose from")

    def distance(bucket: Bucket) -> tuple[Fraction, bool, int, int]:
        wide, tall = bucket.width * height, width * bucket.height
        covers = bucket.covers(height, width)
        area = bucket.area if covers else -bucket.area
        return Fraction(max(wide, tall), min(wide, tall)), not covers, area, bucket.height

    return min(buckets, key=distance)


def round_up(size: Bucket | tuple[int, int], multiple: int) -> Bucket:
    """The smallest size that covers `size`, a bucket or (height, width), with both sides on
    `multiple` (pixels).

    Raises:
        ValueError: `multiple` is not positive.
    """
    if multiple < 1:
        raise ValueError(f"multiple must be positive, got {multiple}")
    height, width = (size.height, size.width) if isinstance(size, Bucket) else size
    return Bucket(-(-height // multiple) * multiple, -(-width // multiple) * multiple)


def split_rows(batch_sizes: Sequence[int], rows: int) -> tuple[int, ...]:
    """The batch sizes of the runs that paint `rows` rows, largest first.

    The fewest rows are painted in vain; among equals, in the fewest runs.

    Raises:
        ValueError: there is no batch size, or nothing to paint.
    """
    if rows < 1 or not batch_sizes:
        raise ValueError(f"cannot split {rows} rows into runs of {list(batch_sizes)}")
    # best[n]: (rows painted, runs) and the runs for at least n rows; every n is reached from a
    # smaller one by one more run.
    best: list[tuple[int, int, tuple[int, ...]]] = [(0, 0, ())]
    for num in range(1, rows + 1):
        fewer = ((size, *best[max(0, num - size)]) for size in batch_sizes)
        best.append(
            min((painted + size, runs + 1, (size, *sizes)) for size, painted, runs, sizes in fewer)
        )
    return tuple(sorted(best[rows][2], reverse=True))
