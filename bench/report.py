"""The bench's result: what was measured per strategy as numbers, as a JSON file, a picture and a
table.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

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


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's fate. `padding` is the share of `painted_pixels` that was thrown away."""

    milliseconds: float
    status: int
    painted_pixels: int = 0
    padding: float = 0.0
    engine: str = ""

    @property
    def good(self) -> bool:
        return self.status == 200


@dataclass(frozen=True, slots=True)
class Measured:
    """One strategy's run. Seconds to READY count from the start of the server's process."""

    ready_seconds: float
    traffic_seconds: float
    answers: Sequence[Answer]
    state: Mapping[str, Any]
    num_requests: int
    """Asked for; fewer answers mean that the profile's time was up."""
    config: Mapping[str, Any] = field(default_factory=dict)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks, as numpy does it."""
    return float(np.percentile(values, percent))


def summary(measured: Measured, eager: Measured | None) -> dict[str, Any]:
    """One strategy's numbers. Only good answers count for latency and throughput."""
    good = [answer for answer in measured.answers if answer.good]
    row: dict[str, Any] = {name: measured.state.get(name) for name in FROM_STATE}
    row |= {
        "ready_seconds": round(measured.ready_seconds, 1),
        "initialize_seconds": measured.state.get("ready_seconds"),
        "answered": len(good),
        "failed": len(measured.answers) - len(good),
        "not_sent": measured.num_requests - len(measured.answers),
        "engines": dict(Counter(answer.engine for answer in good)),
        "config": dict(measured.config),
        "milliseconds": [
            round(answer.milliseconds, 1) if answer.good else None for answer in measured.answers
        ],
    }
    if not good:
        return row
    took = [answer.milliseconds for answer in good]
    p50, p95, p99 = (percentile(took, percent) for percent in (50, 95, 99))
    return row | {
        "p50_ms": round(p50, 1),
        "p95_ms": round(p95, 1),
        "p99_ms": round(p99, 1),
        "max_ms": round(max(took), 1),
        "p99_over_p50": round(p99 / p50, 2),
        "requests_per_second": round(len(measured.answers) / measured.traffic_seconds, 3),
        "throughput_over_eager": _over_eager(measured, eager),
        "padded_share": round(_padded_share(good), 4),
    }


def write(document: Mapping[str, Any], folder: Path) -> None:
    """`traffic.json` and, once a strategy has been answered, `traffic.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"\[\n[^][{}]*\]", on_one_line, json.dumps(document, indent=1))
    (folder / "traffic.json").write_text(text + "\n", encoding="utf-8")
    if any("p50_ms" in row for row in document["strategies"].values()):
        draw(document, folder / "traffic.png")


def on_one_line(found: re.Match[str]) -> str:
    """A list of plain values, which json would give a line each. No JSON string has a line end."""
    return re.sub(r"\n\s*", " ", found[0]).replace("[ ", "[", 1)[:-2] + "]"


def table(document: Mapping[str, Any]) -> Table:
    """The result for a terminal of 120 columns."""
    table = Table(title=f"{document['profile']}: {headline(document)}")
    table.add_column("strategy")
    headings = [
        "READY s",
        "compiles",
        "after",
        "p50 ms",
        "p95",
        "p99",
        "p99/p50",
        "x eager",
        "padded",
        "MiB",
        "answers",
    ]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in document["strategies"].items():
        if "error" in row:
            table.add_row(name, "failed")
            continue
        keys = (
            "ready_seconds",
            "compiles_at_boot",
            "compiles_since_ready",
            "p50_ms",
            "p95_ms",
            "p99_ms",
        )
        cells = [row.get(key) for key in (*keys, "p99_over_p50", "throughput_over_eager")]
        padded, peak = row.get("padded_share"), row["peak_memory_bytes"]
        cells += [
            None if padded is None else f"{padded:.0%}",
            None if peak is None else f"{peak / 2**20:.0f}",
        ]
        cells.append(f"{row['answered']}/{document['requests']['num_requests']}")
        table.add_row(name, *("-" if cell is None else str(cell) for cell in cells))
    return table


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
    """Three panels, a row per strategy: every request's latency, compiles before and after READY,
    seconds to READY.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = {name: row for name, row in document["strategies"].items() if "p50_ms" in row}
    figure = Figure(figsize=(13, 1.8 + 0.62 * len(rows)), layout="constrained")
    latency, compiles, ready = figure.subplots(1, 3, sharey=True, width_ratios=[5, 2, 2])
    _draw_latency(latency, rows)
    _draw_bars(
        compiles, rows, {"compiles_at_boot": "at boot", "compiles_since_ready": "inside requests"}
    )
    compiles.set_xlabel("compile events")
    compiles.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    _draw_bars(ready, rows, {"ready_seconds": "to READY"})
    ready.set_xlabel("seconds from start to READY")
    latency.set_yticks(range(len(rows)), list(rows))
    latency.invert_yaxis()
    for axes in (latency, compiles, ready):
        axes.spines[["top", "right"]].set_visible(False)
    requests = document["requests"]
    title = (
        f"{document['profile']}: {requests['num_requests']} requests, "
        f"{requests['num_distinct_sizes']} sizes"
    )
    figure.suptitle(
        f"{title}, {document['steps']} steps, one at a time\n{headline(document)}", fontsize=10
    )
    FigureCanvasAgg(figure).print_png(str(path))


def _draw_latency(axes: Any, rows: Mapping[str, Mapping[str, Any]]) -> None:
    from matplotlib.ticker import StrMethodFormatter

    rng = np.random.default_rng(0)  # the same scatter every time
    for place, row in enumerate(rows.values()):
        took = np.array([value for value in row["milliseconds"] if value is not None]) / 1000
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
        f"{row['padded_share']:.0%} padded, {row['peak_memory_bytes'] / 2**20:.0f} MiB",
    ]
    if row["throughput_over_eager"] is not None:
        lines.insert(1, f"{row['throughput_over_eager']:g} x eager")
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


def _over_eager(measured: Measured, eager: Measured | None) -> float | None:
    """How many times faster than eager, over the requests that both answered; None where there is
    nothing to compare.
    """
    if eager is None:
        return None
    both = [
        (mine.milliseconds, other.milliseconds)
        for mine, other in zip(measured.answers, eager.answers, strict=False)
        if mine.good and other.good
    ]
    return (
        round(sum(other for _, other in both) / sum(mine for mine, _ in both), 3) if both else None
    )
