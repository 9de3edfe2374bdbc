"""What `bench.cpu` measured as a table and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.cpu_engines import TITLES
from bench.report import BLUE, RED


def rows(document: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(model's title, dtype, its row)."""
    for model in document["models"].values():
        for dtype, row in model["dtypes"].items():
            yield model["title"], dtype, row


def limit(row: Mapping[str, Any]) -> str:
    """Where nothing can be faster, in a line."""
    return (
        f"{row['gigaflop']} GFLOP a step, a matrix product makes {row['gigaflops_of_a_product']} a "
        f"second: no step under {row['limit_ms']:.1f} ms"
    )


def headline(document: Mapping[str, Any]) -> str:
    machine, versions = document["machine"], document["versions"]
    threads = f"{document['num_threads']} threads"
    return (
        f"{machine['cpu']}, {threads}, torch {versions['torch']}, openvino {versions['openvino']}"
    )


def table(document: Mapping[str, Any]) -> Table:
    """A row per engine: milliseconds, how many times faster than eager, seconds to compile."""
    table = Table(
        title=headline(document),
        caption="ms per step (x eager; share of the limit; seconds to compile; with masks, x the "
        "same without); * the fastest",
    )
    table.add_column("engine")
    found = list(rows(document))
    for title, dtype, _ in found:
        table.add_column(f"{title}\n{dtype}", justify="right")
    for name, label in TITLES.items():
        cells = [
            _cell(row["engines"].get(name), winner=row["winner"] == name) for _, _, row in found
        ]
        table.add_row(label, *cells)
    return table


def draw(document: Mapping[str, Any], path: Path) -> None:
    """A panel per model and dtype: the median of every engine with the 10th to 90th percentile, the
    fastest in red.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = list(rows(document))
    figure = Figure(figsize=(13, 2.2 + 1.5 * len(found) / 2), layout="constrained")
    grid = figure.subplots((len(found) + 1) // 2, 2, squeeze=False).flat
    for axes, (title, dtype, row) in zip(grid, found, strict=False):
        for place, (name, cell) in enumerate(row["engines"].items()):
            if "failed" in cell:
                axes.text(0, place, f" {cell['failed'][:60]}", fontsize=7, va="center")
                continue
            axes.barh(place, cell["median_ms"], color=RED if name == row["winner"] else BLUE)
            axes.plot(
                [cell["p10_ms"], cell["p90_ms"]], [place, place], color="#222222", linewidth=1
            )
            axes.text(
                cell["p90_ms"], place, f"  {cell['times_eager']:.2f} x", fontsize=8, va="center"
            )
        axes.axvline(row["limit_ms"], color="#222222", linewidth=0.8, linestyle=":")
        labels = [TITLES[name] for name in row["engines"]]
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_title(f"{title}, {dtype}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        "milliseconds per step; the number is how many times faster than eager, the dotted line "
        "the limit that the machine's matrix product sets",
        fontsize=9,
    )
    figure.suptitle(headline(document), fontsize=10)
    FigureCanvasAgg(figure).print_png(str(path))


def _cell(cell: Mapping[str, Any] | None, *, winner: bool) -> str:
    if cell is None:
        return ""
    if "failed" in cell:
        return str(cell["failed"])[:40]
    told = [f"{cell['times_eager']:.2f} x", f"{cell['share_of_limit']:.0%}"]
    told.append(f"{cell['compile_seconds']:.0f} s")
    if "over_unmasked" in cell:
        told.append(f"{cell['over_unmasked']:.2f}")
    text = f"{cell['median_ms']:.1f} ({'; '.join(told)})"
    return f"* {text}" if winner else text
