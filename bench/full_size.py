"""An SDXL of real size with random weights, made on the GPU: as slow as the real one to run and to
compile, nothing to download.

    python -m bench.full_size FOLDER

The numbers are those of the published configs of Stable Diffusion XL base 1.0;
tests/test_bench_full_size.py counts the parameters. Tokenizers and scheduler are those of the tiny
pipeline, whose vocabulary is a corner of the real one.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from preheat.device import any_device
from preheat.models import tiny

UNET: Mapping[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE: Mapping[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
TEXT: Mapping[str, Any] = {
    "vocab_size": 49408,
    "bos_token_id": 512,  # the tiny tokenizer's
    "eos_token_id": 513,
    "pad_token_id": 513,
}
TEXT_1: Mapping[str, Any] = {
    **TEXT,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
TEXT_2: Mapping[str, Any] = {
    **TEXT,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}


def modules(device: torch.device | str) -> dict[str, torch.nn.Module]:
    """The four networks in bfloat16 on `device`, randomly filled there, by their names in a
    pipeline.
    """
    with _bfloat16(), torch.device(device):
        torch.manual_seed(0)
        return {
            "unet": UNet2DConditionModel(**UNET),
            "vae": AutoencoderKL(**VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT_1)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_2)),
        }


def build(folder: Path, device: torch.device) -> Path:
    """Write the pipeline, 7 GB of safetensors, to `folder`, which must not exist; return it."""
    with tempfile.TemporaryDirectory() as scratch:
        small = tiny.build("sdxl", Path(scratch, "tiny"))
        networks = {name: module.to("cpu") for name, module in modules(device).items()}
        StableDiffusionXLPipeline.from_pretrained(small, **networks).save_pretrained(
            folder, safe_serialization=True
        )
    return folder


@contextmanager
def _bfloat16() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def main() -> None:
    device = any_device()
    if device.type != "cuda":
        sys.exit(
            f"the profile sdxl needs a CUDA GPU, and torch {torch.__version__} sees none; use the "
            "profile tiny on this machine"
        )
    build(Path(sys.argv[1]), device)


if __name__ == "__main__":
    main()
