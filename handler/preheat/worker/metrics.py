"""The worker's metrics, emitted through TorchServe and declared in `archive/metrics.yaml`.

TorchServe 0.12 drops a metric whose name, type or dimensions differ from the declaration, adds up
counters over workers and lets gauges of several workers overwrite each other; so what matters is a
counter.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from time import perf_counter, time
from typing import Protocol, TypeAlias

from preheat.models.batching import Outcome, RunReport
from preheat.worker.state import ServerState

logger = logging.getLogger(__name__)

Arrival: TypeAlias = float
"""When a request came, by this process's `perf_counter`."""


class Sink(Protocol):
    """Where a sample goes; `dimensions` are label names and values in the declared order."""

    def __call__(
        self, kind: str, name: str, value: float, unit: str, dimensions: Mapping[str, str]
    ) -> None: ...


COUNTERS = tuple(
    f"preheat_{name}_total"
    for name in (
        "compiles_since_ready",
        "incidents",
        "eager_fallbacks",
        "planned_eager",
        "rows_painted",
        "rows_filled",
        "pixels_painted",
        "pixels_cropped",
        "flagged",
    )
)
"""Those without labels of their own."""
BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)
"""Seconds, of `preheat_request_seconds`: TorchServe's own histograms end at 10."""
LONGEST_WAIT = 3600.0
"""Seconds. A start that is said to be longer ago, or to come, is a clock that is wrong."""
START_HEADER = "x-request-start"
"""Set by a proxy in front when it got the request: `t=` and seconds since the epoch, as nginx
writes `t=${msec}`, or milli- or microseconds, as others do."""


class Metrics:
    """Counts since READY; every counter is announced with 0, so that "none" can be told from "not
    exported".
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._buckets: frozenset[str] = frozenset()
        self._fields: frozenset[str] = frozenset({"body"})
        self._announced: set[str] = set()
        self._compiles_reported = 0

    def expect(self, buckets: Collection[str], fields: Collection[str]) -> None:
        """Name the buckets and the request's fields that may be labels; a client's own words never
        are.
        """
        self._buckets, self._fields = frozenset(buckets), frozenset({"body", *fields})

    def start(self) -> None:
        """A worker begins to load: more than were scaled to means that some died."""
        self._sink("counter", "preheat_worker_starts_total", 1, "count", {})

    def ready(self, state: ServerState) -> None:
        """Announce the counters and say what warm-up cost."""
        for name in COUNTERS:
            self._sink("counter", name, 0, "count", {})
        for bucket in self._buckets:
            self._announce(bucket)
        # The rows of several targets in one bucket and batch size share the time of their warm-up.
        distinct = {(row.bucket, row.batch_size): row for row in state.buckets}
        seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
        for row in distinct.values():
            seconds[str(row.bucket), row.cache] += row.warm_seconds
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

    def answered(self, answer: Outcome) -> None:
        """One request that was served."""
        self._count("preheat_incidents_total", answer.unwarmed)
        self._count("preheat_eager_fallbacks_total", answer.is_fallback)
        self._count("preheat_planned_eager_total", answer.job.bypass)
        labels = {"Bucket": self._label(answer.bucket), "Engine": answer.engine}
        self._count("preheat_requests_total", 1, labels)
        self._count("preheat_pixels_painted_total", answer.num_computed)
        self._count("preheat_pixels_cropped_total", answer.num_padding)
        self._count("preheat_flagged_total", answer.num_flagged)

    def refused(self, field: str | None) -> None:
        """One request that was not legal. An unknown field's name is a client's text: neither label
        nor log line.
        """
        name = field if field in self._fields else "other"
        self._count("preheat_refused_total", 1, {"Field": name})
        logger.info("refused a request for its field %s", name)

    def failed(self, code: int) -> None:
        """One legal request that got no answer: 500, 503 (put off), 504 or 507; or, computed but
        too large, 413 or 406 (another form of it would not be).
        """
        self._count("preheat_failed_total", 1, {"Code": str(code)})

    def took(self, headers: Mapping[str, str]) -> Arrival:
        """The worker has this request now."""
        now, wall = perf_counter(), time()
        waited = wall - _start(headers.get(START_HEADER, ""), wall)
        return now - waited if 0 <= waited <= LONGEST_WAIT else now

    def left(self, arrivals: Sequence[Arrival], buckets: Sequence[str | None]) -> None:
        """The answers of a batch are ready to go, each from its bucket, None where it is not good:
        how long the others took, in counters that add up as a Prometheus histogram does.

        A line each through TorchServe's log, so they are added up over the batch first.
        """
        now, spans = perf_counter(), dict[str, list[float]]()
        for arrival, bucket in zip(arrivals, buckets, strict=True):
            if bucket is not None:
                spans.setdefault(self._label(bucket), []).append(now - arrival)
        for bucket, seconds in spans.items():
            self._announce(bucket)
            for bound in (*BOUNDS, inf):
                num = sum(each <= bound for each in seconds)
                if num:  # each emission is a line through TorchServe's log
                    self._within(bucket, bound, num)
            total = round(sum(seconds), 6)
            self._sink("counter", "preheat_request_seconds_sum", total, "s", {"Bucket": bucket})

    def _announce(self, bucket: str) -> None:
        """Every bound with 0: of a histogram that begins at a later one PromQL takes all below it
        for possible.
        """
        if bucket not in self._announced:
            self._announced.add(bucket)
            for bound in (*BOUNDS, inf):
                self._within(bucket, bound, 0)

    def _within(self, bucket: str, bound: float, num: int) -> None:
        labels = {"Bucket": bucket, "le": "+Inf" if bound == inf else f"{bound:g}"}
        self._sink("counter", "preheat_request_seconds_bucket", num, "count", labels)

    def _label(self, bucket: str) -> str:
        """A size that is no bucket is a client's own: as a label it would be one more time series
        each.
        """
        return bucket if bucket in self._buckets else "none"

    def state(self, state: ServerState) -> None:
        """After a batch: what the watch has seen, and the memory peak."""
        self._count(
            "preheat_compiles_since_ready_total",
            state.compiles_since_ready - self._compiles_reported,
        )
        self._compiles_reported = state.compiles_since_ready
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


def _start(text: str, otherwise: float) -> float:
    """Seconds since the epoch in a proxy's header; `otherwise` where it has none."""
    try:
        number = float(text.strip().removeprefix("t="))
    except ValueError:
        return otherwise
    for unit in (1e6, 1e3):
        if number > unit * 1e9:  # in seconds it would be after the year 30000
            return number / unit
    return number


def discard(kind: str, name: str, value: float, unit: str, dimensions: Mapping[str, str]) -> None:
    """A sink for where nobody listens."""
