"""A backend in this process, as the gateway sees one: what queue, keys and page are tried on.

It paints nothing. Who waits for `go` is told apart by the prompt.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from preheat.gateway.backend import Answer, Call, Health
from preheat.torchserve.overview import BucketView, ModelView, WorkerView

BUCKETS = ("512x512", "768x512", "512x768")
DEFAULTS = {
    "height": 512,
    "width": 512,
    "num_inference_steps": 4,
    "guidance_scale": 5.0,
    "strength": 0.6,
    "fit": "pad",
    "oversize": "reject",
}


def view(*, workers: int = 1, batch_size: int = 1, settle: float = 0.0) -> ModelView:
    rows = tuple(
        BucketView(bucket, rows, target, "openvino", "", 0.02 * rows)
        for bucket in BUCKETS
        for rows in (1, batch_size)
        for target in ("unet", "vae.decoder")
    )
    worker = WorkerView("9000", 4711, "READY", 61.0, 128, 0, 0, 0, {}, DEFAULTS, rows)
    return ModelView(
        "tiny", "1.0", "0.1.0", workers, workers, 0, batch_size, settle, 0, "", (worker,) * workers
    )


class MemoryHost:
    """A `Backend` with one model."""

    def __init__(self, **of_the_view: float) -> None:
        self.seen = view(**of_the_view)  # type: ignore[arg-type]
        self.inside: list[str] = []
        """Prompts that have come in."""
        self.left: list[str] = []
        """Those whose call was taken back."""
        self.go = asyncio.Event()
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def predict(self, call: Call) -> AsyncIterator[Answer]:
        prompt = json.loads(call.body)["prompt"]
        async with self._changed:
            self.inside.append(prompt)
            self._changed.notify_all()
        try:
            if not prompt.startswith("now"):
                await self.go.wait()
            headers = {"x-preheat-bucket": "512x512", "x-preheat-engine": "openvino"}
            yield Answer(200, {"content-type": "image/png", **headers}, _once(b"picture"))
        except (asyncio.CancelledError, GeneratorExit):
            self.left.append(prompt)
            raise

    async def until(self, *prompts: str) -> None:
        async with self._changed:
            await asyncio.wait_for(
                self._changed.wait_for(lambda: sorted(self.inside) == sorted(prompts)), timeout=20
            )

    async def models(self) -> list[str]:
        return [self.seen.model]

    async def overview(self) -> list[ModelView]:
        return [self.seen]

    async def health(self) -> Health:
        return Health((), ())

    async def metrics(self) -> bytes:
        return b""

    async def close(self) -> None: ...


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body
