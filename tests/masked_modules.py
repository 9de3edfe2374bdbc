"""The modules that can be masked, small, each with a call of it on pictures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import nn

from preheat.models.diffusion.masking.rewrite import rewrite

TEXT, POOLED, TOKENS = 16, 8, 5
ROWS = 4


@dataclass(frozen=True, slots=True)
class Example:
    """A module, and pictures on a canvas for it.

    Args:
        make: the module as diffusers makes it.
        call: gives the output, (rows, channels, height, width), for rows of the conditions.
        canvas: height and width in latent cells.
        sizes: of the rows, in latent cells.
        cell: what a latent cell is in the input and in the output, a side.
    """

    make: Callable[[], nn.Module]
    call: Callable[[nn.Module, torch.Tensor, slice, dict[str, torch.Tensor]], torch.Tensor]
    channels: int
    canvas: tuple[int, int]
    sizes: Sequence[tuple[int, int]]
    cell: tuple[int, int] = (1, 1)

    def picture(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        shape = (ROWS, self.channels, *(self.cell[0] * side for side in self.canvas))
        return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def inside(self, picture: torch.Tensor, row: int) -> torch.Tensor:
        """The row's own part of an input: a view of it."""
        return self._cut(picture, row, self.cell[0])

    def painted(self, output: torch.Tensor, row: int) -> torch.Tensor:
        """The row's own part of an output."""
        return self._cut(output, row, self.cell[1])

    def _cut(self, picture: torch.Tensor, row: int, cell: int) -> torch.Tensor:
        height, width = self.sizes[row]
        return picture[row : row + 1, :, : cell * height, : cell * width]

    def alone(self, module: nn.Module, picture: torch.Tensor, row: int) -> torch.Tensor:
        """What the untouched module gives for this row at its own size."""
        return self.call(module, self.inside(picture, row), slice(row, row + 1), {})

    def together(self, module: nn.Module, picture: torch.Tensor) -> torch.Tensor:
        return self.call(module, picture, slice(0, ROWS), {"sizes": torch.tensor(self.sizes)})


@cache
def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


TIMES = torch.tensor([601.0, 2.0, 333.0, 999.0])


def _unet(levels: int, **config: Any) -> nn.Module:
    cross = ["CrossAttnDownBlock2D"] * (levels - 1), ["CrossAttnUpBlock2D"] * (levels - 1)
    module: nn.Module = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=[8, 16, 16, 24][:levels],
        down_block_types=["DownBlock2D", *cross[0]],
        up_block_types=[*cross[1], "UpBlock2D"],
        attention_head_dim=4,
        norm_num_groups=4,
        cross_attention_dim=TEXT,
        **config,
    )
    return module


SIZED: Mapping[str, Any] = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + POOLED,
}


def _call_unet(
    module: Any, picture: torch.Tensor, rows: slice, sizes: dict[str, torch.Tensor]
) -> torch.Tensor:
    dtype = picture.dtype
    conditions = {
        "text_embeds": _drawn(ROWS, POOLED)[rows].to(dtype),
        "time_ids": _drawn(ROWS, 6)[rows].to(dtype),
    }
    sized = {"added_cond_kwargs": conditions} if module.config.addition_embed_type else {}
    text = _drawn(ROWS, TOKENS, TEXT)[rows].to(dtype)
    painted: torch.Tensor = module(picture, TIMES[rows], text, **sized, return_dict=False, **sizes)[
        0
    ]
    return painted


def _sd3(**config: Any) -> nn.Module:
    module: nn.Module = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=12,
        **config,
    )
    return module


def _call_sd3(
    module: Any, picture: torch.Tensor, rows: slice, sizes: dict[str, torch.Tensor]
) -> torch.Tensor:
    dtype = picture.dtype
    painted: torch.Tensor = module(
        picture,
        _drawn(ROWS, TOKENS, TEXT)[rows].to(dtype),
        _drawn(ROWS, POOLED)[rows].to(dtype),
        TIMES[rows],
        return_dict=False,
        **sizes,
    )[0]
    return painted


