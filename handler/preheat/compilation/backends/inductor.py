"""torch.compile, with Inductor or any other backend of Dynamo's."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from preheat.compilation.backends.base import CompiledCode, EngineName, RoadName
from preheat.compilation.signatures import DynamicDims, Inputs, leaves, map_tensors
from preheat.config.pt2 import Pt2Config


class TorchCompile:
    """A target's compiled forward; nothing is compiled before it is called.

    Args:
        name: the target.
        make: gives the compiled forward; asked at the first call, since it imports all of Inductor.
        cuda_graphs: outputs live in a graph's memory and are overwritten by the next replay, so
            they are cloned. They are recorded per size.
        is_compared: see `CompiledCode`.
    """

    engine: EngineName = "compiled"
    reason: str | None = None
    dims: DynamicDims | None = None
    idle = False

    def __init__(
        self,
        name: str,
        make: Callable[[], Callable[..., Any]],
        *,
        cuda_graphs: bool = False,
        is_compared: bool = False,
    ) -> None:
        self.name, self._make, self._cuda_graphs = name, make, cuda_graphs
        self.is_compared, self.wants_every_size = is_compared, cuda_graphs
        self.road: RoadName = "cuda_graphs" if cuda_graphs else "compiled"

    def code_for(self, inputs: Inputs, dims: DynamicDims) -> CompiledCode:
        for path, leaf in leaves(*inputs) if dims.ranges else ():
            if isinstance(leaf, torch.Tensor):
                dims.mark(path, leaf)
        return self

    def matches(self, inputs: Inputs) -> bool:
        return False  # any other signature may be another graph

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._cuda_graphs:
            return self.compiled(*args, **kwargs)
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return map_tensors(self.compiled(*args, **kwargs), torch.clone)

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        return self._make()


def why_not(device: torch.device, config: Pt2Config) -> str | None:
    """Why Inductor cannot compile here, or None: a CPU needs a C++ compiler, Triton a C compiler
    for its launchers.
    """
    if config.compile.for_inductor.get("backend", "inductor") != "inductor":
        return None
    variable, names = ("CXX", ["g++"]) if device.type == "cpu" else ("CC", ["gcc", "clang", "cc"])
    names = [os.environ[variable]] if variable in os.environ else names
    if any(shutil.which(name) for name in names):
        return None
    return f"no compiler: {' or '.join(map(repr, names))} is not on PATH"


def compile_target(
    module: nn.Module, forward: Callable[..., Any], kwargs: Mapping[str, Any], *, regional: bool
) -> Callable[..., Any]:
    """`forward`, which is the module's own, compiled, or with diffusers' repeated blocks in it
    compiled.

    torch.compile is lazy: nothing runs yet.
    """
    if not regional:
        compiled: Callable[..., Any] = torch.compile(forward, **kwargs)
        return compiled
    compile_blocks: Callable[..., None] = module.compile_repeated_blocks  # type: ignore[assignment]
    compile_blocks(**kwargs)
    return forward
