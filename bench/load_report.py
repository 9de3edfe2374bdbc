"""The load bench's result: numbers per load, a JSON file, a picture and a table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from bench.clients import Traffic
from bench.report import BLUE, RED, headline, on_one_line, percentile

TARGET = 0.95
"""Of the bare loop's throughput: what serving must reach."""


def summary(traffic: Traffic, counted: Mapping[str, float], *, saturated: bool) -> dict[str, Any]:
    """One load's numbers, from what its clients saw and what the metrics `counted` meanwhile.

    Latencies and throughput are those of good answers. The overhead per request is the time in
    which the model did not run: all of it by the clock, and of that what the handler spent parsing
    and encoding.
    """
    took = [one.milliseconds for one in traffic.seen if one.good]
    runs, generated = (
        counted.get("preheat_inference_seconds_count", 0.0),
        counted.get("preheat_rows_painted_total", 0.0),
    )
    filled, pixels = (
        counted.get("preheat_rows_filled_total", 0.0),
        counted.get("preheat_pixels_painted_total", 0.0),
    )
    model_seconds = counted.get("preheat_inference_seconds_sum", 0.0)
    row: dict[str, Any] = {
        "answered": len(took),
        "failed": len(traffic.seen) - len(took),
        "requests_per_second": round(len(took) / traffic.seconds, 3),
    }
    if not took or not generated:
        return row
    row |= {f"p{percent}_ms": round(percentile(took, percent), 1) for percent in (50, 95, 99)}
    row |= {
        "rows_per_run": round((generated - filled) / runs, 2),
        "padded_rows": round(filled / generated, 4),
        "padded_pixels": round(counted.get("preheat_pixels_cropped_total", 0.0) / pixels, 4),
        "model_ms": round(1000 * model_seconds / len(took), 2),
        "parse_ms": round(1000 * counted.get("preheat_preprocess_seconds_sum", 0.0) / len(took), 2),
        "encode_ms": round(1000 * counted.get("preheat_encode_seconds_sum", 0.0) / len(took), 2),
    }
    if saturated:
        row["outside_model_ms"] = round(1000 * (traffic.seconds - model_seconds) / len(took), 2)
    return row


def compared(bare: Sequence[float], served: Sequence[float]) -> dict[str, Any]:
    """Rates in requests per second that were measured in turn, bare first and last: each served one
    over the mean of its neighbours.
    """
    shares = [rate / mean(pair) for rate, pair in zip(served, pairwise(bare), strict=True)]
    return {
        "bare": [round(rate, 3) for rate in bare],
        "served": [round(rate, 3) for rate in served],
        "shares": [round(share, 4) for share in shares],
        "share": round(median(shares), 4),
    }


def compared_line(row: Mapping[str, Any]) -> str:
    each = ", ".join(f"{share:.1%}" for share in row["shares"])
    rates = f"{mean(row['served']):.2f} requests/s against {mean(row['bare']):.2f}"
    return (
        f"{row['traffic']}, batches of {row['batch']}: served over bare {row['share']:.1%} "
        f"({each}; {rates})"
    )


def stages_table(document: Mapping[str, Any]) -> Table:
    """What the handler does with a request, in milliseconds, stage by stage."""
    stages_by_kind: Mapping[str, Mapping[str, float]] = document["stages_ms"]
    table = Table(
        title=f"the handler alone, batches of {document['batch']}, nothing compiled", box=SIMPLE
    )
    table.add_column("ms per request", no_wrap=True)
    for stage in next(iter(stages_by_kind.values())):
        table.add_column(stage, justify="right", no_wrap=True)
    for kind, stages in stages_by_kind.items():
        table.add_row(kind, *(f"{milliseconds:.2f}" for milliseconds in stages.values()))
    return table


def denoiser_share(document: Mapping[str, Any]) -> str:
    """What compiling the denoiser can at best gain from, in a line."""
    stages: Mapping[str, float] = document["stages_ms"]["text to image"]
    share = stages["denoiser"] / sum(stages.values())
    return f"denoiser: {share:.0%} of an eager request in the handler"


def verdict(document: Mapping[str, Any]) -> str:
    """Where sizes are mixed, requests of several buckets share no run, while the bare loop sorts
    them: not the same batch size.
    """
    rows = document["compared"]
    said = ", ".join(
        f"{row['traffic']}, batches of {row['batch']}: {row['share']:.1%}" for row in rows
    )
    (full,) = (
        row["share"]
        for row in rows
        if (row["traffic"], row["batch"]) == ("uniform", document["batch"])
    )
    return (
        f"served over bare: {said}; {TARGET:.0%} {'reached' if full >= TARGET else 'missed'} at "
        "the same batch size"
    )


