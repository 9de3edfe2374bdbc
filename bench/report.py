"""The bench's result: what was measured per strategy as numbers, as a JSON file, a picture and a
table.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.table import Table

from bench.rounds import Spread, doubts

FROM_STATE = (
    "compiles_at_boot",
    "compiles_since_ready",
    "incidents",
    "eager_fallbacks",
    "planned_eager",
    "peak_memory_bytes",
)
"""What `GET /models/{name}?customized=true` says after the last request."""
BLUE, RED = "#9db4c8", "#c0392b"
MOST_DECIBELS = 99.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's fate.

    Args:
        painted_pixels: that the model computed.
        padding: the share of them that was computed in vain.
        size: asked for, (height, width) in pixels.
        decibels: PSNR against what diffusers alone paints, where that is known.
    """

    milliseconds: float
    status: int
    painted_pixels: int = 0
    padding: float = 0.0
    engine: str = ""
    size: tuple[int, int] = (0, 0)
    bucket: str = ""
    decibels: float | None = None

    @property
    def good(self) -> bool:
        return self.status == 200


Rounds = Sequence[Sequence[Answer]]


@dataclass(frozen=True, slots=True)
class Measured:
    """One strategy under one traffic. Seconds to READY count from the start of the server's
    process.
    """

    ready_seconds: float
    rounds: Rounds
    state: Mapping[str, Any]
    num_requests: int
    """Asked for in all rounds; fewer answers mean that the profile's time was up."""
    config: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"

    @property
    def answers(self) -> list[Answer]:
        return [answer for each in self.rounds for answer in each]


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks, as numpy does it."""
    return float(np.percentile(values, percent))


def decibels(picture: NDArray[Any], expected: NDArray[Any]) -> float:
    """PSNR of pixels from 0 to 255; those that are equal have `MOST_DECIBELS`."""
    error = float(np.mean((picture.astype(np.float64) - expected.astype(np.float64)) ** 2))
    return min(MOST_DECIBELS, 10 * math.log10(255**2 / error)) if error else MOST_DECIBELS


def summary(
    measured: Measured, eager: Measured | None, first: Measured | None = None
) -> dict[str, Any]:
    """One strategy's numbers. Only good answers count for latency and throughput.

    `eager` is the row that this one is compared with, of the same dtype; `first` is eager in the
    first dtype.
    """
    answers = measured.answers
    good = [answer for answer in answers if answer.good]
    row: dict[str, Any] = {name: measured.state.get(name) for name in FROM_STATE}
    row |= {
        "dtype": measured.dtype,
        "ready_seconds": round(measured.ready_seconds, 1),
        "initialize_seconds": measured.state.get("ready_seconds"),
        "answered": len(good),
        "failed": len(answers) - len(good),
        "not_sent": measured.num_requests - len(answers),
        "engines": dict(Counter(answer.engine for answer in good)),
        "config": dict(measured.config),
        "milliseconds": [
            [round(answer.milliseconds, 1) if answer.good else None for answer in each]
            for each in measured.rounds
        ],
    }
    if not good:
        return row
    took = [answer.milliseconds for answer in good]
    p50, p95, p99 = (percentile(took, percent) for percent in (50, 95, 99))
    areas = [float(answer.painted_pixels) for answer in good]
    return row | {
        "p50_ms": round(p50, 1),
        "p95_ms": round(p95, 1),
        "p99_ms": round(p99, 1),
        "max_ms": round(max(took), 1),
        "p99_over_p50": round(p99 / p50, 2),
        "p99_over_p50_in_a_bucket": _within_buckets(good),
        "p99_over_p50_of_areas": round(percentile(areas, 99) / percentile(areas, 50), 2),
        "requests_per_second": round(1000 * len(good) / sum(took), 3),
        "throughput_over_eager": _over_eager(measured, eager),
        "x_eager": _as_json(Spread.of(_ratios(measured, eager))),
        "x_first_eager": _as_json(Spread.of(_ratios(measured, first))),
        "slowest_size_x_eager": _slowest_size(measured, eager),
        "padded_share": round(_padded_share(good), 4),
        "psnr_db": _psnr(good),
    }


def doubtful(runs: Mapping[str, Measured], eager: Mapping[str, Measured]) -> list[str]:
    """What the rounds of one traffic do not agree on: the ratios, and the machine itself.

    `eager` holds the row of each dtype.
    """
    spreads = {
        f"{name} over eager": Spread.of(_ratios(run, eager.get(run.dtype)))
        for name, run in runs.items()
    }
    for dtype, run in eager.items():
        spreads[f"eager {dtype} itself"] = Spread.of(
            [sum(answer.milliseconds for answer in each) for each in _whole_rounds(run)]
        )
    return doubts(spreads)


def bound(
    row: Mapping[str, Any], eager: Mapping[str, Any], same: Mapping[str, Any]
) -> float | None:
    """What a strategy can at best reach under user-made sizes, as a multiple of eager: what it
    reaches where nothing is computed in vain (`same`, its row under the buckets' own sizes), less
    what both compute in vain here.
    """
    if not all(each.get("x_eager") for each in (row, eager, same)):
        return None
    kept = (1 - float(row["padded_share"])) / (1 - float(eager["padded_share"]))
    return round(float(same["x_eager"]["median"]) * kept, 3)


def write(document: Mapping[str, Any], folder: Path) -> None:
    """`traffic.json` and, once a strategy has been answered, `traffic.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"\[\n[^][{}]*\]", on_one_line, json.dumps(document, indent=1))
    (folder / "traffic.json").write_text(text + "\n", encoding="utf-8")
    if any(answered(traffic) for traffic in document["traffics"].values()):
        draw(document, folder / "traffic.png")


def on_one_line(found: re.Match[str]) -> str:
    """A list of plain values, which json would give a line each. No JSON string has a line end."""
    return re.sub(r"\n\s*", " ", found[0]).replace("[ ", "[", 1)[:-2] + "]"


def table(document: Mapping[str, Any], traffic: str) -> Table:
    """One traffic's result for a terminal of 120 columns."""
    title = f"{document['profile']}, {traffic}: {headline(document)}"
    table = Table(title=title, box=SIMPLE, padding=0)
    table.add_column("strategy", no_wrap=True)
    for heading in (*COLUMNS, "answers"):
        table.add_column(heading, justify="right", no_wrap=True)
    shown = document["traffics"][traffic]
    for name, row in shown["strategies"].items():
        if "error" in row:
            table.add_row(name, "failed")
            continue
        cells = [cell(row) for cell in COLUMNS.values()]
        asked = document["rounds"] * shown["requests"]["num_requests"]
        cells.append(f"{row['answered']}/{asked}")
        table.add_row(name, *("-" if cell is None else str(cell) for cell in cells))
    return table


def _ratio(row: Mapping[str, Any]) -> str | None:
    """The median of the rounds, and from where to where they go."""
    spread = row.get("x_eager")
    return spread and f"{spread['median']:.2f} ({spread['low']:.2f}-{spread['high']:.2f})"


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.0%}"


COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "READY\ns": lambda row: row["ready_seconds"],
    "com-\npiles": lambda row: f"{row['compiles_at_boot']}+{row['compiles_since_ready']}",
    "p50\nms": lambda row: row.get("p50_ms"),
    "p99": lambda row: row.get("p99_ms"),
    "p99/\np50": lambda row: row.get("p99_over_p50"),
    "x eager": _ratio,
    "bound": lambda row: row.get("x_eager_bound"),
    "slow-\nest": lambda row: row.get("slowest_size_x_eager"),
    "in\nvain": lambda row: _share(row.get("padded_share")),
    "PSNR\ndB": lambda row: (row.get("psnr_db") or {}).get("median"),
}
"""What the table shows of a row."""


def headline(document: Mapping[str, Any]) -> str:
    """Machine and versions in a line."""
    machine, versions = document["machine"], document["versions"]
    gpus = (
        [f"{gpu['name']}, driver {gpu['driver']}" for gpu in machine["gpus"]]
        if document["on_gpu"]
        else []
    )
    where = gpus[0] if gpus else f"{machine['cpu']}, {machine['num_cores']} cores"
    return f"{where}, torch {versions['torch']}"


def draw(document: Mapping[str, Any], path: Path) -> None:
    """A row of three panels for each traffic, a line for each strategy: every request's latency,
    compiles before and after READY, seconds to READY.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {name: answered(one) for name, one in document["traffics"].items() if answered(one)}
    heights = [1.2 + 0.62 * len(rows) for rows in shown.values()]
    figure = Figure(figsize=(13, 0.8 + sum(heights)), layout="constrained")
    grid = figure.subplots(
        len(shown), 3, sharey="row", width_ratios=[5, 2, 2], height_ratios=heights, squeeze=False
    )
    for (latency, compiles, ready), (traffic, rows) in zip(grid, shown.items(), strict=True):
        _draw_latency(latency, rows)
        counted = {"compiles_at_boot": "at boot", "compiles_since_ready": "inside requests"}
        _draw_bars(compiles, rows, counted)
        compiles.set_xlabel("compile events")
        compiles.legend(
            fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False
        )
        _draw_bars(ready, rows, {"ready_seconds": "to READY"})
        ready.set_xlabel("seconds from start to READY")
        latency.set_yticks(range(len(rows)), list(rows))
        latency.invert_yaxis()
        requests = document["traffics"][traffic]["requests"]
        latency.set_title(
            f"{traffic}: {document['rounds']} x {requests['num_requests']} requests, "
            f"{requests['num_distinct_sizes']} sizes",
            fontsize=10,
            loc="left",
        )
        for axes in (latency, compiles, ready):
            axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{document['profile']}: {document['steps']} steps, one at a time\n{headline(document)}",
        fontsize=10,
    )
    FigureCanvasAgg(figure).print_png(str(path))


def answered(traffic: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The strategies of which something was measured."""
    return {name: row for name, row in traffic["strategies"].items() if "p50_ms" in row}


def _draw_latency(axes: Any, rows: Mapping[str, Mapping[str, Any]]) -> None:
    from matplotlib.ticker import StrMethodFormatter

    rng = np.random.default_rng(0)  # the same scatter every time
    for place, row in enumerate(rows.values()):
        each = [value for values in row["milliseconds"] for value in values]
        took = np.array([value for value in each if value is not None]) / 1000
        axes.scatter(
            took,
            place + rng.uniform(-0.22, 0.22, len(took)),
            s=9,
            alpha=0.45,
            color="#2c6e9b",
            linewidths=0,
        )
        for key, colour in (("p50_ms", "#222222"), ("p99_ms", RED)):
            axes.plot(
                [row[key] / 1000] * 2, [place - 0.34, place + 0.34], color=colour, linewidth=1.6
            )
        axes.text(
            1.01, place, _beside(row), fontsize=8, va="center", transform=axes.get_yaxis_transform()
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("seconds per request, logarithmic (black: p50, red: p99)")


def _beside(row: Mapping[str, Any]) -> str:
    lines = [
        f"p99/p50 {row['p99_over_p50']:g}",
        f"{row['padded_share']:.0%} in vain, {row['peak_memory_bytes'] / 2**20:.0f} MiB",
    ]
    if row["x_eager"] is not None:
        lines.insert(1, f"{_ratio(row)} x eager")
    if row["not_sent"] or row["failed"]:
        lines.append(f"{row['not_sent']} not sent, {row['failed']} failed")
    return "\n".join(lines)


def _draw_bars(axes: Any, rows: Mapping[str, Mapping[str, Any]], keys: Mapping[str, str]) -> None:
    """One bar a strategy for each of `keys`, which maps the numbers to their labels."""
    thick = 0.7 / len(keys)
    for index, (key, label) in enumerate(keys.items()):
        places = np.arange(len(rows)) + (index - (len(keys) - 1) / 2) * thick
        bars = axes.barh(
            places,
            [row[key] for row in rows.values()],
            thick,
            label=label,
            color=(BLUE, RED)[index],
        )
        axes.bar_label(bars, padding=2, fontsize=8)
    axes.margins(x=0.2)


def _padded_share(good: Sequence[Answer]) -> float:
    generated = sum(answer.painted_pixels for answer in good)
    return (
        sum(answer.padding * answer.painted_pixels for answer in good) / generated
        if generated
        else 0.0
    )


def _psnr(good: Sequence[Answer]) -> dict[str, float] | None:
    known = [answer.decibels for answer in good if answer.decibels is not None]
    if not known:
        return None
    return {"median": round(percentile(known, 50), 1), "least": round(min(known), 1)}


def _within_buckets(good: Sequence[Answer]) -> float:
    """The worst p99/p50 among the buckets."""
    by_bucket: dict[str, list[float]] = {}
    for answer in good:
        by_bucket.setdefault(answer.bucket, []).append(answer.milliseconds)
    return round(max(percentile(t, 99) / percentile(t, 50) for t in by_bucket.values()), 2)


def _whole_rounds(measured: Measured) -> list[Sequence[Answer]]:
    """Those that were not cut short."""
    return [each for each in measured.rounds if len(each) == len(measured.rounds[0])]


def _pairs(measured: Measured, eager: Measured | None) -> list[list[tuple[Answer, Answer]]]:
    """By round, what both answered."""
    others = eager.rounds if eager is not None else ()
    return [
        [
            (mine, other)
            for mine, other in zip(each, theirs, strict=False)
            if mine.good and other.good
        ]
        for each, theirs in zip(measured.rounds, others, strict=False)
    ]


def _times(pairs: Sequence[tuple[Answer, Answer]]) -> float:
    """How many times as fast as the other."""
    mine, other = (sum(pair[place].milliseconds for pair in pairs) for place in (0, 1))
    return other / mine


def _ratios(measured: Measured, eager: Measured | None) -> list[float]:
    """Times as fast as eager, by round."""
    return [_times(pairs) for pairs in _pairs(measured, eager) if pairs]


def _slowest_size(measured: Measured, eager: Measured | None) -> float | None:
    """The least that any size gains over eager, in the median of the rounds."""
    by_size: dict[tuple[int, int], list[float]] = {}
    for pairs in _pairs(measured, eager):
        for size in {mine.size for mine, _ in pairs}:
            own = [pair for pair in pairs if pair[0].size == size]
            by_size.setdefault(size, []).append(_times(own))
    return round(min(map(statistics.median, by_size.values())), 3) if by_size else None


def _over_eager(measured: Measured, eager: Measured | None) -> float | None:
    """How many times as fast as eager, over all that both answered; None where there is nothing to
    compare.
    """
    both = [pair for pairs in _pairs(measured, eager) for pair in pairs]
    return round(_times(both), 3) if both else None


def _as_json(spread: Spread | None) -> dict[str, float | int] | None:
    return None if spread is None else spread.to_json()
