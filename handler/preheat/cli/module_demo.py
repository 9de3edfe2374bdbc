"""The demo of a module: a tiny BERT or ResNet is built, archived, served, warmed and asked for odd
sizes over REST and gRPC.

It leaves `answers.json`, and no process of its own.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from preheat.cli.demo import serving
from preheat.errors import PreheatError
from preheat.torchserve import server
from preheat.torchserve.client import Client, Reply

LENGTHS = (1, 7, 31, 50, 100, 200, 333, 500)
"""Tokens."""
SIZES = ((224, 224), (97, 150), (384, 384), (200, 380), (383, 225))
"""(height, width) in pixels."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: what it is, for people, and its form for either protocol."""

    title: str
    content_type: str
    body: bytes


def run(model: str, state: Path, out: Path, console: Console | None = None) -> None:
    """Run the demo of `bert` or `resnet` with its working files in `state` and its results in
    `out`.

    Raises:
        PreheatError: the server did not become ready, or an answer is not what was asked for.
    """
    console = console or Console()
    config = server.ROOT / "model-config" / f"{model}.yaml"
    with serving(model, config, state, console) as (running, _), Client.to(running) as client:
        answers = [answer for ask in _asks(model) for answer in _ask(client, ask)]
        padding = client.state()["padding"]
    out.mkdir(parents=True, exist_ok=True)
    (out / "answers.json").write_text(
        json.dumps({"padding": padding, "answers": answers}, indent=1), encoding="utf-8"
    )
    console.print(_table(answers))
    error = padding["max_error"]
    shown = error if isinstance(error, str) else f"{error:.2g}"
    console.print(f"Padding changes an answer by {shown} at most here: {padding['exact']}.")
    console.print(f"The answers are in {out}/answers.json; the server is stopped.")


def _asks(model: str) -> Iterator[Ask]:
    if model == "resnet":
        for height, width in SIZES:
            image = io.BytesIO()
            Image.linear_gradient("L").resize((width, height)).convert("RGB").save(image, "png")
            yield Ask(f"image {height}x{width}", "image/png", image.getvalue())
        return
    yield Ask(
        "text",
        "text/plain",
        b"It was a bright cold day in April, and the clocks were striking thirteen.",
    )
    for length in LENGTHS:
        ids = [5 + (7 * index) % 90 for index in range(length)]
        yield Ask(
            f"{length} tokens",
            "application/json",
            json.dumps({"inputs": {"input_ids": ids}}).encode(),
        )


def _ask(client: Client, ask: Ask) -> Iterator[dict[str, Any]]:
    name = "text" if ask.content_type == "text/plain" else "data"
    yield _read(
        ask, "REST", client.post(content=ask.body, headers={"content-type": ask.content_type})
    )
    yield _read(ask, "gRPC", client.call_grpc({name: ask.body}))


def _read(ask: Ask, protocol: str, reply: Reply) -> dict[str, Any]:
    if reply.status != (200 if protocol == "REST" else 0) or reply.error:
        raise PreheatError(f"{protocol} {ask.title}: {reply.status} {reply.body[:500]!r}")
    document = reply.json()
    return {
        "asked": ask.title,
        "protocol": protocol,
        **{name: document[name] for name in ("bucket", "padding", "engine", "exact")},
        "milliseconds": round(reply.milliseconds, 1),
        "shapes": {name: _shape(value) for name, value in document["outputs"].items()},
        "begins": {name: _first(value) for name, value in document["outputs"].items()},
    }


def _shape(value: Any) -> list[int]:
    return [len(value), *_shape(value[0])] if isinstance(value, list) else []


def _first(value: Any) -> list[float]:
    while isinstance(value[0], list):
        value = value[0]
    return [round(number, 4) for number in value[:4]]


def _table(answers: list[dict[str, Any]]) -> Table:
    name = next(iter(answers[0]["shapes"]))
    # fits 80 columns
    table = Table(title="tiny model, random weights", box=SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("asked", "from", "bucket", "padding", "engine", "ms", "answer"):
        table.add_column(heading, no_wrap=True)
    for answer in answers:
        table.add_row(
            answer["asked"],
            answer["protocol"],
            answer["bucket"],
            f"{answer['padding']:.0%}",
            answer["engine"],
            f"{answer['milliseconds']:.0f}",
            "x".join(map(str, answer["shapes"][name])),
        )
    return table
