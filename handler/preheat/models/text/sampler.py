"""Which token is next: as transformers' `generate` chooses it, one row at a time, with the row's
own random numbers, so that nobody's neighbours change what he gets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from preheat.errors import PipelineFailure


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a sequence's tokens are chosen."""

    temperature: float = 1.0
    """0: the most probable token, and nothing is drawn."""
    top_k: int = 0
    """Only so many of the most probable; 0: all."""
    top_p: float = 1.0
    """Only the most probable that have this probability together."""
    seed: int = 0
    logprobs: int | None = None
    """Tell each token's log-probability, and those of so many of the most probable."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A token; where it was asked for, its log-probability as the model has it (before
    temperature), and those of the most probable tokens.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses one sequence's tokens, in float32 on the CPU.

    Temperature, top_k and top_p in the order of `GenerationMixin._get_logits_processor`, then
    `torch.multinomial` as in `GenerationMixin._sample` (transformers/generation/utils.py), from a
    generator that begins at the seed: what `torch.manual_seed(seed)` is to a `generate` of this
    sequence alone.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._warpers = LogitsProcessorList()
        if sampling.temperature not in (0.0, 1.0):
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def choose(self, logits: torch.Tensor) -> Choice:
        """The next token, by the model's logits [vocabulary], float32 on the CPU.

        Raises:
            PipelineFailure: a logit is no number.
        """
        if logits.isnan().any():
            raise PipelineFailure("the model's logits are not numbers: NaN")
        if self._sampling.temperature == 0.0:
            token = int(logits.argmax())
        else:
            scores: torch.Tensor = self._warpers(None, logits[None])
            drawn = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
            token = int(drawn)
        if self._sampling.logprobs is None:
            return Choice(token)
        known = logits.log_softmax(-1)
        most = min(self._sampling.logprobs, len(known))
        values, indices = known.topk(most)
        top = zip(indices.tolist(), values.tolist(), strict=True)
        return Choice(token, float(known[token]), tuple(top))
