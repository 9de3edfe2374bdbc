"""`/predictions/{model}`, as every host of ours has it: bytes in, bytes and events out."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from preheat.gateway.backend import Backend, Call
from preheat.gateway.headers import for_host
from preheat.gateway.relay import Relay


def router(backend: Backend) -> APIRouter:
    routes = APIRouter(tags=["predictions"])

    @routes.post("/predictions/{model}")
    @routes.post("/predictions/{model}/{version}")
    async def predict(request: Request, model: str, version: str | None = None) -> Response:
        """A prediction, in the form of docs/requests.md."""
        body = await request.body()
        return Relay(backend, Call(model, version, body, for_host(request.headers)))

    return routes
