"""Pictures for the UNet as latents, with their tokens and size conditions, computed once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from rich.progress import track
from torch import Tensor

from examples.shapes import grammar, workers
from examples.shapes.drawing import draw
from examples.shapes.sizes import SIZES
from examples.shapes.text import Texts
from examples.shapes.training import appearing

SEED = 3
PICTURES = 30_000
BATCH = 20  # pictures encoded together
CROPPED = 0.08  # share of the pictures that are cut from a larger one, and know it


@dataclass(frozen=True)
class Pictures:
    """Latents of one size (pictures x 4 x cells x cells), tokens, and original height and width,
    top and left of the crop, target height and width in pixels, as SDXL has them."""

    latents: Tensor
    tokens: Tensor
    sizes: Tensor


def load(folder: Path, vae: AutoencoderKL, texts: Texts) -> dict[tuple[int, int], Pictures]:
    """By height and width; whatever `folder` lacks is drawn and encoded first."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (size, weight) in enumerate(SIZES.items()):
        file = folder / f"{size[0]}x{size[1]}.pt"
        if not file.exists() and index % workers.count() == workers.rank():
            count = PICTURES * weight // sum(SIZES.values())
            made = _make(np.random.default_rng([SEED, index]), size, count, vae, texts)
            with appearing(file) as part:
                torch.save(vars(made), part)
    workers.wait()
    return {
        (height, width): Pictures(
            **torch.load(folder / f"{height}x{width}.pt", weights_only=True, mmap=True)
        )
        for height, width in SIZES
    }


@torch.no_grad()
def _make(
    rng: np.random.Generator, size: tuple[int, int], count: int, vae: AutoencoderKL, texts: Texts
) -> Pictures:
    latents: list[Tensor] = []
    captions: list[str] = []
    sizes: list[list[int]] = []
    starts = range(0, count, BATCH)
    for start in track(starts, description=f"latents {size[0]}x{size[1]}"):
        pictures: list[Tensor] = []
        for index in range(start, min(start + BATCH, count)):
            picture, caption, conditions = one(rng, size, 1 + index % 3)
            pictures.append(picture)
            captions.append(caption)
            sizes.append(conditions)
        batch = torch.stack(pictures).permute(0, 3, 1, 2) * 2 - 1
        latents.append(vae.encode(batch).latent_dist.mean.half())
    return Pictures(torch.cat(latents), texts.ids(captions), torch.tensor(sizes))


def one(
    rng: np.random.Generator, size: tuple[int, int], count: int
) -> tuple[Tensor, str, list[int]]:
    """A picture (height x width x 3, 0 to 1), its caption and its size conditions."""
    height, width = size
    top = left = 0
    whole = size
    if rng.random() < CROPPED:
        whole = (int(height * rng.uniform(1, 1.3)), int(width * rng.uniform(1, 1.3)))
        top = int(rng.integers(whole[0] - height + 1))
        left = int(rng.integers(whole[1] - width + 1))
    scene = grammar.scene(rng, *whole, count)
    picture = draw(scene)[0][top : top + height, left : left + width]
    return torch.from_numpy(picture), scene.told(rng), [*whole, top, left, *size]
