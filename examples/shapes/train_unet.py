"""Trains the UNet on cached latents: v-prediction, a tenth of the prompts empty."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torch.nn import functional

from examples.shapes import grammar, workers
from examples.shapes.dataset import Pictures
from examples.shapes.judge import judge
from examples.shapes.pipeline import SCHEDULE, assemble, new_unet
from examples.shapes.sizes import random_size
from examples.shapes.text import Texts
from examples.shapes.training import Losses, Plan, Training, appearing

SEED = 4
BATCH = 32
EMPTY = 0.1
PLAN = Plan(steps=8_000, rate=8e-4, decay=0.999, warmup=300, show_every=1000)
SHOWN = 18
GUIDANCE = 3.0
STEPS = 20


def train(
    folder: Path, texts: Texts, vae: AutoencoderKL, pictures: dict[tuple[int, int], Pictures]
) -> UNet2DConditionModel:
    """The trained one, from `folder` where it lies there already."""
    done = folder / "trained"
    if not done.exists():
        torch.manual_seed(SEED)
        unet = new_unet().to(memory_format=torch.channels_last)
        training = Training(folder, unet, PLAN, SEED)
        noising = DDPMScheduler(**SCHEDULE)
        empty = texts.ids([""])[0]

        def losses(step: int) -> Losses:
            rng, noise = training.random(step)
            chosen = pictures[random_size(np.random.default_rng([SEED, step]))]
            count = BATCH // workers.count()
            rows = torch.from_numpy(rng.integers(len(chosen.latents), size=count))
            tokens = chosen.tokens[rows].clone()
            tokens[torch.rand(count, generator=noise) < EMPTY] = empty
            batch = Pictures(chosen.latents[rows].float(), tokens, chosen.sizes[rows])
            return _losses(unet, texts, noising, batch, noise)

        average = training.run(
            losses,
            lambda step: _show(texts, vae, training.average, folder / f"samples-{step:05}.png"),
        )
        if workers.rank() == 0:
            with appearing(done) as part:
                average.to(memory_format=torch.contiguous_format).save_pretrained(part)
        workers.wait()
    return UNet2DConditionModel.from_pretrained(done).requires_grad_(False).eval()


def _losses(
    unet: UNet2DConditionModel,
    texts: Texts,
    noising: DDPMScheduler,
    batch: Pictures,
    random: torch.Generator,
) -> Losses:
    count = len(batch.latents)
    noise = torch.randn(batch.latents.shape, generator=random)
    # spread evenly over all times, so that batches differ little
    shares = (torch.arange(count) + torch.rand(count, generator=random)) / count
    times = (shares * noising.config.num_train_timesteps).long()
    noisy = noising.add_noise(batch.latents, noise, times)
    states, pooled = texts.encode(batch.tokens)
    with torch.autocast("cpu", torch.bfloat16):
        told: Tensor = unet(
            noisy.to(memory_format=torch.channels_last),
            times,
            encoder_hidden_states=states,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": batch.sizes},
        ).sample.float()
    wanted = noising.get_velocity(batch.latents, noise, times)
    apart = functional.mse_loss(told, wanted, reduction="none").mean((1, 2, 3))
    third = count // 3
    return {
        "loss": apart.mean(),
        "clean": apart[:third].mean().detach(),
        "noisy": apart[-third:].mean().detach(),
    }


@torch.no_grad()
def _show(texts: Texts, vae: AutoencoderKL, unet: UNet2DConditionModel, file: Path) -> None:
    """Pictures of held-out captions, and how many the judge finds right by number of objects."""
    pipeline = assemble(texts, vae, unet)
    pipeline.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(SEED)
    scenes = [
        grammar.scene(rng, 128, 128, 1 + index * 3 // SHOWN, unseen=True) for index in range(SHOWN)
    ]
    pictures = pipeline(
        prompt=[scene.caption() for scene in scenes],
        height=128,
        width=128,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(index) for index in range(SHOWN)],
        output_type="np",
    ).images
    right = [judge(picture, scene).right for picture, scene in zip(pictures, scenes, strict=True)]
    thirds = np.asarray(right).reshape(3, -1).mean(1)
    print(f"{file.stem}: one, two, three objects right: {thirds.round(2).tolist()}", flush=True)
    rows = np.concatenate(np.concatenate(pictures.reshape(3, -1, 128, 128, 3), axis=1), axis=1)
    Image.fromarray((rows * 255).round().astype(np.uint8)).save(file)
