"""Two workers of an older folder start cold on one shared cache under a real TorchServe: one
compiles, the other loads what it made.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from preheat.torchserve.archive import build_archive
from served import Served, serving

PAIR = """
minWorkers: 2
maxWorkers: 2
startupTimeout: 900
maxRetryTimeoutInSec: 3600
pt2:
  compile: {enable: true, backend: inductor}
  shapes: {buckets: [[64, 64]], batch_sizes: [1]}
  cache: {shared: SHARED, key: pair}
pipeline:
  dtype: float16
  guidance: "off"
  tasks: [text-to-image]
  defaults: {num_inference_steps: 2}
"""


@pytest.fixture(scope="module")
def pair(old_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    work = tmp_path_factory.mktemp("pair")
    config = work / "pair.yaml"
    config.write_text(PAIR.replace("SHARED", str(work / "shared")))
    archive = build_archive(config, old_sdxl, output=work / "archives")
    with serving(
        archive, work, cache=work / "inductor", env={"PREHEAT_CACHE_KEY": "0123456789abcdef"}
    ) as warm:
        yield warm


def shared_cache_metrics(pair: Served) -> dict[str, float]:
    with urllib.request.urlopen(f"{pair.running.metrics}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = (line for line in lines if line.startswith("preheat_shared_cache_total{"))
    return {
        line.partition('Outcome="')[2].partition('"')[0]: float(line.rpartition(" ")[2])
        for line in found
    }


def test_one_worker_compiles_and_the_other_hits(pair: Served) -> None:
    log = (pair.running.logs / "model_log.log").read_text()
    assert log.count(", cache miss)") == 1 and log.count(", cache hit)") == 1
    state = pair.state()  # of either worker
    (row,) = state["buckets"]
    assert (row["cache"], state["shared_cache"]["outcome"]) in {
        ("miss", "published"),
        ("hit", "loaded"),
    }
    (bundle,) = (pair.running.run_dir.parent / "shared").glob("*.bundle")
    with bundle.open("rb") as file:
        # workers get the key from the server's environment
        assert len(json.loads(file.readline())["signature"]) == 64


def test_metrics_tell_it_apart(pair: Served) -> None:
    deadline = time.monotonic() + 60  # they pass through the worker's output and a log first
    while (found := shared_cache_metrics(pair)) != {"published": 1.0, "loaded": 1.0}:
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def test_hits_are_a_metric_too(pair: Served) -> None:
    """Both workers' gauges have the bucket; which of them each label shows is as TorchServe logs
    it.
    """
    assert (
        pair.metric("preheat_warm_seconds", Cache="miss")
        > pair.metric("preheat_warm_seconds", Cache="hit")
        > 0
    )


def test_both_workers_serve(pair: Served) -> None:
    assert len(pair.worker_pids()) == 2
    replies = [
        pair.client.predict({"prompt": "a", "height": 60, "width": 50, "seed": 3}) for _ in range(6)
    ]
    assert {reply.status for reply in replies} == {200}
    assert {reply.headers["x-preheat-engine"] for reply in replies} == {"compiled"}
    assert len({reply.body for reply in replies}) == 1