def write(document: Mapping[str, Any], folder: Path) -> None:
    """`load.json` and `load.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"\[\n[^][{}]*\]", on_one_line, json.dumps(document, indent=1))
    (folder / "load.json").write_text(text + "\n", encoding="utf-8")
    draw(document, folder / "load.png")


def line(row: Mapping[str, Any]) -> str:
    if "p50_ms" not in row:
        return f"{row['name']}: nothing answered, {row['failed']} failed"
    latency = f"p50 {row['p50_ms']} ms, p95 {row['p95_ms']}, p99 {row['p99_ms']}"
    return (
        f"{row['name']}: {row['requests_per_second']} requests/s, {latency}, {row['rows_per_run']} "
        "rows a run"
    )


def table(document: Mapping[str, Any]) -> Table:
    """The result for a terminal of 120 columns. Times in milliseconds; those from "model" on are
    per request.
    """
    table = Table(
        title=f"{document['profile']}: {headline(document)}", box=SIMPLE, padding=(0, 1, 0, 0)
    )
    table.add_column("load", no_wrap=True)
    headings = (
        "req/s",
        "p50 / p95 / p99",
        "rows/run",
        "pad rows",
        "pad px",
        "model",
        "parse",
        "encode",
        "outside",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in document["compared"]:
        table.add_row(
            f"{row['traffic']}, bare loop, {row['batch']} a batch", f"{mean(row['bare']):.2f}"
        )
    for name, served in document["served"].items():
        table.add_section()
        table.add_row(f"[bold]{name}")
        for row in served["loads"]:
            failed = f", {row['failed']} failed" if row["failed"] else ""
            table.add_row(row["name"] + failed, f"{row['requests_per_second']:.2f}", *_cells(row))
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    if "p50_ms" not in row:
        return []
    outside = row.get("outside_model_ms")
    return [
        " / ".join(f"{row[f'p{percent}_ms']:.0f}" for percent in (50, 95, 99)),
        f"{row['rows_per_run']:.2f}",
        f"{row['padded_rows']:.0%}",
        f"{row['padded_pixels']:.0%}",
        *(f"{row[key]:.1f}" for key in ("model_ms", "parse_ms", "encode_ms")),
        "-" if outside is None else f"{outside:.1f}",
    ]


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Two panels, a row per load: throughput against the bare loop's, and latency percentiles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    rows = [
        (name, row)
        for name, served in document["served"].items()
        for row in served["loads"]
        if "p50_ms" in row
    ]
    bare_rates = {(row["traffic"], row["batch"]): mean(row["bare"]) for row in document["compared"]}
    figure = Figure(figsize=(12, 1.8 + 0.36 * len(rows)), layout="constrained")
    rate, latency = figure.subplots(1, 2, sharey=True)
    for place, (name, row) in enumerate(rows):
        bare = bare_rates[row["traffic"], 1 if name == "no batching" else document["batch"]]
        bars = rate.barh([place], [row["requests_per_second"]], 0.7, color=BLUE)
        rate.bar_label(
            bars,
            labels=[f" {row['requests_per_second']:.1f} ({row['requests_per_second'] / bare:.0%})"],
            fontsize=8,
        )
        rate.plot([bare] * 2, [place - 0.4, place + 0.4], color=RED, linewidth=1.6)
        latency.plot(
            [row["p50_ms"], row["p99_ms"]],
            [place] * 2,
            color=BLUE,
            linewidth=3,
            solid_capstyle="butt",
        )
        for percent, colour in ((50, "#222222"), (95, "#777777"), (99, RED)):
            latency.plot(
                [row[f"p{percent}_ms"]],
                [place],
                "|",
                color=colour,
                markersize=12,
                markeredgewidth=1.8,
            )
    rate.set_xlabel(
        "requests per second (red: bare pipeline at the same batch size; in brackets: share of it)"
    )
    rate.set_yticks(range(len(rows)), [f"{name}: {row['name']}" for name, row in rows], fontsize=8)
    rate.invert_yaxis()
    rate.margins(x=0.2)
    latency.set_xscale("log")
    latency.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    latency.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    latency.xaxis.set_minor_formatter(NullFormatter())
    latency.set_xlabel("milliseconds, logarithmic (black: p50, grey: p95, red: p99)")
    for axes in (rate, latency):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.label.set_fontsize(8)
    title = (
        f"{document['profile']}: {document['steps']} steps, batches of up to {document['batch']}, "
        "pictures encoded as PNG"
    )
    figure.suptitle(f"{title}\n{headline(document)}", fontsize=10)
    FigureCanvasAgg(figure).print_png(str(path))
