"""The demo: a tiny SDXL is built, archived, served, warmed and asked for odd sizes over REST and
gRPC.

It leaves `*.png`, `contact-sheet.png` and `summary.json`, and no process of its own.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from preheat.cli.progress import WarmupBars
from preheat.errors import PreheatError
from preheat.torchserve import server
from preheat.torchserve.archive import PACKAGE, build_archive
from preheat.torchserve.client import Client, Reply

CONFIG = server.ROOT / "model-config" / "tiny-sdxl.yaml"
SIZES = ((256, 256), (233, 199), (311, 181), (190, 317), (97, 61), (123, 319), (250, 131))
"""(height, width) in pixels; each is asked over REST and over gRPC."""
SEED = 20


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of the demo; sizes in pixels."""

    height: int
    width: int
    protocol: str
    task: str

    @property
    def payload(self) -> dict[str, object]:
        payload: dict[str, object] = {
            "prompt": "a lighthouse above a stormy sea",
            "height": self.height,
            "width": self.width,
            "seed": SEED,
        }
        return payload | {"image": _photo(), "strength": 0.7} if self.task == "image" else payload


@dataclass(frozen=True, slots=True)
class Picture:
    """One answer of the server."""

    ask: Ask
    file: str
    image: Image.Image
    bucket: tuple[int, int]
    padding: float
    engine: str
    milliseconds: float


def run(state: Path, out: Path, console: Console | None = None) -> None:
    """Run the demo with its working files in `state` and its results in `out`.

    Raises:
        PreheatError: the server did not become ready, or an answer is not what was asked for.
    """
    console = console or Console()
    with serving("sdxl", CONFIG, state, console) as (running, ready_seconds):
        pictures = _ask_all(running)
    _save(pictures, ready_seconds, out)
    table = _table(pictures)
    console.print(table)
    _draw(table, out / "table.svg")
    console.print(
        f"{len(pictures)} pictures, contact-sheet.png and summary.json are in {out}/; the server "
        "is stopped."
    )


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


def _ask_all(running: server.TorchServe) -> list[Picture]:
    asks = []
    for index, (height, width) in enumerate(SIZES):
        tasks = ("text", "image") if index % 2 == 0 else ("image", "text")
        asks += [Ask(height, width, "REST", tasks[0]), Ask(height, width, "gRPC", tasks[1])]
    with Client.to(running) as client:
        return [_ask(client, number, ask) for number, ask in enumerate(asks, start=1)]


def _ask(client: Client, number: int, ask: Ask) -> Picture:
    rest = ask.protocol == "REST"
    # gRPC answers carry no headers; the JSON form says the same in its body.
    reply = (
        client.predict(ask.payload)
        if rest
        else client.predict_grpc({**ask.payload, "response_format": "b64_json"})
    )
    if reply.status != (200 if rest else 0) or reply.error:
        raise PreheatError(
            f"{ask.protocol} {ask.height}x{ask.width}: {reply.status} {reply.body[:500]!r}"
        )
    name = f"{number:02}-{ask.protocol.lower()}-{ask.task}-{ask.height}x{ask.width}.png"
    picture = _read_rest(ask, name, reply) if rest else _read_grpc(ask, name, reply)
    if picture.image.size != (ask.width, ask.height):
        raise PreheatError(
            f"asked for {ask.height}x{ask.width}, got {picture.image.height}x{picture.image.width}"
        )
    return picture


def _read_rest(ask: Ask, name: str, reply: Reply) -> Picture:
    height, _, width = reply.headers["x-preheat-bucket"].partition("x")
    padding, engine = float(reply.headers["x-preheat-padding"]), reply.headers["x-preheat-engine"]
    return Picture(
        ask,
        name,
        _opened(reply.body),
        (int(height), int(width)),
        padding,
        engine,
        reply.milliseconds,
    )


def _read_grpc(ask: Ask, name: str, reply: Reply) -> Picture:
    body = reply.json()
    image = _opened(base64.b64decode(body["data"][0]["b64_json"]))
    height, width = body["bucket"]
    return Picture(
        ask, name, image, (height, width), body["padding"], body["engine"], reply.milliseconds
    )


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
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _save(pictures: Sequence[Picture], ready_seconds: float, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("[0-9][0-9]-*.png"):
        old.unlink()
    for picture in pictures:
        picture.image.save(out / picture.file)
    _contact_sheet(pictures).save(out / "contact-sheet.png")
    requests = [
        {
            "file": picture.file,
            "width": picture.ask.width,
            "height": picture.ask.height,
            "bucket": list(picture.bucket),
            "engine": picture.engine,
            "protocol": picture.ask.protocol,
            "milliseconds": round(picture.milliseconds, 1),
        }
        for picture in pictures
    ]
    summary = {"ready_seconds": round(ready_seconds, 1), "requests": requests}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def _contact_sheet(pictures: Sequence[Picture], columns: int = 4) -> Image.Image:
    """Every picture at its own size, centred in a cell, with what it is below."""
    cell_height = max(picture.ask.height for picture in pictures) + 40
    cell_width = max(picture.ask.width for picture in pictures) + 20
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(pictures):
        left, top = index % columns * cell_width, index // columns * cell_height
        ask, (height, width) = picture.ask, picture.bucket
        at = (left + (cell_width - ask.width) // 2, top + (cell_height - 30 - ask.height) // 2)
        sheet.paste(picture.image, at)
        caption = (
            f"{ask.height}x{ask.width} in {height}x{width}, {ask.task}, {ask.protocol}, "
            f"{picture.engine}"
        )
        draw.text(
            (left + cell_width // 2, top + cell_height - 18), caption, fill="black", anchor="mm"
        )
    return sheet


def _draw(table: Table, path: Path) -> None:
    """The table as a picture, for those who were not at the terminal."""
    console = Console(record=True, width=76, file=io.StringIO())
    console.print(table)
    console.save_svg(str(path), title="make demo")


def _table(pictures: Sequence[Picture]) -> Table:
    table = Table(title="height x width, in pixels")
    for heading in ("asked", "from", "bucket", "padding", "engine", "ms", "protocol"):
        table.add_column(
            heading, justify="right" if heading in ("asked", "padding", "ms") else "left"
        )
    for picture in pictures:
        ask = picture.ask
        table.add_row(
            f"{ask.height}x{ask.width}",
            ask.task,
            "x".join(map(str, picture.bucket)),
            f"{picture.padding:.0%}",
            picture.engine,
            f"{picture.milliseconds:.0f}",
            ask.protocol,
        )
    return table
