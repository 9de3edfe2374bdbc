"""What the config's sections are made of: the strict base, frozen mappings, buckets and numbers as
YAML has them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetPydanticSchema,
    Tag,
)
from pydantic_core import PydanticCustomError, core_schema

from preheat.buckets import Bucket

BUCKET_MULTIPLE = 8
"""Pixels to a latent cell in every family; a pipeline that needs more says so when it is loaded."""

T = TypeVar("T")
Dtype = Literal["float32", "float16", "bfloat16"]
"""What weights and computation may be in."""


class Section(BaseModel):
    """A mapping of the YAML: no key that is not ours, no value of another type, no change
    afterwards.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class FrozenDict(dict[str, Any]):
    """A dict that nobody changes, its nested dicts included; unlike a MappingProxyType it copies
    and pickles.
    """

    def _refuse(self, *_args: object, **_kwargs: object) -> NoReturn:
        raise TypeError("a config is frozen")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self),)

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> FrozenDict:
        """A frozen deep copy of `value`."""
        return cls(
            {
                key: cls.of(x) if isinstance(x, Mapping) else copy.deepcopy(x)
                for key, x in value.items()
            }
        )


def thawed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of plain dicts, for who writes into what it is given: torch.compile takes keys
    out of its `options`.
    """
    return {
        key: thawed(x) if isinstance(x, Mapping) else copy.deepcopy(x) for key, x in value.items()
    }


def _as_pair(value: object) -> object:
    if isinstance(value, Bucket):
        return value.height, value.width
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise PydanticCustomError("bucket", "not a pair")
    return tuple(value)


def _bucket_schema(_source: object, _handler: object) -> core_schema.CoreSchema:
    """A [height, width] pair in the YAML and a Bucket in memory; errors name the side:
    `buckets[1][0]`.
    """
    side = core_schema.int_schema(strict=True, gt=0, multiple_of=BUCKET_MULTIPLE)
    pair = core_schema.no_info_before_validator_function(
        _as_pair, core_schema.tuple_schema([side, side])
    )
    return core_schema.no_info_after_validator_function(
        lambda sides: Bucket(*sides),
        pair,
        serialization=core_schema.plain_serializer_function_ser_schema(
            lambda bucket: (bucket.height, bucket.width)
        ),
    )


def _batch_sizes_form(value: object) -> str | None:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "sizes"
    return "dynamic" if value == "dynamic" else None


# strict=False concerns the container alone: a YAML list becomes a tuple, its entries stay strict.
Listed = Annotated[tuple[T, ...], Field(strict=False)]
BucketPair = Annotated[Bucket, GetPydanticSchema(_bucket_schema)]
FrozenMapping = Annotated[Mapping[str, Any], AfterValidator(FrozenDict.of)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
BatchSizes = Annotated[
    Annotated[Listed[Positive], Field(min_length=1), Tag("sizes")]
    | Annotated[Literal["dynamic"], Tag("dynamic")],
    Discriminator(
        _batch_sizes_form, custom_error_type="batch_sizes", custom_error_message="neither form"
    ),
]
