"""Whether a server is hot: every worker it should have is READY, which it is not before
`initialize()` returned.

TorchServe's /ping says Healthy a second after start, so the management API is asked instead.
Standard library only: this runs as a Kubernetes probe every few seconds.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

from preheat.status import Engine, Status, failed, failure, padding_warning

READY = "READY"


class Readiness(NamedTuple):
    """The verdict; `missing` has a line for everything that is not there yet, and is empty when
    `ready`.
    """

    ready: bool
    missing: list[str]


def check(
    management: str,
    model: str | Sequence[str] | None = None,
    min_workers: int | None = None,
    token: str | None = None,
    *,
    timeout: float = 5.0,
    statuses: Sequence[Status] = (),
) -> Readiness:
    """Ask the management API at the URL `management` about `model` (or several), or about every
    model it has.

    A model is ready with max(its minWorkers, `min_workers`, 1) workers READY. `timeout` is seconds
    per call. Never raises for a server that is absent or answers nonsense: that is not ready, with
    the reason in `missing`. `statuses`, what the workers wrote, say more of those that are missing.
    """
    return _Probe(Management(management, token, timeout), min_workers).ask(model, statuses)


def wait(
    management: str,
    model: str | Sequence[str] | None = None,
    min_workers: int | None = None,
    token: str | None = None,
    *,
    seconds: float,
    interval: float = 0.5,
    should_wait: Callable[[], bool] = lambda: True,
    statuses: Callable[[], Sequence[Status]] = tuple,
    report: Callable[[Sequence[str]], None] = lambda _: None,
) -> Readiness:
    """Ask until ready, for at most `seconds`, or until a worker has `failed`.

    `should_wait` is called before each sleep and ends the wait by returning False; `report` is told
    what is missing, at first and whenever it changes.
    """
    probe, told = _Probe(Management(management, token), min_workers), None
    deadline = time.monotonic() + seconds
    while True:
        wanted = [model] if isinstance(model, str) else model
        current = [status for status in statuses() if wanted is None or status.model in wanted]
        verdict = probe.ask(model, current)
        if verdict.ready or failed(current) or not should_wait() or time.monotonic() >= deadline:
            return verdict
        if verdict.missing != told:
            report(verdict.missing)
            told = verdict.missing
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


def describe_engines(statuses: Sequence[Status]) -> tuple[list[str], list[str]]:
    """A line per model, or per worker where they differ, with the engine of every bucket; and the
    warnings.

    A warning says which buckets are eager though compiling was asked for, and what padding changes.
    """
    lines, warnings = [], []
    by_rows: dict[tuple[str, tuple[Engine, ...]], list[int]] = {}
    for status in statuses:
        if status.state in ("hot", "cold"):
            by_rows.setdefault((status.model, status.engines), []).append(status.pid)
    models = [model for model, _ in by_rows]
    for (model, rows), pids in by_rows.items():
        who = model if models.count(model) == 1 else f"{model} worker {', '.join(map(str, pids))}"
        if not rows:
            lines.append(f"{who}: nothing is warmed; requests wait for the compiler")
            continue
        engines = dict.fromkeys(row.engine for row in rows)
        texts = (
            f"{engine} {', '.join(r.bucket for r in rows if r.engine == engine)}"
            for engine in engines
        )
        lines.append(f"{who}: {'; '.join(texts)}")
        fallbacks = [row for row in rows if row.reason]
        if fallbacks:
            reasons = "; ".join(dict.fromkeys(row.reason for row in fallbacks))
            warnings.append(
                f"{who}: {len(fallbacks)} of {len(rows)} buckets are served eagerly: {reasons} "
                "(pt2.on_failure: fail would not serve them)"
            )
    padded = {(s.model, padding_warning(s.served.get("padding", {}))) for s in statuses}
    warnings += [f"{model}: {text}" for model, text in sorted(padded, key=str) if text is not None]
    return lines, warnings


class Management:
    """A management API by its URL. `timeout` is seconds per call; none waits for a worker."""

    def __init__(self, url: str, token: str | None = None, timeout: float = 5.0) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self._token, self._timeout = token, timeout

    def names(self, model: str | Sequence[str] | None) -> list[str]:
        """`model` as a list; None: every model that is registered."""
        if model is None:
            return [entry["modelName"] for entry in self._get("/models?limit=1000")["models"]]
        return [model] if isinstance(model, str) else list(model)

    def describe(self, name: str) -> dict[str, Any] | None:
        """The model as TorchServe describes it; None where it is not registered."""
        try:
            described: dict[str, Any] = self._get(f"/models/{urllib.parse.quote(name)}")[0]
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise
        return described

    def explain(self, error: Exception) -> str:
        """One of `ERRORS`, in a line."""
        if isinstance(error, urllib.error.HTTPError):
            return _refusal(error)
        if isinstance(error, (OSError, HTTPException)):
            reason = getattr(error, "reason", error)
            return f"the management API at {self.url} does not answer: {reason}"
        return f"the management API at {self.url} answers something that is not TorchServe's"

    def _get(self, path: str) -> Any:
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        # a proxy knows nothing of this loopback
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        request = urllib.request.Request(f"{self.url}{path}", headers=headers)
        with opener.open(request, timeout=self._timeout) as response:
            return json.load(response)


ERRORS = (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError)
"""What asking a server raises that is absent, refuses or answers nonsense."""


class _Probe:
    """Asks one management API, and remembers which workers it has seen."""

    def __init__(self, management: Management, min_workers: int | None) -> None:
        self._management, self._min_workers = management, min_workers
        self._pids: dict[str, set[int]] = {}

    def ask(self, model: str | Sequence[str] | None, statuses: Sequence[Status]) -> Readiness:
        try:
            names = self._management.names(model)
            missing = [] if names else ["no model is registered"]
            for name in names:
                own = [status for status in statuses if status.model == name]
                missing += self._missing(name, own)
        except ERRORS as error:
            missing = [self._management.explain(error)]
        return Readiness(not missing, missing)

    def _missing(self, name: str, statuses: Sequence[Status]) -> list[str]:
        described = self._management.describe(name)
        if described is None:
            return [f"{name}: not registered"]
        wanted, workers = wanted_workers(described, self._min_workers), described["workers"]
        pids = self._pids.setdefault(name, set())
        restarts = count_restarts(workers, statuses, pids)
        num_ready = [worker["status"] for worker in workers].count(READY)
        if num_ready >= wanted:
            return []
        # TorchServe calls every worker that is not READY "UNLOADING", above all those that load.
        by_pid = {status.pid: status for status in statuses}
        others = {
            doing(by_pid.get(worker.get("pid"))) for worker in workers if worker["status"] != READY
        }
        if restarts > 0:
            others.add(f"restarted {restarts} {'time' if restarts == 1 else 'times'}; see its log")
        detail = f" ({', '.join(sorted(others))})" if others else ""
        reason = failure(statuses)
        return [
            f"{name}: {num_ready} of {wanted} workers {READY}{detail}",
            *([reason] if reason else []),
        ]


def wanted_workers(described: Mapping[str, Any], at_least: int | None = None) -> int:
    """How many of the workers of a model must be READY."""
    return max(int(described["minWorkers"]), at_least or 0, 1)


def count_restarts(
    workers: Sequence[Mapping[str, Any]], statuses: Sequence[Status], pids: set[int]
) -> int:
    """How many workers more than there are now have been seen; `pids` are those seen before, and
    take the new ones.
    """
    pids.update(pid for worker in workers if (pid := worker.get("pid") or 0) > 0)
    pids.update(status.pid for status in statuses)
    return max(0, len(pids) - len(workers))


def doing(status: Status | None) -> str:
    """What a worker that is not READY does, for all that is known."""
    # it died; another takes its place
    if status is None or status.state not in ("loading", "warming"):
        return "loading"
    return f"{status.state} {status.done}/{status.total}" if status.total else status.state


def _refusal(error: urllib.error.HTTPError) -> str:
    text = error.read(2000).decode("utf-8", "replace")
    if "oken" in text:
        return "the management API wants a token that is right and not expired"
    return f"the management API answers {error.code}: {text.strip()}"
