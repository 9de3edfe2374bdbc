"""What a request costs by the cells of its bucket: the cells themselves, or seconds as workers have
measured them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from preheat.errors import PreheatError

_SPREAD = 1.5
"""Of the measured cells, below which noise would decide how the cost grows."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Cost of a request whose bucket has `cells` (square pixels, or the length): never less for
    more of them.
    """

    fixed: float = 0.0
    per_cell: float = 1.0
    per_square: float = 0.0
    """Of cells times cells: attention."""
    worst_error: float = 0.0
    """Of the measured points, the largest error relative to what was measured."""

    def __call__(self, cells: int) -> float:
        return self.fixed + self.per_cell * cells + self.per_square * cells * cells

    def scaled(self, factor: float) -> Curve:
        """The same curve, `factor` times as high."""
        return Curve(
            factor * self.fixed,
            factor * self.per_cell,
            factor * self.per_square,
            self.worst_error,
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """What one worker has measured of its buckets."""

    strategy: str
    seconds: Curve | None
    """Of a denoising step (of a run, of a module) with the smallest batch, compiled; None where
    nothing was measured.
    """
    eager_seconds: Curve | None
    """The same of buckets that are served eagerly."""
    warm_seconds: float | None
    """Of a bucket that is compiled at a start, all its graphs."""
    from_cache: bool
    """Whether a cache had some of these graphs."""
    num_buckets: int
    peak_memory_bytes: int


def measured(state: Mapping[str, Any]) -> Measured:
    """What a worker's state says.

    Raises:
        PreheatError: it has no list of buckets, or one that is not a worker's.
    """
    try:
        rows = list(state["buckets"])
        compiled = fitted(_points(row for row in rows if row["engine"] != "eager"))
        eager = fitted(_points(row for row in rows if row["engine"] == "eager"))
        # the rows of several targets share the time of their warm-up
        warm = {
            (row["bucket"], row["batch_size"]): row.get("warm_seconds", 0.0)
            for row in rows
            if row["engine"] != "eager"
        }
        num_compiled = len({bucket for bucket, _ in warm})
        return Measured(
            strategy=str(state.get("strategy", "buckets")),
            seconds=compiled,
            eager_seconds=eager,
            warm_seconds=sum(warm.values()) / num_compiled if any(warm.values()) else None,
            from_cache=any(row.get("cache") in ("hit", "partial") for row in rows),
            num_buckets=num_compiled,
            peak_memory_bytes=int(state.get("peak_memory_bytes", 0)),
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise PreheatError(f"no state of a worker: {type(error).__name__}: {error}") from error


def cells_of(name: str) -> int:
    """Square pixels of a bucket `1024x768`, or the length of one `sequence=512`.

    Raises:
        ValueError: it is called otherwise.
    """
    if re.fullmatch(r"[1-9]\d*x[1-9]\d*", name):
        return prod(map(int, name.split("x")))
    if re.fullmatch(r"[A-Za-z_]\w*=[1-9]\d*", name):
        return int(name.partition("=")[2])
    raise ValueError(f"{name!r} is no bucket of a picture or of one dimension")


def fitted(points: Mapping[int, float]) -> Curve | None:
    """The curve that is nearest to seconds by cells, in proportion; None without points.

    One point, or several that are too close to tell: in proportion to the cells. Two: a constant
    and the cells. More: the square of the cells, too. No part is negative, so that a larger bucket
    never costs less.
    """
    if not points:
        return None
    cells, seconds = np.array(list(points), float), np.array(list(points.values()), float)
    telling = len(points) if cells.max() >= _SPREAD * cells.min() else 1
    powers = {1: (1,), 2: (0, 1)}.get(telling, (0, 1, 2))
    scale = cells.max()
    columns = np.stack([(cells / scale) ** power / seconds for power in powers], axis=1)
    best = dict(zip(powers, _not_negative(columns), strict=True))
    curve = Curve(best.get(0, 0.0), best[1] / scale, best.get(2, 0.0) / scale**2)
    errors = [abs(curve(int(each)) / value - 1) for each, value in points.items()]
    return Curve(curve.fixed, curve.per_cell, curve.per_square, max(errors))


def _not_negative(columns: np.ndarray[Any, np.dtype[np.float64]]) -> list[float]:
    """The factors of the columns, none negative, whose sum is nearest to ones: of every choice of
    columns the best one that ordinary least squares gives without a negative factor.
    """
    num, best, least = columns.shape[1], [0.0] * columns.shape[1], float("inf")
    for chosen in range(1, 2**num):
        own = [index for index in range(num) if chosen >> index & 1]
        factors = np.linalg.lstsq(columns[:, own], np.ones(len(columns)), rcond=None)[0]
        error = float(((columns[:, own] @ factors - 1) ** 2).sum())
        if factors.min() >= 0 and error < least:
            best, least = [0.0] * num, error
            for index, factor in zip(own, factors, strict=True):
                best[index] = float(factor)
    return best


def _points(rows: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Seconds a request by cells, at the smallest batch that was measured."""
    found: dict[int, tuple[int, float]] = {}
    for row in rows:
        cells, size = cells_of(row["bucket"]), int(row["batch_size"])
        seconds = float(row["seconds_per_step"]) / size
        if seconds > 0 and (cells not in found or size < found[cells][0]):
            found[cells] = (size, seconds)
    return {cells: seconds for cells, (_, seconds) in found.items()}
