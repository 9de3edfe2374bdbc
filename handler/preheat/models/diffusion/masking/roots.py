"""The modules that are rewritten: each with the arguments that diffusers' pipelines give it, and
one more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from preheat.models.diffusion.masking.masks import Canvas, Masks
from preheat.models.diffusion.masking.place import PATCH


class MaskedUNet2DConditionModel(UNet2DConditionModel):
    """`sizes`: (rows, 2), in latent cells, or None where every row fills the canvas."""

    canvas: Canvas

    def forward(
        self,
        sample: torch.Tensor,
        timestep: Any,
        encoder_hidden_states: torch.Tensor,
        *,
        timestep_cond: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        return_dict: bool = True,
        sizes: torch.Tensor | None = None,
    ) -> Any:
        height, width = sample.shape[-2:]
        with self.canvas.of(sizes, height, width) as masks:
            (painted,) = super().forward(
                sample,
                timestep,
                encoder_hidden_states,
                timestep_cond=timestep_cond,
                cross_attention_kwargs=cross_attention_kwargs,
                added_cond_kwargs=added_cond_kwargs,
                return_dict=False,
            )
        return _returned(painted, masks, return_dict)


class MaskedSD3Transformer2DModel(SD3Transformer2DModel):
    """`sizes` as of a UNet's."""

    canvas: Canvas

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        *,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        sizes: torch.Tensor | None = None,
    ) -> Any:
        height, width = hidden_states.shape[-2:]
        patch = self.config.patch_size
        with self.canvas.of(sizes, height, width) as masks:
            if masks is not None:
                own = masks.tokens(height // patch, width // patch)
                joint_attention_kwargs = {**(joint_attention_kwargs or {}), "attention_mask": own}
            (painted,) = super().forward(
                hidden_states,
                encoder_hidden_states,
                pooled_projections,
                timestep,
                joint_attention_kwargs=joint_attention_kwargs,
                return_dict=False,
            )
        return _returned(painted, masks, return_dict)


class MaskedFluxTransformer2DModel(FluxTransformer2DModel):
    """`sizes` as of a UNet's. Where a token lies is told by its `img_ids`, so that the canvas's own
    height and width need not be known.
    """

    canvas: Canvas

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
        guidance: torch.Tensor | None = None,
        *,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        sizes: torch.Tensor | None = None,
    ) -> Any:
        own = None
        if sizes is not None:
            within = img_ids[None, :, 1:] < (sizes // PATCH)[:, None]
            own = within.all(-1)  # (rows, tokens)
            text = own.new_ones(encoder_hidden_states.shape[:2])
            mask = torch.cat([text, own], dim=1)[:, None, None]
            joint_attention_kwargs = {**(joint_attention_kwargs or {}), "attention_mask": mask}
        (painted,) = super().forward(
            hidden_states,
            encoder_hidden_states,
            pooled_projections,
            timestep,
            img_ids,
            txt_ids,
            guidance,
            joint_attention_kwargs=joint_attention_kwargs,
            return_dict=False,
        )
        if own is not None:
            painted = torch.where(own[..., None], painted, 0)
        return _returned(painted, None, return_dict)


class MaskedEncoder(Encoder):
    """`sizes` in latent cells; the canvas in pixels is a whole number of them."""

    canvas: Canvas

    def forward(self, sample: torch.Tensor, sizes: torch.Tensor | None = None) -> Any:
        cell = 2 ** (len(self.down_blocks) - 1)  # pixels a side
        height, width = (side // cell for side in sample.shape[-2:])
        with self.canvas.of(sizes, height, width) as masks:
            encoded = super().forward(sample)
        return encoded if masks is None else masks.keep(encoded)


class MaskedDecoder(Decoder):
    """`sizes` in latent cells."""

    canvas: Canvas

    def forward(
        self,
        sample: torch.Tensor,
        latent_embeds: None = None,
        sizes: torch.Tensor | None = None,
    ) -> Any:
        height, width = sample.shape[-2:]
        with self.canvas.of(sizes, height, width) as masks:
            decoded = super().forward(sample, latent_embeds)
            return decoded if masks is None else masks.keep(decoded)


def _returned(painted: torch.Tensor, masks: Masks | None, return_dict: bool) -> Any:
    """0 outside, so that what compiled and eager code give can be compared as a whole."""
    painted = painted if masks is None else masks.keep(painted)
    return Transformer2DModelOutput(sample=painted) if return_dict else (painted,)


ROOTS: Mapping[type, type] = {
    UNet2DConditionModel: MaskedUNet2DConditionModel,
    SD3Transformer2DModel: MaskedSD3Transformer2DModel,
    FluxTransformer2DModel: MaskedFluxTransformer2DModel,
    Encoder: MaskedEncoder,
    Decoder: MaskedDecoder,
}
"""What a module's class becomes."""
