"""The YAML's `module` section: which nn.Module is served, what goes in, what is padded and what
comes out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from preheat.config.family import FamilyConfig, Manifest
from preheat.config.pt2 import Pt2Config
from preheat.config.schema import Dtype, FrozenDict, Listed, Positive, Section, Text
from preheat.config.yaml_errors import refuse_twice, shown
from preheat.errors import ConfigError

TensorDtype = Literal[
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"
]
BATCH = "batch"
DERIVED = ("input_ids", "decoder_input_ids", "token_type_ids", "position_ids")
"""Inputs whose range the config of a transformers model may tell."""
NEEDS_RANGE = (
    "is missing; say the least and the greatest whole number that the module takes, such as range: "
    "[0, 1]: an index outside its table would end the worker"
)
IMAGE_CHANNELS = 3


def _shape_form(value: object) -> str | None:
    if isinstance(value, str):
        return "name"
    return "size" if isinstance(value, int) and not isinstance(value, bool) else None


def _pad_form(value: object) -> str | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    return "edge" if value == "edge" else None


Extent = Annotated[
    Annotated[Positive, Tag("size")] | Annotated[Text, Tag("name")],
    Discriminator(_shape_form, custom_error_type="extent", custom_error_message="neither"),
]
Pad = Annotated[
    Annotated[float, Tag("number")] | Annotated[Literal["edge"], Tag("edge")],
    Discriminator(_pad_form, custom_error_type="pad", custom_error_message="neither"),
]
Sizes = Annotated[Listed[Positive], Field(min_length=1)]


class NormalizeConfig(Section):
    """What an image's channels, 0 to 1, become: (value - mean) / std."""

    mean: Listed[float] = (0.0, 0.0, 0.0)
    """A number for each channel: red, green, blue."""
    std: Listed[Annotated[float, Field(gt=0)]] = (1.0, 1.0, 1.0)
    """The same."""


class InputConfig(Section):
    """One tensor that the module's forward takes by this name."""

    dtype: TensorDtype = "float32"
    """What clients send. The module gets integers as they are and floats in its own dtype."""
    shape: Annotated[Listed[Extent], Field(min_length=1)]
    """Sizes and names of dimensions; the first is `batch`."""
    buckets: Annotated[Mapping[str, Sizes], AfterValidator(FrozenDict.of)] = FrozenDict()
    """Sizes of the named dimensions; other inputs with a dimension of that name share them."""
    pad: Pad = 0.0
    """What fills a bucket: a number, or the nearest value at the edge."""
    default: float | None = None
    """Fills the whole input where a request leaves it out; without one it is required."""
    range: Listed[float] | None = None
    """The least and the greatest number that a request may hold: of whole numbers, which may be
    indices, it must be known. The default is 0 to 1 for a mask, and for the inputs in `DERIVED`
    what the module's transformers config says."""
    normalize: NormalizeConfig | None = None
    """For image files; tensors come normalised."""

    @property
    def is_index(self) -> bool:
        """Whether it holds whole numbers."""
        return "int" in self.dtype

    @property
    def takes_images(self) -> bool:
        """Whether an image file can be this input: (batch, 3, height, width) of floats."""
        return len(self.shape) == 4 and self.shape[1] == IMAGE_CHANNELS and "float" in self.dtype

    def row_shape(self, sizes: Mapping[str, int]) -> list[int]:
        """The shape of one row whose named dimensions have these sizes."""
        named = self.shape[1:]
        return [1, *(sizes[each] if isinstance(each, str) else each for each in named)]


