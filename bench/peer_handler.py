"""TorchServe's own BaseHandler around a diffusers pipeline: what one writes without Preheat. It
runs inside TorchServe's worker, from an archive's folder.

BaseHandler compiles the denoiser by `pt2.compile` itself; the rest is as TorchServe's own diffusion
example has it (pytorch/serve, examples/large_models/diffusion_fast), but for the answer, which is a
PNG as all peers': theirs is a JSON list of pixels, fifteen times as long.
"""

from __future__ import annotations

import io
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from ts.torch_handler.base_handler import BaseHandler


class DiffusionHandler(BaseHandler):  # type: ignore[misc]  # ts has no types
    """One request at a time; the YAML's `handler` names the model's folder and dtype."""

    def initialize(self, context: Any) -> None:
        """Load the pipeline; the denoiser is what BaseHandler takes for its model."""
        super().initialize(context)
        self._pipe.unet = self.model

    def _load_pickled_model(self, *_: Any) -> Any:
        """What BaseHandler loads its model by: here the pipeline's denoiser."""
        settings = self.model_yaml_config["handler"]
        self._pipe = StableDiffusionXLPipeline.from_pretrained(
            settings["model_path"],
            torch_dtype=getattr(torch, settings["dtype"]),
            use_safetensors=True,
            local_files_only=True,
        ).to(self.device)
        self._pipe.set_progress_bar_config(disable=True)
        return self._pipe.unet

    def preprocess(self, data: Any) -> dict[str, Any]:
        (row,) = data
        asked: dict[str, Any] = row["body"]
        return asked

    def inference(self, data: dict[str, Any]) -> Any:
        """The pictures of one request."""
        asked = dict(data)
        generator = torch.Generator("cpu").manual_seed(asked.pop("seed"))
        with torch.inference_mode():
            return self._pipe(**asked, generator=generator).images

    def postprocess(self, data: Any) -> list[bytes]:
        answers = []
        for picture in data:
            encoded = io.BytesIO()
            picture.save(encoded, "png")
            answers.append(encoded.getvalue())
        return answers
