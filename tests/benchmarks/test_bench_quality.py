"""What `bench.quality` asks for, and what it says of pictures that are known."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image

from bench import quality_report
from bench.quality import ROWS, Row
from bench.quality_asks import Ask, asks, psnr, said
from examples.shapes.drawing import draw
from examples.shapes.grammar import held_out
from preheat.config.model import ModelConfig


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_every_row_can_be_served(row: Row, tmp_path: Path) -> None:
    (tmp_path / "shapes.yaml").write_text(yaml.safe_dump(row.config()))
    assert ModelConfig.load(tmp_path / "shapes.yaml", ours=True).batchSize == 1


def painted(ask: Ask) -> NDArray[np.uint8]:
    """What it asks for, by the painter of the training's pictures."""
    return np.asarray((draw(ask.scene)[0] * 255).round(), np.uint8)


@pytest.mark.parametrize("kind", ["trained", "odd", "image", "inpaint"])
def test_what_is_painted_as_asked_is_right(kind: str) -> None:
    found = [said(ask, painted(ask)) for ask in asks(kind, 24, 0.7)]  # type: ignore[arg-type]
    assert sum(each.right for each in found) >= 23
    assert not any(each.cut for each in found)


def test_a_kind_is_the_same_every_time_and_its_beginning_too() -> None:
    assert [ask.payload for ask in asks("odd", 4, 0.7)] == [
        ask.payload for ask in asks("odd", 9, 0.7)[:4]
    ]


def test_captions_are_of_combinations_that_training_never_saw() -> None:
    for ask in asks("trained", 12, 0.7) + asks("odd", 12, 0.7):
        for thing in ask.scene.things:
            assert held_out(thing.shape, thing.colour, thing.place)


def test_no_side_of_an_odd_size_is_a_whole_number_of_cells() -> None:
    for ask in asks("odd", 50, 0.7):
        assert all(ask.payload[side] % 8 for side in ("height", "width"))


def test_an_image_shows_its_scene_in_other_colours() -> None:
    for ask in asks("image", 9, 0.7):
        sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(ask.payload["image"]))))
        assert ask.drawn is not None and np.array_equal(sent, ask.drawn)
        assert not said(ask, sent).right


def test_what_changes_outside_the_mask_is_found_and_nothing_inside() -> None:
    for ask in asks("inpaint", 9, 0.7):
        assert ask.drawn is not None and ask.free is not None
        wanted = painted(ask)
        # the object lies within what may change
        assert np.array_equal(wanted[~ask.free], ask.drawn[~ask.free])
        assert said(ask, wanted).changed == 0
        spoilt = wanted.copy()
        y, x = np.argwhere(~ask.free)[0]
        spoilt[y, x, 0] ^= 2
        assert said(ask, spoilt).changed == 2


def test_a_picture_that_lacks_an_object_or_cuts_one_off_is_not_right() -> None:
    (ask,) = asks("trained", 1, 0.7)
    thing = ask.scene.things[0]
    left = round(thing.x - thing.extent / 4)
    cut = painted(ask)[:, left:]
    assert said(ask, cut).cut and not said(ask, cut).right
    assert not said(ask, np.full_like(cut, 128)).right


def test_figures_have_shares_by_number_of_objects() -> None:
    three = asks("trained", 3, 0.7)
    blank = [np.full_like(painted(ask), 128) for ask in three]
    pictures = [painted(three[0]), blank[1], painted(three[2])]
    found = [said(ask, picture) for ask, picture in zip(three, pictures, strict=True)]
    decibels = [psnr(picture, painted(ask)) for ask, picture in zip(three, pictures, strict=True)]
    row = quality_report.figures(found, decibels)
    assert row["right_by_objects"] == {"1": 1.0, "2": 0.0, "3": 1.0}
    assert row["psnr"] == 99.0 and row["least_psnr"] < 40
    assert "66% right" not in quality_report.line({"trained": row})
    assert "67% right, 0% cut, 99.0 dB" in quality_report.line({"trained": row})


def test_a_sheet_has_every_picture_at_its_own_size() -> None:
    shown = asks("odd", 3, 0.7)
    rows = {name: {ask.name: painted(ask) for ask in shown} for name in ("eager", "mask")}
    sheet = np.asarray(quality_report.sheet(shown, rows))
    for ask in shown:
        corner = painted(ask)[0, 0]
        assert (sheet == corner).all(-1).any()
    assert sheet.shape[1] >= sum(ask.scene.width for ask in shown)
