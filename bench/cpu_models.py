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


def make(name: str) -> tuple[nn.Module, Inputs]:
    """The module in float32, the same weights and inputs every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        benched = MODELS[name]
        return benched.build().eval(), benched.inputs()


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
    "unet": Benched("tiny SDXL UNet", "256x256 pixels with guidance, batch 2", _unet, _unet_inputs),
    "resnet": Benched(
        "ResNet-50",
        "224x224 pixels, batch 1",
        _resnet,
        lambda: ((torch.rand(1, 3, 224, 224),), {"return_dict": False}),
    ),
    "bert": Benched("BERT-base", "128 tokens, batch 1", _bert, _bert_inputs),
}
