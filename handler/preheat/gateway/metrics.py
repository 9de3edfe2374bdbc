"""`/metrics`: what the host says, and how long the gateway's clients wait, in buckets wide enough
for pictures.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from fastapi import APIRouter
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from preheat.errors import Unreachable
from preheat.gateway.backend import Backend

BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)
"""Seconds."""
MAX_BUCKETS = 64
"""Label values; under `oversize: eager` a client names its own size, and gets "other"."""
_BUCKET = b"x-preheat-bucket"
_TEXT = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(slots=True)
class Waits:
    """How long answers took, from the request's first byte to the answer's last."""

    answers: Counter[int] = field(default_factory=Counter)
    """By status."""
    _counts: dict[str, list[int]] = field(default_factory=dict)
    """By bucket: one number for each of BOUNDS, and one for all above."""
    _seconds: dict[str, float] = field(default_factory=dict)

    def took(self, bucket: str, seconds: float) -> None:
        if bucket not in self._counts and len(self._counts) >= MAX_BUCKETS:
            bucket = "other"
        counts = self._counts.setdefault(bucket, [0] * (len(BOUNDS) + 1))
        counts[bisect_left(BOUNDS, seconds)] += 1
        self._seconds[bucket] = self._seconds.get(bucket, 0.0) + seconds

    def lines(self) -> Iterator[str]:
        name = "preheat_gateway_answers_total"
        yield f"# HELP {name} Answers of the gateway."
        yield f"# TYPE {name} counter"
        for status, number in sorted(self.answers.items()):
            yield f'{name}{{Code="{status}"}} {number}'
        name = "preheat_gateway_seconds"
        yield f"# HELP {name} Seconds from a request's arrival at the gateway to its answer's end."
        yield f"# TYPE {name} histogram"
        for bucket, counts in self._counts.items():
            total = 0
            for bound, count in zip((*map(str, BOUNDS), "+Inf"), counts, strict=True):
                total += count
                yield f'{name}_bucket{{Bucket="{bucket}",le="{bound}"}} {total}'
            yield f'{name}_sum{{Bucket="{bucket}"}} {self._seconds[bucket]:.6f}'
            yield f'{name}_count{{Bucket="{bucket}"}} {total}'


class Measured:
    """An ASGI middleware that counts answers, and times those that name the bucket that they were
    painted in.
    """

    def __init__(self, app: ASGIApp, waits: Waits) -> None:
        self._app, self._waits = app, waits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, bucket, is_begun = time.perf_counter(), "", False

        async def watched(message: Message) -> None:
            nonlocal bucket, is_begun
            if message["type"] == "http.response.start":
                is_begun = True
                self._waits.answers[message["status"]] += 1
                bucket = dict(message["headers"]).get(_BUCKET, b"").decode("latin-1")
            await send(message)
            if bucket and message["type"] == "http.response.body" and not message.get("more_body"):
                self._waits.took(bucket, time.perf_counter() - begun)

        try:
            await self._app(scope, receive, watched)
        except Exception:  # a fault of ours: the server answers it, outside of all middlewares
            if not is_begun:
                self._waits.answers[500] += 1
            raise


def router(backend: Backend, waits: Waits) -> APIRouter:
    routes = APIRouter(tags=["metrics"])

    @routes.get("/metrics")
    async def metrics() -> Response:
        """The host's, if it answers, and the gateway's own."""
        try:
            theirs, is_up = await backend.metrics(), 1
        except Unreachable:
            theirs, is_up = b"", 0
        name = "preheat_gateway_host_up"
        own = [
            f"# HELP {name} 1 if the host behind answers.",
            f"# TYPE {name} gauge",
        ]
        own += [f"{name} {is_up}", *waits.lines()]
        return Response(theirs + ("\n".join(own) + "\n").encode(), media_type=_TEXT)

    return routes
