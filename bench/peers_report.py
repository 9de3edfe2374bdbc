"""The peers' result: ratios of the rounds, a JSON file, a picture, and a table for a document."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.table import Table

from bench.report import BLUE, RED, headline, on_one_line, percentile
from bench.rounds import Spread, doubts

TITLES = {
    "eager": "diffusers, eager, a loop",
    "compiled": "diffusers, torch.compile, a loop",
    "genai": "OpenVINO GenAI, a loop",
    "genai-static": "OpenVINO GenAI, a pipeline a size, a loop",
    "handler": "TorchServe's BaseHandler, pt2, served",
    "preheat": "Preheat, served",
}
"""In the order in which they start."""
LOOPS = ("eager", "compiled", "genai", "genai-static")
"""Nobody asks them over a network."""
TARGET = 0.95
"""Of the fastest loop's throughput: what Preheat must reach served."""


def measured(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The rows that have not failed."""
    rows: Mapping[str, Mapping[str, Any]] = document.get("peers", {})
    return {kind: row for kind, row in rows.items() if "error" not in row}


def num_rounds(document: Mapping[str, Any]) -> int:
    """That all have finished."""
    return min((len(row["milliseconds"]) for row in measured(document).values()), default=0)


def times(document: Mapping[str, Any], kind: str, other: str) -> Spread | None:
    """How many times as fast as the other, by round; None where one of them was not measured."""
    rows = measured(document)
    if kind not in rows or other not in rows:
        return None
    pairs = zip(rows[kind]["milliseconds"], rows[other]["milliseconds"], strict=False)
    return Spread.of([sum(theirs) / sum(mine) for mine, theirs in pairs])


def ratios(document: Mapping[str, Any]) -> dict[str, Any]:
    """`x_eager` of each, `preheat_over` each, and the `doubts` about them."""
    kinds = measured(document)
    over_eager = {kind: times(document, kind, "eager") for kind in kinds}
    preheat = {kind: times(document, "preheat", kind) for kind in kinds if kind != "preheat"}
    named = {f"{TITLES[kind]} over eager": over_eager[kind] for kind in kinds}
    named |= {f"Preheat over {TITLES[kind]}": spread for kind, spread in preheat.items()}
    return {
        "x_eager": {kind: spread and spread.to_json() for kind, spread in over_eager.items()},
        "preheat_over": {kind: spread and spread.to_json() for kind, spread in preheat.items()},
        "doubts": doubts(named),
    }


def verdict(document: Mapping[str, Any]) -> list[str]:
    """Whether Preheat is where it should be."""
    over = {kind: spread["median"] for kind, spread in document["preheat_over"].items() if spread}
    loops = {kind: ratio for kind, ratio in over.items() if kind in LOOPS}
    said = []
    if loops:
        fastest = min(loops, key=lambda kind: loops[kind])
        word = "reached" if loops[fastest] >= TARGET else "missed"
        said.append(
            f"Preheat served over the fastest loop ({TITLES[fastest]}): {loops[fastest]:.2f}; "
            f"{TARGET} {word}"
        )
    said += [
        f"Preheat over {TITLES[kind]}: {ratio:.2f}"
        for kind, ratio in over.items()
        if kind not in LOOPS
    ]
    return said


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """Of all rounds: milliseconds a request, p99/p50, and requests a second."""
    took = [each for took in row["milliseconds"] for each in took]
    p50, p99 = (percentile(took, percent) for percent in (50, 99))
    rate = 1000 * len(took) / sum(took)
    return {"p50_ms": p50, "p99_ms": p99, "p99_over_p50": p99 / p50, "requests_per_second": rate}


def write(document: Mapping[str, Any], folder: Path) -> None:
    """`peers.json` and, once something was measured, `peers.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"\[\n[^][{}]*\]", on_one_line, json.dumps(document, indent=1))
    (folder / "peers.json").write_text(text + "\n", encoding="utf-8")
    if num_rounds(document):
        draw(document, folder / "peers.png")


def table(document: Mapping[str, Any]) -> Table:
    """A row a peer, as Markdown."""
    title = f"{document['profile']}, {document['dtype']}: {headline(document)}"
    table = Table(title=title, box=MARKDOWN)
    table.add_column("peer", no_wrap=True)
    headings = ("requests/s", "x eager", "p50, ms", "p99", "p99/p50", "first picture, s")
    for heading in (*headings, "all sizes", "peak MiB", "PSNR, dB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for kind in document["asked_for"]:
        row = document["peers"].get(kind, {"error": "not started"})
        if "error" in row or not row["milliseconds"]:
            table.add_row(TITLES[kind], row.get("error", "not measured"))
            continue
        found, spread = figures(row), document["x_eager"][kind]
        table.add_row(
            TITLES[kind],
            f"{found['requests_per_second']:.2f}",
            f"{spread['median']:.2f} ({spread['low']:.2f}-{spread['high']:.2f})" if spread else "-",
            f"{found['p50_ms']:.0f}",
            f"{found['p99_ms']:.0f}",
            f"{found['p99_over_p50']:.2f}",
            f"{row['first_picture_seconds']:.1f}",
            f"{row['every_size_seconds']:.1f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{row['psnr_db']:.0f}",
        )
    return table


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Two panels, a row a peer: times as fast as eager with the rounds' spread, and seconds to the
    first picture and to one of every size.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = {kind: row for kind, row in measured(document).items() if row["milliseconds"]}
    figure = Figure(figsize=(12, 1.6 + 0.5 * len(rows)), layout="constrained")
    ratio, start = figure.subplots(1, 2, sharey=True)
    for place, (kind, row) in enumerate(rows.items()):
        colour = RED if kind == "preheat" else BLUE
        spread = document["x_eager"][kind]
        if spread:
            ratio.barh(place, spread["median"], 0.6, color=colour)
            ratio.plot([spread["low"], spread["high"]], [place] * 2, color="#222222", linewidth=1)
            ratio.text(spread["high"], place, f"  {spread['median']:.2f}", fontsize=8, va="center")
        start.barh(place, row["every_size_seconds"], 0.6, color=colour, alpha=0.5)
        bars = start.barh(place, row["first_picture_seconds"], 0.6, color=colour)
        start.bar_label(bars, [f" {row['first_picture_seconds']:g} s"], fontsize=8)
    ratio.set_yticks(range(len(rows)), [TITLES[kind] for kind in rows], fontsize=8)
    ratio.invert_yaxis()
    ratio.margins(x=0.15)
    ratio.set_xlabel("times as fast as eager diffusers (line: lowest to highest round)", fontsize=8)
    start.margins(x=0.15)
    start.set_xlabel("seconds to the first picture (pale: to one of every size)", fontsize=8)
    for axes in (ratio, start):
        axes.spines[["top", "right"]].set_visible(False)
    title = f"{document['profile']}, {document['dtype']}, {document['steps']} steps, one at a time"
    figure.suptitle(f"{title}\n{headline(document)}", fontsize=10)
    FigureCanvasAgg(figure).print_png(str(path))
