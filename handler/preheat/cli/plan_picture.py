"""A plan as a picture: sizes as dots, buckets as rectangles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from preheat.cli.planner import Report
from preheat.errors import PreheatError

_DOT, _BUCKET = "#2c6e9b", "#c0392b"


def draw(report: Report, path: Path) -> None:
    """Write the picture, in the form that the file's ending names (png, svg, pdf).

    Raises:
        PreheatError: matplotlib is not installed, or the file cannot be written.
    """
    with saved(path, (7, 7) if report.demand.is_picture else (9, 4.5)) as figure:
        axes = figure.subplots()
        if report.demand.is_picture:
            _draw_rectangles(axes, report)
        else:
            _draw_lengths(axes, report)
        chosen = report.chosen
        axes.set_title(
            f"{report.demand.num_requests} requests, {len(report.demand.counts)} sizes, "
            f"{len(chosen.buckets)} buckets: {chosen.usage.waste:.1%} padding, gap "
            f"{chosen.gap:.2%}",
            fontsize=10,
        )
        axes.spines[["top", "right"]].set_visible(False)


@contextmanager
def saved(path: Path, inches: tuple[float, float]) -> Iterator[Any]:
    """A figure of matplotlib's, written to `path` at the end: the same file for the same picture.

    Raises:
        PreheatError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PreheatError("a picture needs matplotlib: pip install 'preheat[plan]'") from error
    with matplotlib.rc_context({"svg.hashsalt": "preheat", "svg.fonttype": "none"}):
        figure = Figure(figsize=inches)
        figure.set_layout_engine("constrained")
        yield figure
        metadata = {"Date": None} if path.suffix == ".svg" else None
        try:
            figure.savefig(path, dpi=110, metadata=metadata)
        except (OSError, ValueError) as error:
            raise PreheatError(f"cannot write {path}: {error}") from error


def _draw_rectangles(axes: Any, report: Report) -> None:
    from matplotlib.patches import Rectangle

    counts = report.demand.counts
    most = max(counts.values())
    axes.scatter(
        [width for _, width in counts],
        [height for height, _ in counts],
        s=[6 + 120 * count / most for count in counts.values()],
        alpha=0.45,
        color=_DOT,
        linewidths=0,
        label="asked for; larger: more often",
    )
    for bucket in report.chosen.buckets:
        axes.add_patch(
            Rectangle((0, 0), bucket.width, bucket.height, fill=False, color=_BUCKET, lw=1.4)
        )
        axes.annotate(
            str(bucket),
            (bucket.width, bucket.height),
            ha="right",
            va="bottom",
            fontsize=8,
            color=_BUCKET,
        )
    sides = [side for sizes in counts for side in sizes]
    sides += [size for bucket in report.chosen.buckets for _, size in bucket.sizes]
    axes.set(xlim=(0, 1.05 * max(sides)), ylim=(0, 1.05 * max(sides)), aspect="equal")
    axes.set_xlabel("width, pixels")
    axes.set_ylabel("height, pixels (buckets: height x width)")
    axes.legend(loc="lower left", fontsize=8, frameon=False)


def _draw_lengths(axes: Any, report: Report) -> None:
    (name,) = report.demand.names
    lengths = {sizes[0]: count for sizes, count in report.demand.counts.items()}
    axes.vlines(list(lengths), 0, list(lengths.values()), color=_DOT, linewidth=1.2)
    for bucket in report.chosen.buckets:
        axes.axvline(bucket[name], color=_BUCKET, linewidth=1.4)
        axes.annotate(
            f" {bucket[name]}",
            (bucket[name], 1),
            xycoords=("data", "axes fraction"),
            va="top",
            fontsize=8,
            color=_BUCKET,
        )
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.set_xlabel(f"{name} (red: buckets)")
    axes.set_ylabel("requests")
