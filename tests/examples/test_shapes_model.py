"""The model in the tree: it travels, and paints what it is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from examples.shapes import evaluate
from examples.shapes.export import MOST_BYTES
from preheat.torchserve.server import ROOT

MODEL = ROOT / "examples" / "shapes" / "model"


@pytest.fixture(scope="module")
def pipeline() -> Iterator[StableDiffusionXLPipeline]:
    yield StableDiffusionXLPipeline.from_pretrained(
        MODEL, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
    )


def test_it_is_small_enough_to_travel_and_says_what_it_is() -> None:
    weights = list(MODEL.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in weights) <= MOST_BYTES
    assert not [file for file in MODEL.rglob("*.bin")]
    card = (MODEL / "README.md").read_text()
    assert "apache-2.0" in card and "held-out captions" in card


def test_it_paints_what_training_never_saw(pipeline: StableDiffusionXLPipeline) -> None:
    found = evaluate.shares(evaluate.held_out(9, lambda _: (96, 128)), evaluate.painter(pipeline))
    assert np.mean(found.right) > 0.5  # of 300, see its card


def test_another_prompt_is_another_picture(pipeline: StableDiffusionXLPipeline) -> None:
    paint = evaluate.painter(pipeline)
    first, second = evaluate.held_out(2, lambda _: (96, 96))
    assert np.abs(paint(first, 1) - paint(second, 1)).max() > 0.2
