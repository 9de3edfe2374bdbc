"""The demo of the small trained SDXL: pictures from text, others made of them, a contact sheet."""

from __future__ import annotations

import base64
import io
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from preheat.cli.demo_answers import Answer, checked, png, table
from preheat.errors import PreheatError
from preheat.torchserve.client import Client

SEED = 20
STRENGTH = 0.7
"""Of image to image: as much as it takes for another colour."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A picture of a size in pixels from a text, and what another text makes of it: of all of it,
    or of the box (left, top, right, bottom; shares of the picture) that is masked.
    """

    height: int
    width: int
    prompt: str
    then: str
    box: tuple[float, float, float, float] | None = None


LEFT, RIGHT, TOP, BOTTOM = (0, 0, 0.5, 1), (0.5, 0, 1, 1), (0, 0, 1, 0.5), (0, 0.5, 1, 1)
PAIRS = (
    Pair(
        128,
        128,
        "a large red circle in the middle on a sky gradient background",
        "a large yellow circle in the middle on a sky gradient background",
    ),
    Pair(
        109,
        187,
        "a large yellow circle left of a small blue square on a black background",
        "a large yellow circle left of a large red triangle on a black background",
        RIGHT,
    ),
    Pair(
        187,
        109,
        "a large blue square above a small yellow circle on a gray gradient background",
        "a large blue square above a small purple circle on a gray gradient background",
    ),
    Pair(
        97,
        121,
        "a large green triangle in the middle on a sand background",
        "a large purple triangle in the middle on a sand background",
    ),
    Pair(
        155,
        125,
        "a small red triangle above a large green circle on a white background",
        "a small red triangle above a large cyan cross on a white background",
        BOTTOM,
    ),
    Pair(
        96,
        183,
        "a small red circle left of a small yellow square left of a small blue triangle on a sand "
        "gradient background",
        "a small green circle left of a small yellow square left of a small blue triangle on a "
        "sand gradient background",
    ),
    Pair(
        119,
        101,
        "a small cyan cross above a small red square on a black gradient background",
        "a small yellow circle above a small red square on a black gradient background",
        TOP,
    ),
    Pair(
        103,
        166,
        "a large purple cross left of a large green circle on a gray background",
        "a large blue circle left of a large green circle on a gray background",
        LEFT,
    ),
)
"""Asked in turn over REST and over gRPC."""


def ask(client: Client) -> Iterator[Answer]:
    """Every pair: its picture, and what is made of that.

    Raises:
        PreheatError: an answer is not what was asked for.
    """
    for number, pair in enumerate(PAIRS):
        protocols = ("REST", "gRPC") if number % 2 else ("gRPC", "REST")
        first = _ask(client, 2 * number + 1, pair, "text", protocols[0], {"prompt": pair.prompt})
        yield first
        if first.picture is None:
            raise PreheatError(f"{pair.prompt}: no picture")
        made_of: dict[str, object] = {"prompt": pair.then, "image": _base64(first.picture)}
        if pair.box is None:
            task, fields = "image", {**made_of, "strength": STRENGTH}
        else:
            mask = _base64(_masked(pair))
            task, fields = "mask", {**made_of, "strength": 1.0, "mask_image": mask}
        yield _ask(client, 2 * number + 2, pair, task, protocols[1], fields)


