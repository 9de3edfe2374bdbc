"""The gateway as a process."""

from __future__ import annotations

from typing import Any, cast

import uvicorn
from fastapi import FastAPI

from preheat.gateway.app import create_app
from preheat.gateway.torchserve import Places, TorchServeBackend

GRACE = 120
"""Seconds that answers under way have, once it is told to end."""


def configured(app: FastAPI, host: str, port: int) -> uvicorn.Config:
    return uvicorn.Config(
        cast(Any, app),  # Starlette's types of an ASGI app are wider than uvicorn's
        host,
        port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE,
    )


def run(places: Places, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT."""
    app = create_app(TorchServeBackend(places))
    uvicorn.Server(configured(app, host, port)).run()
