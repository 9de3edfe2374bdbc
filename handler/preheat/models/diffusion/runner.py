"""Serves batches of strangers: plans each request, groups what can share a run, pads rows and
pixels, crops back.

The engine knows pipelines by the small `Painter` protocol and compiled code by its routers, so
everything here runs in tests without diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from PIL import Image

from preheat.buckets import Bucket, round_up
from preheat.compilation.pace import Budget, Load
from preheat.compilation.router import Router
from preheat.config.diffusion import LimitsConfig
from preheat.config.pt2 import ShapesConfig
from preheat.device import synchronize
from preheat.errors import RequestError
from preheat.models.batching import Batcher, Outcome, RunReport
from preheat.models.diffusion import geometry, image_processor
from preheat.models.diffusion.geometry import Plan
from preheat.models.diffusion.pipeline import AfterStep, Batch, Painted, Row, Sketch
from preheat.models.diffusion.request import ImageRequest
from preheat.models.diffusion.streaming import Steps, emit_step
from preheat.protocol import images
from preheat.protocol.events import EventStream


class Painter(Protocol):
    """What the engine needs of a pipeline."""

    @property
    def multiple(self) -> int: ...

    @property
    def grid(self) -> int: ...

    def paint(self, batch: Batch, after_step: AfterStep) -> Painted: ...


@dataclass(frozen=True, slots=True)
class Job:
    """A request with its plan; `image` and `mask` are already laid in the bucket."""

    request: ImageRequest
    plan: Plan
    image: Image.Image | None = None
    mask: Image.Image | None = None
    deadline: float | None = None
    """Unix time in seconds after which nobody waits for the answer."""
    events: EventStream | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Tokens that no text encoder reads, by field; only of fields that were cut."""

    @property
    def group_key(self) -> tuple[object, ...]:
        """What has to be equal for two jobs to share a pipeline call.

        Whether there is a negative prompt counts: SDXL gives "none" zeros and "" the embedding of
        an empty text, per batch.
        """
        request = self.request
        strength = request.strength if request.task != "text-to-image" else None
        return (
            self.plan.bucket,
            self.plan.engine_hint,
            request.task,
            request.num_inference_steps,
            request.guidance_scale,
            strength,
            request.negative_prompt is None,
        )

    def rows(self) -> list[Row]:
        """One row a picture: the pictures of `num_images` take consecutive seeds."""
        request = self.request
        seeds = [(request.seed + index) % 2**63 for index in range(request.num_images)]
        return [
            Row(request.prompt, request.negative_prompt, seed, self.image, self.mask, index)
            for index, seed in enumerate(seeds)
        ]


@dataclass(slots=True)
class Answer(Outcome):
    """What one job got. `exact` compares its pictures with those of the same request alone
    (rounding: 1/255).
    """

    job: Job
    pictures: list[Image.Image] = field(default_factory=list)
    flagged: list[bool] = field(default_factory=list)
    """Of each picture, whether the safety checker has blackened it; empty where the pipeline has no
    checker.
    """
    steps: Steps = field(default_factory=Steps)
    """How far its events have come, which no restart takes back."""

    def restart(self) -> None:
        # a class with slots is made anew by dataclass, and super() alone does not find it
        Outcome.restart(self)
        self.pictures.clear()
        self.flagged.clear()

    @property
    def is_planned_eager(self) -> bool:
        """Whether it ran eagerly on purpose (`oversize: eager`)."""
        return self.job.plan.engine_hint == "eager"

    @property
    def bucket(self) -> str:
        return str(self.job.plan.bucket)

    @property
    def num_flagged(self) -> int:
        return sum(self.flagged)

    @property
    def num_painted(self) -> int:
        """Pixels, of all its pictures."""
        return len(self.pictures) * self.job.plan.scaled[0] * self.job.plan.scaled[1]

    @property
    def num_cropped(self) -> int:
        """Of those, how many were cut off."""
        return self.num_painted - len(self.pictures) * self.job.plan.height * self.job.plan.width


