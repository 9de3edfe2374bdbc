"""The page at `/` and `/state`, which it reads; what it looks like is tests/browser/."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re

import httpx

from memory_host import MemoryHost
from preheat.gateway.app import create_app


def _get(path: str) -> httpx.Response:
    async def body() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(MemoryHost()))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            return await http.get(path)

    return asyncio.run(body())


def test_the_page_runs_its_own_script_alone_and_asks_nobody_else() -> None:
    page = _get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert "unsafe" not in policy and "http" not in policy
    for tag in ("script", "style"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(
        r"\son\w+=|\sstyle=|<script src|<link(?! rel=\"icon\" href=\"data:)", page.text
    )
    assert set(re.findall(r"https?://[\w./]+", page.text)) == {"http://www.w3.org/2000/svg"}


def test_the_state_has_what_the_page_shows() -> None:
    state = _get("/state").json()
    assert state["ready"] is True
    (model,) = state["models"]
    (worker,) = model["workers"]
    assert worker["request_defaults"]["fit"] == "pad" and worker["compiles_since_ready"] == 0
    assert worker["buckets"][0]["engine"] == "openvino" and worker["warming"] == []
