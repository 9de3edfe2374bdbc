"""Trains the VAE: 8x8 pixels to a cell of 4 channels, each of mean 0 and deviation 1.

First on crops of 64x64 around the objects, which cost a quarter, then on whole pictures, because
its group norms see the whole picture. Objects weigh more than the grounds, edges more than both.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor
from torch.nn import functional

from examples.shapes import grammar, workers
from examples.shapes.drawing import draw
from examples.shapes.sizes import random_size
from examples.shapes.training import Losses, Plan, Training, appearing

SEED = 1
CROP = 64  # pixels
CROPS, WHOLES = 16, 6  # pictures in a step
CROP_STEPS, WHOLE_STEPS = 3600, 1200
PLAN = Plan(steps=CROP_STEPS + WHOLE_STEPS, rate=1.5e-3, decay=0.998)


def new() -> AutoencoderKL:
    """Of the real class, without attention in its middle: nothing here needs to see that far."""
    torch.manual_seed(SEED)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[16, 32, 64, 96],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def train(folder: Path) -> AutoencoderKL:
    """The trained one, from `folder` where it lies there already."""
    done = folder / "trained"
    if not done.exists():
        vae = new().to(memory_format=torch.channels_last)
        training = Training(folder, vae, PLAN, SEED)
        average = training.run(
            lambda step: _losses(vae, *_pictures(step, *training.random(step))),
            lambda step: _show(training.average, folder / f"samples-{step:05}.png"),
        )
        if workers.rank() == 0:
            standardise(average)
            with appearing(done) as part:
                average.to(memory_format=torch.contiguous_format).save_pretrained(part)
        workers.wait()
    return AutoencoderKL.from_pretrained(done).requires_grad_(False).eval()


def _pictures(step: int, rng: np.random.Generator, noise: torch.Generator) -> list[Tensor]:
    """Pictures from -1 to 1, how much of each pixel an object covers, noise for the latents."""
    size = random_size(rng)
    count = (CROPS if step < CROP_STEPS else WHOLES) // workers.count()
    pictures, covers = [], []
    for index in range(count):
        scene = grammar.scene(rng, *size, count=1 + index % 3)
        picture, cover = draw(scene)
        if step < CROP_STEPS:
            thing = scene.things[rng.integers(len(scene.things))]
            top = _crop_from(rng, thing.y, size[0])
            left = _crop_from(rng, thing.x, size[1])
            picture = picture[top : top + CROP, left : left + CROP]
            cover = cover[top : top + CROP, left : left + CROP]
        pictures.append(torch.from_numpy(picture))
        covers.append(torch.from_numpy(cover))
    batch = torch.stack(pictures).permute(0, 3, 1, 2) * 2 - 1
    height, width = batch.shape[-2] // 8, batch.shape[-1] // 8
    drawn = torch.randn(count, 4, height, width, generator=noise)
    return [batch, torch.stack(covers)[:, None], drawn]


def _crop_from(rng: np.random.Generator, middle: float, side: int) -> int:
    """Where a crop begins that has `middle` somewhere in it, mostly."""
    low = int(np.clip(middle - 0.85 * CROP, 0, side - CROP))
    high = int(np.clip(middle - 0.15 * CROP, 0, side - CROP))
    return int(rng.integers(low, high + 1))


def _losses(vae: AutoencoderKL, pictures: Tensor, covers: Tensor, noise: Tensor) -> Losses:
    pictures = pictures.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        posterior: DiagonalGaussianDistribution = vae.encode(pictures).latent_dist
        mean, deviation = posterior.mean.float(), posterior.std.float()
        painted = vae.decode(mean + deviation * noise).sample.float()
    near = functional.max_pool2d(covers, 5, stride=1, padding=2)
    weight = 1 + 3 * near
    pixels = ((painted - pictures).abs() * weight).mean() / weight.mean()
    edges = sum(
        ((painted.diff(dim=axis) - pictures.diff(dim=axis)).abs()).mean() for axis in (-1, -2)
    )
    divergence = 0.5 * (mean.square() + deviation.square() - 1 - 2 * deviation.log()).mean()
    loss = pixels + edges + 2e-4 * divergence
    return {"loss": loss, "pixels": pixels, "edges": edges, "kl": divergence}


@torch.no_grad()
def _show(vae: AutoencoderKL, file: Path) -> None:
    """Six pictures above what comes back of them."""
    rng = np.random.default_rng(SEED)
    scenes = [grammar.scene(rng, 128, 128, count=1 + index % 3) for index in range(6)]
    pictures = torch.stack([torch.from_numpy(draw(scene)[0]) for scene in scenes])
    back = vae.decode(vae.encode(pictures.permute(0, 3, 1, 2) * 2 - 1).latent_dist.mean).sample
    back = (back.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)
    rows = [torch.cat(list(row), 1) for row in (pictures, back)]
    sheet = (torch.cat(rows).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(sheet).save(file)


@torch.no_grad()
def standardise(vae: AutoencoderKL, pictures: int = 96) -> None:
    """Give each latent channel mean 0 and deviation 1 over random scenes.

    The scale goes into the 1x1 convolutions on both sides of the latents, so that the
    configuration's scaling factor is 1 and pictures come back as before.
    """
    rng = np.random.default_rng(SEED)
    latents = [
        vae.encode(
            torch.from_numpy(draw(grammar.scene(rng, *random_size(rng), count=1 + i % 3))[0])
            .permute(2, 0, 1)[None]
            .mul(2)
            .sub(1)
        ).latent_dist.mean[0]
        for i in range(pictures)
    ]
    cells = torch.cat([latent.flatten(1) for latent in latents], 1)
    mean, deviation = cells.mean(1), cells.std(1)
    into, out = vae.quant_conv, vae.post_quant_conv
    out.bias += out.weight[..., 0, 0] @ mean
    out.weight *= deviation[None, :, None, None]
    channels = len(mean)
    into.bias[:channels] = (into.bias[:channels] - mean) / deviation
    into.weight[:channels] /= deviation[:, None, None, None]
    into.bias[channels:] -= 2 * deviation.log()  # the other half is the logarithm of the variance
