"""SDXL with random weights, in the sizes that the benches serve: nothing to download, and as slow
to run and to compile as a trained one of that size.

    python -m bench.sdxl SIZE FOLDER

`real` has the numbers of the published configs of Stable Diffusion XL base 1.0. `small` is the same
scaled down until two cores paint eight steps in a second or two: channels by 5, transformer blocks
from 0/2/10 to 0/1/3, the decoder so far that the denoiser keeps nine tenths of a request, as it has
in the real one. Tokenizers and scheduler are those of the tiny pipeline, whose vocabulary is a
corner of the real one.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from preheat.device import DTYPES, any_device
from preheat.models import tiny

SIZE_CONDITIONS = 6
"""Height and width of original, crop and target."""


@dataclass(frozen=True, slots=True)
class Text:
    """One text encoder."""

    width: int
    layers: int
    heads: int
    activation: str


@dataclass(frozen=True, slots=True)
class Size:
    """What differs between an SDXL and a smaller one.

    Args:
        side: of the default picture, in pixels.
        channels: of the denoiser, by level.
        transformers: blocks of each attention, by level; the first level has no attention.
        heads: of each attention, by level.
        time_channels: that each of the six size conditions is embedded in.
        vae_channels: by level.
        texts: both encoders. The denoiser sees their widths side by side.
        vocabulary: tokens; 514 is all that the tokenizer knows.
        dtype: of the weights that are written.
        needs_gpu: too large to be made, or run, on a CPU.
    """

    side: int
    channels: tuple[int, int, int]
    transformers: tuple[int, int, int]
    heads: tuple[int, int, int]
    time_channels: int
    vae_channels: tuple[int, int, int, int]
    texts: tuple[Text, Text]
    vocabulary: int
    dtype: Literal["float32", "bfloat16"]
    needs_gpu: bool = False

    @property
    def unet(self) -> Mapping[str, Any]:
        """Arguments of UNet2DConditionModel."""
        return {
            "sample_size": self.side // 8,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": self.channels,
            "layers_per_block": 2,
            "transformer_layers_per_block": self.transformers,
            "attention_head_dim": self.heads,  # by diffusers' own mistake, the number of heads
            "cross_attention_dim": sum(text.width for text in self.texts),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": self.time_channels,
            "projection_class_embeddings_input_dim": SIZE_CONDITIONS * self.time_channels
            + self.texts[1].width,
        }

    @property
    def vae(self) -> Mapping[str, Any]:
        """Arguments of AutoencoderKL."""
        return {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": self.vae_channels,
            "layers_per_block": 2,
            "latent_channels": 4,
            "norm_num_groups": min(32, *self.vae_channels),
            "sample_size": self.side,
            "scaling_factor": 0.13025,
        }

    def text(self, index: int) -> Mapping[str, Any]:
        """Arguments of CLIPTextConfig."""
        text = self.texts[index]
        return {
            "vocab_size": self.vocabulary,
            "bos_token_id": 512,  # the tiny tokenizer's
            "eos_token_id": 513,
            "pad_token_id": 513,
            "hidden_size": text.width,
            "intermediate_size": 4 * text.width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "hidden_act": text.activation,
            "projection_dim": text.width,
        }

    def modules(self, device: torch.device | str) -> dict[str, nn.Module]:
        """The four networks on `device`, randomly filled there, by their names in a pipeline."""
        with _default_dtype(DTYPES[self.dtype]), torch.device(device):
            torch.manual_seed(0)
            return {
                "unet": self.denoiser(),
                "vae": AutoencoderKL(**self.vae),
                "text_encoder": CLIPTextModel(CLIPTextConfig(**self.text(0))),
                "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**self.text(1))),
            }

    def denoiser(self) -> nn.Module:
        """The UNet alone, in torch's default dtype on its default device."""
        module: nn.Module = UNet2DConditionModel(**self.unet)
        return module


SIZES: Mapping[str, Size] = {
    "real": Size(
        side=1024,
        channels=(320, 640, 1280),
        transformers=(1, 2, 10),
        heads=(5, 10, 20),
        time_channels=256,
        vae_channels=(128, 256, 512, 512),
        texts=(Text(768, 12, 12, "quick_gelu"), Text(1280, 32, 20, "gelu")),
        vocabulary=49408,
        dtype="bfloat16",
        needs_gpu=True,
    ),
    "small": Size(
        side=320,
        channels=(64, 128, 256),
        transformers=(1, 1, 3),
        heads=(2, 4, 8),
        time_channels=32,
        vae_channels=(16, 32, 64, 64),
        texts=(Text(48, 3, 4, "quick_gelu"), Text(80, 6, 4, "gelu")),
        vocabulary=514,
        dtype="float32",
    ),
}


def build(size: Size, folder: Path, device: torch.device) -> Path:
    """Write the pipeline to `folder`, which must not exist; return it. A real one is 7 GB of
    safetensors.
    """
    with tempfile.TemporaryDirectory() as scratch:
        small = tiny.build("sdxl", Path(scratch, "tiny"))
        with torch.random.fork_rng():
            networks = {name: part.to("cpu") for name, part in size.modules(device).items()}
        StableDiffusionXLPipeline.from_pretrained(small, **networks).save_pretrained(
            folder, safe_serialization=True
        )
    return folder


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def main() -> None:
    name, folder = sys.argv[1:]
    size, device = SIZES[name], any_device()
    if size.needs_gpu and device.type != "cuda":
        sys.exit(
            f"the profile sdxl needs a CUDA GPU, and torch {torch.__version__} sees none; use the "
            "profile small or tiny on this machine"
        )
    build(size, Path(folder), device)


if __name__ == "__main__":
    main()
