"""The parts of examples/shapes/ that learn: what does not take hours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPTokenizer

from examples.shapes import dataset, grammar, pipeline, text, train_unet, train_vae
from examples.shapes.training import Losses, Plan, Training

PLAN = Plan(steps=60, rate=1e-2, decay=0.9, warmup=5, keep_every=0, show_every=20)


def train(folder: Path, plan: Plan, stop_at: int = 1000) -> nn.Linear:
    """Learns the sum of two numbers; stops dead at a step."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    training = Training(folder, model, plan, seed=7)

    def losses(step: int) -> Losses:
        if step == stop_at:
            raise KeyboardInterrupt
        drawn = torch.randn(16, 2, generator=training.random(step)[1])
        return {"loss": (model(drawn)[:, 0] - drawn.sum(1)).square().mean()}

    return training.run(losses, lambda step: None)


def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", PLAN)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", PLAN, stop_at=33)
    resumed = train(tmp_path / "parts", PLAN)
    torch.testing.assert_close(resumed.weight, whole.weight, rtol=0, atol=0)
    assert (tmp_path / "parts" / "curve.png").exists()


def test_a_training_learns_and_stops_at_what_is_not_finite(tmp_path: Path) -> None:
    learnt = train(
        tmp_path / "well", replace(PLAN, steps=400, rate=5e-2, keep_every=100, show_every=400)
    )
    torch.testing.assert_close(learnt.weight, torch.ones(1, 2), rtol=0, atol=0.05)
    with pytest.raises(FloatingPointError, match="badly"):
        train(tmp_path / "badly", replace(PLAN, rate=float("inf")))


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return text.tokenizer()


def test_each_word_is_one_token_and_others_are_letters(tokenizer: CLIPTokenizer) -> None:
    assert [tokenizer.tokenize(word) for word in grammar.WORDS] == [
        [word + "</w>"] for word in grammar.WORDS
    ]
    assert tokenizer.tokenize("Red, fox") == ["red</w>", "<|unknown|>", "f", "o", "x</w>"]


def test_a_tokenizer_comes_back_from_its_folder(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    captions = ["a large red circle on the left", "", "a fox, §"]
    assert torch.equal(text.token_ids(again, captions), text.token_ids(tokenizer, captions))


def test_the_longest_caption_leaves_the_registers_free(tokenizer: CLIPTokenizer) -> None:
    longest = " left of ".join(["a small red circle"] * 3) + " on a sand gradient background"
    assert len(tokenizer(longest).input_ids) <= text.LENGTH - text.REGISTERS


def test_standardised_latents_have_mean_0_and_deviation_1_and_decode_as_before() -> None:
    vae = train_vae.new()
    picture = torch.rand(1, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        before = vae.encode(picture).latent_dist
        painted = vae.decode(before.mean).sample
        train_vae.standardise(vae, pictures=8)
        after = vae.encode(picture).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, painted, rtol=0, atol=1e-3)
    # as far from its mean in deviations of the posterior as before
    ratio = before.std / after.std
    torch.testing.assert_close(ratio, ratio[..., :1, :1].expand_as(ratio), rtol=1e-3, atol=0)


def test_what_a_caption_tells_is_what_its_scene_has() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 3) * 50:
        scene = grammar.scene(rng, 128, 128, count)
        *registers, ground = text.told(scene.caption())
        expected = {
            grammar.PLACES.index(thing.place): [
                1 + grammar.COLOURS.index(thing.colour),
                1 + grammar.SHAPES.index(thing.shape),
                1 + text.SIZES.index(thing.size),
            ]
            for thing in scene.things
        }
        assert registers == [
            value for place in range(text.REGISTERS) for value in expected.get(place, [0, 0, 0])
        ]
        assert ground == 1 + 2 * grammar.GROUNDS.index(scene.ground) + scene.gradient


@pytest.mark.parametrize(
    ("caption", "same"),
    [
        ("a red circle above a small blue cross", "a small blue cross below a red circle"),
        ("a red circle left of a blue cross", "a blue cross right of a red circle"),
        (
            "a red cross above a blue cross above a cyan cross on a sky background",
            "a cyan cross below a blue cross below a red cross on a sky background",
        ),
    ],
)
def test_a_caption_told_backwards_tells_the_same(caption: str, same: str) -> None:
    assert text.told(caption) == text.told(same)


def test_a_caption_that_says_little_tells_little() -> None:
    assert not any(text.told(""))
    assert text.told("a red x")[-4:] == [1, 0, 0, 0]


def test_standardised_encoders_say_the_same_at_a_deviation_of_1(tokenizer: CLIPTokenizer) -> None:
    texts = text.Texts(tokenizer, *text.new_encoders(tokenizer))
    ids = texts.ids(["a red circle", "a blue square above a red cross", ""])
    states, pooled = texts.encode(ids)
    text.standardise(texts.first, texts.second, ids)
    after, pooled_after = texts.encode(ids)
    for before, scaled in zip(
        [*torch.split(states, text.WIDTH, -1), pooled],
        [*torch.split(after, text.WIDTH, -1), pooled_after],
        strict=True,
    ):
        assert float(scaled.std()) == pytest.approx(1, abs=0.05)
        torch.testing.assert_close(scaled, before / before.std(), rtol=0.05, atol=0.05)


def test_a_cropped_picture_knows_where_it_was_cut() -> None:
    rng = np.random.default_rng(0)
    drawn = [dataset.one(rng, (96, 128), 1) for _ in range(100)]
    assert all(picture.shape == (96, 128, 3) for picture, _, _ in drawn)
    cut = [sizes for _, _, sizes in drawn if sizes != [96, 128, 0, 0, 96, 128]]
    assert 0 < len(cut) < 30
    for height, width, top, left, *target in cut:
        assert target == [96, 128]
        assert top + 96 <= height
        assert left + 128 <= width


def test_all_weights_in_half_precision_are_at_most_16_megabytes(tokenizer: CLIPTokenizer) -> None:
    encoders = text.new_encoders(tokenizer)
    models = [pipeline.new_unet(), train_vae.new(), *encoders]
    assert sum(weight.numel() for model in models for weight in model.parameters()) * 2 <= 16e6


def test_the_unet_learns_from_latents_and_captions(
    tokenizer: CLIPTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = text.Texts(tokenizer, *text.new_encoders(tokenizer))
    rng = np.random.default_rng(0)
    captions = [grammar.scene(rng, 32, 32, 1).told(rng) for _ in range(8)]
    pictures = dataset.Pictures(
        torch.randn(8, 4, 4, 4), texts.ids(captions), torch.tensor([[32, 32, 0, 0, 32, 32]] * 8)
    )
    monkeypatch.setattr(train_unet, "BATCH", 8)
    monkeypatch.setattr(train_unet, "PLAN", replace(PLAN, steps=2, warmup=1, show_every=10))
    monkeypatch.setattr(train_unet, "random_size", lambda _: (32, 32))
    monkeypatch.setattr(train_unet, "SHOWN", 3)
    monkeypatch.setattr(train_unet, "STEPS", 2)
    unet = train_unet.train(tmp_path, texts, train_vae.new(), {(32, 32): pictures})
    assert (tmp_path / "trained" / "config.json").exists()
    assert (tmp_path / "samples-00002.png").exists()
    assert unet.config.cross_attention_dim == 2 * text.WIDTH
