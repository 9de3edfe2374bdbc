"""OpenAI's images API: `/v1/images/generations`, `/edits` and `/variations`."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from preheat.errors import RequestError
from preheat.gateway import openai_requests
from preheat.gateway.backend import Backend, Call
from preheat.gateway.contents import check_charset
from preheat.gateway.headers import for_host
from preheat.gateway.openai_answers import Events, pictures
from preheat.gateway.openai_models import Models
from preheat.gateway.openai_requests import Kind, Wanted
from preheat.gateway.relay import Relay


def router(backend: Backend, models: Models) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["openai"])

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

    async def form(request: Request) -> dict[str, object]:
        content_type = request.headers.get("content-type", "")
        if not content_type.startswith("multipart/form-data"):
            raise RequestError("must be multipart/form-data", "body")
        check_charset(content_type)
        async with request.form() as sent:
            return await openai_requests.from_form(sent)

    async def answered(request: Request, kind: Kind, values: dict[str, object]) -> Response:
        wanted = openai_requests.wanted(kind, values)
        name = await models.find(wanted.model, "pipeline")
        headers = {**for_host(request.headers), "content-type": "application/json"}
        call = Call(name, wanted.version, wanted.body, headers)
        return Relay(backend, call, _events(kind, wanted) if wanted.stream else pictures)

    return routes


def _events(kind: Kind, wanted: Wanted) -> Events:
    return Events("image_generation" if kind == "generations" else "image_edit", wanted.size)
