"""The tokenizer and the two text encoders of the pipeline, of the real CLIP classes.

They learn from captions alone, before any picture, and stay frozen afterwards. The last positions
of a prompt, which are always padding, become registers: one for each place, where a linear map can
read colour, shape and size of what stands there, and one for an object without a place. So a UNet
of a few million parameters need not learn which adjective goes with which noun.
"""

from __future__ import annotations

import string
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from examples.shapes import grammar, workers
from examples.shapes.grammar import (
    COLOURS,
    GROUNDS,
    ORDER,
    PLACES,
    RELATIONS,
    SHAPES,
    WORDS,
    Place,
)
from examples.shapes.training import Losses, Plan, Training, appearing

SEED = 2
LENGTH = 32  # tokens of a prompt
WIDTH = 64  # of each encoder
POOLED = 128
SIZES = tuple(grammar.SIZES)
REGISTERS = len(PLACES) + 1
# what each register tells, each with "nothing said" as one more class
CLASSES = (len(COLOURS) + 1, len(SHAPES) + 1, len(SIZES) + 1)
# the pooled vector tells where something stands and how large; asked for colours and shapes too, it
# mixes them, and misreads one held-out caption in four
POOLED_CLASSES = (2, len(SIZES) + 1)
GROUND_CLASSES = 2 * len(GROUNDS) + 1  # plain, gradient, unsaid
CAPTIONS, BATCH = 40_000, 64
GAPS = 0.3  # share of the colours and shapes that a caption for the encoders lacks
PLAN = Plan(steps=2000, rate=2e-3, decay=0.99, show_every=500)
SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<|unknown|>")


def tokenizer() -> CLIPTokenizer:
    """Each word of the grammar is one token; others come as letters, signs as unknown."""
    merges = _merges(WORDS)
    letters = [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
    joined = dict.fromkeys(["".join(pair) for pair in merges])
    pieces = [*dict.fromkeys([*letters, *joined]), *SPECIAL]
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=merges,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[1],
        unk_token=SPECIAL[2],
        model_max_length=LENGTH,
    )


def _merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Byte-pair encoding, learnt until every word is one piece; ties go by the alphabet."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(pieces) > 1 for pieces in split):
        pairs = Counter(pair for pieces in split for pair in pairwise(pieces))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = [_joined(pieces, best) for pieces in split]
    return merges


