"""A language model on a real TorchServe, in its continuous batching: streams over REST, one message
over gRPC, refusals, and clients that leave.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import yaml

from preheat.models import tiny
from preheat.torchserve.archive import build_archive
from served import ONE_THREAD, Served, events, serving

SLOTS = 4
CONFIG: dict[str, Any] = {
    "minWorkers": 1,
    "maxWorkers": 1,
    "batchSize": SLOTS,
    "continuousBatching": True,
    "startupTimeout": 600,
    "maxRetryTimeoutInSec": 1200,
    "responseTimeout": 60,
    "pt2": {"compile": {"enable": True, "backend": "eager"}},
    "text": {"path": ".", "slots": SLOTS, "prefill_buckets": [8], "max_length": 256},
}
ASKED = {"prompt": "hello", "max_new_tokens": 8, "seed": 3}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    work = tmp_path_factory.mktemp("text")
    tiny.build("llama", work / "llama")
    (work / "llama.yaml").write_text(yaml.safe_dump(CONFIG))
    archive = build_archive(work / "llama.yaml", work / "llama", output=work / "archives")
    with serving(archive, work, env=ONE_THREAD) as own:
        yield own


def told(body: bytes | str) -> tuple[str, dict[str, Any]]:
    """The text, and the last event."""
    every = events(body)
    assert every[0] == {"event": "queued"}
    return "".join(event["text"] for event in every[1:-1]), every[-1]


@pytest.fixture(scope="module")
def text(server: Served) -> str:
    """What ASKED gives."""
    reply = server.client.predict(ASKED)
    assert (reply.status, reply.headers["content-type"]) == (200, "application/x-ndjson")
    assert (reply.headers["x-preheat-seed"], reply.headers["x-preheat-bucket"]) == ("3", "prompt=8")
    text, done = told(reply.body)
    assert (done["event"], done["engine"]) == ("done", "compiled")
    return text


def test_tokens_come_as_they_are_chosen(server: Served, text: str) -> None:
    url = f"{server.running.inference}/predictions/{server.client.model}"
    with (
        httpx.Client(trust_env=False, timeout=60) as http,
        http.stream("POST", url, json=ASKED) as response,
    ):
        chunks = list(response.iter_raw())
    assert len(chunks) > 2
    assert told(b"".join(chunks))[0] == text


def test_an_answer_of_one_turn_ends_too(server: Served) -> None:
    _, done = told(server.client.predict({**ASKED, "max_new_tokens": 1}).body)
    assert done["usage"] == {"prompt_tokens": 5, "completion_tokens": 1}


def test_many_clients_share_the_slots_and_get_what_each_gets_alone(
    server: Served, text: str
) -> None:
    with ThreadPoolExecutor(3 * SLOTS) as pool:
        replies = list(pool.map(server.client.predict, [ASKED] * 3 * SLOTS))
    assert [told(reply.body)[0] for reply in replies] == [text] * 3 * SLOTS


def test_grpc_gets_all_in_one_message_from_either_call(server: Served, text: str) -> None:
    unary = server.client.call_grpc({"data": json.dumps(ASKED).encode()})
    assert told(unary.body)[0] == text
    (message,) = server.client.stream_grpc(ASKED)
    assert told(message)[0] == text


@pytest.mark.parametrize("rest", [True, False])
def test_a_refusal_is_a_status_over_rest_and_a_body_everywhere(server: Served, rest: bool) -> None:
    wrong = {"prompt": "x" * 9}
    client = server.client
    reply = client.predict(wrong) if rest else client.predict_grpc(wrong)
    assert reply.status == (400 if rest else 0)
    assert reply.error is not None and reply.error["field"] == "prompt"
    assert "has 9 tokens; the largest bucket is 8" in reply.error["message"]


def test_clients_that_leave_free_their_slots(server: Served, text: str) -> None:
    """Twice as many as there are slots, none of which would be through soon."""
    for _ in range(2 * SLOTS):
        stream = server.client.stream({**ASKED, "max_new_tokens": 250})
        assert json.loads(next(stream)) == {"event": "queued"}
        stream.close()
    assert told(server.client.predict(ASKED).body)[0] == text


def test_nothing_was_compiled_since(server: Served) -> None:
    """The last of this file."""
    assert server.metric("preheat_compiles_since_ready_total") == 0
    assert server.metric("preheat_incidents_total") == 0
    assert server.metric("preheat_refused_total", Field="prompt") == 2
    assert server.metric("preheat_requests_total", Bucket="prompt=8", Engine="compiled") > 15
