"""A request for tensors, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from preheat.buckets import Bucket
from preheat.compilation.pace import Load
from preheat.models.batching import BaseJob, Outcome
from preheat.models.module.request import Accept

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Job(BaseJob):
    """A request: one row of every input, in its own size."""

    inputs: Tensors = field(repr=False)
    """Each (1, ...)."""
    sizes: Mapping[str, int]
    """Of the bucketed dimensions."""
    bucket: Bucket | None
    """The smallest that holds it; None where it runs as it is, by itself."""
    accept: Accept = "application/json"

    @property
    def asked(self) -> Bucket | None:
        return Bucket(**self.sizes) if self.sizes else None

    @property
    def kind(self) -> str:
        return str(self.bucket or "none")

    @property
    def identity(self) -> int:
        tensors = sorted(self.inputs.items())
        return hash(
            tuple(
                (name, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes())
                for name, tensor in tensors
            )
        )

    def load(self, size: int) -> Load:
        volume = self.bucket.volume if self.bucket else prod(self.sizes.values())
        return Load(volume, size, size, 1)

    def batch_sizes(self, served: Sequence[int]) -> Sequence[int]:
        # outside every bucket it runs by itself and is not filled up
        return [1] if self.bucket is None else served


@dataclass(slots=True)
class Answer(Outcome):
    """What one job got: `outputs` in its own size, (1, ...) each, on the CPU."""

    job: Job
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    ran_in: Bucket | None = None
    """The bucket of the run, which other requests may have made larger than the job's own."""
    num_computed: int = 0
    """Elements of its inputs, padding included."""
    num_real: int = 0

    @property
    def bucket(self) -> str:
        return str(self.ran_in) if self.ran_in is not None else "none"

    @property
    def num_padding(self) -> int:
        return self.num_computed - self.num_real

    @property
    def padding(self) -> float:
        """Share of the inputs' elements that were padding."""
        return self.num_padding / self.num_computed if self.num_computed else 0.0
