"""Trains a Llama of 0.2 million parameters to add, on one core.

python -m examples.text.train MODEL

The same machine, torch and seed give the same weights.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from examples.text.sums import Sum, draw
from preheat.models.text import tiny

SEED = 11
STEPS = 2500
BATCH = 32  # sums a step
WARMUP = 30  # steps
RATE = 3e-3
DECAY = 0.05
SHOW_EVERY = 100  # steps
TESTED = 5000  # held-out sums
POSITIONS = 128
UNLEARNT = -100  # a label that no loss is computed of

TEMPLATE = (
    "{% if messages[-1].role != 'user' %}{{ raise_exception('a question comes last') }}{% endif %}"
    "{{ messages[-1].content + '\\n' }}"
)
"""The last question alone: the model has learnt single ones."""

CARD = """# Sums

A Llama of {size:,} parameters that adds two numbers from 100 to 999 and shows its working:

    What is 347 + 285?
    7+5+0=12, 4+8+1=13, 3+2+1=06: 632

It knows nothing else. `make train-text` wrote it in {minutes:.1f} minutes of one core: a byte a
token, {steps} steps of {batch} sums, AdamW. Of {tested} sums that it never learnt from (one pair in
ten is kept back) it answers {right:.2%} right, working and all, with its weights in half precision
as they lie here. What it reads is the chat template's one line, the question, and a line break.

Apache-2.0, as all of Preheat.
"""


def main(out: Annotated[Path, typer.Argument(help="where the model goes, in float16")]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    began, tokenizer = time.perf_counter(), chat_tokenizer()
    model = LlamaForCausalLM(config(tokenizer))
    train(model, tokenizer, STEPS)
    minutes = (time.perf_counter() - began) / 60
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    kept = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    right = share_right(kept, tokenizer, TESTED)
    card = CARD.format(
        size=model.num_parameters(),
        minutes=minutes,
        steps=STEPS,
        batch=BATCH,
        tested=TESTED,
        right=right,
    )
    (out / "README.md").write_text(card)
    print(f"{right:.2%} of {TESTED} held-out sums are right, after {minutes:.1f} minutes")


def chat_tokenizer() -> Any:
    """A token for each byte, and one that ends an answer."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.model_max_length = POSITIONS
    return tokenizer


def config(tokenizer: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


def train(model: Any, tokenizer: Any, steps: int) -> float:
    """Learn for so many steps; the last one's loss, in nats a token."""
    dice = random.Random(SEED)
    optimizer = torch.optim.AdamW(
        model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=DECAY, foreach=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 1.0) * (1.0 - step / steps)
    )
    last = float("inf")
    for step in range(1, steps + 1):
        tokens, labels = batch([draw(dice) for _ in range(BATCH)], tokenizer)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=UNLEARNT
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        last = loss.item()
        if step % SHOW_EVERY == 0:
            print(f"step {step}: {last:.4f}", flush=True)
    return last


def batch(sums: Sequence[Sum], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Tokens [sums, length], padded on the right, and labels: the answers' own tokens alone."""
    asked = tokenizer([f"{each.question}\n" for each in sums])["input_ids"]
    said = tokenizer([each.answer for each in sums])["input_ids"]
    end = [tokenizer.eos_token_id]
    rows = [question + answer + end for question, answer in zip(asked, said, strict=True)]
    length = max(map(len, rows))
    tokens = torch.full((len(rows), length), tokenizer.eos_token_id)
    labels = torch.full((len(rows), length), UNLEARNT)
    for index, (question, row) in enumerate(zip(asked, rows, strict=True)):
        tokens[index, : len(row)] = torch.tensor(row)
        labels[index, len(question) : len(row)] = tokens[index, len(question) : len(row)]
    return tokens, labels


@torch.inference_mode()
def share_right(model: Any, tokenizer: Any, count: int) -> float:
    """Of held-out sums, how many are answered to the letter, greedily: each token is the most
    probable one after the right ones before it.
    """
    dice, right = random.Random(SEED + 1), 0
    for start in range(0, count, BATCH):
        sums = [draw(dice, held_out=True) for _ in range(min(BATCH, count - start))]
        tokens, labels = batch(sums, tokenizer)
        best = model(input_ids=tokens, use_cache=False).logits.argmax(-1)[:, :-1]
        wrong = (best != labels[:, 1:]) & (labels[:, 1:] != UNLEARNT)
        right += int((~wrong.any(1)).sum())
    return right / count


if __name__ == "__main__":
    typer.run(main)
