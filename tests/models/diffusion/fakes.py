"""What stands in for a diffusers pipeline behind the real runner: no model, no compiling."""

from __future__ import annotations

from collections.abc import Mapping

from preheat.config.diffusion import LimitsConfig, PipelineConfig, Task
from preheat.config.model import ModelConfig
from preheat.config.pt2 import Pt2Config, ShapesConfig
from preheat.models.diffusion.pipeline import FAMILIES
from preheat.models.diffusion.prompts import Reader
from preheat.models.diffusion.request import ImageRequest


class FakePipeline:
    """All that the runner asks of a pipeline but `generate`."""

    family = FAMILIES["StableDiffusionXLPipeline"]
    multiple, grid, order = 8, 16, 1
    most_side: int | None = None
    shifts_by_size = False
    mask_error: Mapping[str, float | str] = {}
    tasks: tuple[Task, ...] = ("text-to-image", "image-to-image", "inpainting")
    guidance_variants: tuple[bool, ...] = (True, False)
    prompts = Reader(())

    def num_calls(self, request: ImageRequest) -> int:
        return request.num_run_steps


def config(
    shapes: ShapesConfig, most: int, min_side: int = 16, *, keep_unmasked: bool = False
) -> ModelConfig:
    """That of a pipeline whose batches have at most so many requests."""
    own = PipelineConfig(limits=LimitsConfig(min_side=min_side), keep_unmasked=keep_unmasked)
    return ModelConfig(batchSize=most, pt2=Pt2Config(shapes=shapes), pipeline=own)
