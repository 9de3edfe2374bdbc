"""Serves pictures: groups requests that can share a pipeline call, fills it up, and cuts each
picture out of its bucket.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Protocol

from PIL import Image

from preheat.buckets import Bucket, joined, round_up, smallest_covering
from preheat.compilation.pace import MARGIN, Pace, Timing
from preheat.compilation.variants import Variant as AnyVariant
from preheat.config.diffusion import PipelineConfig, Task
from preheat.config.model import ModelConfig
from preheat.device import num_cores, synchronize
from preheat.errors import OutOfMemory, RequestError
from preheat.models.base import ModelRunner
from preheat.models.batching import Chunk, Execution, RunReport
from preheat.models.diffusion import geometry, image_processor, responses
from preheat.models.diffusion.admission import check_cost, check_time
from preheat.models.diffusion.geometry import Plan
from preheat.models.diffusion.job import Answer, Job
from preheat.models.diffusion.lending import Party, lend
from preheat.models.diffusion.masking.seats import VaeBuckets
from preheat.models.diffusion.own_sizes import OwnSizes
from preheat.models.diffusion.pipeline import AfterStep, Batch, Generated, Row, Sketch
from preheat.models.diffusion.preprocess import Planner, Sized
from preheat.models.diffusion.prompts import Reader
from preheat.models.diffusion.request import ImageRequest, parse_row
from preheat.models.diffusion.streaming import emit_step
from preheat.models.diffusion.variants import (
    Variant,
    alone_variants,
    covering,
    own,
    plan_variants,
    seated,
)
from preheat.protocol import images
from preheat.protocol.call import Call
from preheat.protocol.events import EventStream
from preheat.protocol.responses import Response

logger = logging.getLogger(__name__)


class Pipeline(Sized, Protocol):
    """What the runner needs of a pipeline; see `DiffusionPipeline`."""

    prompts: Reader
    guidance_variants: tuple[bool, ...]
    mask_error: Mapping[str, float | str]

    @property
    def tasks(self) -> Sequence[Task]: ...

    @property
    def order(self) -> int: ...

    def num_calls(self, request: ImageRequest) -> int: ...

    def generate(self, batch: Batch, after_step: AfterStep) -> Generated: ...


class DiffusionRunner(ModelRunner[Job, Answer]):
    """A pipeline that generates.

    Args:
        config: its shapes are resolved: with buckets, unless `exact`.
    """

    def __init__(self, execution: Execution, pipeline: Pipeline, config: ModelConfig) -> None:
        super().__init__(execution, config.pt2.shapes.buckets)
        self._pipeline, self._most = pipeline, config.batchSize
        self._own, self._shapes = config.section(PipelineConfig), config.pt2.shapes
        self.planner = Planner(pipeline, self._shapes, self._own)
        # The model's own threads sleep meanwhile, so there is a core for each.
        self._encoders = ThreadPoolExecutor(num_cores(), "encode")

    def variants(self, batch_sizes: Iterable[int]) -> tuple[Variant, ...]:
        every = plan_variants(
            self.buckets,
            batch_sizes,
            self._pipeline.guidance_variants,
            self._pipeline.tasks,
            self._shapes.masks,
        )
        painted = [replace(each, painted=self._painted(each)) for each in every]
        known = tuple(each for each in painted if each.painted is not None)
        if not self._shapes.vae_buckets:
            return known
        vae = VaeBuckets(self._shapes.vae_buckets, self._always_masked)
        return seated(known, vae, self._pipeline.multiple)

    @property
    def _always_masked(self) -> bool:
        return self._shapes.masks == (True,)

    def _painted(self, variant: Variant) -> Bucket | None:
        """What a variant's rows fill of its bucket; None where a masked one's cannot fill less."""
        if not variant.masked or self._always_masked:
            return variant.bucket
        return geometry.smaller(variant.bucket, self._pipeline.multiple)

    def covering(self, variants: Sequence[AnyVariant]) -> tuple[Variant, ...]:
        return covering(own(variants))

    def extremes(self, variants: Sequence[AnyVariant]) -> list[Variant]:
        every = own(variants)
        largest = every[0]
        if self._shapes.strategy == "dynamic":
            sizes = {v.bucket: v for v in every if v.guidance == largest.guidance}
            return [largest, *sizes.values(), self._between(largest)]
        if self._shapes.batch_sizes == "dynamic":
            # with masks where there are any: the other graphs' inputs are among theirs
            masked = any(v.masked for v in every)
            smallest = next(v for v in reversed(every) if v.masked == masked)
            kind = smallest.bucket, smallest.task, masked, smallest.painted
            guided = [v for v in every if (v.bucket, v.task, v.masked, v.painted) == kind]
            return [guided[0], guided[-1]]
        return []

    def between(self, variants: Sequence[AnyVariant]) -> list[Variant]:
        if self._shapes.strategy != "dynamic":
            return []
        return list({self._between(variant): None for variant in own(variants)})

    def _between(self, variant: Variant) -> Variant:
        """The variant at about half its size: what `strategy: dynamic` has to serve beside the
        buckets themselves.
        """
        grid, bucket = self._pipeline.grid, variant.bucket
        half = round_up(
            Bucket(max(2 * grid, bucket.height // 2), max(2 * grid, bucket.width // 2)), grid
        )
        # where that is more than the bucket, nothing but the bucket itself is ever served in it
        return replace(variant, bucket=half, painted=half) if bucket.covers(half) else variant

    def run_variant(self, variant: AnyVariant) -> Timing:
        """Run one variant as requests would: every limit, image decoder and encoder on the way is
        met too.
        """
        (meant,) = own([variant])
        samples = (self._sample(meant, seed) for seed in range(meant.batch_size))
        jobs = [
            self._fitted(self.planner.prepare(sample, alone=meant.alone), meant)
            for sample in samples
        ]
        ended: list[float] = []  # of each of its steps
        events = EventStream(lambda _: ended.append(time.perf_counter()), {})
        jobs[0], began = replace(jobs[0], events=events), time.perf_counter()
        answers, _ = self.batches.timed(jobs)
        for job, answer in zip(jobs, answers, strict=True):
            for picture in answer.pictures:
                images.encode(picture, job.request.output_format)
        return _timing(time.perf_counter() - began, ended, self._pipeline.order)

    def measure_padding(self) -> Mapping[str, float | str]:
        """Of what has masks, which was looked at before it was compiled."""
        return self._pipeline.mask_error

    def measure_alone(self, timings: Mapping[AnyVariant, Timing]) -> Mapping[AnyVariant, Timing]:
        """With masks every picture has two roads, but where all are to be the same to the last bit,
        or one is as good as the other; see `own_sizes`.
        """
        compiles = any(not router.idle for router in self.execution.routers.values())
        if not any(self._shapes.masks) or self._shapes.invariant or not compiles:
            return {}
        alone: dict[AnyVariant, Timing] = {}
        for variant in alone_variants(
            max(self.buckets, key=lambda bucket: bucket.volume),
            self._pipeline.multiple,
            self._own.limits.min_side,
            self.execution.batch_sizes,
            self._pipeline.guidance_variants,
            self._pipeline.tasks[0],
        ):
            try:
                alone[variant] = self.run_variant(variant)
            except OutOfMemory as error:
                logger.warning("not painted without its bucket: %s", error)
        met = {**timings, **alone}
        self.planner.own_sizes = OwnSizes.measured(
            self.execution.batch_sizes, {variant: met[variant] for variant in own(list(met))}
        )
        return alone

    def _fitted(self, job: Job, variant: Variant) -> Job:
        """The variant's job, whose picture fills as much of the bucket as the variant's do."""
        painted = variant.painted
        if painted is None or painted == job.plan.painted:
            return job
        shift = painted.volume if job.shift else 0
        return replace(job, plan=replace(job.plan, painted=painted), shift=shift)

    def example(self, bucket: Bucket, steps: int | None = None) -> Job:
        defaults = self._own.defaults
        request = ImageRequest(
            prompt="a picture",
            negative_prompt=None,
            height=bucket.height,
            width=bucket.width,
            num_inference_steps=steps or defaults.num_inference_steps,
            guidance_scale=defaults.guidance_scale,
            seed=0,
            image=None if "text-to-image" in self._own.tasks else _blank(bucket, "RGB"),
            mask_image=_blank(bucket, "L") if self._own.tasks == ("inpainting",) else None,
            strength=defaults.strength,
            num_images=1,
            output_format=defaults.output_format,
            response_format="image",
        )
        return self.planner.prepare(request)

    def num_steps(self, steps: int | None) -> int | None:
        return steps or self._own.defaults.num_inference_steps

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
        limits, most = self._own.limits, max(bucket.volume for bucket in self.buckets)
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
        job = replace(self.planner.prepare(request, call.deadline), dropped=dropped)
        steps = self._pipeline.num_calls(request)
        least_area = min(bucket.volume for bucket in self.buckets)
        # what may be asked for is no matter of which road is quicker on this machine
        canvas = smallest_covering(self.buckets, job.plan.painted) if job.bypass else None
        check_cost(
            request,
            canvas or job.plan.bucket,
            steps=steps,
            least_area=least_area,
            max_cost=pipeline.limits.max_cost,
        )
        timeout = self.execution.budget.timeout
        if timeout is not None:
            seconds = self.batches.seconds([job], generous=True)
            check_time(request, job.plan.bucket, seconds, timeout)
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

    def result(self, job: Job) -> Answer:
        return Answer(job, exact="bitwise" if self._shapes.invariant else "rounding")

    def inference(self, jobs: Sequence[Job]) -> list[Answer]:
        for job in jobs:
            if job.events is not None:
                job.events.emit("queued")
        return self.batches.run(jobs)

    def groups(self, results: Sequence[Answer]) -> Iterable[Sequence[Answer]]:
        """With masks those of a smaller bucket borrow what seats a larger one's run has left."""
        groups = [list(group) for group in super().groups(results)]
        if not any(self._shapes.masks) or self._shapes.invariant:
            return groups
        kin: dict[Hashable, list[Party[Answer]]] = {}
        for group in groups:
            job = group[0].job
            party = Party(job.plan.bucket, self.batches.fitting(job), group)
            kin.setdefault(job.kin, []).append(party)
        for parties in kin.values():
            lend(parties, lambda answer: answer.job.num_rows, _may_be_seated)
        seated = [party.members for parties in kin.values() for party in parties if party.members]
        order = {id(result): index for index, result in enumerate(results)}
        return sorted(seated, key=lambda members: min(order[id(each)] for each in members))

    def _canvas(self, jobs: Sequence[Job]) -> Bucket:
        """The bucket in which these share a run."""
        own = {job.plan.bucket for job in jobs}
        if len(own) == 1:
            return own.pop()
        # that of who borrows nothing holds them all, even where its own rows are gone by now
        canvas = smallest_covering(self.buckets, joined([job.plan.painted for job in jobs]))
        assert canvas is not None
        return canvas

    def run_chunk(self, chunk: Chunk[Answer], size: int) -> RunReport:
        canvas = self._canvas([answer.job for answer, _ in chunk])
        for answer, _ in chunk:
            answer.job = answer.job.on(canvas)
        job, rows = chunk[0][0].job, [answer.job.row(row) for answer, row in chunk]
        masked = self._always_masked or any(row.size != canvas for row in rows)
        batch = _batch(job.request, canvas, rows, size, masked=masked and not job.bypass)
        generated, run = self.execution.run(
            lambda: self._pipeline.generate(batch, partial(self._emit_step, chunk)),
            num_rows=size,
            num_real_rows=len(rows),
            bypass=job.bypass,
        )
        # All before any is kept: a run that fails here is repeated. The filler's are dropped.
        finished = [
            image_processor.finish(pixels, answer.job.plan)
            for (answer, _), pixels in zip(chunk, generated.pixels, strict=False)
        ]
        for index, ((answer, _), picture) in enumerate(zip(chunk, finished, strict=True)):
            flagged = generated.flagged is not None and bool(generated.flagged[index])
            around = answer.job.around
            if around is not None and not flagged:  # a blackened picture stays black
                picture.paste(around, mask=around)
            answer.pictures.append(picture)
            if generated.flagged is not None:
                answer.flagged.append(flagged)
        return run

    def _emit_step(self, chunk: Chunk[Answer], step: int, of: int, sketch: Sketch) -> None:
        """Tell a run's step to the jobs that are streamed; the filler's rows come last and are
        nobody's.
        """
        if any(answer.job.events for answer, _ in chunk):
            synchronize(self.execution.device)  # a GPU is given steps faster than it does them
        for position, (answer, row) in enumerate(chunk):
            preview = partial(_preview, sketch, position, answer.job.plan)
            emit_step(answer, row, step, of, preview)

    def postprocess(self, results: Sequence[Answer]) -> list[Response]:
        most = self._own.limits.max_response_bytes
        files = responses.encoded(results, self._encoders, most=most)
        return [
            responses.from_answer(answer, own) for answer, own in zip(results, files, strict=True)
        ]

    def close(self) -> None:
        self._encoders.shutdown()


