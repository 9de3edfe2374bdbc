"""The peer of `make setup-peers`: OpenVINO GenAI's Text2ImagePipeline in a loop.

    .venv-peers/bin/python -m bench.peer_genai < lines > lines

It paints from what optimum-intel has converted. `genai` is one pipeline for all sizes, as its
examples have it; `genai-static` one for each size, reshaped to it, which compiles to faster code
and holds the weights once more for each. Noise is torch's, so that the pictures can be compared.
"""

from __future__ import annotations

import io
from importlib.metadata import version

import openvino_genai
from PIL import Image

from bench.peer_loop import Paint, Request, Spec, serve

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
PACKAGES = ("openvino-genai", "openvino", "optimum-intel", "transformers", "diffusers", "torch")


def load(spec: Spec) -> Paint:
    """One pipeline for all sizes, or one for each."""
    properties = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[spec.dtype],
        "INFERENCE_NUM_THREADS": spec.num_threads,
    }
    if spec.kind == "genai-static":
        pipes = {}
        for height, width in spec.sizes:
            pipes[height, width] = pipe = openvino_genai.Text2ImagePipeline(spec.model)
            pipe.reshape(1, height, width, spec.guidance_scale)
            pipe.compile("CPU", **properties)
    else:
        pipe = openvino_genai.Text2ImagePipeline(spec.model, "CPU", **properties)
        pipes = {(height, width): pipe for height, width in spec.sizes}

    def paint(request: Request) -> bytes:
        asked = dict(request)
        generator = openvino_genai.TorchGenerator(asked.pop("seed"))
        pipe = pipes[asked["height"], asked["width"]]
        pixels = pipe.generate(asked.pop("prompt"), **asked, generator=generator).data[0]
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "png")
        return encoded.getvalue()

    return paint


if __name__ == "__main__":
    serve(load, lambda: {name: version(name) for name in PACKAGES})
