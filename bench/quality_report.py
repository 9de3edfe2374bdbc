"""The figures, the table and the sheet of `bench.quality`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.table import Table

from bench.quality_asks import Ask, Said, by_things

MARGIN = 12
"""Pixels."""
LINE = 14


def figures(found: Sequence[Said], decibels: Sequence[float]) -> dict[str, Any]:
    """Of one kind of a row. `psnr` is the median, in decibels; 99 stands for equal pictures."""
    changed = [each.changed for each in found if each.changed is not None]
    return {
        "pictures": len(found),
        "right": _share([each.right for each in found]),
        "right_by_objects": {
            str(number): _share([each.right for each in some]) for number, some in by_things(found)
        },
        "cut": _share([each.cut for each in found]),
        "psnr": round(min(99.0, float(np.median(decibels))), 1),
        "least_psnr": round(min(99.0, min(decibels)), 1),
        **({"changed": max(changed)} if changed else {}),
    }


def line(row: Mapping[str, Any]) -> str:
    """A row in one line."""
    return "; ".join(
        f"{kind}: {values['right']:.0%} right, {values['cut']:.0%} cut, {values['psnr']} dB"
        for kind, values in row.items()
    )


def table(document: Mapping[str, Any]) -> Table:
    """All rows, by kind."""
    made = Table(title="right by the judge")
    for heading in (
        "",
        "kind",
        "pictures",
        "right",
        "1",
        "2",
        "3 objects",
        "cut",
        "PSNR",
        "changed",
    ):
        made.add_column(heading, justify="left" if heading in ("", "kind") else "right")
    for name, row in document["rows"].items():
        for kind, values in row.items():
            parts = [f"{values['right_by_objects'].get(str(each), 0):.0%}" for each in (1, 2, 3)]
            made.add_row(
                name,
                kind,
                str(values["pictures"]),
                f"{values['right']:.0%}",
                *parts,
                f"{values['cut']:.0%}",
                f"{values['psnr']}",
                str(values.get("changed", "")),
            )
    return made


def sheet(shown: Sequence[Ask], rows: Mapping[str, Mapping[str, NDArray[np.uint8]]]) -> Image.Image:
    """A row of pictures per way of serving, a column per caption, which stands below."""
    wide = max(ask.scene.width for ask in shown) + MARGIN
    tall = max(ask.scene.height for ask in shown) + MARGIN + LINE
    letters = wide // 6
    texts = [
        textwrap.wrap(f"{ask.scene.caption()} ({ask.scene.height}x{ask.scene.width})", letters)
        for ask in shown
    ]
    below = LINE * max(map(len, texts)) + MARGIN
    image = Image.new("RGB", (len(shown) * wide + MARGIN, len(rows) * tall + below), "white")
    draw = ImageDraw.Draw(image)
    for number, (name, pictures) in enumerate(rows.items()):
        draw.text((MARGIN, number * tall), name, fill="black")
        for column, ask in enumerate(shown):
            at = (MARGIN + column * wide, number * tall + LINE)
            image.paste(Image.fromarray(pictures[ask.name]), at)
    for column, text in enumerate(texts):
        at = (MARGIN + column * wide, len(rows) * tall)
        draw.multiline_text(at, "\n".join(text), fill="black")
    return image


def _share(values: Sequence[bool]) -> float:
    return round(float(np.mean(values)), 4)
