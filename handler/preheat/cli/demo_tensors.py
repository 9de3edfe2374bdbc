"""The demo of a BERT or a ResNet: what it is asked, and the answers' file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from preheat.cli.demo_answers import Answer, checked, png, table
from preheat.torchserve.client import Client

IMAGES = ((224, 224), (97, 150), (384, 384), (200, 380), (383, 225))
"""(height, width) in pixels, of what the ResNet is shown."""
LENGTHS = (1, 7, 31, 50, 100, 200, 333, 500)
"""Tokens."""


def ask(client: Client, model: str) -> Iterator[Answer]:
    """A module's: every request over both protocols."""
    for asked, content_type, content in _images() if model == "resnet" else _texts():
        part = "text" if content_type == "text/plain" else "data"
        over_rest = client.post(content=content, headers={"content-type": content_type})
        replies = {"REST": over_rest, "gRPC": client.call_grpc({part: content})}
        for protocol, reply in replies.items():
            answered = checked(reply, protocol, asked).json()
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
        yield f"image {height}x{width}", "image/png", png(image)


def _texts() -> Iterator[tuple[str, str, bytes]]:
    text = b"It was a bright cold day in April, and the clocks were striking thirteen."
    yield "text", "text/plain", text
    for length in LENGTHS:
        ids = [5 + (7 * index) % 90 for index in range(length)]
        body = json.dumps({"inputs": {"input_ids": ids}}).encode()
        yield f"{length} tokens", "application/json", body


def save(
    answers: Sequence[Answer], padding: Mapping[str, Any], out: Path, console: Console
) -> None:
    """The answers' file into `out`, and their table."""
    document = {"padding": padding, "answers": [answer.document for answer in answers]}
    (out / "answers.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    shapes = [next(iter(answer.document["shapes"].values())) for answer in answers]
    rows = [
        answer.cells("x".join(map(str, shape)))
        for answer, shape in zip(answers, shapes, strict=True)
    ]
    console.print(table("tiny model, random weights", "answer", rows))
    error = padding["max_error"]
    shown = error if isinstance(error, str) else f"{error:.2g}"
    console.print(f"Padding changes an answer by {shown} at most here: {padding['exact']}.")
    console.print(f"The answers are in {out}/answers.json.")


def _shape(value: Any) -> list[int]:
    return [len(value), *_shape(value[0])] if isinstance(value, list) else []


def _first(value: Any) -> list[float]:
    while isinstance(value[0], list):
        value = value[0]
    return [round(number, 4) for number in value[:4]]
