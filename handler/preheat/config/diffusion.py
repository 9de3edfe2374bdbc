"""The YAML's `pipeline` section: which pipeline is served and what its clients may ask."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from preheat.buckets import Bucket
from preheat.config.family import FamilyConfig
from preheat.config.places import is_hub_id
from preheat.config.pt2 import Pt2Config
from preheat.config.schema import Dtype, Listed, Positive, Section, Text
from preheat.config.yaml_errors import refuse_twice, shown
from preheat.errors import ConfigError

Target = Literal["unet", "transformer", "vae.decoder", "vae.encoder"]
Task = Literal["text-to-image", "image-to-image", "inpainting"]
Guidance = Literal["both", "on", "off"]
LongPrompts = Literal["cut", "reject"]
OutputFormat = Literal["png", "jpeg", "webp"]


class LimitsConfig(Section):
    """What a request may ask for; everything past it is a 400."""

    max_steps: Positive = 100
    """Denoising steps of a request."""
    max_prompt_chars: Positive = 2_000
    """Characters of a prompt, and of a negative prompt."""
    long_prompts: LongPrompts = "cut"
    """What becomes of a prompt that no text encoder reads to its end: `cut` says in the answer how
    many tokens were dropped.
    """
    max_image_bytes: Positive = 10_000_000
    """Bytes of an input image as sent, after base64 is undone."""
    max_image_pixels: Positive = 16_777_216
    """Pixels of an input image, once decoded."""
    min_side: Positive = 16
    """Pixels: least height and width of the picture asked for."""
    max_side: Annotated[int, Field(gt=0, le=16_383)] = 4_096
    """Pixels: greatest height and width of the picture asked for."""
    max_images: Positive = 4
    """Pictures of one request (`num_images`)."""
    max_guidance_scale: Annotated[float, Field(gt=0)] = 50.0
    """Greatest `guidance_scale`."""
    max_cost: Positive | None = None
    """Pixel-steps: the bucket's pixels x denoiser calls x pictures of one request. 100 million is
    1024x1024 in 95 steps. Default: no limit."""
    max_response_bytes: Positive = 300_000_000
    """Bytes of one answer, of a stream of each event: a larger one than TorchServe's
    max_response_size, here that of archive/config.properties, would end the worker.
    """

    @model_validator(mode="after")
    def _agree(self) -> LimitsConfig:
        if self.min_side > self.max_side:
            raise ConfigError(
                f"{self.min_side} is over max_side ({self.max_side})", "pipeline.limits.min_side"
            )
        return self

    def check(self, buckets: Iterable[Bucket]) -> None:
        """Raise ConfigError where no request could ask for one of the pictures `buckets`."""
        for index, bucket in enumerate(buckets):
            path = f"pt2.shapes.buckets[{index}]"
            sides = (bucket.height, bucket.width)
            if max(sides) > self.max_side or bucket.volume > self.max_image_pixels:
                raise ConfigError(
                    f"{bucket} is over pipeline.limits (max_side {self.max_side}, "
                    f"max_image_pixels {self.max_image_pixels})",
                    path,
                )
            if min(sides) < self.min_side:
                raise ConfigError(
                    f"{bucket} is under pipeline.limits.min_side ({self.min_side})", path
                )


class DefaultsConfig(Section):
    """What a request gets that does not say."""

    num_inference_steps: Positive = 30
    """Denoising steps."""
    guidance_scale: Annotated[float, Field(ge=0)] = 5.0
    """How closely to follow the prompt. Above 1 the denoiser runs twice per step, with and without
    it."""
    strength: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Image-to-image: share of the steps that run, 0 to 1; 1 keeps nothing of the image."""
    output_format: OutputFormat = "png"
    """Of the pictures."""