def _flux() -> nn.Module:
    module: nn.Module = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    return module


def _call_flux(
    module: Any, picture: torch.Tensor, rows: slice, sizes: dict[str, torch.Tensor]
) -> torch.Tensor:
    dtype, (count, channels, height, width) = picture.dtype, picture.shape
    ids = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", dtype)
    painted = module(
        FluxPipeline._pack_latents(picture, count, channels, height, width),
        _drawn(ROWS, TOKENS, TEXT)[rows].to(dtype),
        _drawn(ROWS, POOLED)[rows].to(dtype),
        TIMES[rows].to(dtype) / 1000,
        ids,
        torch.zeros(TOKENS, 3, dtype=dtype),
        torch.full((count,), 3.5, dtype=dtype),
        return_dict=False,
        **sizes,
    )[0]
    unpacked: torch.Tensor = FluxPipeline._unpack_latents(painted, 8 * height, 8 * width, 8)
    return unpacked


_VAE: Mapping[str, Any] = {"block_out_channels": (4, 8, 8), "layers_per_block": 1}


def _encoder() -> nn.Module:
    kinds = ["DownEncoderBlock2D"] * 3
    module: nn.Module = Encoder(3, 4, kinds, norm_num_groups=2, **_VAE)
    return module


def _decoder() -> nn.Module:
    module: nn.Module = Decoder(4, 3, ["UpDecoderBlock2D"] * 3, norm_num_groups=2, **_VAE)
    return module


def _call_vae(
    module: Any, picture: torch.Tensor, rows: slice, sizes: dict[str, torch.Tensor]
) -> torch.Tensor:
    painted: torch.Tensor = module(picture, **sizes)
    return painted


_EVEN = ((16, 20), (8, 12), (12, 4), (2, 18))
_ODD = ((16, 20), (7, 11), (13, 5), (1, 19))
EXAMPLES: Mapping[str, Example] = {
    "sdxl, 2 levels": Example(lambda: _unet(2, **SIZED), _call_unet, 4, (16, 20), _ODD),
    "sdxl, 3 levels": Example(
        lambda: _unet(3, **SIZED, transformer_layers_per_block=[1, 1, 2]),
        _call_unet,
        4,
        (16, 20),
        _ODD,
    ),
    "sd15, 4 levels": Example(
        lambda: _unet(4), _call_unet, 4, (16, 24), ((16, 24), (7, 11), (13, 5), (1, 23))
    ),
    "sd15, scale and shift": Example(
        lambda: _unet(2, resnet_time_scale_shift="scale_shift"), _call_unet, 4, (16, 20), _ODD
    ),
    "sd3": Example(_sd3, _call_sd3, 4, (16, 20), _EVEN),
    "sd3.5": Example(
        lambda: _sd3(dual_attention_layers=(0,), qk_norm="rms_norm"), _call_sd3, 4, (16, 20), _EVEN
    ),
    "flux": Example(_flux, _call_flux, 4, (16, 20), _EVEN),
    "vae encoder": Example(
        _encoder, _call_vae, 3, (8, 9), ((8, 9), (3, 5), (1, 2), (7, 1)), cell=(4, 1)
    ),
    "vae decoder": Example(
        _decoder, _call_vae, 4, (8, 9), ((8, 9), (3, 5), (1, 2), (7, 1)), cell=(1, 4)
    ),
}


@cache
def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """The module untouched and rewritten, with the same weights, none of which is plain."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untouched = EXAMPLES[name].make().eval().requires_grad_(False)
        for weight in untouched.parameters():
            if weight.dim() == 1:
                nn.init.normal_(weight, mean=0.5, std=0.5)
            else:
                weight.mul_(1.5)  # as drawn, what lies deep inside hardly shows
    untouched.to(dtype)
    masked = copy.deepcopy(untouched)
    rewrite(masked, name)
    return untouched, masked
