"""OpenAI's images API: `/v1/images/generations`, `/edits` and `/variations`, and `/v1/models`."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from preheat.errors import RequestError
from preheat.gateway import openai_requests
from preheat.gateway.backend import Backend, Call
from preheat.gateway.contents import check_charset
from preheat.gateway.headers import for_host
from preheat.gateway.openai_answers import Events, pictures
from preheat.gateway.openai_requests import Kind, Wanted
from preheat.gateway.relay import Relay
from preheat.protocol.json_text import shown_name


def router(backend: Backend) -> APIRouter:
    routes, started = APIRouter(prefix="/v1", tags=["openai"]), int(time.time())

    @routes.post("/images/generations")
    async def generations(request: Request) -> Response:
        """Pictures of a prompt."""
        values = openai_requests.from_json(await request.body())
        return await answered(request, "generations", values)

    @routes.post("/images/edits")
    async def edits(request: Request) -> Response:
        """A picture painted anew: where the mask is transparent, or all over."""
        return await answered(request, "edits", await form(request))

    @routes.post("/images/variations")
    async def variations(request: Request) -> Response:
        """A picture painted anew, without a prompt."""
        return await answered(request, "variations", {"prompt": "", **await form(request)})

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        names = await backend.models()
        return {"object": "list", "data": [model(name) for name in names]}

    @routes.get("/models/{name}")
    async def retrieve(name: str) -> dict[str, Any]:
        for view in await backend.overview():
            if name in (view.model, f"{view.model}@{view.version}"):
                return model(name)
        raise RequestError(f"{shown_name(name)} is not here", "model", 404)

    def model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "preheat"}

    async def form(request: Request) -> dict[str, object]:
        content_type = request.headers.get("content-type", "")
        if not content_type.startswith("multipart/form-data"):
            raise RequestError("must be multipart/form-data", "body")
        check_charset(content_type)
        async with request.form() as sent:
            return await openai_requests.from_form(sent)

    async def answered(request: Request, kind: Kind, values: dict[str, object]) -> Response:
        wanted = openai_requests.wanted(kind, values)
        name = wanted.model or await only_model()
        headers = {**for_host(request.headers), "content-type": "application/json"}
        call = Call(name, wanted.version, wanted.body, headers)
        return Relay(backend, call, _events(kind, wanted) if wanted.stream else pictures)

    async def only_model() -> str:
        names = await backend.models()
        if len(names) != 1:
            raise RequestError(f"is missing; it is one of {', '.join(names)}", "model")
        return names[0]

    return routes


def _events(kind: Kind, wanted: Wanted) -> Events:
    return Events("image_generation" if kind == "generations" else "image_edit", wanted.size)
