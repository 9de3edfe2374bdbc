"""What each fit, engine and strategy does to pictures, by a judge that needs no neural network.

    python -m bench.quality [--count 300] ...

A real TorchServe serves the small trained pipeline of `examples/shapes` once per row and paints
the same held-out captions with the same seeds, one after the other. What was painted is kept under
.preheat/bench/quality, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from bench import command, quality_report
from bench.machine import machine, versions
from bench.quality_asks import Ask, Kind, asks, psnr, said
from preheat.errors import PreheatError
from preheat.torchserve import server
from preheat.torchserve.archive import build_archive
from preheat.torchserve.client import Client

CONFIG = server.ROOT / "model-config" / "shapes.yaml"
MODEL = server.ROOT / "examples" / "shapes" / "model"
KEPT = server.ROOT / ".preheat" / "bench" / "quality"
RESULTS = server.ROOT / "bench" / "results"
READY_SECONDS = 1800
TEXT: tuple[Kind, ...] = ("trained", "odd")
TASKS: tuple[Kind, ...] = ("image", "inpaint")
NUM_TASKS = 100
"""Requests of each task that goes out from a picture."""


@dataclass(frozen=True)
class Row:
    """How the pipeline is served: keys of `pt2.compile` and `pt2.shapes` over those of the YAML."""

    compiled: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, Any] = field(default_factory=dict)
    is_short: bool = False
    """A fifth of the captions, as the picture hardly depends on it."""
    has_tasks: bool = False

    def config(self) -> dict[str, Any]:
        document: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
        document["pt2"]["compile"] |= self.compiled
        shapes = document["pt2"]["shapes"]
        shapes |= self.shapes
        if shapes["strategy"] in ("dynamic", "exact"):
            del shapes["fit"]
        if shapes.get("fit") == "mask":
            shapes["invariant"] = True  # no picture is painted without its bucket, eagerly
        else:
            del shapes["mask_only"]
        if "backend" in self.compiled:
            document["pt2"]["on_failure"] = "fail"  # else the row would be eager's
        # a batch of one, so that no row waits for company
        return document | {"batchSize": 1, "startupTimeout": READY_SECONDS}


ROWS: Mapping[str, Row] = {
    "eager": Row({"enable": False}, {"strategy": "exact"}, has_tasks=True),
    "mask": Row({}, {"fit": "mask"}, has_tasks=True),
    "pad": Row({}, {"fit": "pad"}),
    "resize": Row({}, {"fit": "resize"}),
    "mask, inductor": Row({"backend": "inductor", "dynamic": False}, {"fit": "mask"}, True),
    "mask, uncompiled": Row({"enable": False}, {"fit": "mask"}, True),
    "dynamic": Row({"backend": "inductor"}, {"strategy": "dynamic"}, True),
    "fixed": Row({}, {"strategy": "fixed", "buckets": [[128, 128]], "fit": "resize"}, True),
}
"""The first is what the others are compared with."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def paint(name: str, row: Row, wanted: Sequence[Ask]) -> dict[str, NDArray[np.uint8]]:
    """The pictures (height, width, 3) by name; what is kept is not painted again.

    Raises:
        PreheatError: the server does not get READY, or refuses a request.
    """
    config = row.config()
    folder = KEPT / f"{name.replace(', ', '-')}-{_digest(config, wanted)}"
    folder.mkdir(parents=True, exist_ok=True)
    left = [ask for ask in wanted if not (folder / f"{ask.name}.png").exists()]
    if left:
        _paint_into(folder, config, left)
    return {ask.name: np.asarray(Image.open(folder / f"{ask.name}.png")) for ask in wanted}