def _may_be_seated(answer: Answer, bucket: Bucket) -> bool:
    """Not who streams: the headers that name its bucket have left already."""
    job = answer.job
    return not job.bypass and job.events is None and bucket.covers(job.plan.painted)


def _timing(seconds: float, ended: Sequence[float], order: int) -> Timing:
    """Of a run that took `seconds` and whose steps ended then; the last step counts, what is first
    about the first one does not.
    """
    if len(ended) < 2:
        return Timing(seconds, 0.0)
    per_step = order * (ended[-1] - ended[-2])  # the last one is a single call, whatever the order
    return Timing(max(0.0, seconds - per_step * len(ended)), per_step)


def _preview(sketch: Sketch, position: int, plan: Plan) -> Image.Image:
    return image_processor.preview(sketch(position), plan)


def _batch(
    request: ImageRequest, bucket: Bucket, rows: list[Row], size: int, *, masked: bool
) -> Batch:
    """Real rows, filled up to `size`."""
    # The filler repeats nobody's text; its images are dropped with its pictures.
    filler = replace(
        rows[0], prompt="", negative_prompt=None if rows[0].negative_prompt is None else "", seed=0
    )
    return Batch(
        rows=[*rows, *[filler] * (size - len(rows))],
        task=request.task,
        bucket=bucket,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        strength=request.strength,
        masked=masked,
    )


def _blank(bucket: Bucket, mode: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (bucket.width, bucket.height), "white").save(buffer, "png")
    return buffer.getvalue()
