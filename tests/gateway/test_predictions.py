"""`/predictions` through the gateway: the same bytes, and no other headers."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from fake_host import BUCKET, FakeHost, listening, png
from preheat.gateway.app import create_app
from preheat.gateway.torchserve import Places, TorchServeBackend

PATH = "/predictions/tiny"


@pytest.fixture
def http(gateway: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway, trust_env=False, timeout=30) as client:
        yield client


def test_a_prediction_goes_through_byte_for_byte(host: FakeHost, http: httpx.Client) -> None:
    asked = {"prompt": "a cat", "seed": 5}
    answer = http.post(PATH, json=asked)
    assert (answer.status_code, answer.content) == (200, png(asked))
    assert host.bodies == [asked] and host.paths == [PATH]
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert answer.headers["x-preheat-bucket"] == BUCKET


def test_a_version_is_asked_for_by_its_path(host: FakeHost, http: httpx.Client) -> None:
    assert http.post(f"{PATH}/1.0", json={"prompt": ""}).status_code == 200
    assert http.post(f"{PATH}/9.9", json={"prompt": ""}).status_code == 404
    assert host.paths == [f"{PATH}/1.0", f"{PATH}/9.9"]


def test_a_name_leads_nowhere_else(host: FakeHost, http: httpx.Client) -> None:
    assert http.post("/predictions/..%2Fmodels", json={}).status_code == 404
    assert all(path.startswith("/predictions/") for path in host.paths)


def test_only_named_headers_pass_either_way(host: FakeHost, http: httpx.Client) -> None:
    sent = {
        "accept": "application/safetensors",
        "x-preheat-deadline": "99999999999999",
        "describe": "True",
        "authorization": "Bearer x",
    }
    answer = http.post(PATH, json={"prompt": ""}, headers=sent)
    (seen,) = host.headers
    assert seen["x-preheat-deadline"] == sent["x-preheat-deadline"]
    assert seen["accept"] == sent["accept"]
    assert not {"describe", "authorization"} & seen.keys()
    assert seen["x-request-start"].startswith("t=")
    assert "x-secret" not in answer.headers
    assert answer.headers["x-request-id"] != "theirs"


def test_a_proxys_time_of_arrival_is_kept(host: FakeHost, http: httpx.Client) -> None:
    http.post(PATH, json={"prompt": ""}, headers={"X-Request-Start": "t=1.5"})
    assert host.headers[0]["x-request-start"] == "t=1.5"


def test_events_come_as_they_happen(host: FakeHost, http: httpx.Client) -> None:
    asked = {"prompt": "slow", "stream": True}
    with http.stream("POST", PATH, json=asked) as answer:
        assert answer.headers["content-type"] == "application/x-ndjson"
        lines = answer.iter_lines()
        assert json.loads(next(lines)) == {"event": "queued"}
        host.go.set()
        assert json.loads([*lines][-1]) == {"event": "done"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_its_request_back(
    host: FakeHost, http: httpx.Client, stream: bool
) -> None:
    timeout = httpx.Timeout(30, read=0.2)
    asked = {"prompt": "slow", "stream": stream}
    with (
        pytest.raises(httpx.ReadTimeout),
        http.stream("POST", PATH, json=asked, timeout=timeout) as answer,
    ):
        answer.read()
    assert host.begun.wait(10) and host.left.wait(10)


def test_a_refusal_is_the_workers_own(host: FakeHost, http: httpx.Client) -> None:
    answer = http.post(PATH, json={})
    assert answer.status_code == 400
    assert answer.json()["field"] == "prompt" and answer.json()["message"] == "prompt is missing"
    answer = http.post(PATH, json={"prompt": "fail 503 PutOff"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "0")


def test_a_body_over_the_limit_is_refused_and_reaches_nobody(
    host: FakeHost, http: httpx.Client
) -> None:
    answer = http.post(PATH, content=b" " * 100_001)
    assert answer.status_code == 413 and answer.json()["field"] == "body"
    assert http.post(PATH, content=iter([b" " * 60_000] * 2)).status_code == 413
    assert not host.paths
    assert http.post(PATH, json={"prompt": "a" * 90_000}).status_code == 200


def test_other_paths_are_no_doors(host: FakeHost, http: httpx.Client) -> None:
    answer = http.get("/models")
    assert answer.status_code == 404 and answer.json()["type"] == "NotFound"
    assert http.get(PATH).status_code == 405


def test_a_host_that_is_gone_is_a_503() -> None:
    with listening(FakeHost().app()) as url:
        pass
    places = Places(inference=url, management=url, metrics=url)
    with listening(create_app(TorchServeBackend(places))) as gateway:
        answer = httpx.post(f"{gateway}{PATH}", json={"prompt": ""}, trust_env=False)
        assert answer.status_code == 503 and answer.json()["type"] == "Unreachable"
        assert httpx.get(f"{gateway}/health/live", trust_env=False).status_code == 200
        ready = httpx.get(f"{gateway}/health/ready", trust_env=False)
        assert ready.status_code == 503 and "does not answer" in ready.json()["missing"][0]
        assert "preheat_gateway_host_up 0" in httpx.get(f"{gateway}/metrics", trust_env=False).text
