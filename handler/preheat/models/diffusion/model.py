"""Pipelines as a family: requests for pictures, the variants that they need, and the engine that
paints them.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from preheat.buckets import Bucket, round_up
from preheat.compilation.pace import MARGIN, Budget, Pace, Timing
from preheat.compilation.router import Router
from preheat.config.diffusion import LimitsConfig, PipelineConfig
from preheat.config.model import ModelConfig
from preheat.config.places import model_place
from preheat.config.pt2 import ShapesConfig
from preheat.device import DTYPES, num_cores
from preheat.errors import ConfigError, RequestError
from preheat.models.base import Manifest, ModelRunner
from preheat.models.batching import RunReport
from preheat.models.diffusion import responses
from preheat.models.diffusion.admission import check_cost, check_time
from preheat.models.diffusion.pipeline import DiffusionPipeline
from preheat.models.diffusion.request import FIELDS, ImageRequest, parse_row
from preheat.models.diffusion.runner import Answer, Engine, Job
from preheat.models.diffusion.variants import Variant, covering, plan_variants
from preheat.protocol import images
from preheat.protocol.call import Call
from preheat.protocol.events import EventStream
from preheat.protocol.responses import Response


class DiffusionModel:
    """A diffusers pipeline behind `base.LoadedModel`."""

    fields = FIELDS

    def __init__(
        self, pipeline: DiffusionPipeline, config: ModelConfig, device: torch.device
    ) -> None:
        self.pipeline, self._config, self._device = pipeline, config, device
        self._own = config.section(PipelineConfig)
        self.shapes = _resolved_shapes(config.pt2.shapes, self._own.limits, pipeline)

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        model_dir: Path,
        manifest: Manifest,
        device: torch.device,
    ) -> DiffusionModel:
        """Load the pipeline.

        Raises:
            ConfigError, PipelineError: it cannot be served as the YAML says.
        """
        own = config.section(PipelineConfig)
        path = model_place(own.path, model_dir, own)
        return cls(DiffusionPipeline.load(path, own, device), config, device)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self._own.dtype]

    @property
    def sizes(self) -> Sequence[Bucket]:
        return self.shapes.buckets

    def targets(self) -> dict[str, nn.Module]:
        names = self._config.pt2.targets or self.pipeline.default_targets()
        return {name: self.pipeline.target(name) for name in names}

    def settings(self) -> Mapping[str, Any]:
        return {"dtype": self._own.dtype}

    def structure(self) -> Mapping[str, Any]:
        return self.pipeline.structure()

    def runner(
        self, routers: Mapping[str, Router], report: Callable[[RunReport], None], budget: Budget
    ) -> DiffusionRunner:
        engine = Engine(
            self.pipeline,
            routers,
            self.shapes,
            max_rows=self._config.batchSize,
            device=self._device,
            attention=self._config.pt2.attention,
            report=report,
            budget=budget,
            doubles=self.pipeline.family.guidance == "cfg",
        )
        return DiffusionRunner(
            self.pipeline, self._own, self.shapes, engine, budget, most=self._config.batchSize
        )


class DiffusionRunner(ModelRunner[Job, Answer]):
    """A pipeline that paints: requests and variants become jobs for its engine.

    Args:
        most: requests of a batch.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        own: PipelineConfig,
        shapes: ShapesConfig,
        engine: Engine,
        budget: Budget,
        *,
        most: int,
    ) -> None:
        self._pipeline, self._own, self._shapes = pipeline, own, shapes
        self._engine, self._budget, self._most = engine, budget, most
        self.unfit = engine.unfit
        # The model's own threads sleep meanwhile, so there is a core for each.
        self._encoders = ThreadPoolExecutor(num_cores(), "encode")

    def variants(self, batch_sizes: Iterable[int]) -> tuple[Variant, ...]:
        return plan_variants(
            self._shapes.buckets,
            batch_sizes,
            self._pipeline.guidance_variants,
            self._pipeline.tasks,
        )

    def covering(self, variants: Sequence[Variant]) -> tuple[Variant, ...]:
        return covering(variants)

    def extremes(self, variants: Sequence[Variant]) -> list[Variant]:
        largest, smallest = variants[0], variants[-1]
        if self._shapes.strategy == "dynamic":
            sizes = {
                variant.bucket: variant
                for variant in variants
                if variant.guidance == largest.guidance
            }
            return [largest, *sizes.values(), self._between(largest)]
        if self._shapes.batch_sizes == "dynamic":
            guided = [
                v for v in variants if v.bucket == smallest.bucket and v.task == smallest.task
            ]
            return [guided[0], guided[-1]]
        return []

    def between(self, variants: Sequence[Variant]) -> list[Variant]:
        if self._shapes.strategy != "dynamic":
            return []
        return list({self._between(variant): None for variant in variants})

    def _between(self, variant: Variant) -> Variant:
        """The variant at about half its size: what `strategy: dynamic` has to serve beside the
        buckets themselves.
        """
        grid, bucket = self._pipeline.grid, variant.bucket
        half = round_up(
            Bucket(max(2 * grid, bucket.height // 2), max(2 * grid, bucket.width // 2)), grid
        )
        return replace(variant, bucket=half)

    def run_variant(self, variant: Variant) -> Timing:
        """Run one variant as requests would: every limit, image decoder and encoder on the way is
        met too.
        """
        jobs = [self._prepare(self._sample(variant, seed)) for seed in range(variant.batch_size)]
        told: list[float] = []  # when the batch began, then when each of its steps ended
        events = EventStream(lambda _: told.append(time.perf_counter()), {})
        jobs[0], began = replace(jobs[0], events=events), time.perf_counter()
        answers = self._engine.run(jobs, retry=False)
        for job, answer in zip(jobs, answers, strict=True):
            answer.raise_if_failed()
            for picture in answer.pictures:
                images.encode(picture, job.request.output_format)
        return _timing(time.perf_counter() - began, told[1:], self._pipeline.order)

    def _sample(self, variant: Variant, seed: int) -> ImageRequest:
        """A request that meets exactly this variant, in as few steps as the schedulers take."""
        defaults = self._own.defaults
        with_image, with_mask = variant.task != "text-to-image", variant.task == "inpainting"
        return ImageRequest(
            prompt="a picture",
            negative_prompt=None,
            height=variant.bucket.height,
            width=variant.bucket.width,
            num_inference_steps=2,
            guidance_scale=max(2.0, defaults.guidance_scale) if variant.guidance else 0.0,
            seed=seed,
            image=_blank(variant.bucket, "RGB") if with_image else None,
            mask_image=_blank(variant.bucket, "L") if with_mask else None,
            strength=1.0,
            num_images=1,
            output_format=defaults.output_format,
            response_format="image",
        )

    def overload(self, pace: Pace, timeout: float) -> str | None:
        limits, most = (
            self._own.limits,
            max(bucket.volume for bucket in self._shapes.buckets),
        )
        cost = limits.max_cost or most * limits.max_steps * limits.max_images
        per_cost = pace.worst(2 if self._pipeline.guidance_variants[0] else 1)
        seconds = self._most * cost * per_cost
        if seconds <= timeout:
            return None
        fitting = int(timeout / MARGIN / (self._most * per_cost))
        return (
            f"{self._most} legal requests can take {seconds:.0f} s, responseTimeout is "
            f"{timeout:.0f}: some will be told to come again (503); pipeline.limits.max_cost "
            f"{fitting} would fit"
        )

    def preprocess(self, call: Call) -> Job:
        pipeline = self._own
        request = parse_row(
            call.row,
            content_type=call.headers.get("content-type"),
            limits=pipeline.limits,
            defaults=pipeline.defaults,
            guidance=pipeline.guidance,
            tasks=pipeline.tasks,
        )
        family = self._pipeline.family
        if request.negative_prompt is not None and family.guidance == "embedded":
            raise RequestError(
                f"is not taken by {family.name} models, which are guided without one",
                "negative_prompt",
            )
        dropped = self._dropped(request)
        job = replace(self._prepare(request, call.deadline), dropped=dropped)
        steps = self._pipeline.num_calls(request)
        least_area = min(bucket.volume for bucket in self._shapes.buckets)
        check_cost(
            request,
            job.plan.bucket,
            steps=steps,
            least_area=least_area,
            max_cost=pipeline.limits.max_cost,
        )
        if self._budget.timeout is not None:
            seconds = self._engine.seconds([Answer(job)], generous=True)
            check_time(request, job.plan.bucket, seconds, self._budget.timeout)
        if not request.stream:
            return job
        return replace(job, events=EventStream(call.send, responses.plan_headers(job)))

    def _dropped(self, request: ImageRequest) -> dict[str, int]:
        """Tokens that are cut off, by the field that they stand in."""
        texts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
        counted = {
            field: self._pipeline.prompts.num_dropped(text, field)
            for field, text in texts.items()
            if text
        }
        dropped = {field: number for field, number in counted.items() if number}
        if dropped and self._own.limits.long_prompts == "reject":
            field, number = next(iter(dropped.items()))
            raise RequestError(
                f"is too long: the text encoders would not read its last {number} tokens", field
            )
        return dropped

    def _prepare(self, request: ImageRequest, deadline: float | None = None) -> Job:
        limits = self._own.limits
        return self._engine.prepare(
            request, limits=limits, default=self._shapes.buckets[0], deadline=deadline
        )

    def inference(self, jobs: Sequence[Job]) -> list[Answer]:
        return self._engine.run(jobs)

    def postprocess(self, results: Sequence[Answer]) -> list[Response]:
        most = self._own.limits.max_response_bytes
        files = responses.encoded(results, self._encoders, most=most)
        return [
            responses.from_answer(answer, own) for answer, own in zip(results, files, strict=True)
        ]

    def close(self) -> None:
        self._encoders.shutdown()


def _timing(seconds: float, ended: Sequence[float], order: int) -> Timing:
    """Of a run that took `seconds` and whose steps ended then; the last step counts, what is first
    about the first one does not.
    """
    if len(ended) < 2:
        return Timing(seconds, 0.0)
    per_step = order * (ended[-1] - ended[-2])  # the last one is a single call, whatever the order
    return Timing(max(0.0, seconds - per_step * len(ended)), per_step)


def _resolved_shapes(
    shapes: ShapesConfig, limits: LimitsConfig, pipeline: DiffusionPipeline
) -> ShapesConfig:
    """The shapes with buckets filled in and checked against what the pipeline needs and the limits
    allow.
    """
    buckets = shapes.buckets or (pipeline.default_bucket,)
    for index, bucket in enumerate(buckets):
        for side, pixels in enumerate((bucket.height, bucket.width)):
            if pixels % pipeline.multiple:
                raise ConfigError(
                    f"{pixels} is not a multiple of {pipeline.multiple}, which "
                    f"{pipeline.family.name} needs",
                    f"pt2.shapes.buckets[{index}][{side}]",
                )
        if (
            max(bucket.height, bucket.width) > limits.max_side
            or bucket.volume > limits.max_image_pixels
        ):
            raise ConfigError(
                f"{bucket} is over pipeline.limits (max_side {limits.max_side}, max_image_pixels "
                f"{limits.max_image_pixels})",
                f"pt2.shapes.buckets[{index}]",
            )
        if min(bucket.height, bucket.width) < limits.min_side:
            raise ConfigError(
                f"{bucket} is under pipeline.limits.min_side ({limits.min_side})",
                f"pt2.shapes.buckets[{index}]",
            )
    return shapes.model_copy(update={"buckets": tuple(buckets)})


def _blank(bucket: Bucket, mode: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (bucket.width, bucket.height), "white").save(buffer, "png")
    return buffer.getvalue()
