"""The page at `/`, one file without anything from elsewhere, and what it shows of the workers."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

from preheat.gateway.backend import Backend, Health
from preheat.status import Status
from preheat.torchserve.overview import ModelView


def router(backend: Backend) -> APIRouter:
    routes = APIRouter(tags=["page"])
    page, headers = _page()

    @routes.get("/")
    async def index() -> Response:
        """A page to paint with."""
        return HTMLResponse(page, headers=headers)

    @routes.get("/state")
    async def state() -> dict[str, Any]:
        """Each model with its workers, their buckets and how far they are warm."""
        health, views = await backend.health(), await backend.overview()
        models = [_model(view, health) for view in views]
        return {"ready": health.ready, "missing": list(health.missing), "models": models}

    return routes


@functools.cache
def _page() -> tuple[str, dict[str, str]]:
    """The file, and headers that let it run its own script and style alone, and ask nobody but
    this gateway.
    """
    text = files("preheat.gateway").joinpath("page.html").read_text("utf-8")
    script, style = (_hashed(text, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
        "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",
    }


def _hashed(text: str, tag: str) -> str:
    (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digest = hashlib.sha256(inside.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _model(view: ModelView, health: Health) -> dict[str, Any]:
    by_pid = {worker.pid: worker for worker in health.workers}
    workers = [
        {**asdict(worker), "warming": _warming(by_pid.get(worker.pid or 0))}
        for worker in view.workers
    ]
    return {**asdict(view), "workers": workers}


def _warming(status: Status | None) -> list[dict[str, Any]]:
    """A bar for each bucket, until all are warm."""
    if status is None or status.state != "warming":
        return []
    names = ("bucket", "done", "total", "seconds")
    return [dict(zip(names, bucket, strict=True)) for bucket in status.buckets]
