"""What a worker says about itself: the state that `GET /models/{name}?customized=true` returns, and the file that shows warm-up.

Both are plain data. The state answers "is it hot, and has it stayed hot"; the status file lets `preheat ready` draw progress
while `initialize()` runs, when TorchServe itself can only say "not ready".
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

STATUS_DIR_VARIABLE = "PREHEAT_STATUS_DIR"

Phase = Literal["loading", "warming", "hot", "cold", "failed"]
"""`cold`: serving without warm-up (`strategy: exact`)."""


@dataclass(slots=True)
class ServerState:
    """The design's state object. Counters count requests, not denoising steps."""

    version: str
    strategy: str
    state: Phase = "loading"
    fingerprint: str = ""
    shared_cache: Mapping[str, Any] = field(default_factory=dict)
    """outcome (loaded, published, unchanged, unshared), reason and waited_seconds; empty without `pt2.cache.shared`."""
    buckets: list[Mapping[str, Any]] = field(default_factory=list)
    """One row per bucket, batch size and target: height, width (pixels; `dims`, names and sizes, for a module), batch_size, target,
    engine, warm_seconds, cache, reason, seconds_per_step (as estimated now; of a module, of a run)."""
    unfit: Mapping[str, int] = field(default_factory=dict)
    """By kind of run, such as "1024x1024, text-to-image, guidance": the least batch size that did not fit into memory. Such runs are
    split into smaller ones."""
    padding: Mapping[str, Any] = field(default_factory=dict)
    """What padding was measured to change in a module's outputs: `max_error` and `max_share`, of
    the largest magnitude (or words), and `exact`, the header's word; empty for a pipeline."""
    warnings: list[str] = field(default_factory=list)
    """What the YAML says that loads and is hardly meant."""
    compiles_at_boot: int = 0
    compiles_since_ready: int = 0
    eager_fallbacks: int = 0
    """Requests that ran eagerly although compiled code was wanted: failed buckets and incidents."""
    incidents: int = 0
    """Requests that met a shape or guard nobody foresaw."""
    put_off: int = 0
    """Requests that their batch had no time left for: answered 503, not begun."""
    planned_eager: int = 0
    """Requests outside every bucket, served eagerly on purpose (`oversize: eager`)."""
    requests: int = 0
    ready_seconds: float = 0.0
    peak_memory_bytes: int = 0

    def document(self) -> dict[str, Any]:
        """The object under `customizedMetadata`."""
        return {"preheat": {name: getattr(self, name) for name in self.__slots__}}


def bucket_name(row: Mapping[str, Any]) -> str:
    """The bucket of a row of the state, as headers and metrics name it."""
    if "dims" in row:
        return " ".join(f"{name}={size}" for name, size in row["dims"].items()) or "fixed"
    return f"{row['height']}x{row['width']}"


class StatusFile:
    """A worker's progress as a small JSON file, replaced atomically; nothing is written where no folder is given."""

    def __init__(self, folder: str | None, model: str) -> None:
        self._path = Path(folder) / f"{model}-{os.getpid()}.json" if folder else None
        self._document: dict[str, Any] = {"model": model, "pid": os.getpid(), "state": "loading", "total": 0, "done": 0}
        self._buckets: dict[str, dict[str, Any]] = {}

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
        self._document["lasting"] = lasting
        self.write("failed", message)

    def finish(self, state: Phase, rows: Sequence[Mapping[str, Any]]) -> None:
        """The worker serves. Of the state's `rows`, each bucket keeps its engine and why it is eager though it should not be."""
        for bucket, row in self._buckets.items():
            own = [each for each in rows if bucket_name(each) == bucket]
            row["engine"] = _engine(own)
            row["reason"] = next((each["reason"] for each in own if each["engine"] == "eager" and each["reason"]), "")
        self.write(state)

    def write(self, state: Phase, message: str = "") -> None:
        rows = list(self._buckets.values())
        self._document |= {
            "state": state,
            "total": sum(row["total"] for row in rows),
            "done": sum(row["done"] for row in rows),
            "buckets": rows,
            "message": message,
        }
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self._path.with_suffix(".tmp")
        scratch.write_text(json.dumps(self._document))
        scratch.replace(self._path)


def _engine(rows: Sequence[Mapping[str, Any]]) -> str:
    """The one engine of rows that agree; else each target with its own, such as `unet compiled, vae.decoder eager`."""
    by_target: dict[str, list[str]] = {}
    for row in rows:
        engines = by_target.setdefault(row["target"], [])
        if row["engine"] not in engines:
            engines.append(row["engine"])
    texts = {target: " or ".join(engines) for target, engines in by_target.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return ", ".join(f"{target} {text}" for target, text in texts.items())