def _paint_into(folder: Path, config: Mapping[str, Any], wanted: Sequence[Ask]) -> None:
    run_dir = server.ROOT / ".preheat" / "run" / "bench-quality"
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    earlier = server.recall(run_dir)
    if earlier is not None:
        earlier.stop()  # of a run that was killed
    with tempfile.TemporaryDirectory(prefix="bench-", dir=run_dir.parent) as work:
        path = Path(work, "shapes.yaml")
        path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
        archive = build_archive(
            path, MODEL, output=Path(work), archive_format="no-archive", external=True
        )
        running = server.start(
            [archive], run_dir, ports=server.Ports.free(), cache=KEPT.parent / "inductor"
        )
        try:
            running.wait_ready(READY_SECONDS)
            with Client.to(running, timeout=300) as client:
                for ask in track(wanted, description=folder.name):
                    reply = client.predict(dict(ask.payload))
                    if reply.status != 200:
                        raise PreheatError(f"{ask.name}: {reply.status} {reply.body[:300]!r}")
                    Image.open(io.BytesIO(reply.body)).save(folder / "part.png")
                    (folder / "part.png").rename(folder / f"{ask.name}.png")
        finally:
            running.stop()


def _digest(config: Mapping[str, Any], wanted: Sequence[Ask]) -> str:
    """Changes with the weights, the YAML and what a request of each kind asks for."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in sorted(MODEL.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    for kind in dict.fromkeys(ask.kind for ask in wanted):
        first = next(ask for ask in wanted if ask.kind == kind)
        digest.update(json.dumps(first.payload, sort_keys=True).encode())
    return digest.hexdigest()[:12]


def measured(
    wanted: Sequence[Ask],
    pictures: Mapping[str, NDArray[np.uint8]],
    eager: Mapping[str, NDArray[np.uint8]],
) -> dict[str, Any]:
    """A row's figures by kind."""
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(ask.kind for ask in wanted):
        own = [ask for ask in wanted if ask.kind == kind]
        verdicts = [said(ask, pictures[ask.name]) for ask in own]
        decibels = [psnr(pictures[ask.name], eager[ask.name]) for ask in own]
        found[kind] = quality_report.figures(verdicts, decibels)
    return found


@app.command()
def bench(
    count: Annotated[
        int, typer.Option(help="Captions per row, half of them at trained sizes, half at odd ones.")
    ] = 300,
    row: Annotated[
        list[str] | None, typer.Option(help=f"Of {'; '.join(ROWS)}; may be repeated. Default: all.")
    ] = None,
    strength: Annotated[float, typer.Option(help="Of image-to-image.")] = 0.7,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for quality.json and quality.png; of some rows only: required."),
    ] = None,
) -> None:
    """Paint the same captions once per row, and write down what the judge says of the pictures."""
    unknown = sorted(set(row or ()) - set(ROWS))
    if unknown:
        raise PreheatError(f"unknown row {unknown[0]!r}: one of {'; '.join(ROWS)}")
    if row and output is None:
        raise PreheatError("--output: say where the results of some rows go")
    output = output or RESULTS
    chosen = [name for name in ROWS if not row or name in row or name == "eager"]
    console = command.console()
    document: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "strength": strength,
        "rows": {},
    }
    painted: dict[str, dict[str, NDArray[np.uint8]]] = {}
    for name in chosen:
        one = ROWS[name]
        each = max(1, count // (10 if one.is_short else 2))
        wanted = [ask for kind in TEXT for ask in asks(kind, each, strength)]
        if one.has_tasks:
            number = min(NUM_TASKS, count)
            wanted += [ask for kind in TASKS for ask in asks(kind, number, strength)]
        painted[name] = paint(name, one, wanted)
        document["rows"][name] = measured(wanted, painted[name], painted["eager"])
        console.print(f"{name}: {quality_report.line(document['rows'][name])}", markup=False)
    output.mkdir(parents=True, exist_ok=True)
    (output / "quality.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    rows = {name: painted[name] for name in chosen[:4]}
    shown = [
        ask
        for ask in asks("odd", 6, strength)
        if all(ask.name in pictures for pictures in rows.values())
    ]
    quality_report.sheet(shown, rows).save(output / "quality.png")
    console.print(quality_report.table(document))


def main() -> None:
    command.run(app)


if __name__ == "__main__":
    main()
