"""Whether the models are warm, for whoever can only read a status code; and the Open Inference
Protocol's paths for it, which KServe asks.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse

import preheat
from preheat.errors import RequestError
from preheat.gateway.backend import Backend, Health
from preheat.protocol.json_text import shown_name
from preheat.status import Status
from preheat.torchserve.overview import ModelView


def router(backend: Backend) -> APIRouter:
    routes = APIRouter(tags=["health"])

    @routes.get("/health/live")
    @routes.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        """200 while the gateway runs."""
        return {"live": True}

    @routes.get("/health")
    @routes.get("/health/ready")
    async def ready() -> JSONResponse:
        """200 when every worker is warm, 503 with what is missing."""
        health = await backend.health()
        return JSONResponse(_verdict(health), _status(health))

    @routes.get("/warmup")
    async def warmup() -> JSONResponse:
        """How far each worker is, bucket by bucket; 200 when all are warm."""
        health = await backend.health()
        workers = [_progress(worker) for worker in health.workers]
        return JSONResponse({**_verdict(health), "workers": workers}, _status(health))

    @routes.get("/v2")
    async def server() -> dict[str, Any]:
        return {"name": "preheat", "version": preheat.__version__, "extensions": []}

    @routes.get("/v2/health/ready")
    async def server_ready() -> JSONResponse:
        health = await backend.health()
        document = {"ready": True} if health.ready else {"error": "; ".join(health.missing)}
        return JSONResponse(document, _status(health))

    @routes.get("/v2/models/{model}")
    async def model_metadata(model: str) -> dict[str, Any]:
        view = await _view(backend, model)
        # shapes differ from request to request: docs/requests.md says what goes in and out
        described = {"platform": "preheat", "inputs": [], "outputs": []}
        return {"name": view.model, "versions": [view.version], **described}

    @routes.get("/v2/models/{model}/ready")
    async def model_ready(model: str) -> JSONResponse:
        view = await _view(backend, model)
        if view.ready >= view.wanted:
            return JSONResponse({"name": view.model, "ready": True})
        missing = f"{view.model}: {view.ready} of {view.wanted} workers READY"
        return JSONResponse({"error": missing}, 503)

    return routes


async def _view(backend: Backend, model: str) -> ModelView:
    for view in await backend.overview():
        if view.model == model:
            return view
    raise RequestError(f"{shown_name(model)} is not here", "model", 404)


def _status(health: Health) -> int:
    return 200 if health.ready else 503


def _verdict(health: Health) -> dict[str, Any]:
    return {"ready": health.ready, "missing": list(health.missing)}


def _progress(worker: Status) -> dict[str, Any]:
    names = ("bucket", "done", "total", "seconds")
    return {
        "model": worker.model,
        "pid": worker.pid,
        "state": worker.state,
        "done": worker.done,
        "total": worker.total,
        "message": worker.message,
        "buckets": [dict(zip(names, bucket, strict=True)) for bucket in worker.buckets],
    }
