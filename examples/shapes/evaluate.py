"""How many held-out captions a pipeline paints right, by the judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from rich.progress import track

from examples.shapes import grammar
from examples.shapes.drawing import Pixels
from examples.shapes.grammar import Scene
from examples.shapes.judge import judge
from examples.shapes.sizes import random_size

SEED = 9  # of no training
GUIDANCE, STEPS = 3.0, 20

Paint = Callable[[Scene, int], Pixels]
"""Gives the picture of a scene's caption at the scene's size, of a seed."""


@dataclass(frozen=True)
class Shares:
    """`right` by number of objects (1 to 3), and how many had something cut off by the border."""

    right: tuple[float, float, float]
    cut: float
    pictures: int


def held_out(count: int, size: Callable[[np.random.Generator], tuple[int, int]]) -> list[Scene]:
    """Scenes of one, two and three objects in turn, of combinations that training never saw."""
    rng = np.random.default_rng(SEED)
    return [grammar.scene(rng, *size(rng), 1 + index % 3, unseen=True) for index in range(count)]


def shares(scenes: Sequence[Scene], paint: Paint) -> Shares:
    """Judge a picture of each; its seed is its number."""
    right: tuple[list[bool], list[bool], list[bool]] = ([], [], [])
    cut = 0
    for seed, scene in enumerate(track(scenes, description="painting")):
        verdict = judge(paint(scene, seed), scene)
        right[len(scene.things) - 1].append(verdict.right)
        cut += verdict.cut
    one, two, three = (float(np.mean(each)) if each else 0.0 for each in right)
    return Shares((one, two, three), cut / len(scenes), len(scenes))


def painter(pipeline: StableDiffusionXLPipeline) -> Paint:
    """diffusers by itself, eagerly."""
    pipeline.set_progress_bar_config(disable=True)

    @torch.inference_mode()
    def paint(scene: Scene, seed: int) -> Pixels:
        picture: Pixels = pipeline(
            prompt=scene.caption(),
            height=scene.height,
            width=scene.width,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images[0]
        return picture

    return paint


def trained_sizes(pipeline: StableDiffusionXLPipeline, count: int) -> Shares:
    """At the sizes of the training, by their weights there."""
    return shares(held_out(count, random_size), painter(pipeline))
