"""A server from outside: each model with its workers, its queue and what serves its buckets.

Read from the management API's list and the workers' status files, neither of which waits for a
worker: one that compiles or runs a batch is shown as it is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preheat.status import Status
from preheat.torchserve.readiness import READY, Management, count_restarts, doing, wanted_workers


@dataclass(frozen=True, slots=True)
class BucketView:
    """What serves a target in a bucket at one batch size; a row of the worker's state."""

    bucket: str
    batch_size: int
    target: str
    engine: str
    reason: str
    """Why it is eager though compiling was asked for."""
    seconds_per_step: float


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker; what only its status file tells is None or empty where there is none."""

    id: str
    """TorchServe's, which the worker that takes its place keeps."""
    pid: int | None
    state: str
    """READY, or what it does instead: loading, warming 3/6."""
    uptime_seconds: float | None
    requests: int | None
    compiles_since_ready: int | None
    incidents: int | None
    eager_fallbacks: int | None
    padding: Mapping[str, Any]
    """What padding was measured to change in a module's outputs."""
    request_defaults: Mapping[str, Any]
    """What a picture gets that does not say; empty for others."""
    buckets: tuple[BucketView, ...]
    family: str = ""
    """`pipeline`, `module` or `text`."""


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model of a server."""

    model: str
    version: str
    """Of the archive."""
    preheat: str
    """Preheat's own; empty where no worker has told."""
    wanted: int
    """Workers that must be READY."""
    ready: int
    restarts: int
    """Workers more than there are now, as far as their status files are there."""
    batch_size: int
    """Requests that a worker takes together (`batchSize`)."""
    max_batch_delay: float
    """Seconds for which one waits for them."""
    queue: int | None
    """Requests that wait for a worker."""
    failure: str
    """Of the last worker that failed to start, while none has got further."""
    workers: tuple[WorkerView, ...]


def look(
    management: Management, model: str | Sequence[str] | None, statuses: Sequence[Status]
) -> list[ModelView]:
    """The models as they are now.

    Raises:
        readiness.ERRORS: the management API does not answer, or not as TorchServe's.
    """
    views = []
    for name in management.names(model):
        described = management.describe(name)
        if described is not None:
            views.append(_model(described, [each for each in statuses if each.model == name]))
    return views


def _model(described: Mapping[str, Any], statuses: Sequence[Status]) -> ModelView:
    workers, by_pid = described["workers"], {status.pid: status for status in statuses}
    told = [status.served["version"] for status in statuses if status.served]
    last = statuses[-1] if statuses else None
    return ModelView(
        model=described["modelName"],
        version=str(described.get("modelVersion", "")),
        preheat=told[-1] if told else "",
        wanted=wanted_workers(described),
        ready=[worker["status"] for worker in workers].count(READY),
        restarts=count_restarts(workers, statuses, set()),
        batch_size=int(described.get("batchSize", 1)),
        max_batch_delay=described.get("maxBatchDelay", 0) / 1000,
        queue=described.get("jobQueueStatus", {}).get("pendingRequests"),
        failure=last.message if last is not None and last.state == "failed" else "",
        workers=tuple(_worker(worker, by_pid.get(worker.get("pid"))) for worker in workers),
    )


def _worker(worker: Mapping[str, Any], status: Status | None) -> WorkerView:
    ready, pid = worker["status"] == READY, worker.get("pid") or 0
    if status is not None and not status.alive:
        status = None  # TorchServe has not noticed yet, or starts the next one
    served = status.served if status is not None else {}
    return WorkerView(
        id=str(worker.get("id", "")),
        pid=pid if pid > 0 else None,
        state=READY if ready else doing(status),
        uptime_seconds=round(time.time() - status.started, 1) if status is not None else None,
        requests=served.get("requests"),
        compiles_since_ready=served.get("compiles_since_ready"),
        incidents=served.get("incidents"),
        eager_fallbacks=served.get("eager_fallbacks"),
        padding=served.get("padding", {}),
        request_defaults=served.get("request_defaults", {}),
        buckets=tuple(_bucket(row) for row in served.get("buckets", ())),
        family=served.get("family", ""),
    )


def _bucket(row: Mapping[str, Any]) -> BucketView:
    return BucketView(
        bucket=row["bucket"],
        batch_size=row["batch_size"],
        target=row["target"],
        engine=row["engine"],
        reason=row["reason"],
        seconds_per_step=row["seconds_per_step"],
    )
