"""A seed gives the tokens of `torch.manual_seed(seed); generate(do_sample=True)`."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from preheat.errors import PipelineFailure
from preheat.models.text import tiny
from preheat.models.text.sampler import Sampler, Sampling
from preheat.models.text.step import SlotModel

NEW = 12
WAYS = (
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(temperature=1.4, top_k=20),
    Sampling(top_p=0.8),
    Sampling(temperature=0.8, top_k=50, top_p=0.9),
    Sampling(top_k=1),
)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return tiny.parts(request.param)[0]


@pytest.mark.parametrize("way", range(len(WAYS)))
@torch.inference_mode()
def test_a_seed_gives_the_tokens_of_generate(model: Any, way: int) -> None:
    slots = SlotModel(model, prefill_buckets=[16], slots=2, max_length=32)
    dice = random.Random(way)
    for seed in (0, 7, 2**63 - 1):
        asked = WAYS[way]
        sampler = Sampler(
            Sampling(temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p, seed=seed)
        )
        prompt = dice.choices(range(256), k=dice.randint(1, 16))
        tokens = [sampler.choose(slots.prefill(1, prompt)).token]
        while len(tokens) < NEW:
            step = {1: (tokens[-1], len(prompt) + len(tokens) - 1)}
            tokens.append(sampler.choose(slots.decode(step)[1]).token)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            theirs = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=NEW,
                eos_token_id=None,
                do_sample=True,
                temperature=asked.temperature,
                top_k=asked.top_k,
                top_p=asked.top_p,
            )
        assert tokens == theirs[0, len(prompt) :].tolist()


def test_without_temperature_the_most_probable_token_is_chosen_and_nothing_drawn() -> None:
    sampler = Sampler(Sampling(temperature=0.0, top_p=0.5))
    before = torch.random.get_rng_state()
    assert [sampler.choose(torch.tensor([0.0, 2.0, 1.0])).token for _ in range(3)] == [1, 1, 1]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_log_probabilities_are_the_models_own() -> None:
    logits = torch.tensor([0.5, 0.25, 0.25]).log()
    choice = Sampler(Sampling(temperature=0.1, logprobs=2)).choose(logits)
    assert choice.token == 0
    assert choice.logprob == pytest.approx(math.log(0.5))
    assert dict(choice.top) == pytest.approx({0: math.log(0.5), 1: math.log(0.25)})
    assert len(Sampler(Sampling(logprobs=20)).choose(logits).top) == 3
    assert Sampler(Sampling(logprobs=0)).choose(logits).top == ()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_a_failure(temperature: float) -> None:
    with pytest.raises(PipelineFailure, match="NaN"):
        Sampler(Sampling(temperature=temperature)).choose(torch.tensor([0.0, math.nan]))
