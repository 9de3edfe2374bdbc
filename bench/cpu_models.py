"""The modules of `bench.cpu`: real classes with random weights, each with one call of the size that
it is served with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from preheat.compilation.signatures import Inputs, map_tensors


@dataclass(frozen=True, slots=True)
class Benched:
    """A module to be made, and a call of it in float32."""

    title: str
    call: str
    """The call's size in words."""
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    can_be_masked: bool = False
    """Whether rows may be smaller than the bucket, as `fit: mask` has them."""


def make(name: str, *, masked: bool = False) -> tuple[nn.Module, Inputs]:
    """The module in float32, the same weights and inputs every time; `masked`, with rows a little
    smaller than the same bucket.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        benched = MODELS[name]
        module, (args, kwargs) = benched.build().eval(), benched.inputs()
    if masked:
        from preheat.models.diffusion.masking.rewrite import rewrite

        rewrite(module, name)
        rows, _, height, width = args[0].shape
        kwargs = {**kwargs, "sizes": torch.tensor([[height - 3, width - 5]] * rows)}
    return module, (args, kwargs)


def num_operations(name: str) -> int:
    """Floating-point operations of one call: products and sums of matrix products, convolutions and
    attentions.
    """
    from torch.utils.flop_counter import FlopCounterMode

    module, (args, kwargs) = make(name)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        module(*args, **kwargs)
    return int(counter.get_total_flops())


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The call with its floating-point tensors in `dtype`; a timestep is a number and stays what it
    is.
    """

    def change(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dim() else tensor

    return map_tensors(inputs[0], change), map_tensors(inputs[1], change)


def first_tensor(output: Any) -> torch.Tensor:
    """What is compared: the sample of a UNet, the last hidden state of an encoder."""
    tensor = output[0]
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _unet() -> nn.Module:
    from preheat.models.diffusion.tiny import PIPELINES

    unet: nn.Module = PIPELINES["sdxl"]().unet
    return unet


def _unet_inputs() -> Inputs:
    conditions = {"text_embeds": torch.randn(2, 32), "time_ids": torch.randn(2, 6)}
    states = torch.randn(2, 77, 64)
    return (torch.randn(2, 4, 32, 32), torch.tensor(500.0)), {
        "encoder_hidden_states": states,
        "added_cond_kwargs": conditions,
        "return_dict": False,
    }


def _small() -> nn.Module:
    from bench.sdxl import SIZES

    return SIZES["small"].denoiser()


def _small_inputs() -> Inputs:
    from bench.sdxl import SIZE_CONDITIONS, SIZES

    first, second = SIZES["small"].texts
    return (torch.randn(2, 4, 40, 40), torch.tensor(500.0)), {
        "encoder_hidden_states": torch.randn(2, 77, first.width + second.width),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(2, second.width),
            "time_ids": torch.randn(2, SIZE_CONDITIONS),
        },
        "return_dict": False,
    }


def _resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetModel

    module: nn.Module = ResNetModel(ResNetConfig())
    return module


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    module: nn.Module = BertModel(BertConfig())
    return module


def _bert_inputs() -> Inputs:
    mask = torch.ones(1, 128, dtype=torch.int64)
    return (), {
        "input_ids": torch.randint(30_000, (1, 128)),
        "attention_mask": mask,
        "return_dict": False,
    }


MODELS: Mapping[str, Benched] = {
    "unet": Benched(
        "tiny SDXL UNet",
        "256x256 pixels with guidance, batch 2",
        _unet,
        _unet_inputs,
        can_be_masked=True,
    ),
    "small": Benched(
        "SDXL-shaped UNet of 39 M parameters",
        "320x320 pixels with guidance, batch 2",
        _small,
        _small_inputs,
        can_be_masked=True,
    ),
    "resnet": Benched(
        "ResNet-50",
        "224x224 pixels, batch 1",
        _resnet,
        lambda: ((torch.rand(1, 3, 224, 224),), {"return_dict": False}),
    ),
    "bert": Benched("BERT-base", "128 tokens, batch 1", _bert, _bert_inputs),
}
