"""The SDXLs that the bench makes, looked at without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import sdxl
from bench.profiles import PROFILES, build_sdxl
from bench.sdxl import SIZES, Text
from preheat.config.diffusion import PipelineConfig
from preheat.errors import PreheatError
from preheat.models.diffusion.pipeline import DiffusionPipeline

PARAMETERS = {  # of Stable Diffusion XL base 1.0
    "unet": 2_567_463_684,
    "vae": 83_653_863,
    "text_encoder": 123_060_480,
    "text_encoder_2": 694_659_840,
}


def test_it_is_as_large_as_the_real_one() -> None:
    made = SIZES["real"].modules("meta")
    assert {
        name: sum(p.numel() for p in module.parameters()) for name, module in made.items()
    } == PARAMETERS
    assert {p.dtype for module in made.values() for p in module.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", SIZES)
def test_it_is_a_pipeline_that_preheat_loads(name: str, tmp_path: Path) -> None:
    """The same way, with the layers of the real one made few."""
    size = SIZES[name]
    if size.needs_gpu:
        size = replace(
            size,
            channels=(32, 64, 64),
            transformers=(1, 1, 1),
            heads=(1, 2, 2),
            vae_channels=(32,) * 4,
            texts=(Text(48, 1, 4, "quick_gelu"), Text(80, 1, 4, "gelu")),
            vocabulary=514,
        )
    cpu = torch.device("cpu")
    folder = sdxl.build(size, tmp_path / "pipeline", cpu)
    pipeline = DiffusionPipeline.load(folder, PipelineConfig(dtype=size.dtype), cpu)
    assert pipeline.family.name == "sdxl"
    assert pipeline.default_bucket.height == pipeline.default_bucket.width == size.side


def operations(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def test_the_small_one_is_a_denoiser_with_little_beside_it() -> None:
    """By operations, since nothing here is timed: 85 % of a request, guidance doubling its rows."""
    size = SIZES["small"]
    cells, width = size.side // 8, sum(text.width for text in size.texts)
    with torch.random.fork_rng(), torch.device("meta"):
        made, latents = size.modules("meta"), torch.empty(2, 4, cells, cells)
        conditions = {
            "text_embeds": torch.empty(2, size.texts[1].width),
            "time_ids": torch.empty(2, sdxl.SIZE_CONDITIONS),
        }
        call = (latents, torch.tensor(1.0), torch.empty(2, 77, width))
        step = operations(lambda: made["unet"](*call, added_cond_kwargs=conditions))
        decoder = operations(lambda: cast(Any, made["vae"]).decode(latents[:1]))
    assert sum(p.numel() for p in made["unet"].parameters()) == pytest.approx(39e6, rel=0.02)
    denoiser = PROFILES["small"].num_steps * step
    assert 0.85 <= denoiser / (denoiser + decoder) < 0.95


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a CUDA device, so nothing is refused"
)
def test_without_a_gpu_it_is_refused_in_one_clear_line(tmp_path: Path) -> None:
    said = r"the profile sdxl needs a CUDA GPU.*sees none.*use the profile small or tiny"
    with pytest.raises(PreheatError, match=said) as caught:
        build_sdxl("real", tmp_path / "pipeline")
    assert "\n" not in str(caught.value) and not (tmp_path / "pipeline").exists()
