"""Everybody's own fate on a real TorchServe: two workers whose painter runs out of memory, or dies,
when a prompt says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from preheat.torchserve import archive as archiving
from preheat.torchserve.client import Client, Reply
from served import (
    BUCKETS,
    CACHE,
    CONFIG,
    ENGINE,
    ONE_THREAD,
    Served,
    events,
    kinds,
    opened,
    picture,
    serving,
    streamed,
)

# Appended to the archive's entry file. `large` does not fit beside others, and says so when all
# steps are done; `huge` never fits.
FAULTS = """

import os as _os

import torch as _torch

from preheat.models.diffusion import pipeline as _pipeline

_paint = _pipeline.DiffusionPipeline.generate


def _faulty(self, batch, *arguments):
    words = {word for row in batch.rows for word in row.prompt.split()}
    if "die" in words:
        _os._exit(1)
    pixels = _paint(self, batch, *arguments)
    if "huge" in words or "large" in words and len(batch.rows) > 1:
        raise _torch.OutOfMemoryError("CUDA out of memory (simulated)")
    return pixels


_pipeline.DiffusionPipeline.generate = _faulty
"""
# Of sizes that only the first bucket covers: the other server has them all.
LARGE: dict[str, Any] = {
    "prompt": "a large cat",
    "height": 250,
    "width": 210,
    "num_inference_steps": 3,
}


@pytest.fixture(scope="module")
def faulty(
    served: Served, tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Two workers of the demo's model."""
    work = tmp_path_factory.mktemp("faulty")
    data = yaml.safe_load(CONFIG.read_text())
    data |= {"minWorkers": 2, "maxWorkers": 2, "batchSize": 4, "maxBatchDelay": 300}
    data["pt2"]["shapes"]["buckets"] = [list(BUCKETS[0])]
    data["pipeline"]["grpc_streaming"] = True
    (work / "faulty.yaml").write_text(yaml.safe_dump(data))
    entry = work / archiving.ENTRY.name
    entry.write_text(archiving.ENTRY.read_text() + FAULTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archiving, "ENTRY", entry)
        archive = archiving.build_archive(work / "faulty.yaml", tiny_sdxl, output=work / "archives")
    # what stands in PYTHONPATH would go before the archive's own entry
    env = ONE_THREAD | {"PYTHONPATH": ""}
    with serving(archive, work, cache=CACHE, env=env) as warm:
        yield warm


def together(client: Client, requests: Sequence[Mapping[str, Any]]) -> list[Reply]:
    with ThreadPoolExecutor(len(requests)) as clients:
        return list(clients.map(client.predict, requests))


def assert_same(body: bytes, expected: Reply) -> None:
    mine, its = (np.asarray(opened(data)).astype(int) for data in (body, expected.body))
    assert np.abs(mine - its).max() <= 1


def test_a_batch_that_does_not_fit_is_split_and_its_streams_go_on(
    served: Served, faulty: Served
) -> None:
    requests = [LARGE | {"seed": seed} for seed in range(4)]
    runs = faulty.metric("preheat_inference_seconds_count")
    with ThreadPoolExecutor(4) as clients:
        watching = {"stream": True, "preview_every": 1}
        streams = [clients.submit(streamed, faulty, request | watching) for request in requests[:2]]
        calm = [clients.submit(faulty.client.predict, one) for one in requests[2:]]
        told = [stream.result() for stream in streams]
        replies = [reply.result() for reply in calm]
    expected = [served.client.predict(one) for one in requests]
    for own, its in zip(told, expected[:2], strict=True):
        assert kinds(own) == ["queued", "step", "step", "step", "image", "done"]
        assert [event["step"] for event in own[1:4]] == [1, 2, 3] and all(
            "preview" in event for event in own[1:4]
        )
        assert_same(picture(own[4]), its)
    for reply, its in zip(replies, expected[2:], strict=True):
        assert reply.status == 200
        assert_same(reply.body, its)
    assert faulty.metric("preheat_inference_seconds_count") == runs + 4, (
        "runs that failed are not counted"
    )


