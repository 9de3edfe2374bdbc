"""What the demo of pictures asks for, and what it makes of the answers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from examples.shapes.grammar import WORDS
from preheat.cli import demo, demo_pictures
from preheat.cli.demo_pictures import PAIRS
from preheat.config.model import ModelConfig
from preheat.errors import PreheatError
from preheat.torchserve.client import Client, Reply
from preheat.torchserve.server import ROOT

SHAPES = ModelConfig.load(ROOT / "model-config" / demo.MODELS["sdxl"], ours=True)


class Painted(Client):
    """Answers with one colour a request, `wider` by so many pixels than was asked for."""

    def __init__(self, wider: int = 0) -> None:
        super().__init__("shapes")
        self.wider = wider
        self.asked: list[Mapping[str, Any]] = []

    def predict(self, payload: Mapping[str, Any]) -> Reply:
        headers = {"bucket": "128x192", "engine": "openvino", "padding": "0.2"}
        named = {f"x-preheat-{name}": value for name, value in headers.items()}
        return Reply(200, self._png(payload), 1.0, named)

    def predict_grpc(self, payload: Mapping[str, Any]) -> Reply:
        picture = base64.b64encode(self._png(payload)).decode()
        document = {"data": [{"b64_json": picture}], "bucket": [128, 192], "padding": 0.2}
        return Reply(0, json.dumps({**document, "engine": "eager"}).encode(), 1.0)

    def _png(self, payload: Mapping[str, Any]) -> bytes:
        self.asked.append(payload)
        buffer = io.BytesIO()
        size = payload["width"] + self.wider, payload["height"]
        Image.new("RGB", size, (10 * len(self.asked), 0, 200)).save(buffer, "PNG")
        return buffer.getvalue()


def test_every_word_is_one_that_the_model_was_taught_and_every_size_has_a_bucket() -> None:
    for pair in PAIRS:
        assert set(f"{pair.prompt} {pair.then}".split()) <= set(WORDS)
        assert any(
            pair.height <= bucket.height and pair.width <= bucket.width
            for bucket in SHAPES.pt2.shapes.buckets
        )


def test_each_picture_is_followed_by_what_is_made_of_it() -> None:
    client = Painted()
    answers = list(demo_pictures.ask(client))
    assert [answer.source for answer in answers[::2]] == ["text"] * len(PAIRS)
    assert {answer.protocol for answer in answers} == {"REST", "gRPC"}
    for pair, first, then in zip(PAIRS, answers[::2], client.asked[1::2], strict=True):
        shown = Image.open(io.BytesIO(base64.b64decode(then["image"])))
        assert first.picture is not None and np.array_equal(
            np.asarray(shown), np.asarray(first.picture)
        )
        assert ("mask_image" in then) == (pair.box is not None)
        if pair.box is not None:
            mask = Image.open(io.BytesIO(base64.b64decode(then["mask_image"])))
            assert mask.size == shown.size and 0.4 < np.asarray(mask).mean() / 255 < 0.6


def test_another_size_than_was_asked_for_ends_the_demo() -> None:
    with pytest.raises(PreheatError, match="asked for 128x128, got 128x129"):
        list(demo_pictures.ask(Painted(wider=1)))


def test_the_sheet_has_every_picture_whole(tmp_path: Path) -> None:
    (tmp_path / "03-rest-text-1x1.png").touch()
    answers = list(demo_pictures.ask(Painted()))
    demo_pictures.save(answers, 1.0, tmp_path, Console(quiet=True))
    assert not (tmp_path / "03-rest-text-1x1.png").exists()
    sheet = np.asarray(Image.open(tmp_path / "contact-sheet.png"))
    for answer in answers:
        assert answer.picture is not None
        colour = answer.picture.getpixel((0, 0))
        area = answer.picture.width * answer.picture.height
        assert (sheet == colour).all(-1).sum() == area
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [entry["prompt"] for entry in summary["requests"]][:2] == [
        PAIRS[0].prompt,
        PAIRS[0].then,
    ]
    assert all((tmp_path / entry["file"]).is_file() for entry in summary["requests"])


def test_another_backend_is_named_in_a_copy_of_the_yaml(tmp_path: Path) -> None:
    for name in demo.MODELS.values():
        shipped = ROOT / "model-config" / name
        assert demo.with_backend(shipped, "auto", tmp_path) == shipped
        copy = demo.with_backend(shipped, "inductor", tmp_path)
        assert ModelConfig.load(copy, ours=True).pt2.compile.kwargs["backend"] == "inductor"
