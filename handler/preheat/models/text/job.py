"""A request for text, and how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from preheat.buckets import Bucket
from preheat.compilation.pace import Load
from preheat.models.batching import BaseJob, Outcome
from preheat.models.text.sampler import Sampling
from preheat.protocol.events import EventStream

Finish = Literal["stop", "length"]
"""Why a text ends: at a stop string or token, or as long as it may be."""


@dataclass(frozen=True, slots=True)
class Job(BaseJob):
    """A request."""

    prompt: Sequence[int] = field(repr=False)
    """Tokens."""
    prefill: int
    """The bucket that holds them."""
    max_new_tokens: int
    sampling: Sampling
    stops: tuple[str, ...] = field(repr=False)
    events: EventStream = field(repr=False, compare=False)

    @property
    def asked(self) -> Bucket:
        return bucket(len(self.prompt))

    @property
    def kind(self) -> str:
        return str(bucket(self.prefill))

    @property
    def identity(self) -> int:
        return hash((tuple(self.prompt), self.max_new_tokens, self.sampling, self.stops))

    def load(self, size: int) -> Load:
        return Load(self.prefill, size, size, 1)


@dataclass(slots=True)
class Answer(Outcome):
    """What one job has got so far."""

    job: Job
    tokens: list[int] = field(default_factory=list)
    """Chosen so far."""
    finish: Finish | None = None

    @property
    def done(self) -> bool:
        return self.finish is not None or self.error is not None

    @property
    def next(self) -> tuple[int, int]:
        """The token that the next step takes, and its position."""
        return self.tokens[-1], len(self.job.prompt) + len(self.tokens) - 1

    @property
    def num_computed(self) -> int:
        """Tokens."""
        return self.job.prefill + len(self.tokens)

    @property
    def num_padding(self) -> int:
        return self.job.prefill - len(self.job.prompt)


def bucket(length: int) -> Bucket:
    """Of prompts, in tokens."""
    return Bucket(prompt=length)
