"""Writes the pipeline as it travels: half precision, safetensors, a model card."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from examples.shapes import dataset, evaluate
from examples.shapes.evaluate import Shares
from examples.shapes.grammar import WORDS
from examples.shapes.sizes import SIZES
from examples.shapes.training import appearing

MOST_BYTES = 16_000_000
JUDGED = 300

CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# Shapes: a small SDXL that paints what can be checked

An SDXL pipeline of the real classes (`StableDiffusionXLPipeline`) with {millions:.1f} million
parameters, {megabytes:.1f} MB in float16. It paints one to three objects on a ground, as in "a
large red circle above a small blue square on a sand background", so that anybody can see, and
[a judge without a neural network](../judge.py) can say, whether a picture is what was asked for.
Compute in float32: half precision is for travelling.

- **Words**: {words}. Others are known as unknown.
- **Sizes**: {smallest} to {largest} pixels, in steps of 8; guidance {guidance}, {steps} steps.
- **Data**: {pictures:,} pictures that [a grammar](../grammar.py) and [a painter](../drawing.py)
  make up, nobody's else. One combination in five of shape, colour and place was held out.
- **Training**: `make train-shapes`, at commit {commit}.
- **Limits**: it knows nothing else. Three objects side by side need a picture that is long enough.
- **Licence**: Apache-2.0, as the code that made it.

| {pictures_judged} held-out captions, trained sizes, eager | one object | two | three | cut off |
|---|---|---|---|---|
| share right | {one:.0%} | {two:.0%} | {three:.0%} | {cut:.0%} |
"""


def export(pipeline: StableDiffusionXLPipeline, folder: Path) -> Shares:
    """Replace `folder` by the pipeline in float16; what is judged is what it then loads as.

    Raises:
        ValueError: its weights are too large to travel.
    """
    with appearing(folder) as part:
        shutil.rmtree(part, ignore_errors=True)
        for model in (pipeline.unet, pipeline.vae):
            model.register_to_config(_name_or_path="")  # where it was trained is nobody's business
        pipeline.to(dtype=torch.float16).save_pretrained(part)
        size = sum(file.stat().st_size for file in part.rglob("*.safetensors"))
        if size > MOST_BYTES:
            raise ValueError(f"{size:,} bytes of weights are more than {MOST_BYTES:,}")
        again = StableDiffusionXLPipeline.from_pretrained(
            part, torch_dtype=torch.float32, use_safetensors=True
        )
        found = evaluate.trained_sizes(again, JUDGED)
        (part / "README.md").write_text(_card(again, size, found), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _card(pipeline: StableDiffusionXLPipeline, size: int, found: Shares) -> str:
    models = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    sides = [side for sizes in SIZES for side in sizes]
    one, two, three = found.right
    return CARD.format(
        millions=sum(weight.numel() for model in models for weight in model.parameters()) / 1e6,
        megabytes=size / 1e6,
        words=", ".join(WORDS),
        smallest=min(sides),
        largest=max(sides),
        guidance=evaluate.GUIDANCE,
        steps=evaluate.STEPS,
        pictures=dataset.PICTURES,
        commit=_commit(),
        pictures_judged=found.pictures,
        one=one,
        two=two,
        three=three,
        cut=found.cut,
    )


def _commit() -> str:
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"],
        check=False,
        cwd=here,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"
