"""examples/text: what is asked and right, and a training that learns."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from examples.text import train
from examples.text.sums import LEAST, MOST, Sum, draw, is_right

numbers = st.integers(LEAST, MOST)


@given(numbers, numbers)
def test_a_sum_is_worked_out_right(first: int, second: int) -> None:
    asked = Sum(first, second)
    working, _, total = asked.answer.partition(": ")
    assert int(total) == first + second and is_right(asked, asked.answer)
    for column in working.split(", "):
        terms, _, written = column.partition("=")
        assert sum(map(int, terms.split("+"))) == int(written)


@pytest.mark.parametrize("said", ["", "633", "7+5+0=12, 4+8+1=13, 3+2+1=06: 63", "632: 5"])
def test_another_answer_is_wrong(said: str) -> None:
    assert not is_right(Sum(347, 285), said)


def test_what_is_held_out_is_never_drawn_to_learn_from() -> None:
    dice = random.Random(0)
    assert not any(draw(dice).is_held_out for _ in range(300))
    assert all(draw(dice, held_out=True).is_held_out for _ in range(50))
    share = sum(Sum(first, 500).is_held_out for first in range(LEAST, MOST)) / (MOST - LEAST)
    assert 0.05 < share < 0.15


def test_only_answers_are_learnt_with_their_end() -> None:
    tokenizer, asked = train.chat_tokenizer(), Sum(347, 285)
    tokens, labels = train.batch([asked, Sum(999, 999)], tokenizer)
    learnt = labels[0][labels[0] != train.UNLEARNT].tolist()
    assert learnt[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(learnt[:-1]) == asked.answer
    whole = tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert whole == f"{asked.question}\n{asked.answer}"
    said = [{"role": "user", "content": asked.question}]
    assert whole.startswith(tokenizer.apply_chat_template(said, tokenize=False))


def learnt(steps: int) -> tuple[float, LlamaForCausalLM]:
    torch.manual_seed(0)
    tokenizer = train.chat_tokenizer()
    model = LlamaForCausalLM(train.config(tokenizer))
    return train.train(model, tokenizer, steps), model


def test_a_training_learns_and_is_the_same_again() -> None:
    loss, model = learnt(15)
    again, same = learnt(15)
    assert loss == again < 5.0  # of 5.5 at its beginning
    torch.testing.assert_close(model.state_dict(), same.state_dict(), rtol=0, atol=0)
    assert train.share_right(model, train.chat_tokenizer(), 32) == 0.0
