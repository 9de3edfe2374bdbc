"""The demos: a tiny SDXL, BERT or ResNet is built, archived, served, warmed and asked for odd sizes
over REST and gRPC.

The SDXL's leaves `*.png`, `contact-sheet.png` and `summary.json`, the others' `answers.json`; none
a process of its own.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from preheat.cli.progress import WarmupBars
from preheat.config.model import ModelConfig
from preheat.errors import PreheatError
from preheat.torchserve import server
from preheat.torchserve.archive import PACKAGE, build_archive
from preheat.torchserve.client import Client, Reply

PICTURES = ((256, 256), (233, 199), (311, 181), (190, 317), (97, 61), (123, 319), (250, 131))
"""(height, width) in pixels; each is asked over REST and over gRPC."""
IMAGES = ((224, 224), (97, 150), (384, 384), (200, 380), (383, 225))
"""(height, width) in pixels, of what the ResNet is shown."""
LENGTHS = (1, 7, 31, 50, 100, 200, 333, 500)
"""Tokens."""
SEED = 20
MODELS = {"sdxl": "tiny-sdxl.yaml", "bert": "bert.yaml", "resnet": "resnet.yaml"}
"""What there is a demo of, and the YAML that it is served by."""


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


def run(
    model: str, state: Path, out: Path, backend: str = "auto", console: Console | None = None
) -> None:
    """Run the demo of `model` with its working files in `state` and its results in `out`, compiled
    by `backend` (`pt2.compile.backend`).

    Raises:
        PreheatError: there is no such backend, the server did not become ready, or an answer is
            not what was asked for.
    """
    console = console or Console()
    config = with_backend(server.ROOT / "model-config" / MODELS[model], backend, state)
    with (
        serving(model, config, state, console) as (running, seconds),
        Client.to(running) as client,
    ):
        ask = _pictures if model == "sdxl" else _tensors
        answers, served = list(ask(client, model)), client.state()
    out.mkdir(parents=True, exist_ok=True)
    console.print(engines(served["roads"]))
    if model == "sdxl":
        _save_pictures(answers, seconds, out, console)
    else:
        _save_tensors(answers, served["padding"], out, console)
    console.print("The server is stopped.")


def with_backend(config: Path, backend: str, state: Path) -> Path:
    """A copy of the YAML that names another backend; the YAML itself where it names this one.

    Raises:
        PreheatError: there is no such backend.
    """
    if not backend.isidentifier():
        raise PreheatError(f"{backend!r} is no name of a backend")
    text = config.read_text()
    if f"backend: {backend}," in text:
        return config
    copy = state / "configs" / backend / config.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(text.replace("backend: auto,", f"backend: {backend},"))
    ModelConfig.load(copy, ours=True)
    return copy


def engines(roads: Mapping[str, Any]) -> Table:
    """What was measured of every target's engines at this start, on the largest bucket."""
    table = Table(title="milliseconds a call on the largest bucket")
    for heading in ("target", "engine", "ms", "eager's ms", "of eager's time", "serves"):
        table.add_column(heading, justify="right" if "ms" in heading or "of" in heading else "left")
    for target, known in roads.items():
        for road, row in known["roads"].items():
            if "ratio" not in row:  # not to be had, or not what eager computes
                table.add_row(target, road, "", "", "", row["reason"])
                continue
            times = (f"{row[key]:.1f}" for key in ("milliseconds", "eager_milliseconds"))
            serves = "yes" if known["chosen"] in ("", road) else row["reason"]
            table.add_row(target, road, *times, f"{row['ratio']:.2f}", serves)
    return table


@contextmanager
def serving(
    family: str, config: Path, state: Path, console: Console
) -> Iterator[tuple[server.TorchServe, float]]:
    """A server of a tiny model of this family, warm, and the seconds that took.

    Raises:
        PreheatError: the server did not become ready.
    """
    begun, run_dir = time.monotonic(), state / "run" / f"demo-{family}"
    left = server.recall(run_dir)
    if left is not None:
        left.stop()  # an earlier demo that was killed before it could do so itself
    console.print(f"Building a tiny {family} and its archive ...")
    model = tiny_model(family, state / "models")
    archive = build_archive(config, model, output=state / "archives")
    console.print("Starting TorchServe; its worker compiles and warms every bucket:")
    running = server.start(
        [archive], run_dir, ports=server.Ports.free(), cache=state / "cache" / "inductor"
    )
    try:
        with WarmupBars(console) as progress:
            running.wait_ready(1800, watch=progress.update)
        seconds = time.monotonic() - begun
        console.print(f"READY after {seconds:.1f} s: REST {running.inference}, gRPC {running.grpc}")
        yield running, seconds
    finally:
        running.stop()


