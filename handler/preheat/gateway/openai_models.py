"""`/v1/models`, and which model a request in OpenAI's form is for."""

from __future__ import annotations

import time
from contextlib import suppress
from types import MappingProxyType
from typing import Any

from fastapi import APIRouter

from preheat.errors import RequestError, Unreachable
from preheat.gateway.backend import Backend
from preheat.protocol.fields import Fields
from preheat.protocol.json_text import shown_name

_LONGEST = 100
"""Characters of a name."""
_WHERE = MappingProxyType(
    {
        "pipeline": "paints pictures: ask /v1/images/generations",
        "text": "writes text: ask /v1/chat/completions or /v1/completions",
        "module": "takes tensors: ask /predictions",
    }
)
"""By family, what a model is for."""


def router(backend: Backend) -> APIRouter:
    routes, started = APIRouter(prefix="/v1", tags=["openai"]), int(time.time())

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

    return routes


def asked(fields: Fields) -> tuple[str | None, str | None]:
    """Name and version of the field `model`; None where it does not say.

    Raises:
        RequestError: it is no text, or too long.
    """
    name, _, version = (fields.text("model", _LONGEST) or "").partition("@")
    return name or None, version or None


class Models:
    """The models behind `backend`, by what they are for."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._families: dict[str, str] = {}

    async def find(self, name: str | None, family: str) -> str:
        """The name of the model that a request of this family is for: the one that is named, which
        may be none that there is, or the only one.

        Raises:
            RequestError: there are several and none is named, or it is of another family.
        """
        if name is None:
            names = await self._backend.models()
            if len(names) != 1:
                raise RequestError(f"is missing; it is one of {', '.join(names)}", "model")
            name = names[0]
        if self._families.get(name) != family:
            with suppress(Unreachable):  # then the worker says what it makes of it
                await self._look()
            found = self._families.get(name, family)  # before its workers tell, they must
            if found != family:
                raise RequestError(
                    f"{shown_name(name)} {_WHERE.get(found, 'is of no use')}", "model"
                )
        return name

    async def _look(self) -> None:
        for view in await self._backend.overview():
            told = [worker.family for worker in view.workers if worker.family]
            if told:
                self._families[view.model] = told[0]
