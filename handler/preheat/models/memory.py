"""What has not fitted into memory, and when it is tried again."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

logger = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 600.0, 86_400.0  # seconds
_MOST_KINDS = 256
"""Kinds of runs that are remembered; under `oversize: eager` sizes are the clients' own."""


@dataclass(frozen=True, slots=True)
class _Failure:
    size: int
    """The smallest batch size that has not fitted."""
    until: float
    wait: float


class Unfit:
    """Batch sizes that ran out of memory, by kind of run, though there was a smaller one.

    What failed in warm-up was never hot, and stays out. What failed in serving may have been a
    neighbour's doing: it is tried again after ten minutes, and each time that it fails after twice
    as long, up to a day. Its figures may be read in another thread.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._never: dict[str, int] = {}  # kind -> the smallest that did not fit in warm-up
        self._failures: dict[str, _Failure] = {}  # those of serving

    def fitting(self, kind: str, batch_sizes: Sequence[int]) -> Sequence[int]:
        """Those that are worth a try; the smallest always is."""
        failure, least = self._failures.get(kind), self._never.get(kind, math.inf)
        if failure is not None and failure.until > self._clock():
            least = min(least, failure.size)
        if least == math.inf:
            return batch_sizes
        return [size for size in batch_sizes if size < least] or [min(batch_sizes)]

    def failed(self, kind: str, size: int, *, lasting: bool) -> None:
        """A run of this many rows ran out of memory; `lasting`: it is not tried again."""
        if lasting:
            self._never[kind] = min(size, self._never.get(kind, size))
            self._log(kind, self._never[kind], "from now on")
            return
        now, before = self._clock(), self._failures.pop(kind, None)
        if before is not None and before.until > now:
            failure = _Failure(min(size, before.size), before.until, before.wait)
        else:
            wait = _FIRST_WAIT if before is None else min(2 * before.wait, _LONGEST_WAIT)
            failure = _Failure(size, now + wait, wait)
        self._failures[kind] = failure
        if len(self._failures) > _MOST_KINDS:
            del self._failures[next(iter(self._failures))]
        self._log(kind, failure.size, f"for {failure.until - now:.0f} s")

    @staticmethod
    def _log(kind: str, size: int, how_long: str) -> None:
        logger.error(
            "%s: %d rows do not fit into memory; it runs in smaller batches %s",
            kind,
            size,
            how_long,
        )

    def fitted(self, kind: str, size: int) -> None:
        """A run of this many rows had room."""
        failure = self._failures.get(kind)
        if failure is not None and size >= failure.size:
            del self._failures[kind]

    def sizes(self) -> Mapping[str, int]:
        """By kind, the smallest batch size that is not tried now."""
        never, now = self._never.copy(), self._clock()
        return never | {
            kind: min(each.size, never.get(kind, each.size))
            for kind, each in self._failures.copy().items()
            if each.until > now
        }

    def waits(self) -> Mapping[str, int]:
        """By kind, after how many seconds what failed in serving is tried again."""
        now = self._clock()
        return {
            kind: math.ceil(each.until - now)
            for kind, each in self._failures.copy().items()
            if each.until > now
        }