def test_what_fits_nowhere_is_a_507_of_its_own(served: Served, faulty: Served) -> None:
    calm = {"prompt": "a cat", "height": 230, "width": 200, "seed": 1, "num_inference_steps": 2}
    huge = LARGE | {"prompt": "a huge cat"}
    replies = together(faulty.client, [huge, calm, huge | {"seed": 2}])
    assert [reply.status for reply in replies] == [507, 200, 507]
    assert replies[0].error == {
        "code": 507,
        "type": "OutOfMemory",
        "message": f"{BUCKETS[0][0]}x{BUCKETS[0][1]}, guidance: one row does not fit into memory",
        "field": None,
    }
    assert_same(replies[1].body, served.client.predict(calm))
    last = streamed(faulty, huge | {"stream": True})[-1]
    assert last == {"event": "error", **replies[0].error}


def test_a_deadline_that_has_passed_is_a_504(faulty: Served) -> None:
    request = {"prompt": "a cat", "num_inference_steps": 1, "seed": 1}

    def due(milliseconds: str, more: Mapping[str, Any]) -> Reply:
        return faulty.client.post(
            json={**request, **more}, headers={"x-preheat-deadline": milliseconds}
        )

    late, punctual, streamed = (
        due("1000", {}),
        due("99999999999999", {}),
        due("1000", {"stream": True}),
    )
    assert late.status == 504 and late.error is not None and late.error["type"] == "DeadlinePassed"
    assert punctual.status == 200
    assert (
        kinds(events(streamed.body)) == ["queued", "error"]
        and events(streamed.body)[-1]["code"] == 504
    )


def test_streams_over_grpc_come_in_parts_where_the_yaml_allows(
    served: Served, faulty: Served
) -> None:
    pids, request = faulty.worker_pids(), LARGE | {"seed": 9}
    parts = list(faulty.client.stream_grpc(request | {"stream": True, "preview_every": 3}))
    assert len(parts) == 6 and kinds(events(b"".join(parts))) == [
        "queued",
        "step",
        "step",
        "step",
        "image",
        "done",
    ]
    assert_same(picture(json.loads(parts[4])), served.client.predict(request))
    (refusal,) = faulty.client.stream_grpc(request | {"stream": True, "width": 0})
    assert json.loads(refusal)["field"] == "width"
    assert faulty.client.predict_grpc(request).body[:4] == b"\x89PNG", (
        "who does not stream is answered as ever"
    )
    for _ in range(3):
        with closing(
            faulty.client.stream_grpc(request | {"stream": True, "num_inference_steps": 40})
        ) as leaving:
            assert next(leaving) == b'{"event": "queued"}\n'
    assert faulty.client.predict(request).status == 200 and faulty.worker_pids() == pids


def test_a_worker_that_dies_takes_only_its_own_batch_and_comes_back_hot(
    served: Served, faulty: Served
) -> None:
    calm = {"prompt": "a cat", "height": 230, "width": 200, "seed": 1, "num_inference_steps": 2}
    expected, before = served.client.predict(calm), set(faulty.worker_pids())
    log = faulty.running.logs / "model_log.log"
    num_bytes = log.stat().st_size
    deadly = faulty.client.predict({"prompt": "die", "num_inference_steps": 1})
    assert deadly.status == 500 and deadly.error is not None
    for reply in together(faulty.client, [calm] * 3):  # the other worker goes on
        assert reply.status == 200
        assert_same(reply.body, expected)
    faulty.running.wait_ready(300, min_workers=2)
    assert len(before - set(faulty.worker_pids())) == 1
    assert b"(kept)" in log.read_bytes()[num_bytes:], "what was chosen is chosen for all"
    state = faulty.state()
    assert {row["engine"] for row in state["buckets"]} == {ENGINE} and state["state"] == "hot"
    assert (state["compiles_since_ready"], state["incidents"], state["eager_fallbacks"]) == (
        0,
        0,
        0,
    )
    for reply in together(faulty.client, [calm] * 4):
        assert_same(reply.body, expected)


def test_a_stream_that_loses_its_worker_is_not_done(faulty: Served) -> None:
    told: list[str] = []
    with suppress(httpx.HTTPError):  # how it ends is TorchServe's business
        told.extend(
            faulty.client.stream({"prompt": "die", "stream": True, "num_inference_steps": 1})
        )
    assert told[0] == '{"event": "queued"}' and '{"event": "done"}' not in told
