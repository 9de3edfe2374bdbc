"""Says from pixels alone which objects are in a picture: no neural network, no caption.

Pixels with enough chroma belong to the colour of the nearest hue; connected regions of a colour
that are thicker than an edge are objects. Area and centroid (the moments of order 0 and 1) lay each
shape over the region; the one that overlaps best is its shape. Grounds are nearly without chroma.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

import numpy as np
from numpy.typing import NDArray

from examples.shapes.drawing import TINTS, Pixels, coverage, grid
from examples.shapes.grammar import COLOURS, SHAPES, Colour, Place, Scene, Shape

CHROMA = 0.34  # between the most colourful ground, 0.2, and the palest object, 0.5
OVERLAP = 0.80  # intersection over union that a region must share with its shape
SMALLEST = 0.004  # of the shorter side squared: a quarter of the side wide and not a speck
MIDDLE = 0.10  # as far from the middle, in shares of a side, is still in the middle

Mask = NDArray[np.bool_]
"""Height x width."""

HUES = np.asarray([colorsys.rgb_to_hsv(*TINTS[colour])[0] for colour in COLOURS])


@dataclass(frozen=True)
class Found:
    """A region of one colour; `shape` is None where none fits. `x`, `y` (of the
    middle of the best shape's frame) and `extent` in pixels."""

    colour: Colour
    shape: Shape | None
    x: float
    y: float
    extent: float
    cut: bool


@dataclass(frozen=True)
class Verdict:
    """`right`: the objects of the scene, no others, whole, in its order and at its places."""

    right: bool
    cut: bool
    found: tuple[Found, ...]


def judge(picture: Pixels, scene: Scene) -> Verdict:
    """Compare a picture (of any size) with what its scene's full caption asks for."""
    height, width = picture.shape[:2]
    across = scene.axis == "y"
    found = tuple(sorted(find(picture), key=lambda thing: thing.y if across else thing.x))
    cut = any(thing.cut for thing in found)
    named = [(thing.shape, thing.colour) for thing in found]
    if len(scene.things) == 1:
        placed = [_place(thing.x / width, thing.y / height) for thing in found] == [
            thing.place for thing in scene.things
        ]
    else:
        placed = all(_follows(one, other, across) for one, other in pairwise(found))
    wanted = [(thing.shape, thing.colour) for thing in scene.things]
    return Verdict(not cut and placed and named == wanted, cut, found)


def find(picture: Pixels) -> tuple[Found, ...]:
    """Every object in a picture."""
    hue, chroma = _hue_and_chroma(np.asarray(picture, np.float32))
    apart = np.abs(hue[..., None] - HUES)
    nearest = np.minimum(apart, 1 - apart).argmin(-1)
    least = SMALLEST * min(picture.shape[:2]) ** 2
    found: list[Found] = []
    for index, colour in enumerate(COLOURS):
        for inside in _regions((chroma > CHROMA) & (nearest == index)):
            # an edge between two colours passes through a third: thin, so it does not survive this
            if _eroded(inside).sum() >= least:
                found.append(_measure(colour, inside))
    return tuple(found)


def _regions(mask: Mask) -> Iterator[Mask]:
    """The parts of a mask whose pixels are joined by their sides."""
    rows, ends = np.nonzero(np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8)))
    runs = list(zip(rows[::2].tolist(), ends[::2].tolist(), ends[1::2].tolist(), strict=True))
    parts: list[list[int]] = []  # of numbers of runs; a run that joins two makes them one
    for number, (row, start, end) in enumerate(runs):
        joined = [number]
        for part in [part for part in parts if _touches(runs, part, row, start, end)]:
            parts.remove(part)
            joined = sorted(part + joined)
        parts.append(joined)
    for part in parts:
        inside = np.zeros_like(mask)
        for row, start, end in (runs[number] for number in part):
            inside[row, start:end] = True
        yield inside


def _touches(
    runs: Sequence[tuple[int, int, int]], part: Sequence[int], row: int, start: int, end: int
) -> bool:
    """Whether a run of pixels lies right under one of the part's."""
    above = (runs[number] for number in reversed(part))
    near = takewhile(lambda run: run[0] >= row - 1, above)
    return any(run[0] == row - 1 and run[1] < end and start < run[2] for run in near)


def _eroded(inside: Mask) -> Mask:
    """Without its outermost pixels."""
    padded = np.pad(inside, 1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
    return np.asarray(windows.all((-1, -2)))


def _hue_and_chroma(picture: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Hue from 0 to 1 as in `colorsys`; chroma, the largest channel less the smallest."""
    red, green, blue = np.moveaxis(picture, -1, 0)
    most, chroma = picture.max(-1), np.ptp(picture, axis=-1)
    scale = 6 * np.maximum(chroma, 1e-6)
    hue = np.where(
        most == red,
        (green - blue) / scale,
        np.where(most == green, (blue - red) / scale + 1 / 3, (red - green) / scale + 2 / 3),
    )
    return hue % 1, chroma


def _measure(colour: Colour, inside: Mask) -> Found:
    x, y = grid(*inside.shape)
    area = float(inside.sum())
    middle_x, middle_y = float(x[inside].mean()), float(y[inside].mean())
    fits: list[tuple[float, Shape, float]] = []
    for shape in SHAPES:
        extent = float(np.sqrt(area / _AREAS[shape]))
        lowered = _CENTROIDS[shape] * extent
        laid = coverage(shape, x - middle_x, y - middle_y + lowered, extent) > 0.5
        fits.append((float((laid & inside).sum() / (laid | inside).sum()), shape, extent))
    overlap, best, extent = max(fits)
    border = inside[0].any() or inside[-1].any() or inside[:, 0].any() or inside[:, -1].any()
    fitting = best if overlap >= OVERLAP else None
    return Found(
        colour, fitting, middle_x, middle_y - _CENTROIDS[best] * extent, extent, bool(border)
    )


def _follows(one: Found, other: Found, below: bool) -> bool:
    """Whether `other` is rather beside (`below`: under) `one` than anywhere else."""
    dx, dy = other.x - one.x, other.y - one.y
    return dy > abs(dx) if below else dx > abs(dy)


def _place(x: float, y: float) -> Place:
    """Where a middle is, given as shares of the picture's sides."""
    dx, dy = x - 0.5, y - 0.5
    if max(abs(dx), abs(dy)) <= MIDDLE:
        return "middle"
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def _moments(shape: Shape) -> tuple[float, float]:
    """Area and the centroid's height below the frame's middle, for an extent of 1."""
    side = 200
    x, y = grid(side + 4, side + 4)
    inside = coverage(shape, x - (side + 4) / 2, y - (side + 4) / 2, side)
    area = float(inside.sum())
    return area / side**2, float((inside * (y - (side + 4) / 2)).sum()) / area / side


_AREAS = {shape: _moments(shape)[0] for shape in SHAPES}
_CENTROIDS = {shape: _moments(shape)[1] for shape in SHAPES}
