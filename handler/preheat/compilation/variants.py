"""A variant: what one run of warm-up meets."""

from __future__ import annotations

from dataclasses import dataclass

from preheat.buckets import Bucket
from preheat.compilation.pace import Load


@dataclass(frozen=True, slots=True)
class Variant:
    """Whatever needs its own graph; a family with more than sizes to tell apart adds it."""

    bucket: Bucket
    batch_size: int

    def __str__(self) -> str:
        return f"{self.bucket} {self.details}"

    @property
    def load(self) -> Load:
        """What the time of its run, or of one step of it, depends on."""
        return Load(self.bucket.volume, self.batch_size, self.batch_size, 1)

    @property
    def details(self) -> str:
        """All but the bucket, for the log."""
        return f"batch {self.batch_size}"
