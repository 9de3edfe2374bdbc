"""Who comes in by which key, and what the access log keeps of it."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from memory_host import MemoryHost
from preheat.errors import GatewayError
from preheat.gateway import serving
from preheat.gateway.app import create_app
from preheat.gateway.keys import Keys, Quota, create
from preheat.gateway.queued import Queued
from preheat.gateway.record import access_log, request_id
from preheat.gateway.torchserve import Places

PATH = "/predictions/tiny"
NOW = {"prompt": "now: a very private cat", "height": 300, "width": 200}


@asynccontextmanager
async def gateway(host: MemoryHost, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway before `host`, without a network between them."""
    app = create_app(Queued(host), **options)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield client


def _run(body: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await asyncio.wait_for(body(), 30)

    asyncio.run(whole())


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys.jsonl"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "access.jsonl"


def _lines(log: Path) -> list[dict[str, Any]]:
    for handler in logging.getLogger("preheat.access").handlers:
        handler.flush()
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_only_who_has_a_key_paints(keys: Path) -> None:
    key = create(keys, "ann", Quota())

    async def body() -> None:
        async with gateway(MemoryHost(), keys=Keys(keys)) as http:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic x"}):
                refused = await http.post(PATH, json=NOW, headers=headers)
                assert refused.status_code == 401
                assert refused.json()["code"] == 401
                assert "x-request-id" in refused.headers
            served = await http.post(PATH, json=NOW, headers={"authorization": f"Bearer {key}"})
            assert (served.status_code, served.content) == (200, b"picture")
            # OpenAI's clients read their own form
            refused = await http.get("/v1/anything", headers={"authorization": "Bearer wrong"})
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"

    _run(body)


def test_probes_want_no_key(keys: Path) -> None:
    create(keys, "ann", Quota())

    async def body() -> None:
        async with gateway(MemoryHost(), keys=Keys(keys)) as http:
            for path in (
                "/health",
                "/health/live",
                "/health/ready",
                "/v2/health/ready",
                "/metrics",
            ):
                assert (await http.get(path)).status_code == 200, path
            for path in ("/healthy", "/v2x", "/state"):
                assert (await http.get(path)).status_code == 401, path

    _run(body)


def test_over_its_quota_a_key_is_told_when(keys: Path) -> None:
    key = create(keys, "ann", Quota(requests_per_minute=1))
    other = create(keys, "bob", Quota(pixel_steps_per_minute=512 * 512 * 4))

    async def body() -> None:
        async with gateway(MemoryHost(), keys=Keys(keys)) as http:
            for each, unit in ((key, "requests"), (other, "pixel-steps")):
                headers = {"authorization": f"Bearer {each}"}
                assert (await http.post(PATH, json=NOW, headers=headers)).status_code == 200
                refused = await http.post(PATH, json=NOW, headers=headers)
                assert refused.status_code == 429 and refused.json()["type"] == "QuotaSpent"
                assert unit in refused.json()["message"]
                assert 1 <= int(refused.headers["retry-after"]) <= 60

    _run(body)


def test_the_log_has_what_was_asked_and_nothing_private(keys: Path, log: Path) -> None:
    key = create(keys, "ann", Quota())

    async def body() -> None:
        async with gateway(MemoryHost(), keys=Keys(keys), access=access_log(log)) as http:
            headers = {"authorization": f"Bearer {key}", "x-request-id": "mine-1"}
            answer = await http.post(PATH, json=NOW, headers=headers)
            assert answer.headers["x-request-id"] == "mine-1"
            await http.post(PATH, json=NOW)
            await http.get("/health/live")

    _run(body)
    served, refused = _lines(log)
    assert served | {"time": 0, "seconds": 0, "queued_seconds": 0} == {
        "id": "mine-1",
        "time": 0,
        "key": "ann",
        "method": "POST",
        "path": PATH,
        "model": "tiny",
        "height": 300,
        "width": 200,
        "steps": 4,
        "images": 1,
        "bucket": "512x512",
        "engine": "openvino",
        "queued_seconds": 0,
        "seconds": 0,
        "status": 200,
        "complete": True,
    }
    assert (refused["status"], refused["key"]) == (401, "")
    assert "private" not in log.read_text() and key not in log.read_text()


def test_a_fault_of_ours_is_written_down_as_one(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError

    async def body() -> None:
        app = create_app(Queued(MemoryHost()), access=access_log(log))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            monkeypatch.setattr("preheat.gateway.predictions.for_host", broken)
            assert (await http.post(PATH, json=NOW)).status_code == 500
            assert 'answers_total{Code="500"} 1' in (await http.get("/metrics")).text

    _run(body)
    (line,) = _lines(log)
    assert line["status"] == 500


@pytest.mark.parametrize("given", ["", "a b", "x\n{}", "ä", "x" * 129, None])
def test_an_id_that_no_log_can_hold_is_replaced(given: str | None) -> None:
    assert request_id(given) != given
    assert request_id("a-1.B:2") == "a-1.B:2"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://127.0.0.1"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "evil.example"}, 403),
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "["}, 400),
        ({"origin": "http://["}, 400),
        ({"content-type": b"application/json; x=\xe4"}, 400),
        ({"x-request-start": b"t=\xb2"}, 400),
    ],
)
def test_without_keys_no_other_sites_page_may_ask(headers: dict[str, str], status: int) -> None:
    async def body() -> None:
        async with gateway(MemoryHost(), local=True) as http:
            answer = await http.post(PATH, json=NOW, headers=headers)
            assert answer.status_code == status, answer.text

    _run(body)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "gateway.example"])
def test_without_keys_other_machines_are_not_served(host: str) -> None:
    places = Places(inference="", management="", metrics="")
    with pytest.raises(GatewayError, match="--keys"):
        serving.run(places, host, 0, serving.Admits())


def test_as_many_files_may_be_open_as_connections_need() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        serving.allow_files(512)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (512, hard)
        serving.allow_files(300)  # never down
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (512, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
