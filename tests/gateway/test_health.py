"""Readiness and metrics over HTTP, as the host's own list and the workers' files tell them."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import httpx
import pytest
from typing_extensions import Self

from fake_host import BUCKET, FakeHost, listening
from preheat.gateway import tokens
from preheat.gateway.app import create_app
from preheat.gateway.torchserve import Places, TorchServeBackend
from preheat.status import StatusFile


class Fresh:
    """A gateway of its own, whose last look at its host is not another test's."""

    def __init__(self, work: Path) -> None:
        self.host, self.key_file = FakeHost(), work / "key_file.json"
        self.status = StatusFile(str(work / "status"), "tiny")
        self._work = work

    def __enter__(self) -> Self:
        self._host = listening(self.host.app())
        url = self._host.__enter__()
        places = Places(
            inference=url,
            management=url,
            metrics=url,
            status_dir=self._work / "status",
            key_file=self.key_file,
            models=tuple(self.host.models),
        )
        self._gateway = listening(create_app(TorchServeBackend(places)))
        self.http = httpx.Client(base_url=self._gateway.__enter__(), trust_env=False, timeout=30)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self._gateway.__exit__(None, None, None)
        self._host.__exit__(None, None, None)


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Fresh]:
    with Fresh(tmp_path) as fresh:
        yield fresh


READY = ("/health", "/health/ready", "/warmup", "/v2/health/ready", "/v2/models/tiny/ready")


@pytest.mark.parametrize("path", ["/health/live", "/v2/health/live", "/v2"])
def test_a_gateway_that_runs_is_live(fresh: Fresh, path: str) -> None:
    fresh.host.ready = False
    assert fresh.http.get(path).status_code == 200


def test_nothing_is_ready_before_every_worker_is(fresh: Fresh) -> None:
    fresh.host.ready = False
    fresh.status.plan({"320x192": 2, "192x320": 2})
    fresh.status.step("320x192", 1.5)
    answers = {path: fresh.http.get(path) for path in READY}
    assert {answer.status_code for answer in answers.values()} == {503}
    said = answers["/warmup"].json()
    assert said["missing"] == answers["/health"].json()["missing"] != []
    assert said["missing"] == ["tiny: 0 of 1 workers READY (loading)"]
    (worker,) = said["workers"]
    assert (worker["pid"], worker["done"], worker["total"]) == (os.getpid(), 1, 4)
    assert worker["buckets"][0] == {"bucket": "320x192", "done": 1, "total": 2, "seconds": 1.5}
    assert "READY" in answers["/v2/health/ready"].json()["error"]
    assert answers["/v2/models/tiny/ready"].json()["error"] == "tiny: 0 of 1 workers READY"


def test_all_is_ready_when_every_worker_is(fresh: Fresh) -> None:
    answers = {path: fresh.http.get(path) for path in READY}
    assert {answer.status_code for answer in answers.values()} == {200}
    assert answers["/health"].json() == {"ready": True, "missing": []}
    assert answers["/v2/health/ready"].json() == {"ready": True}


def test_a_model_that_is_still_to_come_is_missing(tmp_path: Path) -> None:
    fresh = Fresh(tmp_path)
    fresh.host.models = ["tiny", "wide"]
    with fresh:
        fresh.host.models.pop()
        assert fresh.http.get("/health").json()["missing"] == ["wide: not registered"]


def test_models_are_described_by_the_open_inference_protocol(fresh: Fresh) -> None:
    said = fresh.http.get("/v2/models/tiny").json()
    assert (said["name"], said["versions"]) == ("tiny", ["1.0"])
    for path in ("/v2/models/none", "/v2/models/none/ready"):
        answer = fresh.http.get(path)
        assert answer.status_code == 404 and answer.json() == {"error": "model none is not here"}