class PipelineConfig(FamilyConfig):
    """Which pipeline is served and what its clients may ask."""

    name: ClassVar[str] = "pipeline"
    weights_index: ClassVar[str] = "model_index.json"
    kind: ClassVar[str] = "a diffusers pipeline"
    tiny: ClassVar[tuple[str, ...]] = ("sdxl", "sd15", "sd3", "flux")
    fills: ClassVar[str] = "only num_images"

    path: Text = "."
    """A diffusers folder, or a hub id, or `tiny:sdxl`; `.` is the archive's own. See operations.md.
    """
    dtype: Dtype = "float32"
    """Of weights and computation.
    In float16 SDXL's VAE, which overflows in it, stays float32."""
    scheduler: Text | None = None
    """Name of a diffusers scheduler class that replaces the folder's own."""
    guidance: Guidance = "both"
    """Which variants are warmed: with guidance (`on`), without (`off`) or both; a request for the
    other one is a 400."""
    tasks: Annotated[Listed[Task], Field(min_length=1)] = (
        "text-to-image",
        "image-to-image",
        "inpainting",
    )
    """What a request may ask; one for another is a 400."""
    keep_unmasked: bool = False
    """Inpainting leaves what is outside the mask to the bit; otherwise it comes out of the VAE, as
    in diffusers, which changes every pixel a little. Its previews are the VAE's."""
    fused_lora: Text | None = None
    """Folder of a safetensors LoRA that is fused before compiling."""
    limits: LimitsConfig = LimitsConfig()
    """What a request may ask for."""
    defaults: DefaultsConfig = DefaultsConfig()
    """What a request gets that does not say."""
    grpc_streaming: bool = False
    """Send a stream's events over gRPC while they happen, each in a message. TorchServe 0.12 does
    not tell a handler whether StreamPredictions or Predictions was called, and a second message to
    the latter ends the worker: only for clients who can be trusted to ask for `stream` in
    StreamPredictions alone. Otherwise all events come in one message at the end, to either."""

    @model_validator(mode="before")
    @classmethod
    def _guidance_words(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        if isinstance(data.get("guidance"), bool):  # YAML 1.1 reads a bare on or off as a boolean
            data["guidance"] = "on" if data["guidance"] else "off"
        defaults = data.get("defaults", {})
        if data.get("guidance") == "off" and isinstance(defaults, Mapping):
            data["defaults"] = {"guidance_scale": 0.0, **defaults}
        return data

    @model_validator(mode="after")
    def _agree(self) -> PipelineConfig:
        refuse_twice(self.tasks, "pipeline.tasks")
        steps, scale = self.defaults.num_inference_steps, self.defaults.guidance_scale
        if steps > self.limits.max_steps:
            raise ConfigError(
                f"{steps} is over pipeline.limits.max_steps ({self.limits.max_steps})",
                "pipeline.defaults.num_inference_steps",
            )
        if scale > self.limits.max_guidance_scale:
            raise ConfigError(
                f"{scale} is over pipeline.limits.max_guidance_scale "
                f"({self.limits.max_guidance_scale})",
                "pipeline.defaults.guidance_scale",
            )
        if self.guidance != "both" and (scale > 1) != (self.guidance == "on"):
            right = "a scale above 1" if self.guidance == "on" else "0.0"
            raise ConfigError(
                f"{scale} contradicts pipeline.guidance: {self.guidance}; use {right}",
                "pipeline.defaults.guidance_scale",
            )
        return self

    @property
    def streams_over_grpc(self) -> bool:
        return self.grpc_streaming

    @property
    def always_guided(self) -> bool:
        return self.guidance == "on"

    def num_graphs(self, pt2: Pt2Config, batches: int) -> int | None:
        """The VAE takes one picture at a time, so its targets have a graph in each bucket, and one
        more with masks.
        """
        shapes, targets = pt2.shapes, pt2.targets or ("unet",)
        vae = sum(name.startswith("vae.") for name in targets)
        both = self.guidance == "both" and shapes.batch_sizes != "dynamic"
        graphs = batches * (2 if both else 1) * len(shapes.masks)
        denoiser = graphs if vae < len(targets) else 0
        if shapes.strategy == "dynamic":
            return denoiser + vae
        sizes = max(1, len(shapes.buckets))
        vae_sizes = len(shapes.vae_buckets) or sizes
        return sizes * denoiser + vae_sizes * vae * len(shapes.masks)

    def check(self, pt2: Pt2Config) -> None:
        for index, target in enumerate(pt2.targets):
            if target not in get_args(Target):
                *most, last = map(repr, get_args(Target))
                raise ConfigError(
                    f"must be {', '.join(most)} or {last}, got {shown(target)}",
                    f"pt2.targets[{index}]",
                )
        self.limits.check(pt2.shapes.buckets)

    def check_here(self) -> None:
        if self.scheduler is not None:
            check_scheduler(self.scheduler)
        if self.fused_lora is None or is_hub_id(self.fused_lora):
            return
        path, folder = "pipeline.fused_lora", Path(self.fused_lora)
        if not folder.is_absolute():
            raise ConfigError(
                f"{shown(self.fused_lora)} is relative, and TorchServe starts workers in a folder "
                "of its own; use an absolute path",
                path,
            )
        if not folder.exists():
            raise ConfigError(f"no such folder: {folder}", path)


def check_scheduler(name: str) -> None:
    """Raise ConfigError where diffusers has no scheduler of that name."""
    # Not above: a YAML is read without torch, and the seconds are for one that names a scheduler.
    diffusers: Any = importlib.import_module("diffusers")
    path = "pipeline.scheduler"
    if not hasattr(getattr(diffusers, name, None), "from_config"):
        known = [each for each in dir(diffusers) if each.endswith("Scheduler")]
        close = get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"diffusers has no scheduler {shown(name)}{hint}", path)
