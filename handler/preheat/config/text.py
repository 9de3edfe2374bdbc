"""The YAML's `text` section: which causal language model is served, and how many sequences at a
time.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from preheat.config.family import FamilyConfig
from preheat.config.pt2 import Pt2Config
from preheat.config.schema import Count, Listed, Positive, Section, Text
from preheat.config.yaml_errors import refuse_twice
from preheat.errors import ConfigError


class TextLimits(Section):
    """What a request may hold; everything past it is a 400."""

    max_prompt_chars: Positive = 50_000
    """Characters of a prompt, or of all messages together."""
    max_messages: Positive = 200
    """Messages of a conversation."""
    max_stop_strings: Positive = 8
    """Strings in `stop`."""
    max_stop_chars: Positive = 100
    """Characters of each."""
    max_logprobs: Count = 20
    """Tokens whose log-probabilities are told beside the chosen one's."""


LEAST_TEMPERATURE = 1e-6
"""Below it logits overflow when they are divided by it."""


class TextDefaults(Section):
    """What a request gets that does not say."""

    max_new_tokens: Positive = 256
    """Tokens; fewer where `max_length` leaves less."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    """0: always the most probable token; otherwise 1e-6 at least."""
    top_k: Count = 0
    """Draw among so many of the most probable tokens; 0: all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw among the most probable tokens that have this probability together."""
    stop: Listed[Text] = ()
    """Strings that end a text, and are no part of it."""


class TextConfig(FamilyConfig):
    """A causal language model: `continuousBatching: true`, `batchSize` as many as `slots`."""

    name: ClassVar[str] = "text"
    weights_index: ClassVar[str] = "config.json"
    kind: ClassVar[str] = "a transformers folder"
    tiny: ClassVar[tuple[str, ...]] = ("llama", "qwen2", "gpt2")
    serving_modes: ClassVar[frozenset[str]] = frozenset({"continuousBatching"})

    path: Text | None = "."
    """A transformers folder, or a hub id, or `tiny:llama`; `.` is the archive's own."""
    prefill_buckets: Annotated[Listed[Positive], Field(min_length=1)] = (64, 256)
    """Lengths in tokens that prompts are padded to; each is compiled. A prompt that none holds is
    a 400."""
    max_length: Positive = 1024
    """Tokens of a sequence, prompt and answer. Keys and values of so many are kept for every
    slot."""
    slots: Positive = 8
    """Sequences that are decoded together; a request takes one as soon as it is free."""
    limits: TextLimits = TextLimits()
    """What a request may hold."""
    defaults: TextDefaults = TextDefaults()
    """What a request gets that does not say."""

    @property
    def num_slots(self) -> int:
        return self.slots

    def num_graphs(self, pt2: Pt2Config, batches: int) -> int:
        return len(self.prefill_buckets) + 1

    def check(self, pt2: Pt2Config) -> None:
        shapes = pt2.shapes
        for key, value, only in (
            ("strategy", shapes.strategy, "buckets"),
            ("buckets", shapes.buckets, ()),
            ("batch_sizes", shapes.batch_sizes, (1,)),
            ("fit", shapes.fit, "pad"),
            ("oversize", shapes.oversize, "reject"),
        ):
            if value != only:
                raise ConfigError(
                    "is not for text: its shapes are text.prefill_buckets, text.max_length and "
                    "text.slots; leave it out",
                    f"pt2.shapes.{key}",
                )
        if pt2.scope != "full":
            raise ConfigError("regional is not for text; leave it out", "pt2.scope")
        if pt2.export.aot_compile:
            raise ConfigError(
                "is not for text: a package cannot write into the slots' keys and values",
                "pt2.export.aot_compile",
            )
        if pt2.openvino or pt2.compile.auto:  # the first step alone would agree with eager
            raise ConfigError(
                f"{pt2.compile.kwargs['backend']} is not for text: OpenVINO cannot "
                "write into the slots' keys and values; leave it out",
                "pt2.compile.backend",
            )

    @model_validator(mode="after")
    def _agree(self) -> TextConfig:
        if 0 < self.defaults.temperature < LEAST_TEMPERATURE:
            raise ConfigError(
                f"must be 0, or from {LEAST_TEMPERATURE:g} to 100, got {self.defaults.temperature}",
                "text.defaults.temperature",
            )
        refuse_twice(self.prefill_buckets, "text.prefill_buckets")
        if max(self.prefill_buckets) >= self.max_length:
            raise ConfigError(
                f"{max(self.prefill_buckets)} leaves no room for an answer below max_length "
                f"({self.max_length})",
                "text.prefill_buckets",
            )
        return self
