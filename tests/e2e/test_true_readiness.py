"""`preheat ready` tells the truth while /ping does not: two workers, one killed under load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from preheat.torchserve.archive import build_archive
from preheat.torchserve.client import Client, Reply
from served import Served, serving

PAIR = """
minWorkers: 2
maxWorkers: 2
startupTimeout: 900
responseTimeout: 120
maxRetryTimeoutInSec: 3600
pt2:
  compile: {enable: true, backend: inductor}
  shapes: {buckets: [[64, 64]], batch_sizes: [1]}
pipeline:
  guidance: "off"
  tasks: [text-to-image]
  defaults: {num_inference_steps: 2}
"""
REQUEST = {"prompt": "a", "height": 60, "width": 50, "seed": 3}


def await_true(condition: Callable[[], bool], what: str, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)


def command(pair: Served, *words: str) -> tuple[int, str]:
    """The exit code and the output of the command as a probe runs it."""
    code = "from preheat.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--management", pair.running.management],
        env={**os.environ, "PREHEAT_STATUS_DIR": str(pair.running.status_dir)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout


def ready(pair: Served) -> tuple[int, str]:
    return command(pair, "ready")


def status(pair: Served) -> dict[str, Any]:
    (model,) = json.loads(command(pair, "status", "--json")[1])["models"]
    assert isinstance(model, dict)
    return model


def ping(pair: Served) -> str:
    try:
        with urllib.request.urlopen(f"{pair.running.inference}/ping", timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


@pytest.fixture(scope="module")
def pair(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with two workers, as it is when its management API answers first."""
    work = tmp_path_factory.mktemp("pair")
    config = work / "pair.yaml"
    config.write_text(PAIR)
    archive = build_archive(config, tiny_sdxl, output=work / "archives")
    with serving(archive, work, wait=0, cache=work / "cache") as cold:
        yield cold


def test_ready_says_no_while_ping_says_healthy_and_yes_once_both_workers_are_warm(
    pair: Served,
) -> None:
    await_true(lambda: "Healthy" in ping(pair), "/ping is Healthy", 60)
    code, missing = ready(pair)
    assert code == 1 and "pair" in missing
    await_true(lambda: ready(pair)[0] == 0, "preheat ready says yes")
    assert [worker["status"] for worker in pair.workers()] == ["READY", "READY"]
    states = [path.read_text() for path in pair.running.status_dir.glob("*.json")]
    assert len(states) == 2 and all('"state": "hot"' in state for state in states)


def test_a_worker_that_is_killed_under_load_comes_back_hot_and_the_other_answers_meanwhile(
    pair: Served,
) -> None:
    await_true(lambda: ready(pair)[0] == 0, "preheat ready says yes")
    expected = pair.client.predict(REQUEST).body
    victim, survivor = pair.worker_pids()
    log = pair.running.logs / "model_log.log"
    before = log.read_text()
    replies: list[Reply] = []
    stop = threading.Event()

    def load() -> None:
        with Client.to(pair.running) as client:
            while not stop.is_set():
                replies.append(client.predict(REQUEST))

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        await_true(lambda: len(replies) > 10, "load runs", 60)
        os.kill(victim, signal.SIGKILL)
        await_true(lambda: ready(pair)[0] == 1, "preheat ready says no", 30)
        assert status(pair)["ready"] == 1
        during = len(replies)
        await_true(lambda: len(replies) > during + 10, "the other worker answers meanwhile", 60)
        assert ready(pair)[0] == 1
        await_true(lambda: ready(pair)[0] == 0, "preheat ready says yes again")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    lost = [reply for reply in replies if reply.status != 200]
    assert len(lost) <= len(threads), "only what the dead worker held in its hands"
    assert all(reply.body == expected for reply in replies if reply.status == 200)
    new = [pid for pid in pair.worker_pids() if pid not in (victim, survivor)]
    assert len(new) == 1 and survivor in pair.worker_pids()
    written = (pair.running.status_dir / f"pair-{new[0]}.json").read_text()
    assert '"state": "hot"' in written
    since = log.read_text()[len(before) :]
    assert "cache hit" in since and "cache miss" not in since and "cache partial" not in since, (
        "compiled from scratch"
    )
    state = pair.state()
    assert state["compiles_since_ready"] == state["incidents"] == 0
    shown = status(pair)
    assert (shown["ready"], shown["restarts"], shown["queue"]) == (2, 1, 0)
    assert {worker["pid"] for worker in shown["workers"]} == {survivor, new[0]}
    by_pid = {worker["pid"]: worker for worker in shown["workers"]}
    assert by_pid[survivor]["requests"] > 0 and by_pid[survivor]["compiles_since_ready"] == 0
    assert [row["engine"] for row in by_pid[new[0]]["buckets"]] == ["compiled"]
    assert pair.metric("preheat_worker_starts_total") == 3
    served = pair.metric("preheat_requests_total")
    assert pair.metric("preheat_request_seconds_bucket", le="+Inf") == served


def test_with_no_worker_left_the_queue_shows_and_is_answered_when_one_is_back(pair: Served) -> None:
    await_true(lambda: ready(pair)[0] == 0, "preheat ready says yes")
    restarts = status(pair)["restarts"]
    for pid in pair.worker_pids():
        os.kill(pid, signal.SIGKILL)
    await_true(lambda: status(pair)["ready"] == 0, "preheat status shows no worker", 30)
    assert ready(pair)[0] == 1
    with ThreadPoolExecutor() as pool, Client.to(pair.running) as client:
        waiting = pool.submit(client.predict, REQUEST)
        await_true(lambda: status(pair)["queue"] == 1, "the request waits", 60)
        assert waiting.result().status == 200
    await_true(lambda: ready(pair)[0] == 0, "preheat ready says yes again")
    assert status(pair)["restarts"] == restarts + 2
