"""Where the time of a request goes, as plain data: what `preflight.measure` writes, and what
follows from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean

from preheat.preflight.facts import Fact

ELSE, ENCODING = "everything else", "encoding"
WORTH = 0.1
"""A target whose share is less than that is not worth a compile."""


class Stopwatch:
    """Seconds by part, a part inside another counted for itself alone; what is in none is `ELSE`.

    Args:
        now: seconds that never go back, once the device has done what it was given.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._last = now()
        self._within = [ELSE]
        self.seconds: dict[str, float] = {ELSE: 0.0}

    def lap(self) -> None:
        """Count what has passed for the part that it is in now."""
        now, part = self._now(), self._within[-1]
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs in here is this part."""
        self.lap()
        self._within.append(name)
        try:
            yield
        finally:
            self.lap()
            self._within.pop()


class InBucket(Fact):
    """One request of exactly a bucket's size."""

    bucket: str
    wall_seconds: float
    seconds: Mapping[str, float]
    """By part."""

    @property
    def shares(self) -> dict[str, float]:
        """Of the wall time, by part."""
        return {name: each / self.wall_seconds for name, each in self.seconds.items()}


class Operator(Fact):
    """One of torch's, in the largest bucket."""

    name: str
    calls: int
    share: float
    """Of the time in operators, its own alone; on a GPU of the time on it."""


class Profile(Fact):
    """What was measured, eager."""

    device: str
    dtype: str
    steps: int | None
    """Denoising steps of the request; None: it has none."""
    targets: tuple[str, ...]
    """The parts that `pt2.targets` may name."""
    buckets: tuple[InBucket, ...]
    operators: tuple[Operator, ...]

    def share(self, part: str) -> float:
        """The part's of the time of a request, over the buckets."""
        return fmean(each.shares.get(part, 0.0) for each in self.buckets)

    def most_gain(self, *targets: str) -> float:
        """How many times as fast a request is at most if these targets take no time at all: Amdahl,
        AFIPS 1967.
        """
        left = 1 - sum(self.share(name) for name in targets)
        return 1 / max(left, 1e-3)

    @property
    def worth(self) -> tuple[str, ...]:
        """The targets that are worth a compile, the largest first."""
        found = sorted(self.targets, key=self.share, reverse=True)
        return tuple(name for name in found if self.share(name) >= WORTH)

    def predicted(self, bucket: InBucket, ratios: Mapping[str, float]) -> float:
        """Seconds of the bucket's request whose targets take so much of their eager time."""
        return sum(each * ratios.get(name, 1.0) for name, each in bucket.seconds.items())

    def advice(self) -> str:
        """YAML that follows from the shares."""
        worth = self.worth
        if not worth:
            return (
                "pt2:\n  # no target takes a tenth of a request's time\n"
                "  compile: {enable: false}\n"
            )
        gain = f"at most {self.most_gain(*worth):.1f} times as fast"
        kept = "" if worth == ("model",) else f"  targets: [{', '.join(worth)}]  # {gain}\n"
        head = "pt2:\n  compile: {enable: true}" + ("" if kept else f"  # {gain}") + "\n"
        return head + kept
