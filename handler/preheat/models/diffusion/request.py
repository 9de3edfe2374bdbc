"""The request: what a client may ask for, parsed from whatever TorchServe hands over, every limit
checked once.

Each refusal is a RequestError that names the field; trouble with the body as a whole is laid at the
field `body`. Messages quote numbers and short words, never a prompt or an image.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal, TypeGuard, TypeVar, get_args

from preheat.errors import RequestError
from preheat.models.diffusion import unserved
from preheat.protocol.images import OutputFormat
from preheat.protocol.json_text import (
    LONGEST_WHOLE,
    decoded,
    from_base64,
    in_bytes,
    loads,
    shown_name,
)

if TYPE_CHECKING:
    from preheat.config.model import DefaultsConfig, Guidance, LimitsConfig, Task

ResponseFormat = Literal["image", "b64_json"]
T = TypeVar("T")
Choice = TypeVar("Choice", bound=str)

OUTPUT_FORMATS: tuple[OutputFormat, ...] = get_args(OutputFormat)
RESPONSE_FORMATS: tuple[ResponseFormat, ...] = get_args(ResponseFormat)
TASKS: tuple[Task, ...] = ("text-to-image", "image-to-image", "inpainting")
_SEND = (
    "send JSON with the header Content-Type: application/json, or the prompt alone with text/plain"
)
NUM_SEEDS = 2**63
"""Seeds run from 0 to one less: what a torch.Generator takes without wrapping."""
NUM_DRAWN_SEEDS = 2**53
"""Those that are drawn, too: whole numbers that JavaScript, and whoever reads JSON into doubles,
returns unchanged.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """One legal request. Its repr leaves out what must not reach a log."""

    prompt: str = field(repr=False)
    negative_prompt: str | None = field(repr=False)
    height: int | None
    """Pixels; None where the client left it to the server."""
    width: int | None
    num_inference_steps: int
    guidance_scale: float
    seed: int
    """0 to 2**63 - 1; drawn at random, below 2**53, if the client named none."""
    image: bytes | None = field(repr=False)
    """The file as it was sent, not decoded; never empty."""
    mask_image: bytes | None = field(repr=False)
    strength: float
    """Above 0, at most 1: how far the image is repainted. Without an image it means nothing."""
    num_images: int
    output_format: OutputFormat
    response_format: ResponseFormat
    stream: bool = False
    """Answer with events while it is painted, not with a picture at the end."""
    preview_every: int = 0
    """Steps from one preview to the next; 0 is never."""

    @property
    def task(self) -> Task:
        """What the request is, by the images it brings."""
        if self.image is None:
            return "text-to-image"
        return "image-to-image" if self.mask_image is None else "inpainting"

    @property
    def num_run_steps(self) -> int:
        """Denoising steps that are run: an image starts on its way (`get_timesteps` of diffusers'
        image-to-image pipelines).
        """
        return run_steps(self.num_inference_steps, None if self.image is None else self.strength)


def run_steps(num_steps: int, strength: float | None) -> int:
    """Of that many steps, those from `strength` on; all without an image (strength None)."""
    return num_steps if strength is None else int(min(num_steps * strength, num_steps))


FIELDS = tuple(one.name for one in fields(ImageRequest))


