"""Whether a server is hot: every worker it should have is READY, which it is not before `initialize()` returned.

TorchServe's /ping says Healthy a second after start, so the management API is asked instead. Standard library only:
this runs as a Kubernetes probe every few seconds.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

READY = "READY"


class Readiness(NamedTuple):
    """The verdict; `missing` has a line for everything that is not there yet, and is empty when `ready`."""

    ready: bool
    missing: list[str]


class Status(NamedTuple):
    """What one worker last wrote about its warm-up; `buckets` are its parts, as (name, done, total, seconds)."""

    model: str
    pid: int
    state: str
    done: int
    total: int
    buckets: tuple[tuple[str, int, int, float], ...]
    message: str
    written: float


def check(
    management: str,
    model: str | Sequence[str] | None = None,
    min_workers: int | None = None,
    token: str | None = None,
    *,
    timeout: float = 5.0,
) -> Readiness:
    """Ask the management API at the URL `management` about `model` (or several), or about every model it has.

    A model is ready with max(its minWorkers, `min_workers`, 1) workers READY. `timeout` is seconds per call. Never
    raises for a server that is absent or answers nonsense: that is not ready, with the reason in `missing`.
    """
    base = management.rstrip("/")
    try:
        if model is None:
            names = [entry["modelName"] for entry in _get(f"{base}/models?limit=1000", token, timeout)["models"]]
        else:
            names = [model] if isinstance(model, str) else list(model)
        missing = [] if names else ["no model is registered"]
        for name in names:
            missing += _ask_model(base, name, min_workers, token, timeout)
    except urllib.error.HTTPError as error:
        missing = [_refusal(error)]
    except (OSError, HTTPException) as error:
        missing = [f"the management API at {base} does not answer: {getattr(error, 'reason', error)}"]
    except (ValueError, LookupError, TypeError):
        missing = [f"the management API at {base} answers something that is not TorchServe's"]
    return Readiness(not missing, missing)


def wait(
    management: str,
    model: str | Sequence[str] | None = None,
    min_workers: int | None = None,
    token: str | None = None,
    *,
    seconds: float,
    interval: float = 0.5,
    hopeful: Callable[[], bool] = lambda: True,
) -> Readiness:
    """Ask until ready, for at most `seconds`; `hopeful` is called before each sleep and ends the wait by returning False."""
    deadline = time.monotonic() + seconds
    while True:
        verdict = check(management, model, min_workers, token)
        if verdict.ready or not hopeful() or time.monotonic() >= deadline:
            return verdict
        time.sleep(min(interval, max(0.0, deadline - time.monotonic())))


def read_token(key_file: Path) -> str:
    """The management token in TorchServe's key_file.json.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file.
    """
    try:
        return str(json.loads(key_file.read_bytes())["management"]["key"])
    except (LookupError, TypeError) as error:
        raise ValueError(f"{key_file} holds no management key") from error


def read_statuses(folder: Path) -> list[Status]:
    """What the workers wrote to `folder` ($PREHEAT_STATUS_DIR), oldest first; unreadable files are left out."""
    statuses = []
    for path in folder.glob("*.json"):
        try:
            data = json.loads(path.read_bytes())
            buckets = tuple((b["bucket"], b["done"], b["total"], b.get("seconds") or 0.0) for b in data["buckets"])
            fields = (str(data["model"]), int(data["pid"]), str(data["state"]), int(data["done"]), int(data["total"]))
            statuses.append(Status(*fields, buckets, str(data.get("message") or ""), path.stat().st_mtime))
        except (OSError, ValueError, LookupError, TypeError):
            continue  # gone meanwhile, or not a worker's
    return sorted(statuses, key=lambda status: status.written)


def failure(statuses: list[Status]) -> str | None:
    """Why warming has failed, if no worker of that model has written anything since; TorchServe may try again."""
    latest = {status.model: status for status in statuses}
    for status in latest.values():
        if status.state == "failed":
            return f"{status.model}: worker {status.pid} failed: {status.message}"
    return None


def _get(url: str, token: str | None, timeout: float) -> Any:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy knows nothing of this loopback
    with opener.open(request, timeout=timeout) as response:
        return json.load(response)


def _ask_model(base: str, name: str, min_workers: int | None, token: str | None, timeout: float) -> list[str]:
    try:
        described = _get(f"{base}/models/{urllib.parse.quote(name)}", token, timeout)[0]
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return [f"{name}: not registered"]
        raise
    wanted = max(int(described["minWorkers"]), min_workers or 0, 1)
    states = [worker["status"] for worker in described["workers"]]
    if states.count(READY) >= wanted:
        return []
    others = sorted({state for state in states if state != READY})
    detail = f" (others: {', '.join(others)})" if others else ""
    return [f"{name}: {states.count(READY)} of {wanted} workers {READY}{detail}"]


def _refusal(error: urllib.error.HTTPError) -> str:
    text = error.read(2000).decode("utf-8", "replace")
    if "oken" in text:
        return "the management API wants a token that is right and not expired"
    return f"the management API answers {error.code}: {text.strip()}"
