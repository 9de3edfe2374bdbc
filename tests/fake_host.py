"""A TorchServe with our handler, as HTTP sees it: what the gateway's tests stand in front of.

It paints nothing, and its model TEXT writes PIECES. Its prompts are orders: "fail 507 OutOfMemory"
answers so, "slow" waits until the test says go or the client leaves, "break" fails half-way,
"vanish" ends there, and "die" too, with TorchServe's word on it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import math
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

MODELS = "tiny", "wide"
BUCKET = "320x192"
STEPS = 6
TEXT = "words"
PIECES = "One", "", " two ", "€"
"""Of every text, one for each token."""


@dataclass
class FakeHost:
    """What it was asked, and how it stands."""

    models: list[str] = field(default_factory=lambda: ["tiny"])
    ready: bool = True
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    token: str | None = None
    """The inference token; None: none is wanted."""
    on_refused_token: Callable[[], None] = lambda: None
    on_renewal: Callable[[str, str | None], None] = lambda kind, key: None
    go: threading.Event = field(default_factory=threading.Event)
    """Lets what is slow go on."""
    begun: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)
    """Somebody left before an answer's end."""

    def app(self) -> FastAPI:
        app = FastAPI(docs_url=None)
        app.post("/predictions/{model}")(self.predict)
        app.post("/predictions/{model}/{version}")(self.predict)
        app.get("/models")(self.list_models)
        app.get("/models/{model}")(self.describe)
        app.get("/token")(self.renew)
        app.get("/metrics")(lambda: Response("ts_inference_requests_total 3.0\n"))
        return app

    async def list_models(self) -> JSONResponse:
        return JSONResponse({"models": [{"modelName": name} for name in self.models]})

    async def describe(self, model: str) -> Response:
        if model not in self.models:
            return _error(404, "ModelNotFoundException", f"Model not found: {model}")
        status = "READY" if self.ready else "UNLOADING"
        worker = {"id": "9000", "status": status, "pid": 0}
        queue = {"pendingRequests": 0, "remainingCapacity": 100}
        described = {"modelName": model, "modelVersion": "1.0", "minWorkers": 1}
        return JSONResponse([{**described, "workers": [worker], "jobQueueStatus": queue}])

    async def renew(self, request: Request) -> Response:
        self.on_renewal(request.query_params["type"], request.headers.get("authorization"))
        return JSONResponse({"status": "renewed"})

    async def predict(self, request: Request, model: str, version: str = "") -> Response:
        body = await request.body()
        self.paths.append(request.url.path)
        self.headers.append(dict(request.headers))
        if self.token is not None and request.headers.get("authorization") != (
            f"Bearer {self.token}"
        ):
            self.on_refused_token()
            return _error(400, "InvalidKeyException", "Token Authorization failed.")
        if model not in self.models or version not in ("", "1.0"):
            return _error(404, "ModelNotFoundException", f"Model not found: {model}")
        asked = json.loads(body)
        self.bodies.append(asked)
        if model == TEXT:
            return self._write(asked)
        prompt = asked.get("prompt")
        if prompt is None:
            return _error(400, "InvalidRequest", "prompt is missing", "prompt")
        if asked.get("num_images", 1) > 4:
            message = "num_images must be a whole number from 1 to 4, got 5"
            return _error(400, "InvalidRequest", message, "num_images")
        if not isinstance(asked.get("stream", False), bool):
            return _error(400, "InvalidRequest", "stream must be true or false", "stream")
        if prompt.startswith("fail "):
            return _failure(prompt)
        if asked.get("stream"):
            headers = {"x-preheat-bucket": BUCKET, "x-request-id": "theirs"}
            parts = self._events(asked)
            return StreamingResponse(parts, media_type="application/x-ndjson", headers=headers)
        if prompt == "slow":
            await self._wait(request)
        return self._picture(asked)

    def _write(self, asked: dict[str, Any]) -> Response:
        prompt = asked["messages"][-1]["content"] if "messages" in asked else asked["prompt"]
        if asked.get("max_new_tokens", 1) > 100:
            return _error(400, "InvalidRequest", "max_new_tokens is too many", "max_new_tokens")
        if asked.get("logprobs", 0) > 20:
            return _error(400, "InvalidRequest", "logprobs is too many", "logprobs")
        if prompt.startswith("fail "):
            return _failure(prompt)
        headers = {"x-preheat-bucket": "prompt=8", "x-preheat-seed": "3", "x-secret": "theirs"}
        parts = self._words(asked, prompt)
        return StreamingResponse(parts, media_type="application/x-ndjson", headers=headers)

    async def _words(self, asked: dict[str, Any], prompt: str) -> AsyncIterator[bytes]:
        ended = False
        try:
            yield _line({"event": "queued"})
            self.begun.set()
            for number, piece in enumerate(PIECES):
                while prompt == "slow" and number and not self.go.is_set():
                    await asyncio.sleep(0.01)
                if number == 2 and prompt in ("break", "vanish", "die"):
                    document = {"code": 507, "type": "OutOfMemory", "message": "no room"}
                    if prompt == "die":
                        yield _line({"code": 500, "type": "Died", "message": "Worker died."})
                    if prompt == "break":
                        yield _line({"event": "error", **document, "field": None})
                    ended = True
                    return
                yield _line({"event": "text", "text": piece, **_token(number, asked)})
            used = {"prompt_tokens": 5, "completion_tokens": len(PIECES)}
            finish = "stop" if "stop" in asked else "length"
            told = {"finish_reason": finish, "seed": 3, "engine": "compiled", "usage": used}
            yield _line({"event": "done", **told})
            ended = True
        finally:
            if not ended:
                self.left.set()

    async def _wait(self, request: Request) -> None:
        self.begun.set()
        while not self.go.is_set():
            if await request.is_disconnected():
                self.left.set()
                return
            await asyncio.sleep(0.01)

    def _picture(self, asked: dict[str, Any]) -> Response:
        headers = {
            "x-preheat-bucket": BUCKET,
            "x-preheat-seed": str(asked.get("seed", 7)),
            "x-secret": "theirs",
        }
        if asked.get("response_format") == "b64_json":
            return JSONResponse(_document(asked), headers=headers)
        return Response(png(asked), media_type="image/png", headers=headers)

    async def _events(self, asked: dict[str, Any]) -> AsyncIterator[bytes]:
        ended = False
        try:
            yield _line({"event": "queued"})
            self.begun.set()
            if asked["prompt"] == "slow":
                while not self.go.is_set():
                    await asyncio.sleep(0.01)
            for step in range(1, STEPS + 1):
                event: dict[str, Any] = {"event": "step", "step": step, "of": STEPS}
                num = asked.get("num_previews", 0)
                if step < STEPS and step * (num + 1) // STEPS > (step - 1) * (num + 1) // STEPS:
                    event |= {"preview": base64.b64encode(b"jpeg%d" % step).decode(), "index": 0}
                yield _line(event)
                if asked["prompt"] == "break" and step == 3:
                    document = {"code": 500, "type": "PipelineFailure", "message": "it raised"}
                    yield _line({"event": "error", **document, "field": None})
                    ended = True
                    return
            told = _document(asked)
            for index, picture in enumerate(told.pop("data")):
                yield _line({"event": "image", "index": index, **picture, **told})
            yield _line({"event": "done"})
            ended = True
        finally:
            if not ended:
                self.left.set()


