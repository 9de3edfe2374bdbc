"""The generator and the judge of examples/shapes."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from examples.shapes import grammar
from examples.shapes.drawing import Pixels, coverage, draw, grid
from examples.shapes.grammar import COLOURS, PLACES, SHAPES, Scene, held_out
from examples.shapes.judge import find, judge

SIZES = [(128, 128), (96, 192), (200, 104), (137, 121)]


def scenes(size: tuple[int, int], count: int) -> list[Scene]:
    rng = np.random.default_rng(size)
    return [
        grammar.scene(rng, *size, 1 + index % 3, unseen=index % 2 == 0) for index in range(count)
    ]


def as_drawn(picture: Pixels) -> Pixels:
    return picture


def noisy(picture: Pixels) -> Pixels:
    noise = np.random.default_rng(0).normal(0, 0.04, picture.shape)
    return np.clip(picture + noise.astype(np.float32), 0, 1)


def soft(picture: Pixels) -> Pixels:
    """Blurred by a pixel, and a JPEG of low quality."""
    file = io.BytesIO()
    as_image(blurred(picture, 1)).save(file, "JPEG", quality=60)
    return as_pixels(Image.open(file))


def blurred(picture: Pixels, radius: float) -> Pixels:
    return as_pixels(as_image(picture).filter(ImageFilter.GaussianBlur(radius)))


def as_image(picture: Pixels) -> Image.Image:
    return Image.fromarray((picture * 255).round().astype(np.uint8))


def as_pixels(image: Image.Image) -> Pixels:
    return np.asarray(image, np.float32) / np.float32(255)


@pytest.mark.parametrize("spoil", [as_drawn, noisy, soft])
@pytest.mark.parametrize("size", SIZES)
def test_at_least_99_in_100_drawn_pictures_are_judged_right(
    size: tuple[int, int], spoil: Callable[[Pixels], Pixels]
) -> None:
    verdicts = [judge(spoil(draw(scene)[0]), scene) for scene in scenes(size, 40)]
    assert np.mean([verdict.right for verdict in verdicts]) >= 0.99


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_object_cut_by_the_border_is_found_and_wrong(count: int) -> None:
    scene = grammar.scene(np.random.default_rng(count), 128, 128, count)
    picture = draw(scene)[0]
    first = scene.things[0]
    cropped = picture[:, round(first.x) :] if scene.axis == "x" else picture[round(first.y) :]
    verdict = judge(cropped, scene)
    assert verdict.cut
    assert not verdict.right


@pytest.mark.parametrize("size", SIZES)
def test_a_picture_of_another_scene_is_wrong(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    for scene in scenes(size, 12):
        other = grammar.scene(rng, *size, len(scene.things))
        told = [(thing.shape, thing.colour, thing.place) for thing in scene.things]
        if told == [(thing.shape, thing.colour, thing.place) for thing in other.things]:
            continue
        assert not judge(draw(other)[0], scene).right


def test_a_missing_object_and_one_too_many_are_wrong() -> None:
    rng = np.random.default_rng(6)
    for count in (2, 3):
        scene = grammar.scene(rng, 128, 160, count)
        fewer = Scene(**{**vars(scene), "things": scene.things[1:]})
        assert not judge(draw(fewer)[0], scene).right
        assert not judge(draw(scene)[0], fewer).right


def test_an_exchange_of_two_objects_is_wrong() -> None:
    scene = grammar.scene(np.random.default_rng(8), 128, 128, 2)
    one, other = scene.things
    turned = Scene(**{**vars(scene), "things": (other, one)})
    assert (one.shape, one.colour) != (other.shape, other.colour)
    assert not judge(draw(scene)[0], turned).right


def test_a_stretched_object_has_no_shape() -> None:
    scene = grammar.scene(np.random.default_rng(9), 128, 128, 1)
    (found,) = find(as_pixels(as_image(draw(scene)[0]).resize((256, 128))))
    assert found.shape is None
    assert found.colour == scene.things[0].colour


def test_a_blurred_blob_has_no_shape() -> None:
    scene = grammar.scene(np.random.default_rng(11), 128, 128, 1)
    cross = Scene(**{**vars(scene), "things": (_as_large_cross(scene),)})
    found = find(blurred(draw(cross)[0], 9))
    assert all(thing.shape != "cross" for thing in found)


def _as_large_cross(scene: Scene) -> grammar.Thing:
    (thing,) = scene.things
    return grammar.Thing(**{**vars(thing), "shape": "cross", "colour": "red"})


def test_a_ring_is_one_object_without_a_shape() -> None:
    x, y = grid(128, 128)
    ring = coverage("circle", x - 64, y - 64, 80) - coverage("circle", x - 64, y - 64, 50)
    (found,) = find(np.stack([0.2 + 0.6 * ring, *[np.full_like(ring, 0.2)] * 2], -1))
    assert (found.colour, found.shape) == ("red", None)
    assert (found.x, found.y) == pytest.approx((64, 64), abs=8)


@pytest.mark.parametrize("ground", grammar.GROUNDS)
def test_a_ground_alone_has_no_objects(ground: grammar.Ground) -> None:
    scene = Scene(120, 136, "x", (), ground, gradient=True, seed=1)
    assert find(draw(scene)[0]) == ()


def test_one_place_of_five_is_held_out_for_each_shape_and_colour() -> None:
    for shape in SHAPES:
        for colour in COLOURS:
            assert sum(held_out(shape, colour, place) for place in PLACES) == 1


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    height=st.integers(64, 256),
    width=st.integers(64, 256),
    count=st.integers(1, 3),
    unseen=st.booleans(),
)
def test_scenes_keep_what_they_promise(
    seed: int, height: int, width: int, count: int, unseen: bool
) -> None:
    scene = grammar.scene(np.random.default_rng(seed), height, width, count, unseen=unseen)
    assert len(scene.things) == count
    for thing in scene.things:
        assert held_out(thing.shape, thing.colour, thing.place) == unseen
        assert thing.extent >= min(height, width) / 4
        assert thing.extent / 2 <= thing.x <= width - thing.extent / 2
        assert thing.extent / 2 <= thing.y <= height - thing.extent / 2
    words = scene.caption().split()
    assert set(words) <= set(grammar.WORDS)
    assert set(scene.told(np.random.default_rng(seed)).split()) <= set(words) | {"below", "right"}


def test_a_scene_is_drawn_the_same_twice() -> None:
    scene = grammar.scene(np.random.default_rng(3), 96, 128, 3)
    np.testing.assert_array_equal(draw(scene)[0], draw(scene)[0])


def test_edges_are_antialiased() -> None:
    scene = grammar.scene(np.random.default_rng(4), 128, 128, 1)
    cover = draw(scene)[1]
    assert 0 < ((cover > 0.05) & (cover < 0.95)).mean() < 0.1
