"""A request for pictures with its plan, and what became of it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

from PIL import Image

from preheat.buckets import Bucket
from preheat.compilation.pace import Load
from preheat.models.batching import BaseJob, Outcome
from preheat.models.diffusion.geometry import Plan
from preheat.models.diffusion.pipeline import Row
from preheat.models.diffusion.request import ImageRequest
from preheat.models.diffusion.streaming import Steps
from preheat.protocol.events import EventStream


@dataclass(frozen=True, slots=True)
class Job(BaseJob):
    """A request with its plan; `image` and `mask` are already placed in the bucket."""

    request: ImageRequest
    plan: Plan
    image: Image.Image | None = None
    mask: Image.Image | None = None
    around: Image.Image | None = None
    """What the answer shows outside the mask, as RGBA of the asked size: transparent where it is
    made anew. None where that comes out of the VAE like the rest.
    """
    doubled: bool = False
    """Guidance doubles the denoiser's rows."""
    shift: int = 0
    """Pixels of what is painted, where the scheduler's steps depend on them."""
    events: EventStream | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Tokens that no text encoder reads, by field; only of fields that were cut."""

    @property
    def num_rows(self) -> int:
        return self.request.num_images

    @property
    def asked(self) -> Bucket:
        return Bucket(self.plan.height, self.plan.width)

    @property
    def group_key(self) -> Hashable:
        """What has to be equal for two jobs to share a pipeline call.

        Whether there is a negative prompt counts: SDXL gives "none" zeros and "" the embedding of
        an empty text, per batch.
        """
        return self.plan.bucket, *self.kin

    @property
    def kin(self) -> tuple[Hashable, ...]:
        """The same without the bucket: with masks a row may be seated in a larger one."""
        request = self.request
        strength = request.strength if request.task != "text-to-image" else None
        return (
            self.bypass,
            self.shift,
            request.task,
            request.num_inference_steps,
            request.guidance_scale,
            strength,
            request.negative_prompt is None,
        )

    def on(self, canvas: Bucket) -> Job:
        """The same with masks in another bucket that holds what it paints."""
        if canvas == self.plan.bucket:
            return self
        whole = (0, 0, canvas.width, canvas.height)  # what is beside the picture does not matter
        return replace(
            self,
            plan=replace(self.plan, bucket=canvas),
            image=self.image and self.image.crop(whole),
            mask=self.mask and self.mask.crop(whole),
        )

    @property
    def kind(self) -> str:
        # Not the task: with one picture at a time in the VAE it is no more than a picture's worth.
        guidance = "guidance" if self.request.guidance_scale > 1 else "no guidance"
        return ", ".join([str(self.plan.bucket), guidance, *(["eager"] if self.bypass else [])])

    @property
    def identity(self) -> int:
        # a seed that the client left out is drawn anew
        return hash(replace(self.request, seed=0))

    def load(self, size: int) -> Load:
        rows = size * (2 if self.doubled else 1)
        steps = self.request.num_run_steps
        return Load(self.plan.bucket.volume, rows, size, steps, eager=self.bypass)

    def row(self, index: int) -> Row:
        """One of its pictures: those of `num_images` take consecutive seeds."""
        request = self.request
        seed = (request.seed + index) % 2**63
        return Row(
            request.prompt,
            request.negative_prompt,
            seed,
            self.image,
            self.mask,
            size=self.plan.painted,
        )


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
    def bucket(self) -> str:
        return str(self.job.plan.bucket)

    @property
    def num_flagged(self) -> int:
        return sum(self.flagged)

    @property
    def num_computed(self) -> int:
        """Pixels, of all its pictures."""
        return len(self.pictures) * self.job.plan.num_computed

    @property
    def num_padding(self) -> int:
        """Of those, how many were cut off."""
        return self.num_computed - len(self.pictures) * self.job.plan.height * self.job.plan.width
