"""Intel's extension for PyTorch, where TorchServe enables it."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

import torch
from torch import nn

from preheat.compilation.backends.base import CompiledCode, EngineName, RoadName
from preheat.compilation.signatures import DynamicDims, Inputs
from preheat.config.pt2 import Pt2Config


class Ipex:
    """A copy of the module, optimised: what IPEX fails on, or gets wrong, is then served by the
    module as it was.

    Weights are not packed: IPEX packs a convolution's for one input shape, and a ResNet-50 then
    took three to six times as long in every other one (IPEX 2.8, AMD EPYC; a BERT-base gained
    nothing).

    Raises:
        Exception: of any type, that Intel's code meets in a module that it does not know.
    """

    engine: EngineName = "ipex"
    road: RoadName = "ipex"
    wants_every_size = False
    reason: str | None = None
    dims: DynamicDims | None = None
    idle = False
    is_compared = True

    def __init__(self, name: str, module: nn.Module, dtype: torch.dtype) -> None:
        self.name = f"{name}-ipex"
        optimized: nn.Module = import_ipex().optimize(
            module, dtype=dtype, inplace=False, weights_prepack=False
        )
        self._optimized = optimized.forward

    def code_for(self, inputs: Inputs, dims: DynamicDims) -> CompiledCode:
        return self

    def matches(self, inputs: Inputs) -> bool:
        return True  # nothing is compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._optimized(*args, **kwargs)


def why_not(device: torch.device, config: Pt2Config) -> str | None:
    """Why it cannot serve here, or None."""
    if device.type != "cpu":
        return f"ipex: it serves on the CPU, and this worker's device is {device}"
    try:
        import_ipex()
    except ImportError as error:
        return f"ipex: ImportError: {error}"
    return None


def requested() -> bool:
    """TorchServe sets TS_IPEX_ENABLE for its workers when config.properties says
    `ipex_enable=true`.
    """
    return os.environ.get("TS_IPEX_ENABLE", "false") == "true"


def import_ipex() -> ModuleType:
    """Intel's extension.

    Raises:
        ImportError: it is not installed, or is not for this torch.
    """
    try:
        return importlib.import_module("intel_extension_for_pytorch")
    except ModuleNotFoundError as error:
        raise ImportError("intel-extension-for-pytorch is not installed") from error
    except (
        ImportError,
        AttributeError,
        OSError,
    ) as error:  # for another torch it means to exit, by a name that os has not
        raise ImportError(
            f"intel-extension-for-pytorch cannot be loaded with torch {torch.__version__}: {error}"
        ) from error
