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


@dataclass(slots=True)
class _Failure:
    size: int
    """The smallest batch size that has not fitted."""
    until: float
    wait: float


class Unfit:
    """Batch sizes that ran out of memory, by kind of run, though there was a smaller one.

    What failed in warm-up was never hot, and stays out. What failed in serving may have been a
    neighbour's doing: it is tried again after ten minutes, and each time that it fails after twice
    as long, up to a day.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: dict[str, _Failure] = {}

    def fitting(self, kind: str, batch_sizes: Sequence[int]) -> Sequence[int]:
        """Those that are worth a try; the smallest always is."""
        failure = self._failures.get(kind)
        if failure is None or failure.until <= self._clock():
            return batch_sizes
        return [size for size in batch_sizes if size < failure.size] or [min(batch_sizes)]

    def failed(self, kind: str, size: int, *, lasting: bool) -> None:
        """A run of this many rows ran out of memory; `lasting`: it is not tried again."""
        now, before = self._clock(), self._failures.pop(kind, None)
        if before is not None and before.until > now:
            failure = _Failure(min(size, before.size), before.until, before.wait)
        else:
            wait = _FIRST_WAIT if before is None else min(2 * before.wait, _LONGEST_WAIT)
            failure = _Failure(size, now + wait, wait)
        if lasting:
            failure.until = math.inf
        self._failures[kind] = failure
        if len(self._failures) > _MOST_KINDS:
            del self._failures[next(iter(self._failures))]
        logger.error(
            "%s: %d rows do not fit into memory; it runs in smaller batches %s",
            kind,
            failure.size,
            "from now on" if lasting else f"for {failure.until - now:.0f} s",
        )

    def fitted(self, kind: str, size: int) -> None:
        """A run of this many rows had room."""
        failure = self._failures.get(kind)
        if failure is not None and size >= failure.size:
            del self._failures[kind]

    def sizes(self) -> Mapping[str, int]:
        """By kind, the smallest batch size that is not tried now."""
        now = self._clock()
        return {kind: each.size for kind, each in self._failures.items() if each.until > now}

    def waits(self) -> Mapping[str, int]:
        """By kind, after how many seconds it is tried again; without those that never are."""
        now = self._clock()
        return {
            kind: math.ceil(each.until - now)
            for kind, each in self._failures.items()
            if now < each.until < math.inf
        }
