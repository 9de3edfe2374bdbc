"""What OpenAI's images API asks for, as a request of ours; no pixel is decoded here.

The limits are the worker's, which knows the model: what it refuses comes back under OpenAI's names
(`openai_errors`).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from starlette.datastructures import FormData, UploadFile

from preheat.errors import RequestError
from preheat.gateway import openai_models
from preheat.gateway.bodies import MAX_BYTES
from preheat.protocol.fields import Fields, shown_value
from preheat.protocol.json_text import document, loads

Kind = Literal["generations", "edits", "variations"]

_AS_THEY_ARE = ("prompt", "output_format", "output_compression", "stream")
_OURS = ("seed", "negative_prompt", "num_inference_steps", "guidance_scale", "strength")
_NUMERALS = frozenset(
    {"n", "output_compression", "stream", "partial_images"}
    | {"seed", "num_inference_steps", "guidance_scale", "strength"}
)
"""Fields of a form whose text is read as JSON."""
_MEANINGLESS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "quality": ("auto", "standard"),
        "style": ("vivid",),
        "background": ("auto", "opaque"),
        "moderation": ("auto",),
        "input_fidelity": ("low",),
    }
)
"""Fields that nothing here listens to, with the values that ask for nothing."""
_WHO = ("user", "safety_identifier")
"""Taken and thrown away."""
_COMMON = (
    *("model", "n", "size", "response_format", "partial_images"),
    *(*_AS_THEY_ARE, *_OURS, *_MEANINGLESS, *_WHO),
)
_KNOWN: Mapping[Kind, tuple[str, ...]] = MappingProxyType(
    {
        "generations": _COMMON,
        "edits": (*_COMMON, "image", "mask"),
        "variations": (*_COMMON, "image"),
    }
)
MAX_JSON = 1 << 20
"""Bytes of a body of JSON: a file never lies in one."""
_LONGEST = 100
"""Characters of a size."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request for pictures."""

    model: str | None
    """None: the only one there is."""
    version: str | None
    stream: bool
    size: str
    """As it was asked for: "WxH" or "auto"."""
    body: bytes = field(repr=False)
    """For the worker, in JSON."""


def from_json(body: bytes) -> dict[str, object]:
    """The fields of a JSON body.

    Raises:
        RequestError: it is none, or over `MAX_JSON` bytes.
    """
    if len(body) > MAX_JSON:
        raise RequestError(f"is over {MAX_JSON} bytes", "body", 413)
    values = document(body, "body")
    if not isinstance(values, dict):
        raise RequestError(f"must be a JSON object, got {shown_value(values)}", "body")
    return values


async def from_form(form: FormData) -> dict[str, object]:
    """The fields of a multipart form: files as bytes, numbers as JSON writes them.

    Raises:
        RequestError: a field is given twice, or several images are.
    """
    values: dict[str, object] = {}
    for sent, value in form.multi_items():
        name = "image" if sent == "image[]" else sent
        if name in values:
            fault = "holds several files; one is edited" if name == "image" else "is given twice"
            raise RequestError(fault, name)
        if isinstance(value, UploadFile):
            values[name] = await value.read()
        else:
            values[name] = _numeral(value) if name in _NUMERALS else value
    return values


def _numeral(text: str) -> object:
    try:
        return loads(text)
    except ValueError:
        return text  # refused as what it is


def wanted(kind: Kind, values: Mapping[str, object]) -> Wanted:
    """The request in these fields.

    Raises:
        RequestError: a field is unknown, asks for what is not there, or is no such thing.
    """
    fields = Fields(values, _KNOWN[kind])
    for name, harmless in _MEANINGLESS.items():
        fields.choice(name, harmless)
    for name in _WHO:
        fields.text(name, 10_000)
    if fields.choice("response_format", ("b64_json", "url")) == "url":
        raise RequestError("must be b64_json: pictures are answered, not kept", "response_format")
    model, version = openai_models.asked(fields)
    size = fields.text("size", _LONGEST) or "auto"
    body: dict[str, object] = {
        **{name: values.get(name) for name in (*_AS_THEY_ARE, *_OURS)},
        "num_images": values.get("n"),
        "num_previews": fields.whole("partial_images", 0, 3),
        "response_format": "b64_json",
        **_sides(size),
        **_files(kind, fields),
    }
    coded = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
    if len(coded) > MAX_BYTES:
        raise RequestError(f"is over {MAX_BYTES} bytes, its files in base64", "body", 413)
    stream = fields.flag("stream") or False
    return Wanted(model, version, stream, size, coded)


def _sides(size: str) -> dict[str, int]:
    if size == "auto":
        return {}
    sides = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", size, re.ASCII)
    if sides is None:
        raise RequestError(
            f'must be "auto", or width x height in pixels such as 1024x768, got '
            f"{shown_value(size)}",
            "size",
        )
    return {"width": int(sides[1]), "height": int(sides[2])}


def _files(kind: Kind, fields: Fields) -> dict[str, str]:
    """What is painted over; the prompt of a variation, which has none of its own."""
    if kind == "generations":
        return {}
    image = fields.file("image", MAX_BYTES)
    if image is None:
        raise RequestError("is missing", "image")
    files = {"image": base64.b64encode(image).decode()}
    if kind == "edits" and (mask := fields.file("mask", MAX_BYTES)) is not None:
        files |= {"mask_image": base64.b64encode(mask).decode(), "mask_channel": "alpha"}
    return files
