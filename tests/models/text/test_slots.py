"""Sequences that come and go in slots get the tokens that each would get alone from transformers'
own `generate`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from preheat.errors import ModelError
from preheat.models.text import tiny
from preheat.models.text.step import SlotModel

PROMPTS = 100
MOST_NEW = 12
LARGEST = 48
SLOTS = 4
TOO_CLOSE = 2e-4
"""Two best logits of eager's that rounding may turn round."""


@pytest.fixture(scope="module", params=tiny.MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return tiny.parts(request.param)[0]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def slots(model: Any) -> SlotModel:
    return SlotModel(model, prefill_buckets=[16, LARGEST], slots=SLOTS, max_length=64)


@dataclass
class Asked:
    """A prompt, how many tokens it wants, and what came of it."""

    prompt: list[int]
    wanted: int
    logits: list[torch.Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """Greedy."""
        return [int(each.argmax()) for each in self.logits]

    @property
    def done(self) -> bool:
        return len(self.logits) == self.wanted

    @property
    def next(self) -> tuple[int, int]:
        return self.tokens[-1], len(self.prompt) + len(self.logits) - 1


def sequences(count: int, seed: int) -> list[Asked]:
    dice = random.Random(seed)
    return [
        Asked(dice.choices(range(256), k=dice.randint(1, LARGEST)), dice.randint(1, MOST_NEW))
        for _ in range(count)
    ]


def run(model: SlotModel, waiting: Sequence[Asked], dice: random.Random) -> None:
    """Each takes some free slot at some time, while others are in the middle of theirs."""
    running: dict[int, Asked] = {}
    left = list(reversed(waiting))
    while left or running:
        free = sorted(set(range(model.slots)) - running.keys())
        if left and free and (not running or dice.random() < 0.6):
            slot = dice.choice(free)
            running[slot] = left.pop()
            running[slot].logits.append(model.prefill(slot, running[slot].prompt))
        running = {slot: each for slot, each in running.items() if not each.done}
        if running:
            logits = model.decode({slot: each.next for slot, each in running.items()})
            for slot, each in running.items():
                each.logits.append(logits[slot])


def eager(model: Any, sequence: Asked) -> list[torch.Tensor]:
    """The logits [vocabulary] of each of its tokens by `generate`."""
    made = model.generate(
        torch.tensor([sequence.prompt]),
        max_new_tokens=sequence.wanted,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return [logits[0] for logits in made.logits]


def first_difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> int | None:
    """None where all tokens are equal, and their logits within rounding; else the first token that
    is another, for a reason: eager's own two best are as good as one.
    """
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert (mine - other).abs().max() < 1e-4, f"token {index}"
        if mine.argmax() != other.argmax():
            best, second = other.topk(2).values.tolist()
            assert best - second < TOO_CLOSE, f"token {index}"
            return index
    return None


def test_tokens_are_those_of_generate_alone_and_in_company(model: Any) -> None:
    served, asked = slots(model), sequences(PROMPTS, seed=1)
    run(served, asked, random.Random(2))
    turned = 0
    for index, sequence in enumerate(asked):
        theirs = eager(model, sequence)
        turned += first_difference(sequence.logits, theirs) is not None
        if index % 4 == 0:
            alone = Asked(sequence.prompt, sequence.wanted)
            run(served, [alone], random.Random(index))
            first_difference(alone.logits, theirs)
    assert turned <= PROMPTS * 0.02


def test_the_prompts_are_of_many_lengths_and_the_slots_are_shared() -> None:
    asked = sequences(PROMPTS, seed=1)
    assert len({len(each.prompt) for each in asked}) > 30
    assert {each.wanted for each in asked} == set(range(1, MOST_NEW + 1))


def test_nan_in_a_slot_reaches_neither_its_neighbours_nor_who_takes_it_next(model: Any) -> None:
    (clean,) = sequences(1, seed=4)
    clean.wanted = MOST_NEW
    poisoned = Asked(clean.prompt, clean.wanted)
    run(slots(model), [clean], random.Random(0))
    served = slots(model)
    for buffer in served.cache.buffers():
        buffer.fill_(torch.nan)
    run(served, [poisoned], random.Random(0))  # in a slot that held NaN, between three that do
    assert all(map(torch.equal, poisoned.logits, clean.logits))


def test_what_padding_computes_is_written_nowhere(model: Any) -> None:
    """Also where it is infinite, as it may be in half precision."""
    served = slots(model)
    table = model.get_input_embeddings().weight
    kept = table[0].clone()
    prompt = [5, 6, 7]
    clean = served.prefill(1, prompt)
    try:
        table[0] = torch.nan  # what padding is looked up in; with tied weights a logit too
        assert torch.equal(served.prefill(1, prompt)[1:], clean[1:])
    finally:
        table[0] = kept
    assert all(buffer.isfinite().all() for buffer in served.cache.buffers())
    assert all(bool((buffer[1, :, 3:] == 0).all()) for buffer in served.cache.buffers())


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_the_decode_step_and_a_prefill_are_one_graph_each(model: Any) -> None:
    served = slots(model)
    one = torch.tensor([1])
    steps: list[tuple[Any, tuple[torch.Tensor, ...]]] = [
        (served.prefill_step, (torch.ones(1, 16, dtype=torch.int64), one, one)),
        (served.decode_step, (torch.ones(SLOTS, 1, dtype=torch.int64), torch.arange(SLOTS))),
    ]
    torch.compiler.reset()
    for step, inputs in steps:
        compiled: Any = torch.compile(
            step.forward, backend="aot_eager", fullgraph=True, dynamic=False
        )
        logits = compiled(*inputs)
        written = [buffer.clone() for buffer in served.cache.buffers()]
        torch.testing.assert_close(logits, step(*inputs), atol=1e-5, rtol=0)
        for buffer, before in zip(served.cache.buffers(), written, strict=True):
            torch.testing.assert_close(buffer, before, atol=1e-5, rtol=0)


def test_sliding_windows_are_refused_by_name() -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=8))
    with pytest.raises(ModelError, match="MistralForCausalLM keeps a DynamicSlidingWindowLayer"):
        slots(model)
