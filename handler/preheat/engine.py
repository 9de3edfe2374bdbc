"""Serves batches of strangers: plans each request, groups what can share a run, pads rows and pixels, crops back.

The engine knows pipelines by the small `Painter` protocol and compiled code by its routers, so everything here runs in tests
without diffusers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from preheat import geometry, images
from preheat.buckets import Bucket, round_up, split_rows
from preheat.compilation import EngineName, Router, slowest
from preheat.config import LimitsConfig, ShapesConfig
from preheat.device import attention_backend, is_device_lost, is_out_of_memory, release_memory, synchronize
from preheat.errors import DeadlinePassed, OutOfMemory, PipelineFailure, RequestError, RunError
from preheat.geometry import Plan
from preheat.pipelines import AfterStep, Batch, Row, Step
from preheat.request import ImageRequest

logger = logging.getLogger(__name__)


class Painter(Protocol):
    """What the engine needs of a pipeline."""

    @property
    def multiple(self) -> int: ...

    @property
    def grid(self) -> int: ...

    def paint(self, batch: Batch, after_step: AfterStep) -> NDArray[np.uint8]: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """Picture number `index` of a job is through denoising step `step` of `of`, counted from 1."""

    index: int
    step: int
    of: int
    sketch: Callable[[], Image.Image]
    """What it looks like so far, small; only good until the next step."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request with its plan; `image` and `mask` are already laid in the bucket."""

    request: ImageRequest
    plan: Plan
    image: Image.Image | None = None
    mask: Image.Image | None = None
    deadline: float | None = None
    """Unix time in seconds after which nobody waits for the answer."""
    watch: Callable[[Progress], None] | None = None
    """Told of every step of its pictures. After an out-of-memory split their steps begin anew."""

    @property
    def group_key(self) -> tuple[object, ...]:
        """What has to be equal for two jobs to share a pipeline call.

        Whether there is a negative prompt counts: SDXL gives "none" zeros and "" the embedding of an empty text, per batch.
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
        return [Row(request.prompt, request.negative_prompt, seed, self.image, self.mask) for seed in seeds]


@dataclass(slots=True)
class Answer:
    """What one job got."""

    job: Job
    pictures: list[Image.Image] = field(default_factory=list)
    engine: EngineName = "eager"
    exact: Literal["bitwise", "rounding"] = "rounding"
    """How equal the pictures are to those of the same request alone: to the last bit, or within rounding (1/255)."""
    incident: bool = False
    """Met a shape or guard that warm-up had not foreseen."""
    fell_back: bool = False
    """Ran eagerly because warm-up had found no engine."""
    error: RunError | None = None

    @property
    def is_fallback(self) -> bool:
        """Whether it ran eagerly although compiled code was wanted."""
        return self.incident or self.fell_back

    @property
    def is_planned_eager(self) -> bool:
        """Whether it ran eagerly on purpose (`oversize: eager`)."""
        return self.job.plan.engine_hint == "eager"

    def raise_if_failed(self) -> None:
        if self.error is not None:
            raise self.error


@dataclass(frozen=True, slots=True)
class Place:
    """One picture to paint: number `index` of its answer's."""

    answer: Answer
    index: int
    row: Row


@dataclass(frozen=True, slots=True)
class RunReport:
    """One pipeline call: its pixels (rows, height, width, 3), how many rows are real, and how it ran."""

    batch: Batch
    pixels: NDArray[np.uint8]
    num_real_rows: int
    engine: EngineName
    seconds: float
    incident: bool
    fell_back: bool


