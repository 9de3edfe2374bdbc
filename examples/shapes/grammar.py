"""What can be said and painted: one to three objects in a row or a column on a ground.

A scene is drawn from a generator of random numbers for a picture of a given size. One combination
in five of shape, colour and place is held out: no scene for training has an object of one, every
object of a held-out scene is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Shape = Literal["circle", "square", "triangle", "cross"]
Colour = Literal["red", "yellow", "green", "cyan", "blue", "purple"]
Size = Literal["small", "large"]
Place = Literal["left", "right", "top", "bottom", "middle"]
Ground = Literal["white", "gray", "black", "sand", "sky"]
Axis = Literal["x", "y"]

SHAPES: tuple[Shape, ...] = ("circle", "square", "triangle", "cross")
COLOURS: tuple[Colour, ...] = ("red", "yellow", "green", "cyan", "blue", "purple")
PLACES: tuple[Place, ...] = ("left", "right", "top", "bottom", "middle")
GROUNDS: tuple[Ground, ...] = ("white", "gray", "black", "sand", "sky")

# the width of an object as a share of the picture's shorter side
SIZES: dict[Size, tuple[float, float]] = {"small": (0.26, 0.29), "large": (0.38, 0.44)}
MARGIN = 0.03  # of the shorter side, to the border and between two objects

ORDER: dict[Axis, tuple[Place, Place, Place]] = {
    "x": ("left", "middle", "right"),
    "y": ("top", "middle", "bottom"),
}
PHRASES: dict[Place, str] = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}
# between two objects, the first of which is left of or above the second; and the other way round
RELATIONS: dict[Axis, tuple[str, str]] = {"x": ("left of", "right of"), "y": ("above", "below")}

_SAID = " ".join([*PHRASES.values(), *RELATIONS["x"], *RELATIONS["y"], "a gradient background"])
WORDS: tuple[str, ...] = tuple(sorted({*SHAPES, *COLOURS, *GROUNDS, *SIZES, *_SAID.split()}))


@dataclass(frozen=True)
class Thing:
    """An object; `x`, `y` (of its frame's middle) and `extent` (its width) in pixels."""

    shape: Shape
    colour: Colour
    size: Size
    place: Place
    x: float
    y: float
    extent: float


@dataclass(frozen=True)
class Scene:
    """A picture to be: `things` from left to right or from top to bottom, sizes in pixels."""

    height: int
    width: int
    axis: Axis
    things: tuple[Thing, ...]
    ground: Ground
    gradient: bool
    seed: int  # of what no caption says: where the light is, the grain

    def caption(self) -> str:
        """All that can be said of it, in the reading order of the picture."""
        return self._say(self.things, RELATIONS[self.axis][0], [True] * 3, True, True)

    def told(self, rng: np.random.Generator) -> str:
        """A caption that may leave out sizes, a single place or the ground, or go backwards."""
        backwards = rng.random() < 0.3
        things = self.things[::-1] if backwards else self.things
        sized = [bool(rng.random() < 0.8) for _ in range(3)]
        return self._say(
            things,
            RELATIONS[self.axis][backwards],
            sized,
            placed=bool(rng.random() < 0.8),
            grounded=bool(rng.random() < 0.85),
        )

    def _say(
        self,
        things: Sequence[Thing],
        relation: str,
        sized: list[bool],
        placed: bool,
        grounded: bool,
    ) -> str:
        names = [
            f"a {thing.size} {thing.colour} {thing.shape}"
            if say_size
            else f"a {thing.colour} {thing.shape}"
            for thing, say_size in zip(things, sized, strict=False)
        ]
        text = f" {relation} ".join(names)
        if len(things) == 1 and placed:
            text += f" {PHRASES[things[0].place]}"
        if grounded:
            text += f" on a {self.ground}{' gradient' if self.gradient else ''} background"
        return text


def held_out(shape: Shape, colour: Colour, place: Place) -> bool:
    """Whether training never sees this together: one place of five for each shape and colour."""
    return (SHAPES.index(shape) + 2 * COLOURS.index(colour) + PLACES.index(place)) % 5 == 0


def scene(
    rng: np.random.Generator, height: int, width: int, count: int, *, unseen: bool = False
) -> Scene:
    """A random scene of `count` objects (1 to 3); `unseen`: made of held-out combinations."""
    while True:
        axis: Axis = "x" if rng.random() < 0.5 else "y"
        if count == 1:
            places: tuple[Place, ...] = (PLACES[rng.integers(len(PLACES))],)
            axis = "x" if places[0] in ORDER["x"] else "y"
        else:
            places = ORDER[axis][:: 2 if count == 2 else 1]
        things = _arrange(rng, height, width, axis, places, unseen)
        if things is not None:
            ground = GROUNDS[rng.integers(len(GROUNDS))]
            gradient = bool(rng.random() < 0.5)
            seed = int(rng.integers(2**31))
            return Scene(height, width, axis, things, ground, gradient, seed)


def _arrange(
    rng: np.random.Generator,
    height: int,
    width: int,
    axis: Axis,
    places: tuple[Place, ...],
    unseen: bool,
) -> tuple[Thing, ...] | None:
    """Objects side by side along `axis`; None where this throw does not fit."""
    shorter, margin = min(height, width), MARGIN * min(height, width)
    along, across = (width, height) if axis == "x" else (height, width)
    sizes: list[Size] = ["small" if rng.random() < 0.5 else "large" for _ in places]
    extents = [rng.uniform(*SIZES[size]) * shorter for size in sizes]
    free = along - sum(extents) - (len(extents) + 1) * margin
    if free < 0:
        return None
    gaps = rng.dirichlet(np.ones(len(extents) + 1)) * free
    things: list[Thing] = []
    end = 0.0
    for place, size, extent, gap in zip(places, sizes, extents, gaps, strict=False):
        middle = end + margin + gap + extent / 2
        end = middle + extent / 2
        if not _stands(place, middle / along):
            return None
        aside = across * (0.5 + rng.uniform(-0.06, 0.06))
        x, y = (middle, aside) if axis == "x" else (aside, middle)
        pairs = [
            (shape, colour)
            for shape in SHAPES
            for colour in COLOURS
            if held_out(shape, colour, place) == unseen
        ]
        shape, colour = pairs[rng.integers(len(pairs))]
        things.append(Thing(shape, colour, size, place, x, y, extent))
    return tuple(things)


def _stands(place: Place, middle: float) -> bool:
    """Whether an object whose middle is at this share of the axis is at that place."""
    if place == "middle":
        return abs(middle - 0.5) <= 0.06
    return middle <= 0.36 if place in ("left", "top") else middle >= 0.64
