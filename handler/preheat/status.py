"""How far a worker is and what it serves: the status file it writes, and what others read in it.

Standard library only: `preheat ready` runs as a probe every few seconds.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

STATUS_DIR_VARIABLE = "PREHEAT_STATUS_DIR"
INTERVAL = 0.5
"""Seconds between what a worker that serves writes: a busy disk took 10 ms for one."""
SIZES_INTERVAL = 30.0
"""Seconds between what it writes of asked sizes, which may be 200 kB; the first are written after
`INTERVAL`."""
SIZES_SUFFIX = ".sizes"


class _Soon:
    """Calls `write` in a thread of its own some seconds after it is asked to, once for all who ask
    meanwhile: no request waits for the disk.
    """

    def __init__(self, write: Callable[[], None]) -> None:
        self._write = write
        self._timer: threading.Timer | None = None

    def ask(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = threading.Timer(seconds, self._run)
            self._timer.daemon = True
            self._timer.start()

    def _run(self) -> None:
        self._timer = None  # what comes from now on is written by the next one
        self._write()


class StatusFile:
    """A worker's progress as a small JSON file, replaced atomically; nothing is written where no
    folder is given.
    """

    def __init__(self, folder: str | None, model: str) -> None:
        self._path = Path(folder) / f"{model}-{os.getpid()}.json" if folder else None
        self._document: dict[str, Any] = {
            "model": model,
            "pid": os.getpid(),
            "started": time.time(),
            "state": "loading",
            "total": 0,
            "done": 0,
        }
        self._buckets: dict[str, dict[str, Any]] = {}
        self._writing = threading.RLock()  # a disk may be slower than INTERVAL
        self._served: Callable[[], Mapping[str, Any]] | None = None
        self._sizes: Callable[[], Mapping[str, Any]] | None = None
        self._served_soon, self._sizes_soon = _Soon(self._write_served), _Soon(self._write_sizes)

    @classmethod
    def from_environment(cls, model: str) -> StatusFile:
        return cls(os.environ.get(STATUS_DIR_VARIABLE), model)

    def plan(self, variants_per_bucket: Mapping[str, int]) -> None:
        """Announce how many variants each bucket has, in the order they will be warmed."""
        self._buckets = {
            bucket: {"bucket": bucket, "total": total, "done": 0, "seconds": self._seconds(bucket)}
            for bucket, total in variants_per_bucket.items()
        }
        self.write("warming")

    def _seconds(self, bucket: str) -> float:
        """What an earlier plan has spent on it: warm-up plans anew where a package fails."""
        seconds: float = self._buckets.get(bucket, {}).get("seconds", 0.0)
        return seconds

    def step(self, bucket: str, seconds: float) -> None:
        row = self._buckets[bucket]
        row["done"] += 1
        row["seconds"] = round(row["seconds"] + seconds, 3)
        self.write("warming")

    def fail(self, message: str, *, lasting: bool) -> None:
        """The worker ends here; `lasting`: TorchServe's next one would, too."""
        with self._writing:
            self._document["lasting"] = lasting
            self.write("failed", message)

    def serve(self, state: Callable[[], Mapping[str, Any]]) -> None:
        """The worker serves, or has answered a batch: the file holds its whole state from now on,
        at the latest `INTERVAL` later. Apart from the first time no request waits for it: it is
        asked for, and written, in a thread of its own.
        """
        first, self._served = self._served is None, state
        if first:
            self._write_served()
        elif self._path is not None:
            self._served_soon.ask(INTERVAL)

    def _write_served(self) -> None:
        assert self._served is not None
        with self._writing:
            served = self._served()
            self._document["served"] = served
            self.write(served["state"])

    def keep_sizes(self, document: Callable[[], Mapping[str, Any]]) -> None:
        """A size was asked for: what `document` then gives is written soon, to a file of its
        own.
        """
        first, self._sizes = self._sizes is None, document
        if self._path is not None:
            self._sizes_soon.ask(INTERVAL if first else SIZES_INTERVAL)

    def _write_sizes(self) -> None:
        assert self._path is not None and self._sizes is not None
        with self._writing:
            sizes = {"model": self._document["model"], **self._sizes()}
            _replace(self._path.with_suffix(SIZES_SUFFIX), sizes)

    def write(self, state: Phase, message: str = "") -> None:
        rows = list(self._buckets.values())
        with self._writing:
            self._document |= {
                "state": state,
                "total": sum(row["total"] for row in rows),
                "done": sum(row["done"] for row in rows),
                "buckets": rows,
                "message": message,
            }
            if self._path is not None:
                _replace(self._path, self._document)


