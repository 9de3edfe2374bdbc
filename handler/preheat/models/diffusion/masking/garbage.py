"""Garbage wherever a masked network says that it reads nothing, for its check."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from preheat.models.diffusion.masking import parts
from preheat.models.diffusion.masking.masks import Canvas

_READ = (
    parts.MaskedConv2d,
    parts.MaskedDownsample2D,
    parts.MaskedGroupNorm,
    Transformer2DModel,
)
"""What masks the states that it is given, (rows, channels, height, width)."""
_WRITE = (nn.Conv2d, Upsample2D)
"""What leaves anything outside, in states of that shape: not a norm, whose zeros are counted on."""


@contextmanager
def outside(module: nn.Module, value: float) -> Iterator[None]:
    """In here `value` stands outside of every row wherever the module's parts mask what they read,
    and in what its convolutions give, so that it is met at every depth: of what the module itself
    is given the first convolution makes zeros.

    The blocks of transformers hand on what is outside by themselves (`x + attention(x)`).
    """
    canvas, level = getattr(module, "canvas", Canvas()), (0, 0)

    def spoiled(states: torch.Tensor) -> torch.Tensor:
        if canvas.masks is None:
            return states
        cells, _ = canvas.masks.at(states.shape[-2], states.shape[-1])
        return torch.where(cells, states, value)

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal level
        level = args[0].shape[-2:]
        return (spoiled(args[0]), *args[1:])

    def after(_: nn.Module, args: tuple[Any, ...], states: torch.Tensor) -> torch.Tensor:
        return spoiled(states)

    def tokens(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Of a block in a transformer whose states have `level`."""
        if canvas.masks is None:
            return args
        own = canvas.masks.tokens(*level)[:, :, None]
        return (torch.where(own, args[0], value), *args[1:])

    with ExitStack() as hooks:
        for part in module.modules():
            if isinstance(part, _READ):
                hooks.callback(part.register_forward_pre_hook(before).remove)
            if isinstance(part, _WRITE):
                hooks.callback(part.register_forward_hook(after).remove)
            if isinstance(part, BasicTransformerBlock):
                hooks.callback(part.register_forward_pre_hook(tokens).remove)
        yield
