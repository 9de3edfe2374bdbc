"""What a call of a target looks like: its tensors by path, and the signature that decides which
graph it needs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

Signature = tuple[Any, ...]
Shapes = dict[str, tuple[int, ...]]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of one call."""


@dataclass(frozen=True, slots=True)
class DynamicDims:
    """Dimensions of a target's inputs that one graph covers: argument path -> dimension -> (least,
    greatest) size.

    Sizes below `least` specialise: 0 and 1 under Dynamo, none where torch.export was told the
    range.
    """

    ranges: Mapping[str, Mapping[int, tuple[int, int]]] = field(default_factory=dict)
    least: int = 2

    @classmethod
    def varying(cls, observed: Sequence[Shapes]) -> DynamicDims:
        """The dimensions whose size differs between the observed calls, with the range seen."""
        ranges: dict[str, dict[int, tuple[int, int]]] = {}
        for path in sorted(set.intersection(*(set(shapes) for shapes in observed))):
            sizes = list(zip(*(shapes[path] for shapes in observed), strict=True))
            spans = {
                dim: (min(seen), max(seen))
                for dim, seen in enumerate(sizes)
                if min(seen) != max(seen)
            }
            if spans:
                ranges[path] = spans
        return cls(ranges)

    def canonical(self, path: str, shape: tuple[int, ...]) -> tuple[int | str, ...]:
        """`shape` with sizes that share a graph made equal."""
        spans = self.ranges.get(path)
        if not spans:
            return shape
        shared = {dim for dim, (_, most) in spans.items() if self.least <= shape[dim] <= most}
        return tuple("n" if dim in shared else size for dim, size in enumerate(shape))

    def mark(self, path: str, tensor: torch.Tensor) -> None:
        """Tell Dynamo, before it compiles, that these dimensions vary.

        For the batch that is a demand, and a model that specialises on it fails to compile. Other
        dimensions may keep guards such as "even", which a UNet's halvings need.
        """
        for dim, (_, most) in self.ranges.get(path, {}).items():
            if not 2 <= tensor.shape[dim] <= most:
                continue
            if dim == 0:
                torch._dynamo.mark_dynamic(tensor, dim, min=2, max=most)
            else:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)


def leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every argument that is not a container, with its path, such as `0` or
    `added_cond_kwargs.time_ids`.
    """

    def walk(path: str, value: Any) -> Iterator[tuple[str, Any]]:
        inside = None if type(value) in _PLAIN else contained(value)
        if inside is None:
            yield path, value
        else:
            for key, item in inside.items():
                yield from walk(f"{path}.{key}", item)

    for index, value in enumerate(args):
        yield from walk(str(index), value)
    for name, value in kwargs.items():
        yield from walk(name, value)


def _memory_format(tensor: torch.Tensor) -> Any:
    if tensor.is_contiguous():
        return "contiguous"
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return "channels_last"
    return tensor.stride()


def signature(args: Sequence[Any], kwargs: Mapping[str, Any], dims: DynamicDims) -> Signature:
    """What decides which graph a call needs; hashable."""
    parts: list[Any] = []
    for path, leaf in leaves(args, kwargs):
        if isinstance(leaf, torch.Tensor):
            shape = dims.canonical(path, tuple(leaf.shape))
            parts.append((path, shape, leaf.dtype, leaf.device.type, _memory_format(leaf)))
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            parts.append((path, leaf))
        else:
            parts.append((path, type(leaf).__qualname__))
    return tuple(parts)


def tensor_shapes(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Shapes:
    return {
        path: tuple(leaf.shape)
        for path, leaf in leaves(args, kwargs)
        if isinstance(leaf, torch.Tensor)
    }


_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str}
"""Types that hold nothing, and that most arguments have: one look instead of several."""


def contained(value: Any) -> dict[Any, Any] | None:
    """What a container holds, by key or index; None where it is none.

    Containers are mappings, lists, tuples, and what is registered with torch.utils._pytree.
    """
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    registered = pytree.SUPPORTED_NODES.get(type(value))
    return dict(enumerate(registered.flatten_fn(value)[0])) if registered is not None else None


def rebuilt(value: Any, inside: Mapping[Any, Any]) -> Any:
    """A container of the type of `value` that holds these instead, by the keys of `contained`."""
    kind = type(value)
    if kind is dict:
        return dict(inside)
    if kind is list:
        return list(inside.values())
    if kind is tuple:
        return tuple(inside.values())
    if isinstance(value, tuple) and hasattr(value, "_make"):  # a namedtuple
        return value._make(inside.values())
    # transformers and diffusers register their outputs
    registered = pytree.SUPPORTED_NODES.get(kind)
    if registered is not None:
        return registered.unflatten_fn(list(inside.values()), registered.flatten_fn(value)[1])
    if isinstance(value, (list, tuple)):
        return kind(inside.values())
    copied = copy.copy(value)  # a mapping whose constructor may want anything
    for key, item in inside.items():
        copied[key] = item
    return copied


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with every tensor in it changed; containers are rebuilt in their own types, other
    objects pass.
    """
    if isinstance(value, torch.Tensor):
        return change(value)
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is dict:
        return {key: map_tensors(item, change) for key, item in value.items()}
    if kind is tuple:
        return tuple([map_tensors(item, change) for item in value])
    inside = contained(value)
    if inside is None:
        return value
    return rebuilt(value, {key: map_tensors(item, change) for key, item in inside.items()})
