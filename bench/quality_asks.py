"""What `bench.quality` asks for, and what a judge says of the pictures. Training has seen none of
the objects of the captions from text, and of the changed ones as few as there are.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.shapes import evaluate
from examples.shapes.drawing import coverage, draw, grid
from examples.shapes.grammar import COLOURS, Scene, Thing, held_out
from examples.shapes.judge import judge
from examples.shapes.sizes import random_size

Kind = Literal["trained", "odd", "image", "inpaint"]
"""From text at sizes of the training, and at others; a drawn picture whose objects shall have other
colours; one object of a drawn picture painted anew in another colour.
"""
SHORT, LONG = (97, 128), (97, 192)
"""Pixels, both included, of the sides of odd sizes."""
AROUND = 0.62
"""Half the side of the square that is painted anew, as a share of the object's width."""


@dataclass(frozen=True)
class Ask:
    """One request. `drawn` is the picture it goes out from, `free` where that may change."""

    name: str
    kind: Kind
    scene: Scene
    """What the answer shall show."""
    payload: Mapping[str, Any]
    drawn: NDArray[np.uint8] | None = None
    free: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Said:
    """Of one answer: whether it is right, something is cut off at the border, and the largest
    change (of 255) of what must not change.
    """

    num_things: int
    right: bool
    cut: bool
    changed: int | None


def asks(kind: Kind, count: int, strength: float) -> list[Ask]:
    """The first `count` of a kind: always the same."""
    made = {"trained": random_size, "odd": odd_size, "image": random_size, "inpaint": random_size}
    scenes = evaluate.held_out(count, made[kind])
    return [_ask(kind, number, scene, strength) for number, scene in enumerate(scenes)]


def odd_size(rng: np.random.Generator) -> tuple[int, int]:
    """Height and width in pixels, neither a whole number of latent cells."""
    sides = []
    for least, most in (SHORT, LONG):
        odd = [side for side in range(least, most + 1) if side % 8]
        sides.append(int(rng.choice(odd)))
    height, width = sides if rng.random() < 0.5 else sides[::-1]
    return height, width


def said(ask: Ask, picture: NDArray[np.uint8]) -> Said:
    """The judge's verdict of (height, width, 3)."""
    verdict = judge((picture / 255).astype(np.float32), ask.scene)
    changed = None
    if ask.drawn is not None and ask.free is not None:
        apart = np.abs(picture.astype(int) - ask.drawn)[~ask.free]
        changed = int(apart.max())
    return Said(len(ask.scene.things), verdict.right, verdict.cut, changed)


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """In decibels; infinite where they are equal."""
    error = float(np.square(one.astype(float) - other).mean())
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def _ask(kind: Kind, number: int, scene: Scene, strength: float) -> Ask:
    name = f"{kind}-{number:03}"
    payload: dict[str, Any] = {
        "height": scene.height,
        "width": scene.width,
        "seed": number,
        "num_inference_steps": evaluate.STEPS,
        "guidance_scale": evaluate.GUIDANCE,
    }
    if kind in ("trained", "odd"):
        return Ask(name, kind, scene, {**payload, "prompt": scene.caption()})
    drawn = (draw(scene)[0] * 255).round().astype(np.uint8)
    rng = np.random.default_rng([evaluate.SEED, number])
    chosen = range(len(scene.things)) if kind == "image" else [rng.integers(len(scene.things))]
    things = [*scene.things]
    for index in chosen:
        things[index] = _recoloured(rng, things[index])
    wanted = replace(scene, things=tuple(things))
    payload |= {"prompt": wanted.caption(), "image": _png(drawn), "strength": strength}
    if kind == "image":
        return Ask(name, kind, wanted, payload, drawn)
    free = _around(scene, things[int(chosen[0])])
    payload |= {"mask_image": _png((free * 255).astype(np.uint8)), "strength": 1.0}
    return Ask(name, kind, wanted, payload, drawn, free)


def _recoloured(rng: np.random.Generator, thing: Thing) -> Thing:
    """In another colour, if possible one that training never saw there."""
    others = [colour for colour in COLOURS if colour != thing.colour]
    unseen = [colour for colour in others if held_out(thing.shape, colour, thing.place)]
    chosen = unseen or others
    return replace(thing, colour=chosen[rng.integers(len(chosen))])


def _around(scene: Scene, thing: Thing) -> NDArray[np.bool_]:
    x, y = grid(scene.height, scene.width)
    side = 2 * AROUND * thing.extent
    return np.asarray(coverage("square", x - thing.x, y - thing.y, side) > 0.5)


def _png(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def by_things(found: Sequence[Said]) -> Iterator[tuple[int, list[Said]]]:
    """Those with one object, with two, with three."""
    for number in (1, 2, 3):
        some = [each for each in found if each.num_things == number]
        if some:
            yield number, some
