"""A host whose pictures can be looked at: stripes of colour that come out of noise, step by step.

For a look at the page without a model: `PYTHONPATH=handler:tests python tests/browser/painter.py`.
"""

from __future__ import annotations

import asyncio
import base64
import colorsys
import io
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from memory_host import MemoryHost
from preheat.gateway.backend import Answer, Call, Health
from preheat.status import Status

STEPS = 20
HEADERS = {"content-type": "application/x-ndjson", "x-preheat-extra": "shown"}


class Painter(MemoryHost):
    """Answers as a worker does; `pause` seconds a step."""

    def __init__(self, pause: float = 0.0, **of_the_view: float) -> None:
        super().__init__(**{"batch_size": 4, **of_the_view})
        self.pause, self.warming = pause, False
        self.asked: list[dict[str, Any]] = []

    @asynccontextmanager
    async def predict(self, call: Call) -> AsyncIterator[Answer]:
        asked = json.loads(call.body)
        self.asked.append(asked)
        if asked["prompt"] == "refuse":
            document = {"code": 400, "type": "InvalidRequest", "message": "prompt is refused"}
            yield Answer(400, {"content-type": "application/json"}, _once(document))
        else:
            yield Answer(200, HEADERS, self._events(asked))

    async def _events(self, asked: dict[str, Any]) -> AsyncIterator[bytes]:
        yield _line({"event": "queued"})
        steps, every = asked.get("num_inference_steps", STEPS), asked["preview_every"]
        seed = asked.get("seed", random.randrange(2**32))
        width, height = asked.get("width", 512), asked.get("height", 512)
        for step in range(1, steps + 1):
            await asyncio.sleep(self.pause)
            event: dict[str, Any] = {"event": "step", "step": step, "of": steps}
            if every and step % every == 0 and step < steps:
                small = picture(seed, width // 8, height // 8, 1 - step / steps)
                event |= {"preview": _base64(small, "jpeg"), "index": 0}
            yield _line(event)
            if asked["prompt"] == "break":
                yield _line({"event": "error", "code": 500, "message": "it raised"})
                return
        facts = {"width": width, "height": height, "bucket": "512x512", "engine": "openvino"}
        more = {"padding": 0.25, "exact": "bitwise", "output_format": "png", "seed": seed}
        done = _base64(picture(seed, width, height, 0.0), "png")
        yield _line({"event": "image", "index": 0, "b64_json": done, **facts, **more})
        yield _line({"event": "done"})

    async def health(self) -> Health:
        (worker, *_) = self.seen.workers
        rows = (("512x512", 4, 4, 9.5), ("768x512", 2, 4, 6.1), ("512x768", 0, 4, 0.0))
        pid = worker.pid or 0
        status = Status(self.seen.model, pid, "warming", 6, 12, rows, "", 0.0)
        missing = (f"{self.seen.model}: warming 6/12",) if self.warming else ()
        return Health(missing, (status,) if self.warming else ())

    def warm(self, on: bool) -> None:
        """Whether its worker is warming up."""
        self.warming = on
        state = "warming 6/12" if on else "READY"
        worker = replace(self.seen.workers[0], state=state)
        self.seen = replace(self.seen, workers=(worker,))


def picture(seed: int, width: int, height: int, noise: float) -> Image.Image:
    """A landscape of hills under a sun, its colours by `seed`; `noise` is 0 (none) to 1."""
    draw = random.Random(seed)
    hue = draw.random()
    y, x = np.mgrid[0 : max(height, 2), 0 : max(width, 2)]
    y, x = y / max(height, 2), x / max(width, 2)
    colour = _colours(hue, y)
    sun = np.hypot(x - draw.uniform(0.3, 0.7), (y - draw.uniform(0.25, 0.4)) * height / width)
    colour += (np.clip(0.13 - sun, 0, 0.02) * 40)[..., None] * np.array([0.5, 0.4, 0.25])
    for layer in range(5):
        top = 0.48 + 0.11 * layer
        for octave in range(1, 4):
            phase, size = draw.uniform(0, 7), 0.05 / octave
            top = top + size * np.sin(x * octave * draw.uniform(4, 9) + phase)
        dark = np.array(colorsys.hsv_to_rgb((hue + 0.55) % 1, 0.55, 0.5 - 0.085 * layer))
        colour = np.where((y > top)[..., None], dark, colour)
    grain = np.random.default_rng(seed).random(colour.shape)
    mixed = np.clip((1 - noise) * colour + noise * grain, 0, 1)
    return Image.fromarray((mixed * 255).astype(np.uint8))


def _colours(hue: float, y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    above, below = (
        np.array(colorsys.hsv_to_rgb(each % 1, amount, value))
        for each, amount, value in ((hue + 0.6, 0.55, 0.62), (hue + 0.05, 0.45, 0.98))
    )
    share = np.clip(y * 1.7, 0, 1)[..., None]
    return np.asarray((1 - share) * above + share * below)


def _base64(image: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def _line(event: dict[str, Any]) -> bytes:
    return json.dumps(event).encode() + b"\n"


async def _once(document: dict[str, Any]) -> AsyncIterator[bytes]:
    yield json.dumps(document).encode()


if __name__ == "__main__":
    import uvicorn

    from preheat.gateway.app import create_app
    from preheat.gateway.queued import Queued

    uvicorn.run(create_app(Queued(Painter(pause=0.1))), port=8123)