def _joined(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


@dataclass(frozen=True)
class Texts:
    """The frozen encoders, as a pipeline has them."""

    tokenizer: CLIPTokenizer
    first: CLIPTextModel
    second: CLIPTextModelWithProjection

    def ids(self, captions: list[str]) -> Tensor:
        """Captions x `LENGTH` tokens."""
        return token_ids(self.tokenizer, captions)

    @torch.no_grad()
    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """States (captions x tokens x 2 `WIDTH`) and pooled vectors, as the SDXL pipeline does."""
        states, pooled = _encode(self.first, self.second, ids)
        return torch.cat(states, -1), pooled


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Padded and cut to the model's length."""
    ids: Tensor = tokenizer(
        captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def _encode(
    first: CLIPTextModel, second: CLIPTextModelWithProjection, ids: Tensor
) -> tuple[list[Tensor], Tensor]:
    outputs = [model(ids, output_hidden_states=True) for model in (first, second)]
    return [output.hidden_states[-2] for output in outputs], outputs[1].text_embeds


def new_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Of the real classes, untrained; SDXL takes the states before the last of the four layers."""
    torch.manual_seed(SEED)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=LENGTH,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=POOLED,
        num_attention_heads=4,
        num_hidden_layers=4,
        hidden_act="gelu",
    )
    return CLIPTextModel(config), CLIPTextModelWithProjection(config)


class _Readable(nn.Module):
    """The encoders and the linear maps that show what can be read from them."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.first, self.second = new_encoders(tokenizer)
        self.registers = nn.ModuleList(
            nn.Linear(WIDTH, sum(CLASSES) + GROUND_CLASSES) for _ in range(2)
        )
        self.pooled = nn.Linear(POOLED, REGISTERS * sum(POOLED_CLASSES) + GROUND_CLASSES)

    def forward(self, ids: Tensor) -> list[Tensor]:
        """What is read, as logits, in the order of `_wanted`."""
        states, pooled = _encode(self.first, self.second, ids)
        read: list[Tensor] = []
        for state, head in zip(states, self.registers, strict=True):
            told = head(state[:, -REGISTERS:])
            *objects, ground = torch.split(told, [*CLASSES, GROUND_CLASSES], -1)
            read += [*objects, ground.mean(1)]
        told = self.pooled(pooled)
        objects = told[:, GROUND_CLASSES:].reshape(-1, REGISTERS, sum(POOLED_CLASSES))
        return [*read, *torch.split(objects, list(POOLED_CLASSES), -1), told[:, :GROUND_CLASSES]]


def _wanted(targets: Tensor) -> list[Tensor]:
    objects, ground = targets[:, :-1].reshape(-1, REGISTERS, len(CLASSES)), targets[:, -1]
    present, size = objects.any(-1).long(), objects[..., -1]
    return [*(*objects.unbind(-1), ground) * 2, present, size, ground]


def train(folder: Path) -> Texts:
    """The trained ones, from `folder` where they lie there already."""
    words = tokenizer()
    done = folder / "trained"
    if not done.exists():
        model = _Readable(words)
        training = Training(folder, model, PLAN, SEED)
        ids, targets = _lessons(words)

        def losses(step: int) -> Losses:
            count = BATCH // workers.count()
            chosen = torch.randint(len(ids), (count,), generator=training.random(step)[1])
            return _losses(model(ids[chosen]), targets[chosen])

        unseen = _lessons(words, count=2000, unseen=True)
        average = training.run(losses, lambda step: _show(training.average, *unseen))
        if workers.rank() == 0:
            standardise(average.first, average.second, ids[:1000])
            with appearing(done) as part:
                average.first.save_pretrained(part / "first")
                average.second.save_pretrained(part / "second")
        workers.wait()
    first = CLIPTextModel.from_pretrained(done / "first")
    second = CLIPTextModelWithProjection.from_pretrained(done / "second")
    return Texts(words, first.requires_grad_(False).eval(), second.requires_grad_(False).eval())


@torch.no_grad()
def standardise(first: CLIPTextModel, second: CLIPTextModelWithProjection, ids: Tensor) -> None:
    """Give the states and the pooled vectors of these tokens a deviation of 1.

    Every layer normalises what it reads, so what is added to the states can be scaled as a whole.
    """
    states, pooled = _encode(first, second, ids)
    for model, state in zip((first, second), states, strict=True):
        adders = [
            part
            for name, part in model.named_modules()
            if name.endswith(("out_proj", "fc2", "token_embedding", "position_embedding"))
        ]
        for weights in (weights for part in adders for weights in part.parameters()):
            weights /= state.std()
    second.text_projection.weight /= pooled.std()


def _lessons(
    tokenizer: CLIPTokenizer, count: int = CAPTIONS, unseen: bool = False
) -> tuple[Tensor, Tensor]:
    """Tokens, and what they tell: captions x (3 `REGISTERS` + 1) classes."""
    rng = np.random.default_rng([SEED, unseen])
    captions: list[str] = []
    targets: list[list[int]] = []
    for index in range(count):
        scene = grammar.scene(rng, 128, 128, count=1 + index % 3, unseen=unseen)
        caption = "" if rng.random() < 0.02 else scene.told(rng)
        if not unseen:
            caption = _with_gaps(rng, caption)
        targets.append(told(caption))
        captions.append(_with_noise(rng, caption, tokenizer) if rng.random() < 0.3 else caption)
    return token_ids(tokenizer, captions), torch.tensor(targets)


def told(caption: str) -> list[int]:
    """Classes by register and of the ground, read by the rules that captions are made by."""
    said, _, ground = caption.partition(" background")[0].partition(" on a ")
    places: list[Place | None] = [next((word for word in PLACES if word in said.split()), None)]
    phrases = [said]
    for axis, relations in RELATIONS.items():
        for relation, step in zip(relations, (1, -1), strict=True):
            if f" {relation} " in said:
                phrases = said.split(f" {relation} ")
                places = [*ORDER[axis][:: step * (2 if len(phrases) == 2 else 1)]]
    registers = [[0, 0, 0] for _ in range(REGISTERS)]
    for phrase, place in zip(phrases, places, strict=True):
        words = phrase.split()
        registers[PLACES.index(place) if place else -1] = [
            _class_in(words, COLOURS),
            _class_in(words, SHAPES),
            _class_in(words, SIZES),
        ]
    tone = _class_in(ground.split(), GROUNDS)
    tone = 2 * tone - 1 + ground.endswith(" gradient") if tone else 0
    return [value for register in registers for value in register] + [tone]


def _class_in(words: list[str], names: tuple[str, ...]) -> int:
    """Which of the names is among the words, from 1; 0 for none."""
    return next((1 + index for index, name in enumerate(names) if name in words), 0)


def _with_gaps(rng: np.random.Generator, caption: str) -> str:
    """With a letter instead of some colours and shapes.

    Without it the encoders learn which combinations never come, and misread the held-out ones.
    """
    return " ".join(
        str(rng.choice(list(string.ascii_lowercase)))
        if word in (*COLOURS, *SHAPES) and rng.random() < GAPS
        else word
        for word in caption.split()
    )


def _with_noise(rng: np.random.Generator, caption: str, tokenizer: CLIPTokenizer) -> str:
    """With a made-up word or sign somewhere, where it leaves the registers free."""
    words = caption.split()
    letters = rng.choice([*string.ascii_lowercase, ","], int(rng.integers(1, 6)))
    words.insert(int(rng.integers(len(words) + 1)), "".join(letters))
    noisy = " ".join(words)
    return noisy if len(tokenizer(noisy).input_ids) <= LENGTH - REGISTERS else caption


def _losses(read: list[Tensor], targets: Tensor) -> Losses:
    loss = torch.zeros(())
    right = torch.ones(len(targets), dtype=torch.bool)
    for told, wanted in zip(read, _wanted(targets), strict=True):
        loss = loss + functional.cross_entropy(told.flatten(0, -2), wanted.flatten())
        right &= (told.argmax(-1) == wanted).reshape(len(targets), -1).all(1)
    return {"loss": loss, "wrong": 1 - right.float().mean()}


@torch.no_grad()
def _show(model: _Readable, ids: Tensor, targets: Tensor) -> None:
    """How much of captions with held-out combinations is read wrong."""
    print(f"held-out captions read wrong: {float(_losses(model(ids), targets)['wrong']):.4f}")