class Engine(Batcher[Answer, Row]):
    """Runs jobs through a painter.

    Args:
        painter: the pipeline.
        shapes: the strategy, buckets (resolved, not empty unless `exact`) and batch sizes.
        doubles: whether guidance doubles the denoiser's rows.

    The others are those of `Batcher`.
    """

    def __init__(
        self,
        painter: Painter,
        routers: Mapping[str, Router],
        shapes: ShapesConfig,
        *,
        max_rows: int,
        device: torch.device,
        attention: str = "default",
        report: Callable[[RunReport], None] = lambda _: None,
        budget: Budget | None = None,
        doubles: bool = True,
    ) -> None:
        super().__init__(
            routers,
            shapes,
            max_rows=max_rows,
            device=device,
            attention=attention,
            report=report,
            budget=budget,
        )
        self._painter, self._shapes = painter, shapes
        self._doubles = doubles

    def prepare(
        self,
        request: ImageRequest,
        *,
        limits: LimitsConfig,
        default: Bucket,
        deadline: float | None = None,
    ) -> Job:
        """Decode the request's images and plan its geometry.

        A side that the request leaves out comes from its image (in proportion, where the other side
        is given), else from `default`.

        Raises:
            RequestError: an image that cannot be read, or a size that no bucket covers under
                `oversize: reject`.
        """
        image = mask = None
        if request.image is not None:
            image = images.decode(request.image, field="image", max_pixels=limits.max_image_pixels)
        if request.mask_image is not None:
            mask = images.decode_mask(
                request.mask_image, field="mask_image", max_pixels=limits.max_image_pixels
            )
        height, width = _asked_size(request, image, default)
        _check_sides(height, width, limits)
        plan = self.plan(height, width, has_image=image is not None)
        if image is not None:
            image = image_processor.lay(image_processor.fit_to(image, height, width), plan)
        if mask is not None:
            mask = image_processor.lay(image_processor.fit_to(mask, height, width), plan)
        return Job(request, plan, image, mask, deadline)

    def plan(self, height: int, width: int, *, has_image: bool) -> Plan:
        """The geometry of one request; sizes in pixels."""
        shapes = self._shapes
        if shapes.strategy in ("dynamic", "exact"):
            own = self._own_size(height, width)
            if shapes.strategy == "exact" or any(bucket.covers(own) for bucket in shapes.buckets):
                return geometry.pad_into(own, height, width, has_image=has_image)
        return geometry.plan(
            height,
            width,
            buckets=shapes.buckets,
            fit=shapes.fit,
            oversize=shapes.oversize,
            multiple=self._painter.multiple,
            has_image=has_image,
        )

    def _own_size(self, height: int, width: int) -> Bucket:
        """The asked size rounded up to what the pipeline can paint; two grid cells a side keep a
        dynamic graph off size 1.
        """
        if self._shapes.strategy == "exact":
            return round_up(Bucket(height, width), self._painter.multiple)
        grid = self._painter.grid
        return round_up(Bucket(max(height, 2 * grid), max(width, 2 * grid)), grid)

    def run(self, jobs: Sequence[Job], *, retry: bool = True) -> list[Answer]:
        """Answers in the order of the jobs; for `retry` see `Batcher.answer`."""
        for job in jobs:
            if job.events is not None:
                job.events.emit("queued")
        answers = [
            Answer(job, exact="bitwise" if self._shapes.invariant else "rounding") for job in jobs
        ]
        self.answer(answers, retry=retry)
        return answers

    def _job(self, answer: Answer) -> Job:
        return answer.job

    def _grouped(self, answers: Sequence[Answer]) -> Iterator[list[Answer]]:
        groups: dict[tuple[object, ...], list[Answer]] = {}
        for answer in answers:
            groups.setdefault(answer.job.group_key, []).append(answer)
        yield from groups.values()

    def _rows(self, answer: Answer) -> list[Row]:
        return answer.job.rows()

    def _kind(self, answer: Answer) -> str:
        # Not the task: with one picture at a time in the VAE it is no more than a picture's worth.
        plan, request = answer.job.plan, answer.job.request
        guidance = "guidance" if request.guidance_scale > 1 else "no guidance"
        eager = ["eager"] if plan.engine_hint == "eager" else []
        return ", ".join([str(plan.bucket), guidance, *eager])

    def _load(self, answers: Sequence[Answer], size: int) -> Load:
        job = answers[0].job
        rows = size * (2 if self._doubles and job.request.guidance_scale > 1 else 1)
        return Load(job.plan.bucket.volume, rows, size, job.request.num_run_steps)

    def _identity(self, answer: Answer) -> int:
        # a seed that the client left out is drawn anew
        return hash(replace(answer.job.request, seed=0))

    def _too_large(self, answer: Answer) -> str:
        return f"painting {answer.job.plan.bucket} does not fit into memory"

    def _run_chunk(self, chunk: Sequence[tuple[Answer, Row]], size: int) -> None:
        job, rows = chunk[0][0].job, [row for _, row in chunk]
        batch = _batch(job.request, job.plan.bucket, rows, size)
        painted, run = self._called(
            lambda: self._painter.paint(batch, partial(self._emit_step, chunk)),
            num_rows=size,
            num_real_rows=len(rows),
            planned_eager=job.plan.engine_hint == "eager",
        )
        # All before any is kept: a run that fails here is painted again. The filler's pictures are
        # dropped.
        finished = [
            image_processor.finish(pixels, answer.job.plan)
            for (answer, _), pixels in zip(chunk, painted.pixels, strict=False)
        ]
        for index, ((answer, _), picture) in enumerate(zip(chunk, finished, strict=True)):
            answer.note(run, first=not answer.pictures)
            answer.pictures.append(picture)
            if painted.flagged is not None:
                answer.flagged.append(bool(painted.flagged[index]))

    def _emit_step(
        self, chunk: Sequence[tuple[Answer, Row]], step: int, of: int, sketch: Sketch
    ) -> None:
        """Tell a run's step to the jobs that are streamed; the filler's rows come last and are
        nobody's.
        """
        if any(answer.job.events for answer, _ in chunk):
            synchronize(self._device)  # a GPU is given steps faster than it does them
        for position, (answer, row) in enumerate(chunk):
            preview = partial(_preview, sketch, position, answer.job.plan)
            emit_step(answer, row.index, step, of, preview)