def padding_warning(padding: Mapping[str, Any]) -> str | None:
    """What a module's `padding`, as its state has it, means for who asks it; None where padding
    changes no more than rounding, or nothing was measured.
    """
    if padding.get("exact") != "padded":
        return None
    share = padding["max_share"]
    how_far = (
        f"by up to {share:.2g} of the largest magnitude"
        if isinstance(share, float)
        else "into what is not finite"
    )
    return (
        f"padding changes answers {how_far}; a mask input with default: 1, padded with 0, would "
        "let the module see it"
    )


Phase = Literal["loading", "warming", "hot", "cold", "failed"]
"""`cold`: serving without warm-up (`strategy: exact`)."""


class Status(NamedTuple):
    """What one worker last wrote about its warm-up; `buckets` are its parts, as (name, done, total,
    seconds).
    """

    model: str
    pid: int
    state: str
    done: int
    total: int
    buckets: tuple[tuple[str, int, int, float], ...]
    message: str
    written: float
    lasting: bool = False
    """Of a failure: the next worker would fail alike."""
    started: float = 0.0
    """Seconds since the epoch."""
    served: Mapping[str, Any] = {}
    """The worker's state after READY, as of its last batch; empty before."""

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Of the buckets, once they are served."""
        rows: dict[str, list[Mapping[str, Any]]] = {}
        for row in self.served.get("buckets", ()):
            rows.setdefault(row["bucket"], []).append(row)
        return tuple(Engine(bucket, _engine(own), _reason(own)) for bucket, own in rows.items())

    @property
    def alive(self) -> bool:
        return Path("/proc", str(self.pid)).exists()


def read_statuses(folder: Path) -> list[Status]:
    """What the workers wrote to `folder` ($PREHEAT_STATUS_DIR), oldest first; unreadable files are
    left out.
    """
    statuses = []
    for path in folder.glob("*.json"):
        try:
            statuses.append(_status(json.loads(path.read_bytes()), path.stat().st_mtime))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # gone meanwhile, or not a worker's
    return sorted(statuses, key=lambda status: status.written)


def read_sizes(folder: Path) -> dict[str, list[Mapping[str, Any]]]:
    """What the workers in `folder` were asked for, those that are gone included, by model; in the
    form of the state's `asked_sizes`.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for path in sorted(folder.glob(f"*{SIZES_SUFFIX}")):
        try:
            document = json.loads(path.read_bytes())
            found.setdefault(str(document["model"]), []).append(document)
        except (OSError, ValueError, LookupError, TypeError):
            continue  # gone meanwhile, or not a worker's
    return found


def _replace(path: Path, document: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.tmp")
    scratch.write_text(json.dumps(document))
    scratch.replace(path)


def _status(data: Mapping[str, Any], written: float) -> Status:
    return Status(
        model=str(data["model"]),
        pid=int(data["pid"]),
        state=str(data["state"]),
        done=int(data["done"]),
        total=int(data["total"]),
        buckets=tuple(
            (b["bucket"], b["done"], b["total"], b.get("seconds") or 0.0) for b in data["buckets"]
        ),
        message=str(data.get("message") or ""),
        written=written,
        lasting=bool(data.get("lasting")),
        started=float(data.get("started", 0)),
        served={**data.get("served", {})},
    )


def failure(statuses: Sequence[Status]) -> str | None:
    """What to say of the worker that `failed`."""
    status = failed(statuses)
    return f"{status.model}: worker {status.pid} failed: {status.message}" if status else None


class Engine(NamedTuple):
    """What serves a bucket; `reason`: why that is eager code although compiling was asked for."""

    bucket: str
    engine: str
    reason: str


def failed(statuses: Sequence[Status]) -> Status | None:
    """The worker that failed, if no later one of its model has got further; `statuses` are oldest
    first.

    TorchServe starts another at once. That it loads says nothing where the fault is lasting, and
    all else where it is not.
    """
    for model in dict.fromkeys(status.model for status in statuses):
        own = [status for status in statuses if status.model == model]
        told = [status for status in own if status.state != "loading"]
        if told and told[-1].state == "failed" and (told[-1].lasting or told[-1] is own[-1]):
            return told[-1]
    return None


def _reason(rows: Sequence[Mapping[str, Any]]) -> str:
    return next((row["reason"] for row in rows if row["engine"] == "eager" and row["reason"]), "")


def _engine(rows: Sequence[Mapping[str, Any]]) -> str:
    """The one engine of rows that agree; else each target with its own, such as `unet compiled,
    vae.decoder eager`.
    """
    by_target: dict[str, list[str]] = {}
    for row in rows:
        engines = by_target.setdefault(row["target"], [])
        if row["engine"] not in engines:
            engines.append(row["engine"])
    texts = {target: " or ".join(engines) for target, engines in by_target.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return ", ".join(f"{target} {text}" for target, text in texts.items())
