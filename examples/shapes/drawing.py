"""Scenes as pixels: signed distances, one pixel of antialiasing, a little light and grain."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from examples.shapes.grammar import Colour, Ground, Scene, Shape

Pixels = NDArray[np.float32]
"""Height x width x 3, red, green and blue from 0 to 1."""
Plane = NDArray[np.float32]
"""Height x width."""

TINTS: dict[Colour, tuple[float, float, float]] = {
    "red": (0.87, 0.15, 0.16),
    "yellow": (0.95, 0.81, 0.10),
    "green": (0.16, 0.68, 0.25),
    "cyan": (0.10, 0.76, 0.82),
    "blue": (0.14, 0.28, 0.86),
    "purple": (0.66, 0.18, 0.78),
}
# much paler than any object
GROUND_TINTS: dict[Ground, tuple[float, float, float]] = {
    "white": (0.95, 0.95, 0.95),
    "gray": (0.52, 0.52, 0.53),
    "black": (0.09, 0.09, 0.10),
    "sand": (0.86, 0.79, 0.68),
    "sky": (0.70, 0.81, 0.90),
}
SLOPE = float(np.sqrt(3))  # of a triangle's sides: it is as wide as it is told, and equilateral
ARM = 0.34  # the width of a cross's arm as a share of its extent
GRAIN = 0.008


def grid(height: int, width: int) -> tuple[Plane, Plane]:
    """The x and the y of every pixel's middle, in pixels."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    return x, y


def coverage(shape: Shape, x: Plane, y: Plane, extent: float) -> Plane:
    """How much of each pixel lies inside; `x` and `y` from the frame's middle, all in pixels."""
    inside: Plane = np.clip(0.5 - _distance(shape, x, y, extent / 2), 0.0, 1.0)
    return inside


def _distance(shape: Shape, x: Plane, y: Plane, half: float) -> Plane:
    """Signed, in pixels, exact along straight edges and circles, near enough at corners."""
    if shape == "circle":
        return np.asarray(np.hypot(x, y) - half, np.float32)
    if shape == "square":
        return (np.maximum(np.abs(x), np.abs(y)) - half).astype(np.float32)
    if shape == "triangle":
        # its frame is as high as its sides' slope makes it, and centred
        rise = SLOPE * half / 2
        sides = (np.abs(x) * SLOPE - (y + rise)) / 2
        return np.asarray(np.maximum(sides, y - rise), np.float32)
    arm = half * ARM
    lying = np.maximum(np.abs(x) - half, np.abs(y) - arm)
    standing = np.maximum(np.abs(x) - arm, np.abs(y) - half)
    return np.minimum(lying, standing).astype(np.float32)


def draw(scene: Scene) -> tuple[Pixels, Plane]:
    """The picture, and how much of each pixel an object covers."""
    rng = np.random.default_rng(scene.seed)
    x, y = grid(scene.height, scene.width)
    picture = _ground(scene, x, y)
    covered = np.zeros_like(x)
    angle = rng.uniform(-np.pi, 0)  # the light comes from above
    for thing in scene.things:
        dx, dy = x - np.float32(thing.x), y - np.float32(thing.y)
        inside = coverage(thing.shape, dx, dy, thing.extent)
        light = 1 + 0.16 * (np.cos(angle) * dx + np.sin(angle) * dy) / thing.extent
        tint = np.asarray(TINTS[thing.colour], np.float32) * light[..., None]
        picture += inside[..., None] * (tint - picture)
        covered = np.maximum(covered, inside)
    picture += rng.normal(0, GRAIN, (scene.height, scene.width, 1)).astype(np.float32)
    return np.clip(picture, 0, 1).astype(np.float32), covered


def _ground(scene: Scene, x: Plane, y: Plane) -> Pixels:
    """Plain, or darker towards the bottom; black, which cannot be, grows lighter."""
    fall = (y / scene.height if scene.gradient else np.zeros_like(x))[..., None]
    shade = 1 + 2.2 * fall if scene.ground == "black" else 1 - 0.38 * fall
    return np.asarray(np.asarray(GROUND_TINTS[scene.ground]) * shade, np.float32)
