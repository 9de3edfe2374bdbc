"""The rewrite of a module whose rows have sizes of their own: what it knows, and what it refuses.

Known are classes, exactly: a subclass of a known class may do anything. Read in diffusers 0.42.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusers.models import activations, attention, embeddings, normalization, resnet
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
)
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.transformers import transformer_flux as flux
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets import unet_2d_blocks as blocks
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from preheat.errors import ConfigError
from preheat.models.diffusion.masking import parts, roots
from preheat.models.diffusion.masking.masks import Canvas

CELLWISE: frozenset[type] = frozenset(
    {
        nn.Linear,
        nn.Dropout,
        nn.Identity,
        nn.LayerNorm,
        nn.RMSNorm,
        nn.ModuleList,
        nn.SiLU,
        nn.GELU,
        nn.Mish,
        nn.ReLU,
        activations.GEGLU,
        activations.GELU,
        activations.ApproximateGELU,
        attention.FeedForward,
        attention.JointTransformerBlock,
        blocks.CrossAttnDownBlock2D,
        blocks.CrossAttnUpBlock2D,
        blocks.DownBlock2D,
        blocks.DownEncoderBlock2D,
        blocks.UNetMidBlock2D,
        blocks.UNetMidBlock2DCrossAttn,
        blocks.UpBlock2D,
        blocks.UpDecoderBlock2D,
        embeddings.CombinedTimestepGuidanceTextProjEmbeddings,
        embeddings.CombinedTimestepTextProjEmbeddings,
        embeddings.PixArtAlphaTextProjection,
        embeddings.TimestepEmbedding,
        embeddings.Timesteps,
        flux.FluxPosEmbed,
        flux.FluxSingleTransformerBlock,
        flux.FluxTransformerBlock,
        normalization.AdaLayerNormContinuous,
        normalization.AdaLayerNormZero,
        normalization.AdaLayerNormZeroSingle,
        normalization.RMSNorm,
        normalization.SD35AdaLayerNormZeroX,
    }
)
"""What does to a cell what does not depend on any other cell, or only calls its parts."""
KEEPS_ZERO = (nn.SiLU, nn.GELU, nn.Mish, nn.ReLU)
"""Activations that are 0 at 0."""


def rewrite(module: nn.Module, path: str) -> None:
    """Give the module's forward one more argument, `sizes`: (rows, 2) in latent cells, long. Rows
    of any sizes then give, in their own cells, what the untouched module gives each of them alone;
    without `sizes` it is the untouched module. Its weights, their names and its parts stay.

    Args:
        path: the YAML key and the target in it, for refusals.

    Raises:
        ConfigError: there is something in it whose neighbours' influence is not known here. Nothing
            is changed then.
    """
    rewriting = _Rewriting(Canvas())
    for name, part in module.named_modules():
        rewriting.look_at(name or "itself", part)
    if type(module) not in roots.ROOTS:
        rewriting.refused.append(f"itself ({type(module).__name__})")
    if rewriting.refused:
        raise ConfigError(
            f"mask cannot be had for {path}, which has parts that it does not know: "
            f"{', '.join(rewriting.refused)}; use fit: pad",
            "pt2.shapes.fit",
        )
    for change in rewriting.changes:
        change()


class _Rewriting:
    """Looks at every part, parents first; changes nothing before all of them are known."""

    def __init__(self, canvas: Canvas) -> None:
        self._canvas = canvas
        self.refused: list[str] = []
        self.changes: list[Callable[[], None]] = []
        self._settled: set[int] = set()  # parts that need no mask where they stand

    def look_at(self, name: str, part: nn.Module) -> None:
        kind = type(part)
        known = _KNOWN.get(kind)
        if kind in CELLWISE if known is None else id(part) in self._settled:
            return
        reason = "" if known is None else known(self, part)
        if reason is not None:
            self.refused.append(f"{name} ({kind.__name__}{reason and ', ' + reason})")

    def become(self, part: nn.Module, kind: type) -> None:
        def change() -> None:
            part.__class__ = kind
            part.__dict__["canvas"] = self._canvas

        self.changes.append(change)

    def attend(self, attn: Any, processor: Any) -> None:
        self.settle(attn)
        self.changes.append(lambda: attn.set_processor(processor))

    def settle(self, *parts: nn.Module) -> None:
        self._settled.update(map(id, parts))

    def unsettled(self, part: nn.Module) -> str:
        return "where it is not known"

    # Each looks at a part, notes the changes, and returns why it is refused, or None.

    def convolution(self, part: Any) -> str | None:
        halves = part.kernel_size == (3, 3) and part.stride == (2, 2)
        if part.padding_mode != "zeros" or (part.stride != (1, 1) and not halves):
            return f"stride {part.stride}, padding {part.padding_mode}"
        same = tuple(d * (k - 1) / 2 for d, k in zip(part.dilation, part.kernel_size, strict=True))
        if part.padding != same:
            return f"padding {part.padding}"
        if part.kernel_size != (1, 1):
            self.become(part, parts.MaskedConv2d)
        return None

    def norm(self, part: nn.GroupNorm) -> str | None:
        if not part.affine:
            return "without weights"
        self.become(part, parts.MaskedGroupNorm)
        return None

    def resnet(self, part: Any) -> str | None:
        if part.upsample is not None or part.downsample is not None:
            return "up or down"
        if type(part.nonlinearity) not in KEEPS_ZERO:
            return type(part.nonlinearity).__name__
        self.settle(part.conv1)
        if part.time_embedding_norm != "scale_shift":
            self.settle(part.conv2)
        return None

    def down(self, part: Any) -> str | None:
        conv = part.conv
        if part.norm is not None or not part.use_conv or part.padding not in (0, 1):
            return "not a plain convolution"
        if type(conv) is not nn.Conv2d or (conv.kernel_size, conv.stride) != ((3, 3), (2, 2)):
            return "not a plain convolution"
        if part.padding == 0:
            self.settle(conv)
            self.become(part, parts.MaskedDownsample2D)
        return None

    def up(self, part: Any) -> str | None:
        if part.norm is not None or part.use_conv_transpose or not part.interpolate:
            return "not nearest and a convolution"
        return None  # of an odd size it makes a cell too many, which the convolution is masked from

    def transformer(self, part: Any) -> str | None:
        if not part.is_input_continuous:
            return "not over latent cells"
        self.become(part, parts.MaskedTransformer2DModel)
        return None

    def block(self, part: Any) -> str | None:
        if part.pos_embed is not None or part.only_cross_attention or part.attn2 is None:
            return "not self-attention, then cross-attention"
        if part.double_self_attention or part.norm_type != "layer_norm":
            return "not self-attention, then cross-attention"
        if _processors(part.attn1, part.attn2) != {AttnProcessor2_0}:
            return "another attention processor"
        self.attend(part.attn1, parts.SelfAttention())
        self.settle(part.attn2)
        return None

    def middle(self, part: Any) -> str | None:
        for attn in filter(None, part.attentions):
            if _processors(attn) != {AttnProcessor2_0} or type(attn.group_norm) is not nn.GroupNorm:
                return "another attention"
            if attn.spatial_norm is not None or not attn.residual_connection:
                return "another attention"
            self.attend(attn, parts.CellAttention(self._canvas))
        return None

    def joint(self, part: Any) -> str | None:
        attentions = [part.attn, *([] if part.attn2 is None else [part.attn2])]
        if _processors(*attentions) != {JointAttnProcessor2_0}:
            return "another attention processor"
        for attn in attentions:
            self.attend(attn, parts.JointAttention())
        return None

    def flux_attention(self, part: Any) -> str | None:
        if _processors(part) != {flux.FluxAttnProcessor}:
            return "another attention processor"
        self.attend(part, parts.FluxAttention())
        return None

    def patches(self, part: Any) -> str | None:
        if not part.pos_embed_max_size or not part.flatten or part.layer_norm:
            return "positions that are not cut from a table"
        if part.pos_embed is None or part.proj.kernel_size != part.proj.stride:
            return "positions that are not cut from a table"
        self.settle(part.proj)
        self.become(part, parts.MaskedPatchEmbed)
        return None

    def root(self, part: Any) -> str | None:
        norm, last = getattr(part, "conv_norm_out", None), getattr(part, "conv_out", None)
        if last is not None and norm is not None and type(part.conv_act) in KEEPS_ZERO:
            self.settle(last)
        config = getattr(part, "config", {})
        if config.get("addition_embed_type") not in (None, "text", "text_time"):
            return f"addition_embed_type {config['addition_embed_type']}"
        self.become(part, roots.ROOTS[type(part)])
        return None


def _processors(*attentions: Any) -> set[type]:
    return {type(attn.processor) for attn in attentions}


_KNOWN: Mapping[type, Callable[[_Rewriting, Any], str | None]] = {
    Attention: _Rewriting.unsettled,
    nn.Conv2d: _Rewriting.convolution,
    nn.GroupNorm: _Rewriting.norm,
    resnet.ResnetBlock2D: _Rewriting.resnet,
    Downsample2D: _Rewriting.down,
    Upsample2D: _Rewriting.up,
    Transformer2DModel: _Rewriting.transformer,
    attention.BasicTransformerBlock: _Rewriting.block,
    blocks.UNetMidBlock2D: _Rewriting.middle,
    attention.JointTransformerBlock: _Rewriting.joint,
    flux.FluxAttention: _Rewriting.flux_attention,
    embeddings.PatchEmbed: _Rewriting.patches,
    UNet2DConditionModel: _Rewriting.root,
    SD3Transformer2DModel: _Rewriting.root,
    flux.FluxTransformer2DModel: _Rewriting.root,
    Encoder: _Rewriting.root,
    Decoder: _Rewriting.root,
}
"""What looks beyond its own cell, or has a part that need not be masked."""
