"""A profile as a picture: a bar a bucket, its parts beside each other."""

from __future__ import annotations

from pathlib import Path

from preheat.cli.plan_picture import saved
from preheat.preflight.profile import Profile

_COLOURS = ("#2c6e9b", "#c0392b", "#e0a030", "#5b8c5a", "#8e6c8a", "#b0b0b0")


def draw(found: Profile, path: Path) -> None:
    """Write the picture, in the form that the file's ending names (png, svg, pdf).

    Raises:
        PreheatError: matplotlib is not installed, or the file cannot be written.
    """
    names = list(dict.fromkeys(name for each in found.buckets for name in each.seconds))
    names.sort(key=found.share, reverse=True)
    with saved(path, (8, 1.6 + 0.45 * len(found.buckets))) as figure:
        axes = figure.subplots()
        begins = [0.0] * len(found.buckets)
        rows = range(len(found.buckets))
        for index, name in enumerate(names):
            widths = [1000 * each.seconds.get(name, 0.0) for each in found.buckets]
            label = f"{name} {found.share(name):.0%}"
            colour = _COLOURS[index % len(_COLOURS)]
            axes.barh(rows, widths, left=begins, color=colour, label=label, height=0.6)
            begins = [begin + width for begin, width in zip(begins, widths, strict=True)]
        axes.set_yticks(rows, [each.bucket for each in found.buckets])
        axes.invert_yaxis()
        axes.set_xlabel(f"milliseconds of a request, eager {found.dtype} on {found.device}")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