def parse_row(
    row: Mapping[str, object],
    *,
    content_type: str | None = None,
    limits: LimitsConfig,
    defaults: DefaultsConfig,
    guidance: Guidance = "both",
    tasks: Collection[Task] = TASKS,
) -> ImageRequest:
    """The request in one row of a TorchServe batch.

    A row is `{"body": ...}` over REST (bytes of JSON or, by its content type, of text that is the
    prompt; either one decoded already, where TS_DECODE_INPUT_REQUEST leaves that to TorchServe),
    `{"data": JSON bytes}` over gRPC, or one entry per field (multipart, gRPC map): text as UTF-8,
    numbers as JSON writes them, images as raw files. Entries beside `body` or `data` add to its
    fields.

    Raises:
        RequestError: anything that is not a legal request; nothing else is raised, whatever the row
            holds.
    """
    if content_type is not None and content_type.lower().startswith(
        "application/x-www-form-urlencoded"
    ):
        # What `curl -d` says if it is told nothing else. TorchServe 0.12 takes such a body apart:
        # JSON arrives as no fields at all.
        raise RequestError(f"is form-encoded; {_SEND}", "body")
    sent = _Sent(_fields_of(row, is_text=(content_type or "").lower().startswith("text/")))
    prompt = sent.text("prompt", limits.max_prompt_chars)
    if prompt is None:
        raise RequestError("is missing", "prompt")
    request = ImageRequest(
        prompt=prompt,
        negative_prompt=sent.text("negative_prompt", limits.max_prompt_chars),
        height=sent.whole("height", limits.min_side, limits.max_side),
        width=sent.whole("width", limits.min_side, limits.max_side),
        num_inference_steps=_or(
            sent.whole("num_inference_steps", 1, limits.max_steps), defaults.num_inference_steps
        ),
        guidance_scale=_or(
            sent.number("guidance_scale", limits.max_guidance_scale), defaults.guidance_scale
        ),
        seed=_or(sent.whole("seed", 0, NUM_SEEDS - 1), secrets.randbelow(NUM_DRAWN_SEEDS)),
        image=sent.file("image", limits.max_image_bytes),
        mask_image=sent.file("mask_image", limits.max_image_bytes),
        strength=_or(sent.number("strength", 1.0, zero=False), defaults.strength),
        num_images=_or(sent.whole("num_images", 1, limits.max_images), 1),
        output_format=_or(sent.choice("output_format", OUTPUT_FORMATS), defaults.output_format),
        response_format=_or(sent.choice("response_format", RESPONSE_FORMATS), "image"),
        stream=_or(sent.flag("stream"), False),
        preview_every=_or(sent.whole("preview_every", 0, limits.max_steps), 0),
    )
    _check_together(request, guidance, tasks)
    return request


def _check_together(request: ImageRequest, guidance: Guidance, tasks: Collection[Task]) -> None:
    """What no field can know alone."""
    if request.mask_image is not None and request.image is None:
        raise RequestError("needs the image that it masks, in the field image", "mask_image")
    if request.task not in tasks:
        at_fault = "mask_image" if request.task == "inpainting" else "image"
        raise RequestError(
            f"asks for {request.task}, which this model does not do; it does {', '.join(tasks)}",
            at_fault,
        )
    if guidance == "on" and request.guidance_scale <= 1:
        raise RequestError(
            f"must be above 1, since this model always guides; got {request.guidance_scale}",
            "guidance_scale",
        )
    if guidance == "off" and request.guidance_scale > 1:
        raise RequestError(
            f"must be from 0 to 1, since this model never guides; got {request.guidance_scale}",
            "guidance_scale",
        )
    if request.num_run_steps < 1:
        shares = f"{request.strength} of {request.num_inference_steps} steps"
        raise RequestError(f"is less than one step, {shares}; ask for more of either", "strength")
    if request.num_images > 1 and request.response_format != "b64_json" and not request.stream:
        raise RequestError(
            "needs response_format b64_json, or stream, for more than one image", "num_images"
        )
    if request.preview_every and not request.stream:
        raise RequestError("needs stream too: previews are its events", "preview_every")


