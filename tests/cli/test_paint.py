"""`preheat paint` against a gateway, and what it says where that is not to be had."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fake_host import STEPS, FakeHost, listening, png
from preheat.cli import app, paint
from preheat.errors import PreheatError
from preheat.gateway.app import create_app
from preheat.gateway.torchserve import Places, TorchServeBackend

HOST = FakeHost()


@pytest.fixture(scope="module")
def gateway() -> Iterator[str]:
    with listening(HOST.app()) as url:
        places = Places(inference=url, management=url, metrics=url)
        with listening(create_app(TorchServeBackend(places))) as front:
            yield front


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    HOST.bodies.clear()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> Result:
    return CliRunner().invoke(app.app, ["paint", *words])


def test_a_picture_is_painted_and_what_was_said_of_it_is_printed(gateway: str, here: Path) -> None:
    words = ("a red circle", "--size", "64x32", "--seed", "3", "--url", gateway, "-o", "red.png")
    done = run(*words, "--steps", "4", "--negative", "blue", "--guidance", "2.5")
    assert done.exit_code == 0, done.output
    assert (here / "red.png").read_bytes() == png({"width": 64, "height": 32, "seed": 3})
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["red.png"] == "64x32" and lines["seed"] == "3"
    assert (lines["bucket"], lines["engine"]) == ("320x192", "compiled")
    (asked,) = HOST.bodies
    assert asked == {
        "prompt": "a red circle",
        "width": 64,
        "height": 32,
        "seed": 3,
        "num_inference_steps": 4,
        "negative_prompt": "blue",
        "guidance_scale": 2.5,
        "output_format": "png",
        "stream": True,
        "num_previews": 0,
    }
    assert f"{STEPS}/{STEPS}" in done.stderr


def test_a_picture_is_painted_over(gateway: str, here: Path) -> None:
    (here / "image.png").write_bytes(b"image")
    (here / "mask.png").write_bytes(b"mask")
    words = ("a cat", "--image", "image.png", "--mask", "mask.png", "--strength", "0.5")
    done = run(*words, "--stream", "--url", gateway, "-o", "cat.jpg", "--model", "tiny")
    assert done.exit_code == 0, done.output
    (asked,) = HOST.bodies
    assert base64.b64decode(asked["image"]) == b"image" and asked["strength"] == 0.5
    assert base64.b64decode(asked["mask_image"]) == b"mask" and asked["output_format"] == "jpeg"
    assert (here / "cat.preview.jpg").read_bytes().startswith(b"jpeg")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("a cat", "-o", "cat.gif"), "cat.gif: the name ends in one of .png"),
        (("a cat", "--size", "big"), "--size big: width x height"),
        (("a cat", "--image", "none.png"), "cannot read none.png"),
        (("fail 400 InvalidRequest",), "as asked"),
        (("break",), "it raised"),
        (("a cat", "--model", "none"), "Model not found: none"),
    ],
)
def test_what_goes_wrong_is_said_in_a_line(
    gateway: str, here: Path, words: tuple[str, ...], said: str
) -> None:
    done = run(*words, "--url", gateway)
    assert isinstance(done.exception, PreheatError) and said in str(done.exception)
    assert not list(here.iterdir())


def test_nobody_there_is_said_too(here: Path) -> None:
    with pytest.raises(PreheatError, match=r"127\.0\.0\.1:9 does not answer"):
        paint.paint(paint.Door("http://127.0.0.1:9", "tiny"), {}, here / "out.png", None)
