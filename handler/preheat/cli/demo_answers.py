"""What the demos have in common: an answer, and the table of all."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from rich.table import Table

from preheat.errors import PreheatError
from preheat.torchserve.client import Reply


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of the server; sizes are (height, width) in pixels."""

    asked: str
    source: str
    """What it was made from."""
    protocol: str
    bucket: str
    padding: float
    engine: str
    milliseconds: float
    document: Mapping[str, Any]
    """What the results' file says of it."""
    picture: Image.Image | None = None

    def cells(self, last: str) -> tuple[str, ...]:
        """A row of the table."""
        padding, milliseconds = f"{self.padding:.0%}", f"{self.milliseconds:.0f}"
        return (self.asked, self.source, self.bucket, padding, self.engine, milliseconds, last)


def checked(reply: Reply, protocol: str, asked: str) -> Reply:
    """The reply, if it is an answer.

    Raises:
        PreheatError: it is a refusal.
    """
    if reply.status != (200 if protocol == "REST" else 0) or reply.error:
        raise PreheatError(f"{protocol} {asked}: {reply.status} {reply.body[:500]!r}")
    return reply


def png(image: Image.Image) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def table(title: str, last: str, rows: Sequence[Sequence[str]]) -> Table:
    """A row for each answer's cells; `last` heads the last column."""
    made = Table(title=title)
    for heading in ("asked", "from", "bucket", "padding", "engine", "ms", last):
        right = heading in ("asked", "padding", "ms")
        made.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made
