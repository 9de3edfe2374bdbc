"""Serves batches of strangers: plans each request, groups what can share a run, pads rows and pixels, crops back.

The engine knows pipelines by the small `Painter` protocol and compiled code by its routers, so everything here runs in tests
without diffusers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from preheat import geometry, images
from preheat.buckets import Bucket, batch_size_for, round_up
from preheat.compilation import EngineName, Router, slowest
from preheat.config import LimitsConfig, ShapesConfig
from preheat.device import attention_backend
from preheat.errors import RequestError
from preheat.geometry import Plan
from preheat.pipelines import Batch, Row
from preheat.request import ImageRequest

logger = logging.getLogger(__name__)


class Painter(Protocol):
    """What the engine needs of a pipeline."""

    @property
    def multiple(self) -> int: ...

    @property
    def grid(self) -> int: ...

    def paint(self, batch: Batch) -> NDArray[np.uint8]: ...


@dataclass(frozen=True, slots=True)
class Job:
    """A request with its plan; `image` and `mask` are already laid in the bucket."""

    request: ImageRequest
    plan: Plan
    image: Image.Image | None = None
    mask: Image.Image | None = None

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
    error: Exception | None = None

    def raise_if_failed(self) -> None:
        if self.error is not None:
            raise self.error


@dataclass(frozen=True, slots=True)
class RunReport:
    """One pipeline call, for metrics: real rows out of painted rows, its engine, and what went wrong with it."""

    batch: Batch
    num_requests: int
    num_real_rows: int
    engine: EngineName
    seconds: float
    planned_eager: bool
    incident: bool
    fell_back: bool

    @property
    def is_fallback(self) -> bool:
        """Whether it ran eagerly although compiled code was wanted."""
        return self.incident or self.fell_back


class Engine:
    """Runs jobs through a painter.

    Args:
        painter: the pipeline.
        routers: what stands in for its targets, by target name.
        shapes: the strategy, buckets (resolved, not empty unless `exact`) and batch sizes.
        max_rows: most rows of one run where `batch_sizes: dynamic` names none.
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
        attention: str = "default",
        report: Callable[[RunReport], None] = lambda _: None,
    ) -> None:
        self._painter, self._routers, self._shapes = painter, routers, shapes
        self._report, self._attention = report, attention
        self.batch_sizes: tuple[int, ...] | None = None if shapes.batch_sizes == "dynamic" else shapes.batch_sizes
        self._max_rows = max_rows if self.batch_sizes is None else max(self.batch_sizes)

    def prepare(self, request: ImageRequest, *, limits: LimitsConfig, default: Bucket) -> Job:
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
        return Job(request, plan, image, mask)

    def plan(self, height: int, width: int, *, has_image: bool) -> Plan:
        """The geometry of one request; sizes in pixels."""
        shapes = self._shapes
        if shapes.strategy in ("dynamic", "exact"):
            multiple = self._painter.grid if shapes.strategy == "dynamic" else self._painter.multiple
            own = round_up(Bucket(height, width), multiple)
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

    def run(self, jobs: Sequence[Job]) -> list[Answer]:
        """Answers in the order of the jobs. A group that fails takes only its own jobs with it."""
        answers = [Answer(job) for job in jobs]
        for group in _grouped(jobs):
            try:
                self._run_group(group, jobs, answers)
            except Exception as error:  # the model's own failure: it belongs to this group, not to the batch
                logger.exception("a group of %d request(s) failed", len(group))
                for index in group:
                    answers[index] = Answer(jobs[index], error=error)
        return answers

    def _run_group(self, group: Sequence[int], jobs: Sequence[Job], answers: Sequence[Answer]) -> None:
        expanded = [(index, row) for index in group for row in jobs[index].rows()]
        first = jobs[group[0]]
        for start in range(0, len(expanded), self._max_rows):
            chunk = expanded[start : start + self._max_rows]
            pixels, engine = self._paint(first, [row for _, row in chunk], len({index for index, _ in chunk}))
            for (index, _), painted in zip(chunk, pixels, strict=True):
                answer = answers[index]
                answer.pictures.append(images.finish(painted, answer.job.plan))
                # A request whose pictures took several runs is as slow as the slowest of them.
                answer.engine = "eager" if answer.pictures[1:] and answer.engine == "eager" else engine

    def _paint(self, job: Job, rows: list[Row], num_requests: int) -> tuple[NDArray[np.uint8], EngineName]:
        """Paint real rows, filled up to a warmed batch size; the filler's pictures are dropped."""
        size = len(rows) if self.batch_sizes is None else batch_size_for(self.batch_sizes, len(rows))
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
        planned_eager = job.plan.engine_hint == "eager"
        for router in self._routers.values():
            router.start_run(planned_eager=planned_eager)
        started = time.perf_counter()
        # One grad mode for warm-up and serving: a graph warmed under another one would be compiled again.
        with torch.inference_mode(), attention_backend(self._attention):
            pixels = self._painter.paint(batch)
        seconds = time.perf_counter() - started
        runs = [router.run for router in self._routers.values()]
        engine = slowest({engine for run in runs for engine in run.engines})
        self._report(
            RunReport(
                batch=batch,
                num_requests=num_requests,
                num_real_rows=len(rows),
                engine=engine,
                seconds=seconds,
                planned_eager=planned_eager,
                incident=any(run.incidents for run in runs),
                fell_back=any(run.fallen for run in runs),
            )
        )
        return pixels[: len(rows)], engine


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
    """Sides that come from an image are held to the limits of those that a request names."""
    for field_name, side in (("height", height), ("width", width)):
        if not limits.min_side <= side <= limits.max_side:
            span = f"{limits.min_side} to {limits.max_side}"
            raise RequestError(f"would be {side} pixels by the image; name a size of {span}", field_name)


def _grouped(jobs: Sequence[Job]) -> Iterator[list[int]]:
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault(job.group_key, []).append(index)
    yield from groups.values()