def _preview(sketch: Sketch, position: int, plan: Plan) -> Image.Image:
    return image_processor.preview(sketch(position), plan)


def _batch(request: ImageRequest, bucket: Bucket, rows: list[Row], size: int) -> Batch:
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
    )


def _asked_size(
    request: ImageRequest, image: Image.Image | None, default: Bucket
) -> tuple[int, int]:
    """(height, width) in pixels, with what the request leaves out filled in."""
    if image is None:
        return request.height or default.height, request.width or default.width
    if request.height is None and request.width is not None:
        return _in_proportion(image.height, request.width, image.width), request.width
    if request.width is None and request.height is not None:
        return request.height, _in_proportion(image.width, request.height, image.height)
    return request.height or image.height, request.width or image.width


def _in_proportion(side: int, part: int, whole: int) -> int:
    """`side` x `part` / `whole`, rounded to the nearest pixel, at least one."""
    return max(1, (2 * side * part + whole) // (2 * whole))


def _check_sides(height: int, width: int, limits: LimitsConfig) -> None:
    """Sides that come from an image are held to the limits of those that a request names (buckets
    always meet them).
    """
    for field_name, side in (("height", height), ("width", width)):
        if not limits.min_side <= side <= limits.max_side:
            span = f"{limits.min_side} to {limits.max_side}"
            raise RequestError(
                f"would be {side} pixels by the image; name a size of {span}", field_name
            )
