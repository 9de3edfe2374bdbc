"""The bare diffusers pipeline in a loop: compiled, batched, cropped and encoded, with nobody asking
over a network.

    python -m bench.bare

What the served pipeline is held against. It is compiled as anybody would do it, one static graph
per bucket and batch size; none of Preheat's routing, planning or padding of rows is on this road,
but the worker's allocator settings are. A process that stays, so that it can be measured between
two loads of the server: the first line it reads is the spec, every other one a question, and each
gets a line of JSON. While it waits it takes no processor.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence

import torch
from diffusers import StableDiffusionXLPipeline

from bench.bare_spec import Spec
from preheat.buckets import Bucket, smallest_covering
from preheat.compilation.targets import build_router
from preheat.config.pt2 import Pt2Config
from preheat.device import DTYPES, keep_freed_memory, pick_device, share_cpu
from preheat.protocol import images

WARM_CALLS = 2


class BareLoop:
    """The pipeline and what its calls have in common."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._buckets = [Bucket(*size) for size in spec.buckets]
        device = pick_device(0 if spec.on_gpu else None)
        if device.type == "cpu":
            share_cpu(1)
            keep_freed_memory()
        pipe = StableDiffusionXLPipeline.from_pretrained(
            spec.model, torch_dtype=DTYPES[spec.dtype], use_safetensors=True, local_files_only=True
        )
        pipe.set_progress_bar_config(disable=True)
        self._pipe = pipe.to(device)
        torch._dynamo.config.recompile_limit = 10 + 2 * len(self._buckets) * len(spec.batch_sizes)
        self._compile(device)

    def _compile(self, device: torch.device) -> None:
        """The denoiser, by torch; `auto` and OpenVINO's models are Preheat's, since torch.compile
        has no such backend. Of `auto` the order alone decides, as nothing is written down.
        """
        backend, unet = self._spec.backend, self._pipe.unet
        if backend not in ("auto", "openvino"):
            self._pipe.unet = torch.compile(unet, backend=backend, dynamic=False)
            return
        config = {"compile": {"enable": True, "kwargs": {"backend": backend}}}
        dtype = DTYPES[self._spec.dtype]
        router = build_router("unet", unet, Pt2Config.model_validate(config), dtype, device)
        router.roads.may_veto = False

    def warm(self) -> None:
        """Compile everything, and meet it once more."""
        for size in self._spec.batch_sizes:
            for bucket in self._buckets:
                for _ in range(WARM_CALLS):
                    self._paint([(bucket.height, bucket.width)] * size, bucket)

    def rate(self, traffic: str, batch_size: int, seconds: float) -> float:
        """Requests per second; a pass over the traffic is always finished."""
        batches = list(full_batches(self._spec.traffics[traffic], self._buckets, batch_size))
        begun, num_done = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            for bucket, batch in batches:
                self._paint(batch, bucket)
                num_done += len(batch)
        return num_done / (time.perf_counter() - begun)

    @torch.inference_mode()
    def _paint(self, sizes: Sequence[tuple[int, int]], bucket: Bucket) -> list[bytes]:
        spec = self._spec
        generated = self._pipe(
            prompt=[spec.prompts[index % len(spec.prompts)] for index in range(len(sizes))],
            height=bucket.height,
            width=bucket.width,
            num_inference_steps=spec.num_steps,
            guidance_scale=spec.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(index) for index in range(len(sizes))],
        ).images
        return [
            images.encode(picture.crop((0, 0, width, height)), "png")
            for picture, (height, width) in zip(generated, sizes, strict=True)
        ]


def full_batches(
    sizes: Iterable[tuple[int, int]], buckets: Sequence[Bucket], batch_size: int
) -> Iterable[tuple[Bucket, list[tuple[int, int]]]]:
    """The requests sorted into batches of one bucket, as no server that must answer in order could:
    what is left over of a bucket fills its last batch with requests it has had before, so that
    every batch is full.
    """
    by_bucket: dict[Bucket, list[tuple[int, int]]] = {}
    for height, width in sizes:
        bucket = smallest_covering(buckets, Bucket(height, width))
        if bucket is None:
            raise ValueError(f"no bucket covers {height}x{width}")
        by_bucket.setdefault(bucket, []).append((height, width))
    for bucket, own in by_bucket.items():
        for start in range(0, len(own), batch_size):
            batch = own[start : start + batch_size]
            yield bucket, [*batch, *[own[0]] * (batch_size - len(batch))]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print is no answer
    loop, begun = BareLoop(Spec(**json.loads(sys.stdin.readline()))), time.perf_counter()
    loop.warm()
    warmed = {
        "warm_seconds": round(time.perf_counter() - begun, 1),
        "num_threads": torch.get_num_threads(),
    }
    print(json.dumps(warmed), file=answers)
    for question in sys.stdin:
        print(json.dumps(loop.rate(**json.loads(question))), file=answers)


if __name__ == "__main__":
    main()