@dataclass(frozen=True, slots=True)
class Cut:
    """How much of an output's dimension belongs to a request: a dimension of the inputs, divided
    and rounded up.
    """

    dimension: str
    divisor: int = 1

    @classmethod
    def parse(cls, text: str) -> Cut | None:
        found = re.fullmatch(r"([A-Za-z_]\w*)(?:/([1-9][0-9]{0,5}))?", text, re.ASCII)
        return cls(found[1], int(found[2] or 1)) if found else None

    def size(self, sizes: Mapping[str, int]) -> int:
        return -(-sizes[self.dimension] // self.divisor)


class OutputConfig(Section):
    """One tensor of the module's answer."""

    crop: Mapping[Annotated[int, Field(ge=1)], Text] = Field(default_factory=dict)
    """Dimension of the output (0 is the batch) -> the input dimension whose padding is cut off it,
    such as `sequence`; where the module shrinks it, `height/32`."""

    @property
    def cuts(self) -> dict[int, Cut]:
        return {dim: cut for dim, text in self.crop.items() if (cut := Cut.parse(text)) is not None}


class ModuleLimits(Section):
    """What a request may hold; everything past it is a 400."""

    max_text_chars: Positive = 20_000
    """Characters of a text for the tokenizer."""
    max_image_bytes: Positive = 10_000_000
    """Bytes of an image file as sent."""
    max_image_pixels: Positive = 16_777_216
    """Pixels of an image file, once decoded."""
    max_elements: Positive = 16_777_216
    """Elements of one input that no bucket holds: with `oversize: eager`, or where no inputs are
    declared."""
    max_response_bytes: Positive = 300_000_000
    """Bytes of one answer: a larger one than TorchServe's max_response_size, here that of
    archive/config.properties, would end the worker.
    """


class ModuleConfig(FamilyConfig):
    """Which module is served. Neither `path` nor `factory`: TorchServe's own --model-file and
    --serialized-file.
    """

    name: ClassVar[str] = "module"
    weights_index: ClassVar[str] = "config.json"
    kind: ClassVar[str] = "a transformers folder"
    tiny: ClassVar[tuple[str, ...]] = ("bert", "resnet")

    path: Text | None = None
    """A transformers folder, or a hub id, or `tiny:bert`; `.` is the archive's own."""
    auto_class: Text = Field(default="AutoModel", alias="class")
    """The transformers class that loads `path`."""
    factory: Text | None = None
    """`package.module:function`, in the archive: returns the module. It is given the archive's
    folder if it takes an argument."""
    dtype: Dtype = "float32"
    """Of weights and computation."""
    inputs: Annotated[Mapping[str, InputConfig], AfterValidator(FrozenDict.of)] = FrozenDict()
    """In the order of forward. Empty: nothing can be warmed, and a request is one call, as it
    is."""
    outputs: Annotated[Mapping[str, OutputConfig], AfterValidator(FrozenDict.of)] = FrozenDict()
    """Those that are answered; empty means all tensors. A module that returns a bare tensor calls
    it by the only name here, or `output`.
    """
    limits: ModuleLimits = ModuleLimits()
    """What a request may hold."""

    @property
    def choices(self) -> dict[str, tuple[int, ...]]:
        """The bucketed dimensions with their sizes, in the YAML's order."""
        return {
            name: sizes for spec in self.inputs.values() for name, sizes in spec.buckets.items()
        }

    @property
    def made_by(self) -> str | None:
        return self.factory

    @classmethod
    def is_meant_by(cls, manifest: Manifest) -> bool:
        """It was made with --model-file or --serialized-file."""
        return not {"modelFile", "serializedFile"}.isdisjoint(manifest.get("model", {}))

    def num_graphs(self, pt2: Pt2Config, batches: int) -> int | None:
        if not self.inputs:
            return None
        one = pt2.shapes.strategy == "dynamic"
        return batches * (1 if one else prod(map(len, self.choices.values())))

    def check(self, pt2: Pt2Config) -> None:
        shapes = pt2.shapes
        if shapes.buckets:
            raise ConfigError(
                "a module's buckets are sizes of its inputs: module.inputs", "pt2.shapes.buckets"
            )
        if shapes.strategy == "fixed":
            raise ConfigError(
                "fixed is for pipelines; a module has buckets, dynamic or exact",
                "pt2.shapes.strategy",
            )
        if shapes.strategy == "dynamic" and [len(sizes) > 1 for sizes in self.choices.values()] != [
            True
        ]:
            raise ConfigError(
                "dynamic needs one dimension with buckets, whose least and greatest size are its "
                "range: module.inputs.<input>.buckets: {sequence: [16, 512]}; with more of them "
                "use buckets",
                "pt2.shapes.strategy",
            )
        if shapes.fit != "pad":
            raise ConfigError(
                f"{shapes.fit} is for pipelines; a module's inputs are padded", "pt2.shapes.fit"
            )
        if shapes.oversize == "downscale":
            raise ConfigError(
                "downscale is for pipelines; use reject or eager", "pt2.shapes.oversize"
            )
        if pt2.export.aot_compile and not self.inputs:
            raise ConfigError(
                "has no shapes to compile ahead of time; declare module.inputs",
                "pt2.export.aot_compile",
            )

    @model_validator(mode="after")
    def _agree(self) -> ModuleConfig:
        if self.path is not None and self.factory is not None:
            raise ConfigError(
                "stands beside module.path; a module comes from one of the two", "module.factory"
            )
        if self.factory is not None and not re.fullmatch(
            r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.factory, re.ASCII
        ):
            raise ConfigError(
                f"must be package.module:function, got {shown(self.factory)}", "module.factory"
            )
        seen: dict[str, str] = {}
        for name, spec in self.inputs.items():
            _check_name(name, f"module.inputs.{name}")
            self._check_buckets(name, spec, seen)
        for name, spec in self.inputs.items():
            self._check_shape(name, spec, seen)
        for name, output in self.outputs.items():
            self._check_crop(f"module.outputs.{name}.crop", output, seen)
        return self

    def _check_buckets(self, name: str, spec: InputConfig, seen: dict[str, str]) -> None:
        for dimension, sizes in spec.buckets.items():
            path = f"module.inputs.{name}.buckets.{dimension}"
            if dimension not in spec.shape or dimension == BATCH:
                raise ConfigError(
                    f"{dimension} is no dimension of this input's shape that can be bucketed", path
                )
            if dimension in seen:
                raise ConfigError(
                    f"has its buckets already at module.inputs.{seen[dimension]}; once is enough",
                    path,
                )
            refuse_twice(sizes, path)
            seen[dimension] = name

    def _check_shape(self, name: str, spec: InputConfig, seen: Mapping[str, str]) -> None:
        path = f"module.inputs.{name}"
        if spec.shape[0] != BATCH:
            raise ConfigError(
                f"the first dimension is {BATCH}, got {shown(spec.shape[0])}", f"{path}.shape[0]"
            )
        refuse_twice([extent for extent in spec.shape if isinstance(extent, str)], f"{path}.shape")
        for index, extent in enumerate(spec.shape[1:], start=1):
            if not isinstance(extent, str):
                continue
            _check_name(extent, f"{path}.shape[{index}]")
            if extent not in seen:
                raise ConfigError(
                    f"{extent} has no sizes; name them at one input: buckets: {{{extent}: [...]}}",
                    f"{path}.shape[{index}]",
                )
        if spec.normalize is not None and not spec.takes_images:
            raise ConfigError(
                "is for images: an input of floats with shape [batch, 3, height, width]", path
            )
        if spec.range is not None and (len(spec.range) != 2 or spec.range[0] > spec.range[1]):
            raise ConfigError(
                f"must be [least, greatest], got {shown(list(spec.range))}", f"{path}.range"
            )
        for key, values in (spec.normalize.model_dump() if spec.normalize else {}).items():
            if len(values) != IMAGE_CHANNELS:
                raise ConfigError(
                    f"needs one number a channel, {IMAGE_CHANNELS}", f"{path}.normalize.{key}"
                )
        for key, number in (("pad", spec.pad), ("default", spec.default)):
            if isinstance(number, float) and not _fits(number, spec.dtype):
                raise ConfigError(f"{number:g} is no {spec.dtype}", f"{path}.{key}")
        if spec.is_index and spec.range is None and name not in DERIVED and not is_mask(name):
            raise ConfigError(NEEDS_RANGE, f"{path}.range")

    def _check_crop(self, path: str, output: OutputConfig, seen: Mapping[str, str]) -> None:
        for dim, text in output.crop.items():
            cut = Cut.parse(text)
            if cut is None or cut.dimension not in seen:
                known = ", ".join(seen) or "none"
                raise ConfigError(
                    "must be a bucketed dimension such as sequence or height/32, got "
                    f"{shown(text)}; known: {known}",
                    f"{path}.{dim}",
                )


def is_mask(name: str) -> bool:
    """Whether an input of this name says which others are padding: zeros and ones."""
    return "mask" in name.split("_")


def _check_name(name: str, path: str) -> None:
    if not re.fullmatch(r"[A-Za-z_]\w{0,63}", name, re.ASCII):
        raise ConfigError("must be a name of letters, digits and _", path)


def _fits(number: float, dtype: str) -> bool:
    if "float" in dtype:
        return True
    if dtype == "bool":
        return number in (0, 1)
    bits, least = int(re.sub(r"\D", "", dtype)), 0
    if not dtype.startswith("u"):
        bits, least = bits - 1, -(2 ** (bits - 1))
    return number == int(number) and least <= number < 2**bits
