"""The SDXL of real size that the bench makes on a GPU, looked at without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import full_size
from bench.profiles import build_full_size
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
    made = full_size.modules("meta")
    assert {
        name: sum(p.numel() for p in module.parameters()) for name, module in made.items()
    } == PARAMETERS
    assert {p.dtype for module in made.values() for p in module.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_it_is_a_pipeline_that_preheat_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same way, with the layers made few."""
    text = {"num_hidden_layers": 1, "vocab_size": 514}
    few = {
        "layers_per_block": 1,
        "transformer_layers_per_block": 1,
        "block_out_channels": (32, 64, 64),
    }
    heads = {"attention_head_dim": (1, 2, 2), "cross_attention_dim": 2048}
    monkeypatch.setattr(full_size, "UNET", {**full_size.UNET, **few, **heads})
    monkeypatch.setattr(
        full_size, "VAE", {**full_size.VAE, "layers_per_block": 1, "block_out_channels": (32,) * 4}
    )
    monkeypatch.setattr(full_size, "TEXT_1", {**full_size.TEXT_1, **text})
    monkeypatch.setattr(full_size, "TEXT_2", {**full_size.TEXT_2, **text})
    cpu = torch.device("cpu")
    folder = full_size.build(tmp_path / "pipeline", cpu)
    pipeline = DiffusionPipeline.load(folder, PipelineConfig(dtype="bfloat16"), cpu)
    assert pipeline.family.name == "sdxl"
    assert pipeline.default_bucket.height == pipeline.default_bucket.width == 1024


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a CUDA device, so nothing is refused"
)
def test_without_a_gpu_it_is_refused_in_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(
        PreheatError, match=r"the profile sdxl needs a CUDA GPU.*sees none.*use the profile tiny"
    ) as caught:
        build_full_size(tmp_path / "pipeline")
    assert "\n" not in str(caught.value) and not (tmp_path / "pipeline").exists()