def _ask(
    client: Client, number: int, pair: Pair, task: str, protocol: str, fields: Mapping[str, object]
) -> Answer:
    asked = f"{pair.height}x{pair.width}"
    payload = {**fields, "height": pair.height, "width": pair.width, "seed": SEED}
    if protocol == "REST":
        reply = checked(client.predict(payload), protocol, asked)
        picture = _opened(reply.body)
        bucket, engine = (reply.headers[f"x-preheat-{name}"] for name in ("bucket", "engine"))
        padding = float(reply.headers["x-preheat-padding"])
    else:  # its answers carry no headers; the JSON form says the same in its body
        reply = client.predict_grpc({**payload, "response_format": "b64_json"})
        body = checked(reply, protocol, asked).json()
        picture = _opened(base64.b64decode(body["data"][0]["b64_json"]))
        bucket, engine = "x".join(map(str, body["bucket"])), body["engine"]
        padding = body["padding"]
    if picture.size != (pair.width, pair.height):
        raise PreheatError(f"asked for {asked}, got {picture.height}x{picture.width}")
    document = {
        "file": f"{number:02}-{protocol.lower()}-{task}-{asked}.png",
        "prompt": fields["prompt"],
        "width": pair.width,
        "height": pair.height,
        "bucket": [int(side) for side in bucket.split("x")],
        "engine": engine,
        "protocol": protocol,
        "milliseconds": round(reply.milliseconds, 1),
    }
    return Answer(
        asked, task, protocol, bucket, padding, engine, reply.milliseconds, document, picture
    )


def save(answers: Sequence[Answer], ready_seconds: float, out: Path, console: Console) -> None:
    """Pictures, contact sheet, table and summary into `out`, where an earlier demo's are gone."""
    for old in out.glob("[0-9][0-9]-*.png"):
        old.unlink()
    for answer in answers:
        if answer.picture is not None:
            answer.picture.save(out / answer.document["file"])
    contact_sheet(answers).save(out / "contact-sheet.png")
    requests = [answer.document for answer in answers]
    summary = {"ready_seconds": round(ready_seconds, 1), "requests": requests}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    rows = [answer.cells(answer.protocol) for answer in answers]
    shown = table("height x width, in pixels", "protocol", rows)
    console.print(shown)
    _draw(shown, out / "table.svg")
    console.print(f"{len(answers)} pictures, contact-sheet.png and summary.json are in {out}/.")


COLUMNS, CELL, GAP, LINE = 4, 208, 12, 13
"""Of the contact sheet: pictures side by side; pixels."""


def contact_sheet(answers: Sequence[Answer]) -> Image.Image:
    """Every picture at its own size with what was asked for below it, each beside the one that it
    was made of.
    """
    font = ImageFont.load_default(11)
    rows = [answers[first : first + COLUMNS] for first in range(0, len(answers), COLUMNS)]
    tall = [max(answer.picture.height for answer in row if answer.picture) for row in rows]
    texts = [[_caption(answer) for answer in row] for row in rows]
    lines = [max(text.count("\n") + 1 for text in row) for row in texts]
    heights = [high + LINE * some + 2 * GAP for high, some in zip(tall, lines, strict=True)]
    sheet = Image.new("RGB", (COLUMNS * CELL + GAP, sum(heights) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for row, high, height, captions in zip(rows, tall, heights, texts, strict=True):
        for column, (answer, text) in enumerate(zip(row, captions, strict=True)):
            left = GAP + column * CELL
            if answer.picture is not None:
                sheet.paste(answer.picture, (left, top + high - answer.picture.height))
            draw.multiline_text((left, top + high + 4), text, fill="#333", font=font, spacing=2)
        top += height
    return sheet


def _caption(answer: Answer) -> str:
    made = {"text": "", "image": "made of it: ", "mask": "its masked half: "}[answer.source]
    said = textwrap.wrap(made + answer.document["prompt"], 31)
    return "\n".join([*said, f"{answer.asked} in {answer.bucket}, {answer.protocol}"])


def _masked(pair: Pair) -> Image.Image:
    """White where it is painted anew."""
    mask = Image.new("L", (pair.width, pair.height), 0)
    left, top, right, bottom = pair.box or (0, 0, 1, 1)
    across, down = pair.width, pair.height
    corners = (left * across, top * down, right * across, bottom * down)
    ImageDraw.Draw(mask).rectangle(corners, fill=255)
    return mask


def _opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def _base64(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()


def _draw(shown: Table, path: Path) -> None:
    """The table as a picture, for those who were not at the terminal."""
    console = Console(record=True, width=76, file=io.StringIO())
    console.print(shown)
    console.save_svg(str(path), title="make demo")
