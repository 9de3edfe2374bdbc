"""What diffusers alone paints for the bench's requests, eagerly and in float32: what every
strategy's pictures are held against.

    python -m bench.reference < spec.json > result.json

Also told: which share of such a request the denoiser has, which is all that compiling it can make
faster.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.plain_diffusers import Plain
from preheat.device import pick_device, share_cpu

CELL = 8
"""Pixels: the least that sizes are rounded up to, by diffusers and by Preheat alike."""


class DenoiserClock:
    """Seconds inside a module, from its hooks on."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        self.seconds, self._begun, self._device = 0.0, 0.0, device
        module.register_forward_pre_hook(lambda *_: self._begin())
        module.register_forward_hook(lambda *_: self._end())

    def _begin(self) -> None:
        self._begun = now(self._device)

    def _end(self) -> None:
        self.seconds += now(self._device) - self._begun


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def painted(spec: Mapping[str, Any]) -> dict[str, float]:
    """Paint `requests` with the pipeline in `model`; number i becomes `folder`/i.npy, (height,
    width, 3) of uint8.
    """
    device = pick_device(0 if spec["on_gpu"] else None)
    if device.type == "cpu":
        share_cpu(1)
    plain = Plain(Path(spec["model"]), CELL, device=device)
    clock, total = DenoiserClock(plain.denoiser, device), 0.0
    plain.picture(spec["requests"][0])  # the first call of a process is no measure
    clock.seconds = 0.0
    for index, request in enumerate(spec["requests"]):
        begun = now(device)
        picture = plain.picture(request)
        total += now(device) - begun
        np.save(Path(spec["folder"], f"{index}.npy"), picture.astype(np.uint8))
    return {"denoiser_share": round(clock.seconds / total, 3)}


def main() -> None:
    result = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer
    json.dump(painted(json.load(sys.stdin)), result)
    result.close()


if __name__ == "__main__":
    main()