class Engine:
    """Runs jobs through a painter.

    Args:
        painter: the pipeline.
        routers: what stands in for its targets, by target name.
        shapes: the strategy, buckets (resolved, not empty unless `exact`) and batch sizes.
        max_rows: most rows of one run where `batch_sizes: dynamic` names none.
        device: where it runs.
        attention: `pt2.attention`, the same in warm-up and serving because both come through here.
        report: told of every run.
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
    ) -> None:
        self._painter, self._routers, self._shapes = painter, routers, shapes
        self._report, self._device, self._attention = report, device, attention
        # The sizes a run is filled up to; any number of rows up to the largest where one graph serves them all.
        self._batch_sizes: Sequence[int] = (
            range(1, max_rows + 1) if shapes.batch_sizes == "dynamic" else shapes.batch_sizes
        )
        if shapes.invariant:
            self._batch_sizes = (max(self._batch_sizes),)

    def prepare(
        self, request: ImageRequest, *, limits: LimitsConfig, default: Bucket, deadline: float | None = None
    ) -> Job:
        """Decode the request's images and plan its geometry.

        A side that the request leaves out comes from its image (in proportion, where the other side is given), else from `default`.

        Raises:
            RequestError: an image that cannot be read, or a size that no bucket covers under `oversize: reject`.
        """
        image = mask = None
        if request.image is not None:
            image = images.decode(request.image, field="image", max_pixels=limits.max_image_pixels)
        if request.mask_image is not None:
            mask = images.decode_mask(request.mask_image, field="mask_image", max_pixels=limits.max_image_pixels)
        height, width = _asked_size(request, image, default)
        _check_sides(height, width, limits)
        plan = self.plan(height, width, has_image=image is not None)
        if image is not None:
            image = images.lay(images.fit_to(image, height, width), plan)
        if mask is not None:
            mask = images.lay(images.fit_to(mask, height, width), plan)
        return Job(request, plan, image, mask, deadline)

    def plan(self, height: int, width: int, *, has_image: bool) -> Plan:
        """The geometry of one request; sizes in pixels."""
        shapes = self._shapes
        if shapes.strategy in ("dynamic", "exact"):
            own = self._own_size(height, width)
            if shapes.strategy == "exact" or any(bucket.covers(own.height, own.width) for bucket in shapes.buckets):
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
        """The asked size rounded up to what the pipeline can paint; two grid cells a side keep a dynamic graph off size 1."""
        if self._shapes.strategy == "exact":
            return round_up(Bucket(height, width), self._painter.multiple)
        grid = self._painter.grid
        return round_up(Bucket(max(height, 2 * grid), max(width, 2 * grid)), grid)

    def run(self, jobs: Sequence[Job]) -> list[Answer]:
        """Answers in the order of the jobs. A group that fails takes only its own jobs with it."""
        answers = [Answer(job, exact="bitwise" if self._shapes.invariant else "rounding") for job in jobs]
        for group in _grouped(answers):
            try:
                self._run_group(group)
            except Exception as error:  # the model's own failure: it belongs to this group, not to the batch
                logger.exception("a group of %d request(s) failed", len(group))
                if is_device_lost(error):
                    raise SystemExit("the device is lost; TorchServe starts a new worker") from error
                text = f"the pipeline failed on this request ({type(error).__name__}); the server's log says more"
                for answer in group:
                    answer.error = PipelineFailure(text)
        return answers

    def _run_group(self, group: Sequence[Answer]) -> None:
        for answer in group:
            if answer.job.deadline is not None and time.time() > answer.job.deadline:
                answer.error = DeadlinePassed("the deadline had passed before the request's turn came")
        waiting = [answer for answer in group if answer.error is None]
        places = [Place(answer, index, row) for answer in waiting for index, row in enumerate(answer.job.rows())]
        if places:
            self._run_places(places, self._batch_sizes)

    def _run_places(self, places: Sequence[Place], batch_sizes: Sequence[int]) -> None:
        """Paint rows in runs of these batch sizes; a run that does not fit into memory is retried in smaller ones."""
        start = 0
        for size in split_rows(batch_sizes, len(places)):
            chunk = places[start : start + size]
            start += size
            try:
                self._run_chunk(chunk, size)
                continue
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                logger.warning("a run of %d rows ran out of memory", size)
            release_memory(self._device)
            smaller = [other for other in batch_sizes if other < size]
            if smaller:
                self._run_places(chunk, smaller)
            for place in () if smaller else chunk:
                bucket = place.answer.job.plan.bucket
                place.answer.error = OutOfMemory(f"painting {bucket} does not fit into memory")

    def _run_chunk(self, chunk: Sequence[Place], size: int) -> None:
        run = self._paint(chunk, size)
        self._report(run)
        for place, painted in zip(chunk, run.pixels, strict=False):  # the filler's pictures are dropped
            answer = place.answer
            # A request whose pictures took several runs is as slow as the slowest of them.
            answer.engine = slowest({run.engine, answer.engine}) if answer.pictures else run.engine
            answer.pictures.append(images.finish(painted, answer.job.plan))
            answer.incident |= run.incident
            answer.fell_back |= run.fell_back

    def _paint(self, chunk: Sequence[Place], size: int) -> RunReport:
        """Paint real rows, filled up to `size`."""
        job, rows = chunk[0].answer.job, [place.row for place in chunk]
        # The filler repeats nobody's text; its images are dropped with its pictures.
        filler = replace(rows[0], prompt="", negative_prompt=None if rows[0].negative_prompt is None else "", seed=0)
        request = job.request
        batch = Batch(
            rows=[*rows, *[filler] * (size - len(rows))],
            task=request.task,
            bucket=job.plan.bucket,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            strength=request.strength,
        )
        for router in self._routers.values():
            router.start_run(planned_eager=job.plan.engine_hint == "eager")
        started = time.perf_counter()
        # One grad mode for warm-up and serving: a graph warmed under another one would be compiled again.
        with torch.inference_mode(), attention_backend(self._attention):
            pixels = self._painter.paint(batch, lambda step: self._tell(chunk, step))
        runs = [router.run for router in self._routers.values()]
        return RunReport(
            batch=batch,
            pixels=pixels,
            num_real_rows=len(rows),
            engine=slowest({engine for run in runs for engine in run.engines}),
            seconds=time.perf_counter() - started,
            incident=any(run.incidents for run in runs),
            fell_back=any(run.fallen for run in runs),
        )

    def _tell(self, chunk: Sequence[Place], step: Step) -> None:
        """Pass a run's step on to the jobs that watch; the filler's rows come last and are nobody's."""
        watched = [(row, place) for row, place in enumerate(chunk) if place.answer.job.watch is not None]
        if watched:
            synchronize(self._device)  # a GPU is given steps faster than it does them
        for row, place in watched:
            job = place.answer.job
            assert job.watch is not None
            sketch = partial(_sketched, step, row, job.plan)
            job.watch(Progress(place.index, step.number, step.of, sketch))


def _sketched(step: Step, row: int, plan: Plan) -> Image.Image:
    return images.preview(step.sketch(row), plan)


def _asked_size(request: ImageRequest, image: Image.Image | None, default: Bucket) -> tuple[int, int]:
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
    """Sides that come from an image are held to the limits of those that a request names (buckets always meet them)."""
    for field_name, side in (("height", height), ("width", width)):
        if not limits.min_side <= side <= limits.max_side:
            span = f"{limits.min_side} to {limits.max_side}"
            raise RequestError(f"would be {side} pixels by the image; name a size of {span}", field_name)


def _grouped(answers: Sequence[Answer]) -> Iterator[list[Answer]]:
    groups: dict[tuple[object, ...], list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.job.group_key, []).append(answer)
    yield from groups.values()
