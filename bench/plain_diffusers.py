"""What diffusers alone paints for a request, at the size that a masked picture has."""

from __future__ import annotations

import base64
import inspect
import io
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
)
from numpy.typing import NDArray
from PIL import Image
from torch import nn

MAKERS: Mapping[str, Any] = {
    "text-to-image": lambda pipe: pipe,
    "image-to-image": AutoPipelineForImage2Image.from_pipe,
    "inpainting": AutoPipelineForInpainting.from_pipe,
}


class Plain:
    """diffusers' pipelines of a folder, untouched.

    Args:
        grid: pixels to which sizes are rounded up.
        scheduler: its class, where it is not the folder's own.
        device: where it runs; noise is drawn on the CPU all the same.
        config: of the scheduler, where it is not as it stands there.
    """

    def __init__(
        self,
        folder: Path,
        grid: int,
        scheduler: Any = None,
        *,
        device: torch.device | None = None,
        **config: Any,
    ) -> None:
        self._grid = grid
        pipe = AutoPipelineForText2Image.from_pretrained(folder, use_safetensors=True)
        pipe.to(device or torch.device("cpu"), torch.float32)
        kind = scheduler or type(pipe.scheduler)
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **config)
        self._step = pipe.scheduler.step
        self._pipe = cache(lambda task: MAKERS[task](pipe))

    @property
    def denoiser(self) -> nn.Module:
        """The pipelines' own."""
        pipe = self._pipe("text-to-image")
        module: nn.Module = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        return module

    def painted(self, request: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width of what is painted for a request."""
        sides = (request["height"], request["width"])
        height, width = (-(-side // self._grid) * self._grid for side in sides)
        return height, width

    def picture(self, request: Mapping[str, Any]) -> NDArray[np.int64]:
        """(height, width, 3), 0 to 255: what is asked for, cut from what is painted. An image is as
        large as the request.
        """
        asked, (height, width) = dict(request), self.painted(request)
        tall, wide = asked.pop("height"), asked.pop("width")
        own: dict[str, Any] = {"generator": torch.Generator().manual_seed(asked.pop("seed"))}
        margins = ((0, height - tall), (0, width - wide), (0, 0))
        for name in {"image", "mask_image"} & asked.keys():
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(asked.pop(name)))))
            own[name] = Image.fromarray(np.pad(pixels, margins[: pixels.ndim], mode="edge"))
        task = "text-to-image"
        if "image" in own:
            task = "inpainting" if "mask_image" in own else "image-to-image"
        pipe = self._pipe(task)
        pipe.set_progress_bar_config(disable=True)
        takes = "generator" in inspect.signature(self._step).parameters
        if takes and not hasattr(pipe, "unet"):  # then diffusers itself hands the step none
            pipe.scheduler.step = partial(self._step, generator=own["generator"])
        if "height" in inspect.signature(type(pipe).__call__).parameters:
            own |= {"height": height, "width": width}
        top, left = (0, 0) if "image" in own else ((height - tall) // 2, (width - wide) // 2)
        with torch.inference_mode():
            (image,) = pipe(**asked, **own, output_type="np").images
        whole = (image * 255).round().astype(np.int64)
        cut: NDArray[np.int64] = whole[top : top + tall, left : left + wide]
        return cut
