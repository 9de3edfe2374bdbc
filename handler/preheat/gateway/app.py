"""The gateway as an ASGI app: its routers, put together."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException

import preheat
from preheat.errors import RequestError, RunError
from preheat.gateway import (
    errors,
    health,
    metrics,
    openai_images,
    openai_models,
    openai_texts,
    page,
    predictions,
)
from preheat.gateway.backend import Backend
from preheat.gateway.bodies import MAX_BYTES, BodyLimit
from preheat.gateway.door import Door
from preheat.gateway.keys import Keys
from preheat.gateway.metrics import Measured, Waits


def create_app(
    backend: Backend,
    *,
    max_body_bytes: int = MAX_BYTES,
    keys: Keys | None = None,
    access: logging.Logger | None = None,
    local: bool = False,
) -> FastAPI:
    """The app in front of `backend`, which it closes in the end.

    Args:
        keys: who may ask; None: everybody.
        access: gets a line for each request.
        local: it listens for this machine alone.
    """
    waits = Waits()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await backend.close()

    app = FastAPI(
        title="Preheat",
        version=preheat.__version__,
        lifespan=lifespan,
        docs_url=None,  # they load scripts from other hosts
        redoc_url=None,
    )
    for kind in (RequestError, RunError, HTTPException):
        app.add_exception_handler(kind, errors.refused)
    app.include_router(predictions.router(backend))
    models = openai_models.Models(backend)
    app.include_router(openai_models.router(backend))
    app.include_router(openai_images.router(backend, models))
    app.include_router(openai_texts.router(backend, models))
    app.include_router(health.router(backend))
    app.include_router(page.router(backend))
    app.include_router(metrics.router(backend, waits))
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    app.add_middleware(Measured, waits=waits)
    app.add_middleware(Door, keys=keys, access=access, local=local)  # the last is the outermost
    return app
