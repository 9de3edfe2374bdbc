"""The worker's metrics, emitted through TorchServe and declared in `archive/metrics.yaml`.

TorchServe 0.12 drops a metric whose name, type or dimensions differ from the declaration, adds up
counters over workers and lets gauges of several workers overwrite each other; so what matters is a
counter.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Protocol

from preheat.models.batching import RunReport
from preheat.worker.state import ServerState

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Where a sample goes; `dimensions` are label names and values in the declared order."""

    def __call__(
        self, kind: str, name: str, value: float, unit: str, dimensions: Mapping[str, str]
    ) -> None: ...


class Answered(Protocol):
    """What is counted of a request that was served."""

    @property
    def engine(self) -> str: ...

    @property
    def incident(self) -> bool: ...

    @property
    def is_fallback(self) -> bool: ...

    @property
    def is_planned_eager(self) -> bool: ...

    @property
    def bucket(self) -> str: ...

    @property
    def num_painted(self) -> int:
        """Pixels (elements, of a module's inputs) that the model computed for it."""

    @property
    def num_cropped(self) -> int:
        """Of those, how many were padding."""

    @property
    def num_flagged(self) -> int:
        """Pictures that a safety checker has blackened."""


class Metrics:
    """Counts since READY; every counter is announced with 0, so that "none" can be told from "not
    exported".
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._buckets: frozenset[str] = frozenset()
        self._fields: frozenset[str] = frozenset({"body"})
        self._compiles_told = 0

    def expect(self, buckets: Collection[str], fields: Collection[str]) -> None:
        """Name the buckets and the request's fields that may be labels; a client's own words never
        are.
        """
        self._buckets, self._fields = frozenset(buckets), frozenset({"body", *fields})

    def ready(self, state: ServerState) -> None:
        """Announce the counters and say what warm-up cost."""
        for name in (
            "preheat_compiles_since_ready_total",
            "preheat_incidents_total",
            "preheat_eager_fallbacks_total",
            "preheat_planned_eager_total",
            "preheat_rows_painted_total",
            "preheat_rows_filled_total",
            "preheat_pixels_painted_total",
            "preheat_pixels_cropped_total",
            "preheat_flagged_total",
        ):
            self._sink("counter", name, 0, "count", {})
        # The rows of several targets in one bucket and batch size share the time of their warm-up.
        distinct = {(row["bucket"], row["batch_size"]): row for row in state.buckets}
        seconds: Counter[tuple[str, str]] = Counter()
        for (bucket, _), row in distinct.items():
            seconds[bucket, row["cache"]] += row["warm_seconds"]
        for (bucket, cache), spent in seconds.items():
            self._sink(
                "gauge",
                "preheat_warm_seconds",
                round(spent, 3),
                "s",
                {"Bucket": bucket, "Cache": cache},
            )
        if state.shared_cache:
            outcome = str(state.shared_cache["outcome"])
            self._sink("counter", "preheat_shared_cache_total", 1, "count", {"Outcome": outcome})
        self._sink("gauge", "preheat_ready_seconds", state.ready_seconds, "s", {})

    def run(self, run: RunReport) -> None:
        """One call of the model."""
        self._sink("histogram", "preheat_inference_seconds", round(run.seconds, 6), "s", {})
        self._count("preheat_rows_painted_total", run.num_rows)
        self._count("preheat_rows_filled_total", run.num_rows - run.num_real_rows)

    def answered(self, answer: Answered) -> None:
        """One request that was served."""
        self._count("preheat_incidents_total", answer.incident)
        self._count("preheat_eager_fallbacks_total", answer.is_fallback)
        self._count("preheat_planned_eager_total", answer.is_planned_eager)
        # A size that is no bucket is a client's own: as a label it would be one more time series
        # each.
        bucket = answer.bucket if answer.bucket in self._buckets else "none"
        self._count("preheat_requests_total", 1, {"Bucket": bucket, "Engine": answer.engine})
        self._count("preheat_pixels_painted_total", answer.num_painted)
        self._count("preheat_pixels_cropped_total", answer.num_cropped)
        self._count("preheat_flagged_total", answer.num_flagged)

    def refused(self, field: str | None) -> None:
        """One request that was not legal. An unknown field's name is a client's text: neither label
        nor log line.
        """
        name = field if field in self._fields else "other"
        self._count("preheat_refused_total", 1, {"Field": name})
        logger.info("refused a request for its field %s", name)

    def failed(self, code: int) -> None:
        """One legal request that got no answer: 500, 503 (put off), 504 or 507."""
        self._count("preheat_failed_total", 1, {"Code": str(code)})

    def state(self, state: ServerState) -> None:
        """After a batch: what the watch has seen, and the memory peak."""
        self._count(
            "preheat_compiles_since_ready_total", state.compiles_since_ready - self._compiles_told
        )
        self._compiles_told = state.compiles_since_ready
        self._sink("gauge", "preheat_peak_memory_bytes", state.peak_memory_bytes, "B", {})

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Observe how long the block takes in the histogram `name`, in seconds."""
        started = perf_counter()
        yield
        self._sink("histogram", name, round(perf_counter() - started, 6), "s", {})

    def _count(self, name: str, value: int, dimensions: Mapping[str, str] | None = None) -> None:
        if value:  # each emission is a line through TorchServe's log
            self._sink("counter", name, int(value), "count", dimensions or {})


def discard(kind: str, name: str, value: float, unit: str, dimensions: Mapping[str, Any]) -> None:
    """A sink for where nobody listens."""
