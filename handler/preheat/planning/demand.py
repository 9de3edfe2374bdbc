"""What sizes are asked for: read from a CSV file or from what workers have counted."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preheat.buckets import Bucket
from preheat.errors import LogError

PICTURE = ("height", "width")
COUNT = "count"


@dataclass(frozen=True)
class Demand:
    """Sizes with their numbers of requests, of a picture (pixels) or of one dimension."""

    names: tuple[str, ...]
    counts: Mapping[tuple[int, ...], int]
    num_uncounted: int = 0
    """Requests whose sizes the workers had no room to remember."""

    @property
    def is_picture(self) -> bool:
        return self.names == PICTURE

    @property
    def num_requests(self) -> int:
        return sum(self.counts.values())

    def rounded(self, multiple: int) -> dict[tuple[int, ...], int]:
        """The counts with every size rounded up."""
        found: Counter[tuple[int, ...]] = Counter()
        for sizes, count in self.counts.items():
            found[tuple(-(-size // multiple) * multiple for size in sizes)] += count
        return dict(found)

    def bucket(self, sizes: Iterable[int]) -> Bucket:
        if self.is_picture:
            return Bucket(*sizes)
        return Bucket(**dict(zip(self.names, sizes, strict=True)))


def read(path: Path) -> Demand:
    """The sizes in a CSV file, or in the gateway's access log.

    Raises:
        LogError: it cannot be read, or holds something else.
    """
    try:
        with open(path, "rb") as file:
            is_access_log = file.read(1) == b"{"
    except OSError as error:
        raise LogError(f"cannot read {path}: {error.strerror}") from error
    return read_access_log(path) if is_access_log else read_csv(path)


def read_access_log(path: Path) -> Demand:
    """The pictures' sizes in the gateway's access log, a JSON object a line: those that clients
    named, of requests that were painted or refused with a 400, as a size is that no bucket covers.

    Raises:
        LogError: it cannot be read, a line is none of such a log, or it holds no sizes.
    """
    counts: Counter[tuple[int, ...]] = Counter()
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if (size := _asked(line, f"{path}, line {number}")) is not None:
                    counts[size] += 1
    except (OSError, UnicodeDecodeError) as error:
        raise LogError(f"cannot read {path}: {error}") from error
    if not counts:
        raise LogError(f"{path} holds no sizes")
    return Demand(PICTURE, dict(counts))


def _asked(line: str, where: str) -> tuple[int, int] | None:
    try:
        row = json.loads(line)
        status, sides = row["status"], (row.get("height"), row.get("width"))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise LogError(f"{where} is none of an access log") from None
    if status not in (200, 400) or not all(type(side) is int and side > 0 for side in sides):
        return None
    return sides


def read_csv(path: Path) -> Demand:
    """The sizes in a CSV file with the columns height and width, or one dimension's, such as
    sequence; and, where it is a histogram, count.

    Raises:
        LogError: it cannot be read, or holds something else.
    """
    names, rows = csv_rows(path)
    dimensions = tuple(name for name in names if name != COUNT)
    if {*PICTURE} <= {*dimensions}:
        dimensions = PICTURE
    elif len(dimensions) != 1 or not dimensions[0].isidentifier():
        raise LogError(
            f"{path}: its first line must name the columns height,width[,count], or one dimension "
            f"of a module, such as sequence[,count], got {','.join(names) or 'nothing'!r}"
        )
    counts: Counter[tuple[int, ...]] = Counter()
    for line, row in rows:
        where = f"{path}, line {line}"
        sizes = tuple(whole(row, name, where) for name in dimensions)
        counts[sizes] += whole(row, COUNT, where) if COUNT in names else 1
    if not counts:
        raise LogError(f"{path} holds no sizes")
    return Demand(dimensions, dict(counts))


def csv_rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The lower-case names of the columns, and the rows by these names with their line numbers.

    Raises:
        LogError: it cannot be read, or is no CSV.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restkey="", restval="", skipinitialspace=True)
            names = [(name or "").strip().lower() for name in reader.fieldnames or ()]
            reader.fieldnames = names
            return names, [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise LogError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LogError(f"{path} is not UTF-8 (byte {error.start})") from error
    except csv.Error as error:
        raise LogError(f"{path} is no CSV: {error}") from error


def whole(row: Mapping[str, str], name: str, where: str) -> int:
    """A cell that has to hold a whole number above 0.

    Raises:
        LogError: it holds something else.
    """
    text = row[name].strip()
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) > 0):
        raise LogError(f"{where}: {name} must be a whole number above 0, got {text[:20]!r}")
    return int(text)


def counted(documents: Iterable[Mapping[str, Any]]) -> Demand | None:
    """The sizes in what several workers of one model have counted (`asked_sizes` of their state);
    None where that is nothing.

    Raises:
        LogError: they have several dimensions that are no picture, or different ones.
    """
    counts: Counter[tuple[int, ...]] = Counter()
    names: set[tuple[str, ...]] = set()
    uncounted, is_picture = 0, False
    for document in documents:
        uncounted += int(document.get("uncounted", 0))
        if rows := document.get("sizes"):
            names.add(tuple(document["dims"]))
            is_picture = bool(document.get("picture"))
            for *sizes, count in rows:
                counts[tuple(sizes)] += count
    if not counts:
        return None
    dimensions = names.pop()
    if names or not (is_picture or len(dimensions) == 1):
        raise LogError(
            f"sizes of {', '.join(dimensions)}: buckets are planned for pictures and for modules "
            "with one bucketed dimension; with more they are every combination of sizes"
        )
    return Demand(dimensions, dict(counts), uncounted)
