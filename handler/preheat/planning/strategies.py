"""What each strategy would cost for a demand: seconds before READY, seconds a request, and from how
many requests on which is the cheapest.

What was not measured on the own machine is taken in proportion from docs/benchmarks.md, and said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, prod

from preheat.planning.cost import Curve, Measured
from preheat.planning.demand import Demand
from preheat.planning.plan import Choice

DOCUMENTED = "docs/benchmarks.md: a tiny SDXL with Inductor on two CPU cores"
_BUCKETS_PER_CELL = 2.575e-6
_PER_CELL = {"eager": 3.752e-6, "dynamic": 3.477e-6, "exact": 3.412e-6}
"""Seconds a request of four steps and square pixel, of `make bench-traffic`."""
_BUCKET_SECONDS = 23.1
"""To compile one bucket."""
_START_SECONDS = {"dynamic": 58.6, "exact": 145.2}
"""`exact` compiles inside requests, four times there."""
GRAPH_BYTES = 41 * 2**20
"""A bucket's compiled code, of the tiny UNet."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds by which strategies are compared."""

    requests: Mapping[str, Curve]
    """By strategy: of a request, by the cells that are computed for it."""
    bucket_seconds: float
    """Of warm-up, for each bucket."""
    start_seconds: Mapping[str, float]
    measured: frozenset[str]
    """The strategies whose seconds a request were measured."""
    warm_up_measured: bool = False
    from_cache: bool = False
    """Whether that warm-up found compiled code."""
    peak_bytes: int = 0
    """Of the worker that was measured; 0: of none."""
    num_buckets: int = 0
    """That it had."""

    @classmethod
    def of(cls, states: Sequence[Measured], steps: int) -> Rates:
        """From what workers have measured; requests take `steps` denoising steps."""
        by_strategy = {state.strategy: state for state in states}
        own = by_strategy.get("buckets") or by_strategy.get("fixed")
        rates = {"buckets": _BUCKETS_PER_CELL, **_PER_CELL}
        curves = {name: state.seconds for name, state in by_strategy.items() if name in rates}
        if own is not None:
            curves |= {"buckets": own.seconds, "eager": own.eager_seconds}
        measured = {name: curve.scaled(steps) for name, curve in curves.items() if curve}
        base = next((name for name in ("buckets", "eager") if name in measured), None)
        if base is None:
            filled = {name: Curve(per_cell=rate) for name, rate in rates.items()}
        else:
            filled = {
                name: measured.get(name) or measured[base].scaled(rate / rates[base])
                for name, rate in rates.items()
            }
        warm = own.warm_seconds if own is not None else None
        bucket_seconds = warm or _BUCKET_SECONDS
        starts = {n: s / _BUCKET_SECONDS * bucket_seconds for n, s in _START_SECONDS.items()}
        dynamic = by_strategy.get("dynamic")
        if dynamic is not None and dynamic.warm_seconds:
            starts["dynamic"] = dynamic.warm_seconds * dynamic.num_buckets
        return cls(
            filled,
            bucket_seconds,
            starts,
            frozenset(measured),
            warm is not None,
            own is not None and own.from_cache,
            own.peak_memory_bytes if own is not None else 0,
            own.num_buckets if own is not None else 0,
        )

    def warm_up(self, num_buckets: int) -> float:
        """Seconds of a cold start's warm-up."""
        return num_buckets * self.bucket_seconds

    def memory(self, num_buckets: int) -> int:
        """Bytes: of a worker, in proportion to what was measured; else of the compiled code alone,
        on top of the eager model.
        """
        return self.peak_bytes + (num_buckets - self.num_buckets) * GRAPH_BYTES


@dataclass(frozen=True, slots=True)
class Row:
    """One strategy for this demand."""

    strategy: str
    start_seconds: float
    """What is compiled, before READY or (`exact`) inside requests."""
    request_seconds: float
    """The mean."""
    computed_cells: int
    measured: bool
    note: str


def compare(demand: Demand, choice: Choice, rates: Rates, multiple: int) -> list[Row]:
    """A row for each strategy that serves such a demand."""
    rounded, number = demand.rounded(multiple), demand.num_requests
    own_cells = sum(count * prod(sizes) for sizes, count in rounded.items())

    def mean(curve: Curve) -> float:
        return sum(count * curve(prod(sizes)) for sizes, count in rounded.items()) / number

    def row(name: str, start: float, seconds: float, cells: int, note: str) -> Row:
        known = "buckets" if name == "fixed" else name
        return Row(name, start, seconds, cells, known in rates.measured, note)

    rows = [row("eager", 0.0, mean(rates.requests["eager"]), own_cells, "nothing is compiled")]
    seconds = _in_buckets(demand, choice, rates, multiple) / number
    cells = choice.usage.computed_cells + choice.usage.left_cells
    start = rates.warm_up(len(choice.buckets))
    note = f"{len(choice.buckets)} buckets"
    if choice.usage.left:
        note += f", {choice.usage.left_share:.1%} of the requests uncompiled"
    rows.append(row("buckets", start, seconds, cells, note))
    if demand.is_picture:
        one = _median(rounded)
        fixed = rates.requests["buckets"](prod(one))
        note = f"every picture resampled from {demand.bucket(one)}"
        rows.append(row("fixed", rates.warm_up(1), fixed, number * prod(one), note))
    if demand.is_picture or len(demand.names) == 1:
        start, note = rates.start_seconds["dynamic"], "one graph, sizes as asked"
        rows.append(row("dynamic", start, mean(rates.requests["dynamic"]), own_cells, note))
    note = "compiles inside requests: they wait"
    start = rates.start_seconds["exact"]
    rows.append(row("exact", start, mean(rates.requests["exact"]), own_cells, note))
    return rows


def cheapest(rows: Sequence[Row]) -> list[tuple[str, float]]:
    """The strategies that are the cheapest for some number of requests, and from how many on;
    those that give the asked size as the model makes it (not `fixed`).
    """
    lines = [(row.request_seconds, row.start_seconds, row.strategy) for row in rows]
    lines = [line for line in lines if line[2] != "fixed"]
    marks = {0.0}
    for one in lines:
        for other in lines:
            if one[0] < other[0] and one[1] > other[1]:
                marks.add((one[1] - other[1]) / (other[0] - one[0]))
    ends = [*sorted(marks), inf]
    found: list[tuple[str, float]] = []
    for begin, end in pairwise(ends):
        middle = begin + 1 if end == inf else (begin + end) / 2
        name = min(lines, key=lambda line: line[1] + middle * line[0])[2]
        if not found or found[-1][0] != name:
            found.append((name, begin))
    return found


def _in_buckets(demand: Demand, choice: Choice, rates: Rates, multiple: int) -> float:
    """Seconds of all requests, of which those that are left run eagerly at their own size."""
    total = 0.0
    buckets = sorted(choice.buckets, key=lambda bucket: (bucket.volume, bucket.sizes))
    for sizes, count in demand.rounded(multiple).items():
        size = demand.bucket(sizes)
        bucket = next((bucket for bucket in buckets if bucket.covers(size)), None)
        curve = rates.requests["eager" if bucket is None else "buckets"]
        total += count * curve((bucket or size).volume)
    return total


def _median(counts: Mapping[tuple[int, ...], int]) -> tuple[int, ...]:
    """The middle of each side over all requests."""
    middles = []
    for side in range(len(next(iter(counts)))):
        seen, half = 0, sum(counts.values()) / 2
        for sizes, count in sorted(counts.items(), key=lambda item: item[0][side]):
            seen += count
            if seen >= half:
                middles.append(sizes[side])
                break
    return tuple(middles)
