"""The tiny pipelines are what the real ones are, but for their size."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
)
from PIL import Image

from preheat.models import tiny
from preheat.models.diffusion.tiny import PIPELINES


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("family", PIPELINES)
def test_every_family_paints_in_every_task(family: str, tmp_path: Path) -> None:
    pipeline = AutoPipelineForText2Image.from_pretrained(tiny.build(family, tmp_path / family))
    asked = {"prompt": "a fox", "num_inference_steps": 2, "height": 64, "width": 96}
    generated = pipeline(**asked, generator=torch.Generator().manual_seed(1)).images[0]
    assert generated.size == (96, 64)
    # pictures, not a grey plane: comparisons by pixel mean something
    assert len(generated.getcolors(64 * 96)) > 500

    sources = {"image": generated, "strength": 0.9}
    again = AutoPipelineForImage2Image.from_pipe(pipeline)(**asked, **sources).images[0]
    mask = Image.new("L", generated.size, 255)
    inpainted = AutoPipelineForInpainting.from_pipe(pipeline)(
        **asked, **sources, mask_image=mask
    ).images[0]
    assert again.size == inpainted.size == (96, 64)


@pytest.mark.parametrize("family", PIPELINES)
def test_prompts_matter(family: str, tmp_path: Path) -> None:
    pipeline = AutoPipelineForText2Image.from_pretrained(tiny.build(family, tmp_path / family))
    generated = [
        pipeline(
            prompt,
            num_inference_steps=2,
            height=64,
            width=64,
            generator=torch.Generator().manual_seed(1),
        )
        for prompt in ("a red fox", "the sea at night")
    ]
    assert generated[0].images[0].tobytes() != generated[1].images[0].tobytes()


def test_two_builds_are_the_same_bytes_and_only_safetensors(tmp_path: Path) -> None:
    first, second = (digest(tiny.build("sdxl", tmp_path / name)) for name in ("first", "second"))
    assert first == second
    weights = {Path(name).suffix for name in first} - {".json", ".txt"}
    assert weights == {".safetensors"}


def test_a_build_replaces_an_older_one_and_leaves_the_dice_alone(tmp_path: Path) -> None:
    folder = tiny.build("sd15", tmp_path / "model")
    (folder / "left-over").touch()
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    tiny.build("sd15", folder)
    assert torch.rand(1) == expected
    assert not (folder / "left-over").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sdxl, sd15, sd3, flux"):
        tiny.build("sd2", tmp_path / "model")
