"""A warm server as the end-to-end tests see it."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from PIL import Image

from preheat.torchserve import server
from preheat.torchserve.client import Client

CONFIG = server.ROOT / "model-config" / "tiny-sdxl.yaml"
BUCKETS = [
    tuple(bucket) for bucket in yaml.safe_load(CONFIG.read_text())["pt2"]["shapes"]["buckets"]
]
ENGINE = "openvino"
"""What `backend: auto` takes there."""
CACHE = server.ROOT / ".preheat" / "cache" / "inductor"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For servers of the demo's model, which find each other's graphs in CACHE: with another number of
threads they are others. A tiny model's pictures cost a third more on two. test_aot_archive and
test_modules serve on two.
"""


def blocks(language: str, document: str = "README.md") -> list[str]:
    """A document's fenced blocks of a language: `sh` are run as they stand, of `bash` single
    commands.
    """
    text = (server.ROOT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Served:
    """A warm server with a client for its only model."""

    running: server.TorchServe
    client: Client

    def management(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.running.management}{path}", timeout=60) as answer:
            return json.load(answer)

    def workers(self) -> list[dict[str, Any]]:
        (model,) = self.management(f"/models/{self.client.model}")
        workers: list[dict[str, Any]] = model["workers"]
        return workers

    def worker_pids(self) -> list[int]:
        pids = sorted(worker["pid"] for worker in self.workers())
        assert all(psutil.pid_exists(pid) for pid in pids)
        return pids

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels on the metrics port; 0.0 where none is
        exported.
        """
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line for line in self.exported() if re.match(rf"{name}[{{ ]", line)]
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if all(label in line for label in wanted)
        )

    def exported(self) -> list[str]:
        """What the metrics port says, a line each: samples, and `# TYPE` lines of what has no
        sample yet.
        """
        with urllib.request.urlopen(f"{self.running.metrics}/metrics", timeout=60) as answer:
            return list(answer.read().decode().splitlines())

    def state(self) -> dict[str, Any]:
        (model,) = self.management(f"/models/{self.client.model}?customized=true")
        state: dict[str, Any] = model["customizedMetadata"]["preheat"]
        return state


def opened(body: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(body))
    image.load()
    return image


def streamed(served: Served, request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The events of a request that streams over REST."""
    return events("\n".join(served.client.stream(request)))


def events(text: bytes | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def kinds(told: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in told]


def picture(event: dict[str, Any]) -> bytes:
    return base64.b64decode(event["b64_json"])


def noise(height: int, width: int, mode: str = "RGB") -> str:
    """A picture nobody could have guessed, as base64."""
    pixels = np.random.default_rng(height * width).integers(
        0, 255, (height, width, 3), dtype=np.uint8
    )
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def random_request(rng: random.Random) -> dict[str, Any]:
    """A legal request of any size that a bucket covers: text, image or mask, with and without
    guidance, 1 to 6 steps.
    """
    most_height, most_width = rng.choice(BUCKETS)
    height, width = rng.randint(16, most_height), rng.randint(16, most_width)
    request: dict[str, Any] = {
        "prompt": "word " * rng.randint(0, 120),
        "height": height,
        "width": width,
        "seed": rng.randrange(2**63),
        "num_inference_steps": rng.randint(1, 6),
        "guidance_scale": rng.choice([0.0, 1.0, 3.0, 7.5]),
    }
    if rng.random() < 0.3:
        request["negative_prompt"] = "blurry"
    if rng.random() < 0.4:
        least = 1.0 if request["num_inference_steps"] == 1 else 0.5
        request |= {"image": noise(height, width), "strength": rng.uniform(least, 1.0)}
        if rng.random() < 0.5:
            request["mask_image"] = noise(height, width, "L")
    return request


@contextmanager
def started(
    archives: Sequence[Path], work: Path, *, wait: float = 900, **options: Any
) -> Iterator[server.TorchServe]:
    """A server on ports of its own, READY unless `wait` is 0 seconds, and stopped in the end;
    `options` are `server.start`'s.
    """
    running = server.start(archives, work / "run", ports=server.Ports.free(), **options)
    try:
        if wait:
            running.wait_ready(wait)
        yield running
    finally:
        running.stop()


@contextmanager
def serving(archive: Path, work: Path, *, wait: float = 900, **options: Any) -> Iterator[Served]:
    """`started`, with a client."""
    with started([archive], work, wait=wait, **options) as running, Client.to(running) as client:
        yield Served(running, client)
