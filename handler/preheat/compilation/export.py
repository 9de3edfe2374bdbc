"""What code made through `torch.export` has in common: the export of one call, the calls it serves,
and its proof against eager.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from preheat.compilation.router import (
    DynamicDims,
    Inputs,
    contained,
    leaves,
    map_tensors,
    rebuilt,
    signature,
)
from preheat.compilation.watch import eagerly

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Largest difference from eager that is let through, as a share of the largest magnitude in eager's
result. What roundings of the dtype add up to, on both sides (bfloat16 on a small UNet: 0.04); other
weights or a wrong kernel are off by more."""


def export(module: nn.Module, inputs: Inputs, dims: DynamicDims) -> torch.export.ExportedProgram:
    """The graph of `module` for these inputs, which are left alone; `dims` names at most one number
    that varies.
    """
    # Whatever the caller's mode is: an inference tensor in a graph can only ever be used in that
    # mode. Eagerly: regional blocks are wrapped.
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


def fault(result: Any, expected: Any, name: str = "") -> str | None:
    """Why `result` is not what eager gave, or None where it is within the dtype's tolerance; the
    log then says by how much, if the code that gave it has a name.
    """
    worst = 0.0, 0.0
    ours, theirs = dict(leaves((result,), {})), dict(leaves((expected,), {}))
    if ours.keys() != theirs.keys():
        return f"it returns {sorted(ours)}, eager returns {sorted(theirs)}"
    for path, tensor in theirs.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if ours[path].shape != tensor.shape or ours[path].dtype != tensor.dtype:
            return (
                f"it returns {tuple(ours[path].shape)} {ours[path].dtype}, eager "
                f"{tuple(tensor.shape)} {tensor.dtype}"
            )
        error, tolerance = difference(ours[path], tensor), TOLERANCE.get(tensor.dtype, 0.0)
        if not error <= tolerance:  # NaN is a fault too
            return (
                f"its result differs from eager by {error:.2g} of the largest magnitude; "
                f"{tolerance:g} is let through"
            )
        worst = max(worst, (error, tolerance))
    if name:
        logger.info(
            "%s: differs from eager by %.2g of the largest magnitude; %g is let through",
            name,
            *worst,
        )
    return None


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference between two tensors as a share of the second's largest magnitude."""
    if not theirs.numel():
        return 0.0
    reference = theirs.double()
    scale = reference.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((ours.double() - reference).abs().max() / scale)


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
