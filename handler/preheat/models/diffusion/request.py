"""The request: what a client may ask for, parsed from whatever TorchServe hands over, every limit
checked once.

Trouble with the body as a whole is laid at the field `body`; otherwise see `protocol.fields`.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

from preheat.errors import RequestError
from preheat.models.diffusion import unserved
from preheat.protocol.fields import Fields, envelope, shown_value, together
from preheat.protocol.images import MaskChannel, OutputFormat
from preheat.protocol.json_text import decoded, document

if TYPE_CHECKING:
    from preheat.config.diffusion import DefaultsConfig, Guidance, LimitsConfig, Task

ResponseFormat = Literal["image", "b64_json"]
T = TypeVar("T")

OUTPUT_FORMATS: tuple[OutputFormat, ...] = get_args(OutputFormat)
RESPONSE_FORMATS: tuple[ResponseFormat, ...] = get_args(ResponseFormat)
MASK_CHANNELS: tuple[MaskChannel, ...] = get_args(MaskChannel)
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
    """Answer with events while it is generated, not with a picture at the end."""
    preview_every: int = 0
    """Steps from one preview to the next; 0 is never."""
    num_previews: int = 0
    """Previews of each picture, evenly over its steps."""
    mask_channel: MaskChannel = "luminance"
    """What of the mask says where to repaint: white, or what is transparent, as in OpenAI's."""
    output_compression: int | None = None
    """OpenAI's name for the quality of a JPEG or WebP, 0 to 100; None: Preheat's own."""

    def shows(self, step: int, of: int) -> bool:
        """Whether a picture's preview is sent after denoising step `step` of `of`, from 1."""
        if self.preview_every:
            return step % self.preview_every == 0
        share = self.num_previews + 1
        return step < of and step * share // of > (step - 1) * share // of

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
    prompt; either one decoded already, where decode_input_request leaves that to TorchServe),
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
    is_text = (content_type or "").lower().startswith("text/")
    sent = Fields(_fields_of(row, is_text=is_text), FIELDS, unserved.FIELDS)
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
        num_previews=_or(sent.whole("num_previews", 0, limits.max_steps), 0),
        mask_channel=_or(sent.choice("mask_channel", MASK_CHANNELS), "luminance"),
        output_compression=sent.whole("output_compression", 0, 100),
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
    for name in ("preview_every", "num_previews"):
        if getattr(request, name) and not request.stream:
            raise RequestError("needs stream too: previews are its events", name)
    if request.preview_every and request.num_previews:
        raise RequestError("is asked for beside preview_every; send one", "num_previews")
    if request.mask_channel == "alpha" and request.mask_image is None:
        raise RequestError("is of the mask in mask_image, which is missing", "mask_channel")
    if request.output_format == "png" and request.output_compression not in (None, 100):
        raise RequestError(
            "is of jpeg and webp; a png holds every pixel as it is", "output_compression"
        )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _fields_of(row: object, *, is_text: bool) -> dict[str, object]:
    """The fields by name, from any of the shapes that TorchServe gives a row; of text, `body` is
    the prompt.
    """
    body, parts = envelope(row, hint=_SEND)
    if isinstance(body, bytes | bytearray | memoryview) and (is_text or len(body)):
        body = decoded(bytes(body), "body") if is_text else _json(bytes(body))
    return together(_object(body), parts, "JSON")


def _json(data: bytes) -> Mapping[str, object]:
    body = document(data, "body", _SEND)
    if not isinstance(body, dict):
        raise RequestError(f"must be a JSON object, got {shown_value(body)}", "body")
    return body


def _object(body: object) -> Mapping[str, object]:
    if isinstance(body, Mapping):
        return body
    if body is None or body in (b"", ""):
        raise RequestError("is empty; send a JSON object", "body")
    if isinstance(body, str):
        return {"prompt": body}
    raise RequestError(f"must be a JSON object, got {shown_value(body)}", "body")
