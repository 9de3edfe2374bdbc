"""Peers of this environment: diffusers alone in a loop, eager or with plain `torch.compile`.

    python -m bench.peer_diffusers < lines > lines

As anybody would write it: no buckets, no static shapes, no settings of Preheat's.
"""

from __future__ import annotations

import io
from importlib.metadata import version

import torch
from diffusers import StableDiffusionXLPipeline

from bench.peer_loop import Paint, Request, Spec, serve
from preheat.device import DTYPES


def load(spec: Spec) -> Paint:
    """The pipeline of `spec.model`; its denoiser compiled where the kind is `compiled`."""
    torch.set_num_threads(spec.num_threads)
    pipe = StableDiffusionXLPipeline.from_pretrained(
        spec.model, torch_dtype=DTYPES[spec.dtype], use_safetensors=True, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.to("cuda" if spec.on_gpu else "cpu")
    if spec.kind == "compiled":
        pipe.unet = torch.compile(pipe.unet)

    def paint(request: Request) -> bytes:
        asked = dict(request)
        generator = torch.Generator("cpu").manual_seed(asked.pop("seed"))
        with torch.inference_mode():
            (picture,) = pipe(**asked, generator=generator).images
        encoded = io.BytesIO()
        picture.save(encoded, "png")
        return encoded.getvalue()

    return paint


if __name__ == "__main__":
    serve(load, lambda: {name: version(name) for name in ("torch", "diffusers")})
