"""Tensors in and out of clients' bytes: JSON lists, .npy, safetensors and images, each hostile
until proven otherwise.

Nothing here unpickles, and no header is believed about how much memory to take. Every refusal is a
RequestError that names the input.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.lib import format as npy

from preheat.buckets import Bucket
from preheat.config.module import InputConfig, ModuleLimits
from preheat.errors import NoBucket, RequestError, is_panic
from preheat.protocol import images

NPY_MAGIC = b"\x93NUMPY"
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
    )
}
Span = tuple[float, float]
"""The least and the greatest number, both allowed."""
_MAX_RANK = 16
_LONGEST_NPY_HEADER = 10_000  # bytes; numpy's own limit
# of one dimension: beside a zero, a huge one would promise no bytes at all
_LARGEST_SIZE = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Bounds:
    """How large an input may be: checked before memory is taken for it."""

    largest: Mapping[str, int]
    """The largest bucket of each dimension."""
    rejecting: bool
    """Whether a larger one is refused (`oversize: reject`)."""
    max_elements: int
    """Of one input that no bucket holds."""
    lengths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Input -> one of its dimensions, and the most that the module takes there, whatever `oversize`
    says.
    """

    def most(self, spec: InputConfig) -> int:
        """Elements of one input that `check` lets through, or more."""
        sizes = [
            self.largest.get(extent, 1) if isinstance(extent, str) else extent
            for extent in spec.shape
        ]
        return math.prod(sizes) if self.rejecting else max(math.prod(sizes), self.max_elements)

    def check(self, shape: Sequence[int], spec: InputConfig | None, name: str) -> None:
        """Refuse an input of this shape, its batch dimension included; without a spec it may have
        any shape.

        Raises:
            RequestError: it is larger than that; NoBucket, where buckets set the limit.
        """
        dim, longest = self.lengths.get(name, (0, 0))
        if longest and len(shape) >= -dim and shape[dim] > longest:
            raise RequestError(
                f"is {shape[dim]} long, and the module has positions for {longest}", name
            )
        if spec is not None:
            named = zip(spec.shape, shape, strict=True)
            over = [
                (each, size)
                for each, size in named
                if isinstance(each, str) and size > self.largest.get(each, size)
            ]
            if not over:
                return
            if self.rejecting:
                dimension, size = over[0]
                sizes = {each: size for each, size in zip(spec.shape, shape, strict=True)}
                asked = {each: sizes[each] for each in self.largest if each in sizes}
                raise NoBucket(
                    f"has {dimension} {size}, the largest bucket is {self.largest[dimension]}",
                    name,
                    Bucket(**asked) if len(asked) == len(self.largest) else None,
                )
        if math.prod(shape) > self.max_elements:
            raise RequestError(
                f"has {math.prod(shape)} elements, at most {self.max_elements} are allowed", name
            )


def from_list(value: object, dtype: str | None, name: str) -> torch.Tensor:
    """A number, or lists of numbers nested to one shape, as a tensor of `dtype`.

    Args:
        value: of a size that was checked: see `shape_of` and `check_shape`.
        dtype: None where nobody says: then int64 for whole numbers, bool for truth values, else
            float32.

    Raises:
        RequestError: ragged, too deep, or something in it is not of the dtype.
    """
    shape = shape_of(value, name)
    numbers: list[Any] = [value]
    for depth, size in enumerate(shape):
        if set(map(type, numbers)) != {list} or set(map(len, numbers)) != {size}:
            raise RequestError(
                f"is ragged: dimension {depth} is {size} in one place and not in another", name
            )
        numbers = list(chain.from_iterable(numbers))
    kinds = set(map(type, numbers))
    dtype = dtype or {frozenset({bool}): "bool", frozenset({int}): "int64"}.get(
        frozenset(kinds), "float32"
    )
    allowed = {bool} if dtype == "bool" else {int} if "int" in dtype else {int, float}
    if not kinds <= allowed:
        wrong = sorted({_kind(kind) for kind in kinds - allowed})
        raise RequestError(f"must hold numbers of type {dtype}, got {' and '.join(wrong)}", name)
    wanted = TORCH_DTYPES[dtype]
    if "int" in dtype and numbers and not _holds(wanted, min(numbers), max(numbers)):
        raise RequestError(f"holds a number that is no {dtype}", name)
    # Of a list numpy makes an array four times as fast as torch a tensor.
    array = np.array(
        numbers, np.float64 if "float" in dtype else np.int64 if "int" in dtype else np.bool_
    )
    tensor = torch.from_numpy(array).to(wanted).reshape(shape)
    if not tensor.isfinite().all():  # NaN and Infinity are not JSON, and 1e300 is no float32
        raise RequestError(f"holds a number that is no {dtype}", name)
    return tensor