class _Sent:
    """The fields as they came, read one at a time; None is as good as absent.

    JSON has no bytes, so a value in bytes is always a part of its own (multipart, gRPC map).
    """

    def __init__(self, values: Mapping[str, object]) -> None:
        for name in values:
            if name not in FIELDS:
                raise _unknown(name)
        self._values = values

    def text(self, name: str, max_chars: int) -> str | None:
        value = self._values.get(name)
        if value is None:
            return None
        if isinstance(value, bytes):
            value = decoded(value, name)
        if not isinstance(value, str):
            raise RequestError(f"must be text, got {_shown(value)}", name)
        if len(value) > max_chars:
            raise RequestError(
                f"has {len(value)} characters, at most {max_chars} are allowed", name
            )
        if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
            raise RequestError("holds a NUL or half a surrogate pair, which are not text", name)
        return value

    def choice(self, name: str, choices: tuple[Choice, ...]) -> Choice | None:
        value = self._values.get(name)
        if value is None:
            return None
        if isinstance(value, bytes):
            value = decoded(value, name)
        for one in choices:
            if value == one:
                return one
        raise RequestError(f"must be one of {', '.join(choices)}, got {_shown(value)}", name)

    def flag(self, name: str) -> bool | None:
        value = self._numeral(name)
        if value is None or isinstance(value, bool):
            return value
        raise RequestError(f"must be true or false, got {_shown(value)}", name)

    def whole(self, name: str, low: int, high: int) -> int | None:
        value = self._numeral(name)
        if value is None:
            return None
        if type(value) is not int or not low <= value <= high:  # type(), since True is an int
            raise RequestError(
                f"must be a whole number from {low} to {high}, got {_shown(value)}", name
            )
        return value

    def number(self, name: str, high: float, *, zero: bool = True) -> float | None:
        value = self._numeral(name)
        if value is None:
            return None
        # Compared before it is converted: Python compares a huge int exactly, and NaN to nothing.
        if (
            isinstance(value, int | float)
            and type(value) is not bool
            and 0 <= value <= high
            and (zero or value > 0)
        ):
            return float(value)
        legal = f"from 0 to {high:g}" if zero else f"above 0 and at most {high:g}"
        raise RequestError(f"must be a number {legal}, got {_shown(value)}", name)

    def file(self, name: str, max_bytes: int) -> bytes | None:
        value = self._values.get(name)
        if value is None:
            return None
        if isinstance(value, str):
            value = from_base64(value, name, max_bytes)
        if not isinstance(value, bytes):
            raise RequestError(f"must be an image file in base64, got {_shown(value)}", name)
        if not value:
            raise RequestError("is empty", name)
        if len(value) > max_bytes:
            raise RequestError(f"has {len(value)} bytes, at most {max_bytes} are allowed", name)
        return value

    def _numeral(self, name: str) -> object:
        """A number or a truth value, from a part of its own as JSON writes it."""
        value = self._values.get(name)
        if not isinstance(value, bytes):
            return value
        text = decoded(value, name)
        try:
            return loads(text)
        except ValueError:
            return text


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _fields_of(row: object, *, is_text: bool) -> dict[str, object]:
    """The fields by name, from any of the shapes that TorchServe gives a row; of text, `body` is
    the prompt.
    """
    if not isinstance(row, Mapping) or not row:
        # What `curl -d` without a content type comes down to: TorchServe drops form-encoded bodies.
        raise RequestError(f"is empty; {_SEND}", "body")
    parts = {name: in_bytes(value) for name, value in row.items()}
    for envelope in ("data", "body"):
        if envelope in parts:
            del parts[envelope]
            body = row[envelope]
            inside = _object(decoded(bytes(body), "body") if is_text and _is_bytes(body) else body)
            for name in parts:
                if name in inside:
                    raise RequestError(
                        "is given twice, in the JSON and beside it", shown_name(name)
                    )
            return {**inside, **parts}
    return parts


def _is_bytes(body: object) -> TypeGuard[bytes | bytearray | memoryview]:
    return isinstance(body, bytes | bytearray | memoryview)


def _object(body: object) -> dict[str, object]:
    if _is_bytes(body) and len(body):
        try:
            body = loads(decoded(bytes(body), "body"))
        except ValueError as error:
            raise RequestError(f"is not JSON: {error}; {_SEND}", "body") from None
        if not isinstance(body, dict):
            raise RequestError(f"must be a JSON object, got {_shown(body)}", "body")
    if isinstance(body, str) and body:
        return {"prompt": body}
    if isinstance(body, Mapping):
        return dict(body)
    if body is None or body in (b"", ""):
        raise RequestError("is empty; send a JSON object", "body")
    raise RequestError(f"must be a JSON object, got {_shown(body)}", "body")


def _unknown(name: object) -> RequestError:
    shown = shown_name(name)
    if shown in unserved.FIELDS:
        return RequestError(f"is not served: {unserved.FIELDS[shown]}", shown)
    close = get_close_matches(shown, FIELDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(FIELDS)}"
    return RequestError(f"is an unknown field; {hint}", shown)


def _shown(value: object) -> str:
    """A value for a message: numbers and short words themselves, of all else the kind alone."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float) or (
        isinstance(value, int) and value.bit_length() <= 4 * LONGEST_WHOLE
    ):
        return repr(value)
    if isinstance(value, str):
        return ascii(value) if len(value) <= 20 else f"text of {len(value)} characters"
    kinds = {int: "a huge number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "something else")