def test_metrics_are_the_hosts_and_how_long_clients_wait(fresh: Fresh) -> None:
    for _ in range(3):
        assert fresh.http.post("/predictions/tiny", json={"prompt": ""}).status_code == 200
    assert fresh.http.post("/predictions/tiny", json={}).status_code == 400
    text = fresh.http.get("/metrics").text
    assert "ts_inference_requests_total 3.0" in text
    assert 'preheat_gateway_answers_total{Code="200"} 3' in text
    assert 'preheat_gateway_answers_total{Code="400"} 1' in text
    counts = re.findall(rf'preheat_gateway_seconds_bucket{{Bucket="{BUCKET}",le=".*"}} (\d+)', text)
    assert [int(count) for count in counts] == sorted(map(int, counts)) and counts[-1] == "3"
    assert f'preheat_gateway_seconds_count{{Bucket="{BUCKET}"}} 3' in text


def _write_keys(fresh: Fresh, inference: str, ends: str = "2999-01-01T00:00:00.123Z") -> None:
    entries = {kind: {"key": kind, "expiration time": ends} for kind in ("management", "inference")}
    entries["inference"]["key"] = inference
    fresh.key_file.write_text(json.dumps({**entries, "API": {"key": "master"}}))


def test_the_token_is_the_one_in_the_file_whoever_replaces_it(fresh: Fresh) -> None:
    for token in ("first", "second"):
        _write_keys(fresh, token)
        fresh.host.token = token
        assert fresh.http.post("/predictions/tiny", json={"prompt": ""}).status_code == 200


def test_a_token_replaced_on_the_way_is_read_again(fresh: Fresh) -> None:
    _write_keys(fresh, "old")
    fresh.host.token = "new"
    fresh.host.on_refused_token = lambda: _write_keys(fresh, "new")
    assert fresh.http.post("/predictions/tiny", json={"prompt": ""}).status_code == 200
    assert [each.get("authorization") for each in fresh.host.headers] == [
        "Bearer old",
        "Bearer new",
    ]


def test_a_wrong_token_is_no_loop(fresh: Fresh) -> None:
    _write_keys(fresh, "old")
    fresh.host.token = "new"
    answer = fresh.http.post("/predictions/tiny", json={"prompt": ""})
    assert answer.status_code == 400 and answer.json()["type"] == "InvalidKeyException"
    assert len(fresh.host.headers) == 2


def test_a_token_is_renewed_before_it_ends(fresh: Fresh) -> None:
    soon = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.1Z")
    _write_keys(fresh, "old", soon)
    fresh.host.token = "old"

    def renew(kind: str, key: str | None) -> None:
        assert (kind, key) == ("inference", "Bearer master")
        fresh.host.token = "new"
        _write_keys(fresh, "new")

    fresh.host.on_renewal = renew
    for _ in range(2):
        assert fresh.http.post("/predictions/tiny", json={"prompt": ""}).status_code == 200
    assert [each["authorization"] for each in fresh.host.headers] == ["Bearer new"] * 2


def test_a_token_that_cannot_be_renewed_costs_nobody_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The management API's port is closed, or it accepts and says nothing."""
    monkeypatch.setattr(tokens, "TIMEOUT", 0.2)
    key_file, tried = tmp_path / "key_file.json", list[str]()
    entry = {"key": "old", "expiration time": "2000-01-01T00:00:00.1Z"}
    key_file.write_text(json.dumps({"inference": entry, "management": entry}))

    async def ask(url: str) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=None) as http:
            own = tokens.Tokens(key_file, url, http, clock=lambda: 1e9)
            found = await asyncio.gather(*(own.get("inference") for _ in range(50)))
            assert found == ["old"] * 50

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tried.append("x")
        await reader.read()
        writer.close()

    async def body() -> None:
        silent = await asyncio.start_server(note, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}"
        await ask(url)
        assert tried == ["x"]  # not each of them
        silent.close()
        await silent.wait_closed()
        await ask(url)

    asyncio.run(asyncio.wait_for(body(), 30))
