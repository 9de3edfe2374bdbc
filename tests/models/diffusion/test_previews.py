"""Previews: the map from latents to colours, alone and on every family's VAE."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionXLPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from preheat.buckets import Bucket
from preheat.config.diffusion import PipelineConfig
from preheat.models import tiny
from preheat.models.diffusion import geometry, image_processor
from preheat.models.diffusion.pipeline import Batch, DiffusionPipeline, Row, Sketch
from preheat.models.diffusion.previews import LatentColours, plain_colours
from worker.test_service import FAMILY_NAMES


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([4, 16]), st.integers(0, 1000))
def test_a_vae_that_is_linear_in_colour_is_read_back(num_channels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # (3, channels)
    directions = torch.linalg.qr(torch.randn(num_channels, 3, generator=generator)).Q.T
    there = (0.5 + torch.rand(3, 1, generator=generator)) * directions
    offset = torch.randn(num_channels, generator=generator)
    colours = LatentColours.fit(plain_colours() @ there + offset, plain_colours())
    wanted = torch.rand(5, 7, 3, generator=generator)
    generated = colours.generate((wanted @ there + offset).permute(2, 0, 1))
    assert generated.shape == (5, 7, 3) and generated.dtype == np.uint8
    assert np.abs(generated / 255 - wanted.numpy()).max() < 0.02


def test_channels_that_say_nothing_of_colour_are_not_blown_up() -> None:
    quiet = torch.cat(
        [plain_colours(), 1e-6 * torch.randn(27, 13, generator=torch.Generator().manual_seed(0))],
        dim=1,
    )
    assert LatentColours.fit(quiet, plain_colours()).weight.abs().max() < 2


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_tells_its_steps_and_shows_them(
    family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tiny.build(family, tmp_path_factory.mktemp(family) / "model")
    pipeline = DiffusionPipeline.load(folder, PipelineConfig(), torch.device("cpu"))
    seen: list[tuple[int, int]] = []
    shown: list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]] = []

    def look(step: int, of: int, sketch: Sketch) -> None:
        seen.append((step, of))
        shown.extend(sketch(row) for row in (0, 1))

    pipeline.generate(_batch(seeds=(1, 2)), look)
    of = seen[0][1]
    assert of >= 3 and seen == [(number, of) for number in range(1, of + 1)]
    assert {sketch.shape for sketch in shown} == {(12, 6, 3)}
    assert (shown[0] != shown[1]).any(), "two seeds look alike"
    alone: list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]] = []
    pipeline.generate(_batch(seeds=(2, 2)), lambda *step: alone.append(step[2](0)))
    assert np.abs(alone[0].astype(int) - shown[1]).max() <= 1, (
        "a row's sketch depends on its neighbour"
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.integers(1, 48), st.booleans())
def test_a_preview_is_the_asked_part_of_the_bucket(height: int, width: int, resize: bool) -> None:
    plan = geometry.plan(
        height,
        width,
        buckets=[Bucket(64, 48)],
        fit="resize" if resize else "pad",
        oversize="reject",
        multiple=8,
        has_image=False,
    )
    cells = np.zeros((8, 6, 3), np.uint8)
    cells[..., 0], cells[..., 1] = np.mgrid[:8, :6] * 30
    small = image_processor.preview(cells, plan)
    assert small.size == (max(1, width // 8), max(1, height // 8))
    whole = image_processor.finish(np.repeat(np.repeat(cells, 8, axis=0), 8, axis=1), plan)
    mean, its = np.asarray(small).mean((0, 1)), np.asarray(whole).mean((0, 1))
    assert np.abs(mean - its).max() < 16, "not the same part"


def _batch(seeds: Sequence[int]) -> Batch:
    rows = [Row("a cat", None, seed) for seed in seeds]
    return Batch(
        rows,
        "text-to-image",
        Bucket(96, 48),
        num_inference_steps=3,
        guidance_scale=4.0,
        strength=1.0,
    )


def test_a_tiny_autoencoder_is_fitted_too(tmp_path: Path) -> None:
    """TAESD, which people put in an SDXL's place to save memory: its encoder gives latents, not a
    distribution.
    """
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny.build("sdxl", tmp_path / "model"))
    blocks = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    pipe.vae = AutoencoderTiny(**blocks, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4)
    pipe.save_pretrained(tmp_path / "taesd")
    pipeline = DiffusionPipeline.load(tmp_path / "taesd", PipelineConfig(), torch.device("cpu"))
    shown: list[tuple[int, ...]] = []
    pixels = pipeline.generate(
        _batch(seeds=(1, 2)), lambda *step: shown.append(step[2](0).shape)
    ).pixels
    assert pixels.shape[0] == 2 and set(shown) == {(12, 6, 3)}
