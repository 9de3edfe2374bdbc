"""What code made through `torch.export` has in common: the export of one call, and the calls it
serves.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from preheat.compilation.signatures import (
    DynamicDims,
    Inputs,
    contained,
    leaves,
    map_tensors,
    rebuilt,
    signature,
)
from preheat.compilation.watch import eagerly


def export(module: nn.Module, inputs: Inputs, dims: DynamicDims) -> torch.export.ExportedProgram:
    """The graph of `module` for these inputs, which are left alone; `dims` names at most one number
    that varies.
    """
    # Whatever the caller's mode is: an inference tensor in a graph can only ever be used in that
    # mode.
    # regional blocks are wrapped
    with torch.inference_mode(False), torch.no_grad(), own_forward(module), eagerly():
        _leave_inference_mode(module)
        args, kwargs = map_tensors(inputs[0], torch.clone), map_tensors(inputs[1], torch.clone)
        shapes = _dynamic_shapes(module, inputs, dims)
        return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)


def call_key(args: Sequence[Any], kwargs: Mapping[str, Any], dims: DynamicDims) -> str:
    """Equal for calls that one exported graph serves."""
    return repr(signature(args, kwargs, dims))


def tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors of a call in the order in which an exported graph takes them."""
    return (leaf for _, leaf in leaves(args, kwargs) if isinstance(leaf, torch.Tensor))


def _dynamic_shapes(module: nn.Module, inputs: Inputs, dims: DynamicDims) -> dict[str, Any] | None:
    """What torch.export is told: argument name -> a tree like the argument, with the dimensions
    that vary at its leaves.
    """
    if not dims.ranges:
        return None
    (span,) = {span for spans in dims.ranges.values() for span in spans.values()}
    batch = torch.export.Dim("batch", min=span[0], max=span[1])

    def tree(path: str, value: Any) -> Any:
        inside = contained(value)
        if inside is not None:
            shapes = {key: tree(f"{path}.{key}", item) for key, item in inside.items()}
            # Of a class that is registered torch.export takes the contents as a list.
            own = type(value) in pytree.SUPPORTED_NODES.keys() - pytree.BUILTIN_TYPES
            return list(shapes.values()) if own else rebuilt(value, shapes)
        return {dim: batch for dim in dims.ranges.get(path, {})} or None

    args, kwargs = inputs
    names = list(inspect.signature(module.forward).parameters)
    positional = {names[index]: tree(str(index), value) for index, value in enumerate(args)}
    return positional | {name: tree(name, value) for name, value in kwargs.items()}


def _leave_inference_mode(module: nn.Module) -> None:
    """Make ordinary tensors of weights that were made under inference mode, which torch.export
    refuses: some models register buffers in their forward.
    """
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            if weight.is_inference():
                part.register_parameter(name, nn.Parameter(weight.clone(), requires_grad=False))
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_inference():
                setattr(part, name, buffer.clone())


@contextmanager
def own_forward(module: nn.Module) -> Iterator[None]:
    """The module without the router that stands in for its forward."""
    router = module.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if router is not None:
            module.forward = router
