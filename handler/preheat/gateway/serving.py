"""The gateway as a process."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import uvicorn
from fastapi import FastAPI

from preheat.errors import GatewayError
from preheat.gateway.app import create_app
from preheat.gateway.connections import Patience, protocol
from preheat.gateway.door import is_loopback
from preheat.gateway.keys import Keys
from preheat.gateway.queued import Queued
from preheat.gateway.record import access_log
from preheat.gateway.torchserve import Places, TorchServeBackend

FILES = 8192
"""Descriptors: two for each of the connections that `Patience.total` allows, and some."""
GRACE = 120
"""Seconds that answers under way have, once it is told to end."""


def configured(
    app: FastAPI, host: str, port: int, patience: Patience | None = None
) -> uvicorn.Config:
    return uvicorn.Config(
        cast(Any, app),  # Starlette's types of an ASGI app are wider than uvicorn's
        host,
        port,
        http=protocol(patience or Patience()),
        ws="none",  # an upgrade would leave our protocol, and its timers
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Admits:
    """Whom the gateway serves, and how many at a time."""

    keys: Path | None = None
    """The file of API keys; None: whoever reaches it may ask."""
    is_open: bool = False
    """Without keys it may listen for other machines too."""
    access_log: Path | None = None
    max_queued: int = 100
    max_queued_per_key: int = 100


def run(places: Places, host: str, port: int, admits: Admits) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        GatewayError: it would be open to others without keys, or the keys cannot be read.
    """
    is_local = is_loopback(host)
    if admits.keys is None and not is_local and not admits.is_open:
        raise GatewayError(
            f"on {host} others reach it: give it --keys (preheat key makes one), or --open if "
            "whoever reaches it may paint"
        )
    backend = Queued(
        TorchServeBackend(places),
        max_queued=admits.max_queued,
        max_queued_per_key=admits.max_queued_per_key,
    )
    app = create_app(
        backend,
        keys=Keys(admits.keys) if admits.keys is not None else None,
        access=access_log(admits.access_log) if admits.access_log is not None else None,
        local=is_local,
    )
    allow_files(FILES)
    uvicorn.Server(configured(app, host, port)).run()


def allow_files(number: int) -> None:
    """Raise this process's limit of open files, often 1024, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
