"""OpenAI's `/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from preheat.gateway import openai_requests, openai_text_requests
from preheat.gateway.backend import Backend, Call
from preheat.gateway.headers import for_host
from preheat.gateway.openai_models import Models
from preheat.gateway.openai_text_answers import Texts
from preheat.gateway.openai_text_requests import Kind
from preheat.gateway.relay import Relay


def router(backend: Backend, models: Models) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["openai"])

    @routes.post("/completions")
    async def completions(request: Request) -> Response:
        """How a text goes on."""
        return await answered(request, "completions")

    @routes.post("/chat/completions")
    async def chat(request: Request) -> Response:
        """The next message of a conversation."""
        return await answered(request, "chat")

    async def answered(request: Request, kind: Kind) -> Response:
        values = openai_requests.from_json(await request.body())
        wanted = openai_text_requests.wanted(kind, values)
        name = await models.find(wanted.model, "text")
        headers = {**for_host(request.headers), "content-type": "application/json"}
        call = Call(name, wanted.version, wanted.body, headers)
        asked = name if wanted.version is None else f"{name}@{wanted.version}"
        return Relay(backend, call, Texts(wanted, asked))

    return routes
