"""What a request asks for, as far as its order in the queue and its price depend on it.

The worker alone decides what is legal. Here a wrong guess costs a batch or a price, never an
answer; what cannot be read counts as the largest bucket.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from preheat.buckets import Bucket, nearest_aspect, smallest_covering
from preheat.errors import RequestError
from preheat.gateway import contents

_LARGEST_SIDE = 65_536
_MOST = 10_000


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for pictures, or for anything else (`bucket` None)."""

    height: int | None = None
    """Pixels, as the client said."""
    width: int | None = None
    bucket: Bucket | None = None
    """Where it will be painted, as far as that can be told."""
    steps: int = 1
    num_images: int = 1
    group: Hashable = None
    """Equal for requests that probably can share a run."""

    @property
    def pixel_steps(self) -> float:
        """What it will paint."""
        return (self.bucket.volume if self.bucket else 1) * self.steps * self.num_images


@dataclass(frozen=True, slots=True)
class Model:
    """What a model's workers say of its buckets and defaults."""

    buckets: tuple[Bucket, ...] = ()
    """Pictures' alone."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """`request_defaults` of the state."""

    @classmethod
    def of(cls, names: Sequence[str], defaults: Mapping[str, Any]) -> Model:
        """From the buckets' names, as the state has them."""
        found = (_bucket(name) for name in dict.fromkeys(names))
        return cls(tuple(bucket for bucket in found if bucket is not None), defaults)

    def asked(self, fields: Mapping[str, object]) -> Asked:
        """By the fields of a request, each of them as it came."""
        if not self.buckets:
            return Asked(_whole(fields.get("height")), _whole(fields.get("width")))
        height, width = (_whole(fields.get(side), _LARGEST_SIDE) for side in ("height", "width"))
        bucket = self._bucket(height, width, has_image="image" in fields)
        steps = _whole(fields.get("num_inference_steps")) or self._default("num_inference_steps")
        # what job.py of the family compares, without what no client changes
        group = (
            bucket,
            steps,
            str(fields.get("guidance_scale")),
            str(fields.get("strength")) if "image" in fields else None,
            "image" in fields,
            "mask_image" in fields,
            fields.get("negative_prompt") is None,
        )
        num_images = _whole(fields.get("num_images")) or 1
        return Asked(height, width, bucket, steps, num_images, group)

    def largest(self) -> Asked:
        """What a request counts as that cannot be read."""
        if not self.buckets:
            return Asked()
        bucket = max(self.buckets, key=lambda each: each.volume)
        return Asked(bucket=bucket, steps=self._default("num_inference_steps"), group="unread")

    def _bucket(self, height: int | None, width: int | None, *, has_image: bool) -> Bucket:
        if height is None and width is None and has_image:
            return max(self.buckets, key=lambda each: each.volume)  # of the image's size
        first = self.buckets[0]
        size = Bucket(
            height or self._default("height") or first.height,
            width or self._default("width") or first.width,
        )
        if self.defaults.get("fit") != "resize" and (
            found := smallest_covering(self.buckets, size)
        ):
            return found
        if self.defaults.get("oversize") == "eager" and self.defaults.get("fit") != "resize":
            return size
        return nearest_aspect(self.buckets, size.height, size.width)

    def _default(self, name: str) -> int:
        return _whole(self.defaults.get(name)) or 1


async def read(body: bytes, content_type: str, model: Model) -> Asked:
    """What the request `body` asks `model` for.

    Raises:
        RequestError: a form in a charset that is not read here.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "text/plain":
        return model.asked({})
    is_form = kind == "multipart/form-data"
    if is_form:
        contents.check_charset(content_type)
    try:
        if is_form:
            return model.asked(await contents.of_form(body, content_type))
        return model.asked(await contents.of_json(body))
    except (ValueError, RequestError):
        return model.largest()  # the worker will say what is wrong


def _whole(value: object, most: int = _MOST) -> int | None:
    """A whole number above 0 as JSON or a form has it."""
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        value = int(value) if len(value.strip()) <= 9 else None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        return None
    return min(value, most)


def _bucket(name: str) -> Bucket | None:
    """A picture's, by its name."""
    height, _, width = name.partition("x")
    if not (height.isdigit() and width.isdigit()):
        return None
    return Bucket(int(height), int(width))
