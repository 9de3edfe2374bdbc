"""A request for pictures as a job: its images decoded and placed in the bucket that its size
asks for.
"""

from __future__ import annotations

from typing import Protocol

from PIL import Image

from preheat.buckets import Bucket, round_up
from preheat.config.diffusion import LimitsConfig, PipelineConfig
from preheat.config.pt2 import ShapesConfig
from preheat.errors import RequestError
from preheat.models.diffusion import geometry, image_processor
from preheat.models.diffusion.geometry import Plan
from preheat.models.diffusion.job import Job
from preheat.models.diffusion.own_sizes import OwnSizes
from preheat.models.diffusion.pipeline import Family
from preheat.models.diffusion.request import ImageRequest
from preheat.protocol import images


class Sized(Protocol):
    """What planning needs of a pipeline; see `DiffusionPipeline`."""

    @property
    def family(self) -> Family: ...

    @property
    def multiple(self) -> int: ...

    @property
    def grid(self) -> int: ...

    @property
    def most_side(self) -> int | None: ...

    @property
    def shifts_by_size(self) -> bool: ...


class Planner:
    """Plans requests for a pipeline; `shapes` are resolved: with buckets, unless `exact`."""

    own_sizes: OwnSizes
    """Decides which pictures are painted without their bucket; until it is measured, none."""

    def __init__(self, pipeline: Sized, shapes: ShapesConfig, config: PipelineConfig) -> None:
        self._pipeline, self._shapes, self._limits = pipeline, shapes, config.limits
        self._keeps_unmasked = config.keep_unmasked
        self.own_sizes = OwnSizes()

    def prepare(
        self, request: ImageRequest, deadline: float | None = None, *, alone: bool = False
    ) -> Job:
        """Decode the request's images and plan its geometry.

        A side that the request leaves out comes from its image (in proportion, where the other side
        is given), else from the first bucket. `alone`: without its bucket, whatever is quicker.

        Raises:
            RequestError: an image that cannot be read, or a size that no bucket covers under
                `oversize: reject`.
        """
        image = mask = around = None
        most = self._limits.max_image_pixels
        if request.image is not None:
            image = images.decode(request.image, field="image", max_pixels=most)
        if request.mask_image is not None:
            mask = images.decode_mask(
                request.mask_image,
                field="mask_image",
                max_pixels=most,
                channel=request.mask_channel,
            )
        height, width = _asked_size(request, image, self._shapes.buckets[0])
        _check_sides(height, width, self._limits)
        plan = self.plan(height, width, has_image=image is not None)
        self._check_positions(plan.painted)
        doubled = self._pipeline.family.guidance == "cfg" and request.guidance_scale > 1
        if alone or self.own_sizes.are_quicker(plan, request.num_images, doubled=doubled):
            plan = geometry.alone(plan)
        if image is not None:
            image = image_processor.fit_to(image, height, width)
        if mask is not None:
            mask = image_processor.fit_to(mask, height, width)
        if image is not None and mask is not None and self._keeps_unmasked:
            around = image_processor.unmasked(image, mask)
        image, mask = (each and image_processor.place(each, plan) for each in (image, mask))
        return Job(
            request,
            plan,
            image,
            mask,
            around,
            doubled=doubled,
            shift=plan.painted.volume if self._pipeline.shifts_by_size else 0,
            deadline=deadline,
            bypass=plan.bypass,
        )

    def _check_positions(self, painted: Bucket) -> None:
        """Buckets have been checked at load; what is painted without one has not."""
        most = self._pipeline.most_side
        for field_name, side in (("height", painted.height), ("width", painted.width)):
            if most is not None and side > most:
                raise RequestError(
                    f"would be {side} pixels; this model has positions for {most}", field_name
                )

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
            # what has no masks has no canvas either
            fit="pad" if shapes.fit == "mask" and not any(shapes.masks) else shapes.fit,
            oversize=shapes.oversize,
            multiple=self._pipeline.multiple,
            has_image=has_image,
        )

    def _own_size(self, height: int, width: int) -> Bucket:
        """The asked size rounded up to what the pipeline can generate; two grid cells a side keep a
        dynamic graph off size 1.
        """
        if self._shapes.strategy == "exact":
            return round_up(Bucket(height, width), self._pipeline.multiple)
        grid = self._pipeline.grid
        return round_up(Bucket(max(height, 2 * grid), max(width, 2 * grid)), grid)


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