def tiny_model(family: str, models: Path) -> Path:
    """`build_tiny` into a folder of `models` whose name changes with what would be made, and only
    where it is not there.

    Raises:
        PreheatError: it failed.
    """
    made_by = [metadata.version(name) for name in ("torch", "diffusers", "transformers")]
    sources = sorted(PACKAGE.glob("models/**/tiny.py"))
    source = b"".join(path.read_bytes() for path in sources)
    digest = hashlib.sha256(source + repr(made_by).encode()).hexdigest()[:12]
    folder = models / f"tiny-{family}-{digest}"
    # which appears whole, by a rename
    return folder if folder.is_dir() else build_tiny(family, folder)


def build_tiny(family: str, folder: Path) -> Path:
    """`tiny.build` in a process of its own, which spares this one torch, and the terminal what
    loading it prints.

    Raises:
        PreheatError: it failed.
    """
    code = (
        "import sys, pathlib; from preheat.models import tiny; tiny.build(sys.argv[1], "
        "pathlib.Path(sys.argv[2]))"
    )
    search = os.pathsep.join(
        filter(None, [str(server.ROOT / "handler"), os.environ.get("PYTHONPATH")])
    )
    done = subprocess.run(
        [sys.executable, "-c", code, family, str(folder)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": search},
    )
    if done.returncode:
        raise PreheatError(f"no tiny {family} could be made: {done.stderr.strip()}")
    return folder


def _pictures(client: Client, _: str) -> Iterator[Answer]:
    """The SDXL's: every size over both protocols, from text and from an image in turn."""
    turns = (("text", "image"), ("image", "text"))
    asks = (
        (size, protocol, task)
        for index, size in enumerate(PICTURES)
        for protocol, task in zip(("REST", "gRPC"), turns[index % 2], strict=True)
    )
    for number, ((height, width), protocol, task) in enumerate(asks, start=1):
        asked = f"{height}x{width}"
        payload = {
            "prompt": "a lighthouse above a stormy sea",
            "height": height,
            "width": width,
            "seed": SEED,
            **({"image": _photo(), "strength": 0.7} if task == "image" else {}),
        }
        if protocol == "REST":
            reply = _checked(client.predict(payload), protocol, asked)
            picture = _opened(reply.body)
            bucket, engine = (reply.headers[f"x-preheat-{name}"] for name in ("bucket", "engine"))
            padding = float(reply.headers["x-preheat-padding"])
        else:  # its answers carry no headers; the JSON form says the same in its body
            reply = client.predict_grpc({**payload, "response_format": "b64_json"})
            body = _checked(reply, protocol, asked).json()
            picture = _opened(base64.b64decode(body["data"][0]["b64_json"]))
            bucket, engine = "x".join(map(str, body["bucket"])), body["engine"]
            padding = body["padding"]
        if picture.size != (width, height):
            raise PreheatError(f"asked for {asked}, got {picture.height}x{picture.width}")
        document = {
            "file": f"{number:02}-{protocol.lower()}-{task}-{asked}.png",
            "width": width,
            "height": height,
            "bucket": [int(side) for side in bucket.split("x")],
            "engine": engine,
            "protocol": protocol,
            "milliseconds": round(reply.milliseconds, 1),
        }
        yield Answer(
            asked, task, protocol, bucket, padding, engine, reply.milliseconds, document, picture
        )


def _tensors(client: Client, model: str) -> Iterator[Answer]:
    """A module's: every request over both protocols."""
    for asked, content_type, content in _images() if model == "resnet" else _texts():
        part = "text" if content_type == "text/plain" else "data"
        over_rest = client.post(content=content, headers={"content-type": content_type})
        replies = {"REST": over_rest, "gRPC": client.call_grpc({part: content})}
        for protocol, reply in replies.items():
            answered = _checked(reply, protocol, asked).json()
            outputs = answered["outputs"]
            facts = {name: answered[name] for name in ("bucket", "padding", "engine")}
            document = {
                "asked": asked,
                "protocol": protocol,
                **facts,
                "exact": answered["exact"],
                "milliseconds": round(reply.milliseconds, 1),
                "shapes": {name: _shape(value) for name, value in outputs.items()},
                "begins": {name: _first(value) for name, value in outputs.items()},
            }
            took = reply.milliseconds
            yield Answer(asked, protocol, protocol, **facts, milliseconds=took, document=document)


def _images() -> Iterator[tuple[str, str, bytes]]:
    """What each is, for people, its content type, and itself."""
    for height, width in IMAGES:
        image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
        yield f"image {height}x{width}", "image/png", _png(image)


def _texts() -> Iterator[tuple[str, str, bytes]]:
    text = b"It was a bright cold day in April, and the clocks were striking thirteen."
    yield "text", "text/plain", text
    for length in LENGTHS:
        ids = [5 + (7 * index) % 90 for index in range(length)]
        body = json.dumps({"inputs": {"input_ids": ids}}).encode()
        yield f"{length} tokens", "application/json", body


def _checked(reply: Reply, protocol: str, asked: str) -> Reply:
    if reply.status != (200 if protocol == "REST" else 0) or reply.error:
        raise PreheatError(f"{protocol} {asked}: {reply.status} {reply.body[:500]!r}")
    return reply


def _shape(value: Any) -> list[int]:
    return [len(value), *_shape(value[0])] if isinstance(value, list) else []


def _first(value: Any) -> list[float]:
    while isinstance(value[0], list):
        value = value[0]
    return [round(number, 4) for number in value[:4]]


def _opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def _photo() -> str:
    """The input of the image-to-image requests, 240x360, as base64: a sky, a sun and hills, no file
    needed.
    """
    image = Image.linear_gradient("L").resize((360, 240))
    image = Image.merge(
        "RGB", (image, image.point(lambda v: 255 - v // 2), Image.new("L", image.size, 200))
    )
    draw = ImageDraw.Draw(image)
    draw.ellipse((250, 30, 310, 90), fill=(255, 220, 80))
    draw.polygon(
        [(0, 240), (0, 170), (120, 120), (230, 190), (360, 140), (360, 240)], fill=(40, 90, 50)
    )
    return base64.b64encode(_png(image)).decode()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _save_pictures(
    answers: Sequence[Answer], ready_seconds: float, out: Path, console: Console
) -> None:
    for old in out.glob("[0-9][0-9]-*.png"):
        old.unlink()
    for answer in answers:
        if answer.picture is not None:
            answer.picture.save(out / answer.document["file"])
    _contact_sheet(answers).save(out / "contact-sheet.png")
    requests = [answer.document for answer in answers]
    summary = {"ready_seconds": round(ready_seconds, 1), "requests": requests}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    rows = [answer.cells(answer.protocol) for answer in answers]
    table = _table("height x width, in pixels", "protocol", rows)
    console.print(table)
    _draw(table, out / "table.svg")
    console.print(f"{len(answers)} pictures, contact-sheet.png and summary.json are in {out}/.")


def _save_tensors(
    answers: Sequence[Answer], padding: Mapping[str, Any], out: Path, console: Console
) -> None:
    document = {"padding": padding, "answers": [answer.document for answer in answers]}
    (out / "answers.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    shapes = [next(iter(answer.document["shapes"].values())) for answer in answers]
    rows = [
        answer.cells("x".join(map(str, shape)))
        for answer, shape in zip(answers, shapes, strict=True)
    ]
    console.print(_table("tiny model, random weights", "answer", rows))
    error = padding["max_error"]
    shown = error if isinstance(error, str) else f"{error:.2g}"
    console.print(f"Padding changes an answer by {shown} at most here: {padding['exact']}.")
    console.print(f"The answers are in {out}/answers.json.")


def _contact_sheet(answers: Sequence[Answer], columns: int = 4) -> Image.Image:
    """Every picture at its own size, centred in a cell, with what it is below."""
    pictures = [(answer, answer.picture) for answer in answers if answer.picture is not None]
    cell_height = max(picture.height for _, picture in pictures) + 40
    cell_width = max(picture.width for _, picture in pictures) + 20
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (answer, picture) in enumerate(pictures):
        left, top = index % columns * cell_width, index // columns * cell_height
        beside, above = cell_width - picture.width, cell_height - 30 - picture.height
        sheet.paste(picture, (left + beside // 2, top + above // 2))
        caption = (
            f"{answer.asked} in {answer.bucket}, {answer.source}, {answer.protocol}, "
            f"{answer.engine}"
        )
        at = (left + cell_width // 2, top + cell_height - 18)
        draw.text(at, caption, fill="black", anchor="mm")
    return sheet


def _draw(table: Table, path: Path) -> None:
    """The table as a picture, for those who were not at the terminal."""
    console = Console(record=True, width=76, file=io.StringIO())
    console.print(table)
    console.save_svg(str(path), title="make demo")


def _table(title: str, last: str, rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for heading in ("asked", "from", "bucket", "padding", "engine", "ms", last):
        right = heading in ("asked", "padding", "ms")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
