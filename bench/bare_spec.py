"""What the bare loop is told to run; apart from it, since the bench itself needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Spec:
    """What is run. Sizes are [height, width] in pixels."""

    model: str
    dtype: str
    on_gpu: bool
    backend: str
    buckets: Sequence[tuple[int, int]]
    batch_sizes: Sequence[int]
    num_steps: int
    guidance_scale: float
    prompts: Sequence[str]
    traffics: Mapping[str, Sequence[tuple[int, int]]]
    """The requests' sizes, by the traffic's name."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))
