"""The parts of a network that look beyond their own cell, masked.

Each takes the place of a part's class, and is that class wherever a call has no masks. What lies
outside a row's cells is never read: it is replaced by the zeros that the row's own border would
have, or left out. It may be anything, NaN and infinity too.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import PatchEmbed
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn
from torch.nn import functional

from preheat.models.diffusion.masking.masks import Canvas


class MaskedConv2d(nn.Conv2d):
    """Zeros where the picture's own border would be padded with zeros."""

    canvas: Canvas

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        masks = self.canvas.masks
        return super().forward(input if masks is None else masks.keep(input))


class MaskedGroupNorm(nn.GroupNorm):
    """Mean and variance are those of a row's own cells, in float32 and in two passes, as the
    difference of two large sums would lose the variance. All other cells are 0 afterwards, which
    SiLU and its kin leave 0, so that a convolution that follows needs no mask.
    """

    canvas: Canvas

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        masks = self.canvas.masks
        if masks is None:
            return super().forward(input)
        cells, count = masks.at(input.shape[-2], input.shape[-1])
        own = cells[:, None]
        # (rows, groups, channels of a group, height, width)
        split = (input.shape[0], self.num_groups, -1, *input.shape[2:])
        grouped = torch.where(own, input.reshape(split).float(), 0)
        number = (count * grouped.shape[2])[:, None, None, None, None]
        mean = grouped.sum((2, 3, 4), keepdim=True) / number
        centred = torch.where(own, grouped - mean, 0)
        variance = centred.square().sum((2, 3, 4), keepdim=True) / number
        shape = (1, self.num_groups, -1, 1, 1)
        scale = (variance + self.eps).rsqrt() * self.weight.float().view(shape)
        normed = torch.where(own, centred * scale + self.bias.float().view(shape), 0)
        return normed.flatten(1, 2).to(input.dtype)


class MaskedDownsample2D(Downsample2D):
    """Masked before the padding of (0, 1, 0, 1) that an encoder has here; that of a UNet is its
    convolution's own.
    """

    canvas: Canvas

    def forward(self, hidden_states: torch.Tensor) -> Any:
        masks = self.canvas.masks
        return super().forward(hidden_states if masks is None else masks.keep(hidden_states))


class MaskedTransformer2DModel(Transformer2DModel):
    """Hands its blocks the mask of the cells as an argument, so that a block compiled by itself
    (`scope: regional`) sees it.
    """

    canvas: Canvas

    def forward(self, hidden_states: torch.Tensor, **others: Any) -> Any:
        masks = self.canvas.masks
        if masks is not None:
            height, width = hidden_states.shape[-2:]
            # (rows, 1, cells): what has three dimensions passes through unchanged
            others["attention_mask"] = masks.tokens(height, width)[:, None]
        return super().forward(hidden_states, **others)


class SelfAttention(AttnProcessor2_0):
    """Over the cells whose keys the mask, (rows, 1, cells), has; keys and values of all others are
    made of zeros, since a masked NaN poisons a row in spite of the mask.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> Any:
        if attention_mask is not None:
            hidden_states = torch.where(attention_mask.transpose(1, 2), hidden_states, 0)
        return super().__call__(attn, hidden_states, None, attention_mask, temb)


class CellAttention(AttnProcessor2_0):
    """`SelfAttention` of the VAE's: over (rows, channels, height, width), with the norm and the
    residual in it.
    """

    def __init__(self, canvas: Canvas) -> None:
        super().__init__()
        self._canvas = canvas

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: torch.Tensor | None = None,
    ) -> Any:
        masks = self._canvas.masks
        if masks is None:
            return super().__call__(attn, hidden_states, temb=temb)
        residual = hidden_states
        rows, channels, height, width = hidden_states.shape
        # a masked norm: the other cells are 0
        states = attn.group_norm(hidden_states).flatten(2).transpose(1, 2)
        query, key, value = (
            project(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        keys = masks.tokens(height, width)[:, None, None]
        states = functional.scaled_dot_product_attention(query, key, value, attn_mask=keys)
        states = attn.to_out[0](states.transpose(1, 2).flatten(2))
        states = states.transpose(1, 2).reshape(rows, channels, height, width)
        return (states + residual) / attn.rescale_output_factor


class JointAttention(JointAttnProcessor2_0):
    """Of SD3's blocks, over the picture's tokens, then the text's; the mask, (rows, tokens), is the
    picture's.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> Any:
        if attention_mask is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states)
        states = torch.where(attention_mask[:, :, None], hidden_states, 0)
        query, key, value = (
            _heads(attn, project(states), norm)
            for project, norm in (
                (attn.to_q, attn.norm_q),
                (attn.to_k, attn.norm_k),
                (attn.to_v, None),
            )
        )
        keys = attention_mask
        if encoder_hidden_states is not None:
            text = (
                _heads(attn, project(encoder_hidden_states), norm)
                for project, norm in (
                    (attn.add_q_proj, attn.norm_added_q),
                    (attn.add_k_proj, attn.norm_added_k),
                    (attn.add_v_proj, None),
                )
            )
            pairs = zip((query, key, value), text, strict=True)
            query, key, value = (torch.cat(pair, dim=2) for pair in pairs)
            every = keys.new_ones(encoder_hidden_states.shape[:2])
            keys = torch.cat([keys, every], dim=1)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=keys[:, None, None]
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        picture = attn.to_out[1](attn.to_out[0](mixed[:, : states.shape[1]]))
        if encoder_hidden_states is None:
            return picture
        text_states = mixed[:, states.shape[1] :]
        return picture, text_states if attn.context_pre_only else attn.to_add_out(text_states)


def _heads(attn: Any, projected: torch.Tensor, norm: Any) -> torch.Tensor:
    """(rows, tokens, channels) as (rows, heads, tokens, channels of a head)."""
    split = projected.reshape(*projected.shape[:2], attn.heads, -1).transpose(1, 2)
    return split if norm is None else norm(split)


class FluxAttention(FluxAttnProcessor):
    """Over the text's tokens, then the picture's; the mask, (rows, 1, 1, tokens), is of both. In a
    block of one stream the states are both, too; in one of two they are the picture's.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        if attention_mask is not None:
            own = attention_mask[:, 0, 0, -hidden_states.shape[1] :, None]
            hidden_states = torch.where(own, hidden_states, 0)
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )


class MaskedPatchEmbed(PatchEmbed):
    """SD3's: each row has the positions of its own size, which are cut from the middle of their
    table. Patches do not overlap and need no mask.
    """

    canvas: Canvas

    def forward(self, latent: torch.Tensor) -> Any:
        masks = self.canvas.masks
        if masks is None:
            return super().forward(latent)
        height, width = (side // self.patch_size for side in latent.shape[-2:])
        states = self.proj(latent).flatten(2).transpose(1, 2)
        return (states + self._positions(masks.sizes // self.patch_size, height, width)).to(
            states.dtype
        )

    def _positions(self, sizes: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(rows, patches, channels) for sizes in patches. A patch outside of its row has some
        position of the table.
        """
        most = self.pos_embed_max_size
        first = (most - sizes) // 2
        down = first[:, :1] + torch.arange(height, device=sizes.device)
        across = first[:, 1:] + torch.arange(width, device=sizes.device)
        places = down.clamp(max=most - 1)[:, :, None] * most + across.clamp(max=most - 1)[:, None]
        return self.pos_embed[0][places.flatten(1)]  # type: ignore[no-any-return]
