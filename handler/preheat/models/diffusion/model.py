"""Pipelines as a family: what is loaded and compiled of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from preheat.buckets import Bucket, smallest_covering
from preheat.compilation.attention import attention_backend
from preheat.config.diffusion import LimitsConfig, PipelineConfig
from preheat.config.family import Manifest
from preheat.config.model import ModelConfig
from preheat.config.places import model_place
from preheat.device import DTYPES
from preheat.errors import ConfigError
from preheat.models.base import LoadedModel, TimedPart
from preheat.models.batching import Execution
from preheat.models.diffusion.job import Answer, Job
from preheat.models.diffusion.masking.row_vae import PARTS
from preheat.models.diffusion.masking.seats import VaeBuckets
from preheat.models.diffusion.pipeline import DiffusionPipeline
from preheat.models.diffusion.request import FIELDS
from preheat.models.diffusion.runner import DiffusionRunner


class DiffusionModel(LoadedModel[Job, Answer]):
    """A diffusers pipeline."""

    fields = FIELDS

    def __init__(self, pipeline: DiffusionPipeline, config: ModelConfig) -> None:
        own = config.section(PipelineConfig)
        self.pipeline, self.dtype = pipeline, DTYPES[own.dtype]
        shapes = config.pt2.shapes
        masked = any(shapes.masks)
        step = pipeline.grid if masked else pipeline.multiple
        self.sizes = _resolved_buckets(shapes.buckets, own.limits, pipeline, step)
        vae_buckets: tuple[Bucket, ...] = ()
        if masked:
            parts = [part for part in PARTS if f"vae.{part}" in config.pt2.targets]
            if parts:
                vae_buckets = _resolved_vae_buckets(shapes.vae_buckets, self.sizes, pipeline)
            own_buckets = VaeBuckets(vae_buckets, shapes.masks == (True,)) if parts else None
            with attention_backend(config.pt2.attention):
                pipeline.mask(self.sizes, own_buckets, parts)
        resolved = {"buckets": self.sizes, "vae_buckets": vae_buckets}
        self.config = config.with_shapes(shapes.model_copy(update=resolved))

    @classmethod
    def load(
        cls, config: ModelConfig, model_dir: Path, manifest: Manifest, device: torch.device
    ) -> DiffusionModel:
        own = config.section(PipelineConfig)
        path = model_place(own.path, model_dir, own)
        return cls(DiffusionPipeline.load(path, own, device), config)

    def targets(self) -> dict[str, nn.Module]:
        names = self.config.pt2.targets or self.pipeline.default_targets()
        return {name: self.pipeline.target(name) for name in names}

    def fingerprint_facts(self) -> Mapping[str, object]:
        return {"dtype": str(self.dtype), **self.pipeline.structure()}

    def request_defaults(self) -> Mapping[str, object]:
        """The YAML's defaults, the first bucket, and what becomes of sizes between buckets."""
        first, shapes = self.sizes[0], self.config.pt2.shapes
        own = self.config.section(PipelineConfig).defaults
        return {
            "height": first.height,
            "width": first.width,
            "num_inference_steps": own.num_inference_steps,
            "guidance_scale": own.guidance_scale,
            "strength": own.strength,
            "fit": shapes.fit,
            "oversize": shapes.oversize,
        }

    def parts(self) -> dict[str, TimedPart]:
        return self.pipeline.parts()

    def num_dropped(self, text: str) -> int:
        return self.pipeline.prompts.num_dropped(text, "prompt")

    def runner(self, execution: Execution) -> DiffusionRunner:
        return DiffusionRunner(execution, self.pipeline, self.config)


def _resolved_buckets(
    buckets: tuple[Bucket, ...], limits: LimitsConfig, pipeline: DiffusionPipeline, step: int
) -> tuple[Bucket, ...]:
    """The buckets, the pipeline's own where there are none, checked against what it needs and the
    limits allow; `step` is what their sides must be a multiple of.
    """
    buckets = buckets or (pipeline.default_bucket,)
    for index, bucket in enumerate(buckets):
        for side, pixels in enumerate((bucket.height, bucket.width)):
            if pixels % step:
                masked = " with fit: mask" if step != pipeline.multiple else ""
                raise ConfigError(
                    f"{pixels} is not a multiple of {step}, which {pipeline.family.name} "
                    f"needs{masked}",
                    f"pt2.shapes.buckets[{index}][{side}]",
                )
            if pipeline.most_side is not None and pixels > pipeline.most_side:
                raise ConfigError(
                    f"{pixels} is more than {pipeline.most_side} pixels, for which this model has "
                    "positions (pos_embed_max_size)",
                    f"pt2.shapes.buckets[{index}][{side}]",
                )
    limits.check(buckets)  # those of the YAML are known to pass; the pipeline's own is not
    return buckets


def _resolved_vae_buckets(
    vae_buckets: tuple[Bucket, ...], buckets: Sequence[Bucket], pipeline: DiffusionPipeline
) -> tuple[Bucket, ...]:
    """The VAE's own buckets, those of the denoiser where there are none, checked against what can
    be painted.
    """
    vae_buckets = vae_buckets or tuple(buckets)
    path = "pt2.shapes.vae_buckets"
    for bucket in buckets:
        if smallest_covering(vae_buckets, bucket) is None:
            raise ConfigError(f"has none that covers the bucket {bucket}", path)
    own = VaeBuckets(vae_buckets, mask_only=False)
    met = {seat.bucket for seat in own.seats(buckets, pipeline.multiple)}
    for index, bucket in enumerate(vae_buckets):
        for side, pixels in enumerate((bucket.height, bucket.width)):
            if pixels % pipeline.cell:
                raise ConfigError(
                    f"{pixels} is not a multiple of {pipeline.cell}, a latent cell of this VAE",
                    f"{path}[{index}][{side}]",
                )
        if bucket not in met:
            raise ConfigError(
                f"no picture is ever in {bucket}: for all that pt2.shapes.buckets cover there is a "
                "smaller one; leave it out",
                f"{path}[{index}]",
            )
    return vae_buckets