def png(asked: dict[str, Any]) -> bytes:
    """The picture that a request gets: grey by its seed, of the size asked."""
    size = asked.get("width") or 192, asked.get("height") or 320
    file = io.BytesIO()
    Image.new("L", size, asked.get("seed", 7) % 256).save(file, "png")
    return file.getvalue()


def _token(number: int, asked: dict[str, Any]) -> dict[str, Any]:
    """Of each piece; the second one's is part of a character, and another that looks like it is as
    probable as nothing.
    """
    if "logprobs" not in asked:
        return {}
    text = PIECES[number] or "\ufffd"
    said = {"token": number, "token_text": text, "logprob": -0.5}
    others = [said, {"token": 9, "token_text": text, "logprob": -math.inf}]
    return {**said, "top_logprobs": others[: asked["logprobs"]]}


def _failure(prompt: str) -> Response:
    _, code, kind, *_ = prompt.split()
    again = {"retry-after": "0"} if kind == "PutOff" else {}
    return _error(int(code), kind, "as asked", headers=again)


def _document(asked: dict[str, Any]) -> dict[str, Any]:
    seed = asked.get("seed", 7)
    pictures = [
        {"b64_json": base64.b64encode(png({**asked, "seed": seed + i})).decode(), "seed": seed + i}
        for i in range(asked.get("num_images", 1))
    ]
    size = {"width": asked.get("width") or 192, "height": asked.get("height") or 320}
    facts = {"bucket": [320, 192], "engine": "compiled", "padding": 0.1, "exact": "rounding"}
    output_format = asked.get("output_format") or "png"
    return {"data": pictures, **size, **facts, "output_format": output_format}


def _line(event: dict[str, Any]) -> bytes:
    return json.dumps(event).encode() + b"\n"


def _error(
    code: int,
    kind: str,
    message: str,
    field: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    document = {"code": code, "type": kind, "message": message, "field": field}
    return JSONResponse(document, code, headers)


@contextmanager
def listening(app: FastAPI, **options: Any) -> Iterator[str]:
    """The URL of `app`, served from a thread; it is ended with whatever is under way."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            cast(Any, app), log_level="error", timeout_graceful_shutdown=1, **options
        )
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, args=([listener],), daemon=True)
        thread.start()
        deadline = time.monotonic() + 30
        while not running.started and time.monotonic() < deadline:
            time.sleep(0.005)
        assert running.started
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join(10)
            with contextlib.suppress(OSError):
                listener.close()
