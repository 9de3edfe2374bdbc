"""Which of the VAE's own buckets a picture lies in, and which of them pictures can meet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from preheat.buckets import Bucket, smallest_covering


@dataclass(frozen=True, slots=True)
class Seat:
    """What needs a graph of its own at the VAE, which is given one picture at a time."""

    bucket: Bucket
    masked: bool


@dataclass(frozen=True, slots=True)
class VaeBuckets:
    """The sizes that a compiled VAE works at.

    Args:
        sizes: in pixels.
        mask_only: what fills its bucket has masks too.
    """

    sizes: tuple[Bucket, ...]
    mask_only: bool

    def seat(self, picture: Bucket) -> Seat | None:
        """Of a picture of this size in pixels; None where no bucket covers it."""
        bucket = smallest_covering(self.sizes, picture)
        if bucket is None:
            return None
        return Seat(bucket, self.mask_only or picture != bucket)

    def seats(self, buckets: Sequence[Bucket], multiple: int) -> Mapping[Seat, Bucket]:
        """Every seat that pictures in the denoiser's `buckets`, sides multiples of `multiple`, can
        have, with a picture that has it.

        Where any picture has a bucket for its seat, the largest that fits there has: what covers
        that one covers all smaller ones.
        """
        found: dict[Seat, Bucket] = {}
        for own in self.sizes:
            for bucket in buckets:
                for picture in _largest(own, bucket, multiple):
                    seat = self.seat(picture)
                    if seat is not None:
                        found.setdefault(seat, picture)
        return found


def _largest(one: Bucket, other: Bucket, multiple: int) -> Iterator[Bucket]:
    """The largest picture that fits into both, and the largest two that do not fill it."""
    high, wide = (
        min(pair) // multiple * multiple
        for pair in ((one.height, other.height), (one.width, other.width))
    )
    for height, width in ((high, wide), (high - multiple, wide), (high, wide - multiple)):
        if height > 0 and width > 0:
            yield Bucket(height, width)
