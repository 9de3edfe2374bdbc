"""A kernel of your own as an opaque op, for `pt2.import: [attention_op.py]` beside the YAML.

torch.compile does not look inside a custom op and does not break the graph at it. What the op
returns for given inputs it learns from the fake, which therefore has to tell the truth about shape,
dtype and strides (https://docs.pytorch.org/docs/stable/library.html#torch.library.custom_op).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

NAME = "preheat_example"


@torch.library.custom_op(f"{NAME}::attention", mutates_args=())
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """All (batch, heads, length, width); put your kernel's call here."""
    result = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale
    )
    return result.contiguous()  # whatever the backend's layout: the fake promises this one


@attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


class OpaqueProcessor:
    """What diffusers calls for each attention layer of a UNet."""

    def __call__(
        self,
        layer: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def split(projected: torch.Tensor) -> torch.Tensor:
            return projected.reshape(*projected.shape[:2], layer.heads, -1).transpose(1, 2)

        query, key, value = (
            split(layer.to_q(hidden_states)),
            split(layer.to_k(context)),
            split(layer.to_v(context)),
        )
        mixed = attention(query, key, value, attention_mask).transpose(1, 2).flatten(2)
        out: torch.Tensor = layer.to_out[1](layer.to_out[0](mixed))
        return out


def install(target: nn.Module) -> None:
    """Preheat calls this with every target before it is compiled."""
    known: Any = target
    if hasattr(target, "set_attn_processor"):  # diffusers
        known.set_attn_processor(OpaqueProcessor())
    elif hasattr(target, "set_attn_implementation"):  # transformers
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        def forward(
            module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **_: Any
        ) -> Any:
            if mask is None and getattr(module, "is_causal", False) and query.shape[2] > 1:
                raise NotImplementedError("this op knows no causal mask: it is for encoders")
            return attention(query, key, value, mask, scaling).transpose(1, 2), None

        AttentionInterface.register(NAME, forward)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        known.set_attn_implementation(NAME)