def shape_of(value: object, name: str) -> tuple[int, ...]:
    """The shape of nested lists by the first of each, which costs nothing however large they are.

    Raises:
        RequestError: nested too deep.
    """
    shape: list[int] = []
    while isinstance(value, list):
        shape.append(len(value))
        if len(shape) > _MAX_RANK:
            raise RequestError(f"is nested deeper than {_MAX_RANK} lists", name)
        if not value:
            break
        value = value[0]
    return tuple(shape)


def _holds(dtype: torch.dtype, least: int, most: int) -> bool:
    span = torch.iinfo(dtype)
    return span.min <= least and most <= span.max


def _kind(kind: type) -> str:
    names = {
        int: "whole numbers",
        float: "fractions",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    return names.get(kind, "lists or objects")


def from_npy(data: bytes, name: str) -> torch.Tensor:
    """The tensor in an .npy file.

    Raises:
        RequestError: corrupt, of Python objects, or of a dtype that torch does not have.
    """
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, _, dtype = read(file, max_header_size=_LONGEST_NPY_HEADER)
    # numpy parses the header as Python literals, and raises whatever that leads to
    except Exception:  # noqa: BLE001
        raise RequestError(
            "is no .npy file that can be read: its header is corrupt", name
        ) from None
    if dtype.hasobject:
        raise RequestError(
            "holds pickled objects, which are refused: reading them can run code", name
        )
    if dtype.kind not in "biuf" or len(shape) > _MAX_RANK:
        raise RequestError(f"holds {str(dtype)[:40]}, which is no tensor of numbers", name)
    # Before numpy takes memory for what the header promises.
    if (
        any(not 1 <= size <= _LARGEST_SIZE for size in shape)
        or math.prod(shape) * dtype.itemsize != len(data) - file.tell()
    ):
        raise RequestError(
            "is empty, or is no .npy file that can be read: its size is not what its header says",
            name,
        )
    array = np.load(io.BytesIO(data), allow_pickle=False)
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    except TypeError:
        raise RequestError(f"holds {dtype}, which torch does not have", name) from None


def from_safetensors(data: bytes) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file, by name.

    Raises:
        RequestError: corrupt.
    """
    try:
        return safetensors.torch.load(data)
    # a hostile header leads the library to TypeError and OverflowError too
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        reason = ascii(str(error) or type(error).__name__)[1:-1][:100]
        raise RequestError(f"is no safetensors file that can be read: {reason}", "body") from None


def looks_like_safetensors(data: bytes) -> bool:
    """A length, then a JSON object of that length (huggingface/safetensors, README)."""
    return (
        len(data) > 8
        and data[8:9] == b"{"
        and 2 <= int.from_bytes(data[:8], "little") <= len(data) - 8
    )


def from_image(
    data: bytes, spec: InputConfig, name: str, limits: ModuleLimits, bounds: Bounds
) -> torch.Tensor:
    """An image file as (1, 3, height, width): RGB in 0..1, normalised as the YAML says.

    Raises:
        RequestError: it cannot be read, or is over the limits.
    """
    if len(data) > limits.max_image_bytes:
        raise RequestError(
            f"has {len(data)} bytes, at most {limits.max_image_bytes} are allowed", name
        )
    picture = images.decode(data, field=name, max_pixels=limits.max_image_pixels)
    # as floats it takes four times as much
    bounds.check((1, 3, picture.height, picture.width), spec, name)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # (3, height, width)
    values = pixels.to(torch.float32) / 255
    if spec.normalize is not None:
        mean, std = (
            torch.tensor(each).reshape(3, 1, 1)
            for each in (spec.normalize.mean, spec.normalize.std)
        )
        values = (values - mean) / std
    return values.unsqueeze(0).to(TORCH_DTYPES[spec.dtype])


def checked(tensor: torch.Tensor, spec: InputConfig, name: str, bounds: Bounds) -> torch.Tensor:
    """`tensor` with its leading batch dimension of 1, as `spec` wants it. Numbers are cast as those
    of JSON are: any to floats, whole ones to other whole ones that hold them.

    Raises:
        RequestError: wrong dtype, or a number that the dtype wanted has not; otherwise as
            `check_shape`.
    """
    wanted = TORCH_DTYPES[spec.dtype]
    if tensor.dtype != wanted and not _castable(tensor.dtype, wanted):
        raise RequestError(f"must be {spec.dtype}, got {_dtype_name(tensor)}", name)
    shape = check_shape(tensor.shape, spec, name, bounds)
    return _cast(tensor, wanted, name).reshape(shape).contiguous()


def check_shape(
    shape: Sequence[int], spec: InputConfig, name: str, bounds: Bounds
) -> tuple[int, ...]:
    """The shape with its batch dimension, which may be left out.

    Raises:
        RequestError: wrong rank or a fixed size; more than one row; empty; out of bounds.
    """
    wanted = ", ".join(map(str, spec.shape))
    if len(shape) == len(spec.shape) - 1:
        shape = (1, *shape)
    if len(shape) != len(spec.shape):
        raise RequestError(
            f"must have {len(spec.shape)} dimensions [{wanted}], got {len(shape)}", name
        )
    if shape[0] != 1:
        raise RequestError(
            f"holds {shape[0]} rows; a request is one row, the server makes batches", name
        )
    for index, (size, extent) in enumerate(zip(shape, spec.shape, strict=True)):
        if isinstance(extent, int) and size != extent:
            raise RequestError(
                f"must be {extent} in dimension {index} of [{wanted}], got {size}", name
            )
        if size == 0:
            raise RequestError(f"is empty in dimension {index} of [{wanted}]", name)
    bounds.check(shape, spec, name)
    return tuple(shape)


def _castable(sent: torch.dtype, wanted: torch.dtype) -> bool:
    # uint16, float8: torch computes little with these
    if sent not in TORCH_DTYPES.values() or torch.bool in (sent, wanted):
        return False
    return wanted.is_floating_point or not sent.is_floating_point


def _cast(tensor: torch.Tensor, wanted: torch.dtype, name: str) -> torch.Tensor:
    if tensor.dtype == wanted or not tensor.numel():
        return tensor.to(wanted)
    cast = tensor.to(wanted)
    if wanted.is_floating_point:
        # what is not finite is `check_values`'s
        fits = bool(cast.isfinite().all()) or not bool(tensor.isfinite().all())
    else:
        fits = _holds(wanted, int(tensor.min()), int(tensor.max()))
    if not fits:
        raise RequestError(f"holds a number that is no {_dtype_name(cast)}", name)
    return cast


def as_sent(tensor: torch.Tensor, name: str, bounds: Bounds) -> torch.Tensor:
    """`tensor`, of which the YAML says nothing.

    Raises:
        RequestError: a dtype that no input can have; out of bounds.
    """
    if tensor.dtype not in TORCH_DTYPES.values():
        raise RequestError(f"is {_dtype_name(tensor)}; inputs are {', '.join(TORCH_DTYPES)}", name)
    bounds.check(tensor.shape, None, name)
    return tensor


def check_values(tensor: torch.Tensor, name: str, computed: torch.dtype, span: Span | None) -> None:
    """Refuse numbers that the module cannot take.

    Args:
        computed: the module's dtype, which floats become.
        span: the least and the greatest that are allowed.

    Raises:
        RequestError: NaN, an infinity, too large for `computed`, or outside `span`.
    """
    if not tensor.numel():
        return
    if tensor.is_floating_point() and not (
        tensor.isfinite().all() and tensor.to(computed).isfinite().all()
    ):
        raise RequestError(
            f"holds a number that is not finite in {str(computed).removeprefix('torch.')}", name
        )
    if span is not None and not span[0] <= tensor.min().item() <= tensor.max().item() <= span[1]:
        raise RequestError(f"holds a number outside {span[0]:.15g}..{span[1]:.15g}", name)


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def pad_to(tensor: torch.Tensor, shape: Sequence[int], pad: float | str) -> torch.Tensor:
    """`tensor` grown at the end of each dimension to `shape`: by a number, or by its last value
    there (`edge`).
    """
    if tuple(tensor.shape) == tuple(shape):
        return tensor
    if pad == "edge":
        for dim, size in enumerate(shape):
            if tensor.shape[dim] != size:
                index = torch.arange(size, device=tensor.device).clamp(max=tensor.shape[dim] - 1)
                tensor = tensor.index_select(dim, index)
        return tensor
    assert not isinstance(pad, str)
    grown = tensor.new_full(tuple(shape), pad)
    grown[tuple(slice(size) for size in tensor.shape)] = tensor
    return grown


def cut_to(tensor: torch.Tensor, sizes: Mapping[int, int]) -> torch.Tensor:
    """`tensor` with the padding cut off: the first `sizes[dim]` of each dimension that is named."""
    for dim, size in sizes.items():
        tensor = tensor.narrow(dim, 0, size)
    return tensor


def json_bytes(tensor: torch.Tensor) -> int:
    """About how long `to_lists` of it is as JSON: as long as a thousand of its numbers are on
    average, and a tenth more.
    """
    if not tensor.numel():
        return 2
    flat = tensor.reshape(-1)
    sample = flat[:: max(1, flat.numel() // 1000)]
    return int(1.1 * len(dumps({"": to_lists(sample)})) / sample.numel() * flat.numel())


def to_npy(tensor: torch.Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, _as_numpy(tensor), allow_pickle=False)
    return file.getvalue()


def to_safetensors(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, str]) -> bytes:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(contiguous, metadata=dict(facts))


def to_lists(tensor: torch.Tensor) -> Any:
    """Nested lists for JSON, which knows no NaN and no infinity: they become null."""
    array: Any = _as_numpy(tensor)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        array = np.where(np.isfinite(array), array.astype(object), None)
    return array.tolist()


def _as_numpy(tensor: torch.Tensor) -> Any:
    """numpy has no bfloat16."""
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()


def dumps(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
