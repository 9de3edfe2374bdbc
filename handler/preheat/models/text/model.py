"""A causal language model as a family: what is loaded and compiled of one, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from preheat.compilation.closeness import compare
from preheat.config.family import Manifest
from preheat.config.model import ModelConfig
from preheat.config.places import model_place
from preheat.config.text import TextConfig
from preheat.device import DTYPES
from preheat.errors import ConfigError, HubError, ModelError, in_one_line
from preheat.models.base import LoadedModel
from preheat.models.batching import Execution
from preheat.models.text.job import Answer, Job, bucket
from preheat.models.text.request import FIELDS, Reader, Tokenizer, stop_tokens
from preheat.models.text.runner import TextRunner
from preheat.models.text.step import SlotModel

logger = logging.getLogger(__name__)

_COMPARED = 3
"""Decode steps that are compared with eager at start-up, after the longest prompt."""


class TextModel(LoadedModel[Job, Answer]):
    """A causal language model of transformers and its slots."""

    def __init__(self, model: Any, tokenizer: Tokenizer, config: ModelConfig) -> None:
        own = config.section(TextConfig)
        self.dtype = DTYPES[own.dtype]
        shapes = config.pt2.shapes.model_copy(update={"batch_sizes": (own.slots,)})
        self.config = config.with_shapes(shapes)
        self._own, self._model, self._tokenizer = own, model, tokenizer
        self.sizes, self.fields = [bucket(each) for each in own.prefill_buckets], FIELDS
        _refuse_lengths(model, own)
        self.slots = SlotModel(
            model,
            prefill_buckets=own.prefill_buckets,
            slots=own.slots,
            max_length=own.max_length,
        )
        logger.info("%d slots of %d tokens: %d bytes", own.slots, own.max_length, self.num_bytes)
        refuse_other_logits(self.slots, model)

    @property
    def num_bytes(self) -> int:
        """Of the slots' keys and values."""
        return self.slots.cache.num_bytes

    @classmethod
    def load(
        cls, config: ModelConfig, model_dir: Path, manifest: Manifest, device: torch.device
    ) -> TextModel:
        own = config.section(TextConfig)
        place = model_place(own.path or ".", model_dir, own)
        local = Path(place).is_dir()
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=local)
            model = AutoModelForCausalLM.from_pretrained(
                place, use_safetensors=True, local_files_only=local, dtype=DTYPES[own.dtype]
            )
        except (OSError, ValueError) as error:
            kind = ModelError if local else HubError
            raise kind(f"cannot load a language model from {place}: {in_one_line(error)}") from None
        return cls(model.to(device).eval(), tokenizer, config)

    def targets(self) -> Mapping[str, nn.Module]:
        known = {"decode": self.slots.decode_step, "prefill": self.slots.prefill_step}
        for name in self.config.pt2.targets or ():
            if name not in known:
                raise ConfigError(f"text has no {name!r}; it has decode, prefill", "pt2.targets")
        return {name: known[name] for name in self.config.pt2.targets or known}

    def request_defaults(self) -> Mapping[str, object]:
        """How many requests a worker serves side by side, each from when it comes."""
        return {"slots": self._own.slots}

    def fingerprint_facts(self) -> Mapping[str, object]:
        """Its classes and config, the shapes of its weights, and those of its slots."""
        weights = {
            name: (tuple(tensor.shape), str(tensor.dtype))
            for name, tensor in self._model.state_dict().items()
        }
        return {
            "section": self._own.model_dump(
                mode="json", include={"dtype", "prefill_buckets", "max_length", "slots"}
            ),
            "model": repr(self._model),
            "config": self._model.config.to_dict(),
            "weights": weights,
        }

    def runner(self, execution: Execution) -> TextRunner:
        ends = stop_tokens(self._model, self._tokenizer)
        embeddings = self._model.get_input_embeddings()
        reader = Reader(self._own, self._tokenizer, embeddings.num_embeddings)
        return TextRunner(execution, self.slots, reader, ends, self._own)


def _refuse_lengths(model: Any, own: TextConfig) -> None:
    """A model's positions may end, or change with the length of the text."""
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and own.max_length > most:
        raise ConfigError(
            f"{own.max_length} is more than the {most} positions of {type(model).__name__}",
            "text.max_length",
        )
    rope = getattr(model.config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {
        each.get("rope_type") for each in rope.values() if isinstance(each, Mapping)
    }
    for kind in kinds & {"dynamic", "longrope"}:
        raise ModelError(
            f"{type(model).__name__} has {kind} rotary positions, which change with the longest "
            "text beside: it is not served"
        )


@torch.inference_mode()
def refuse_other_logits(slots: SlotModel, model: Any) -> None:
    """Compare the slots' logits with the model's own, on tokens drawn at random.

    Raises:
        ModelError: they differ by more than rounding, so that its attention or cache is not what
            the slots take it for.
    """
    length = min(slots.buckets[-1], slots.max_length - _COMPARED)
    dice = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        model.get_input_embeddings().num_embeddings, (length + _COMPARED,), generator=dice
    ).tolist()
    ours = [slots.prefill(slots.slots - 1, tokens[:length])]
    for position in range(length, length + _COMPARED):
        row = {slots.slots - 1: (tokens[position], position)}
        ours.append(slots.decode(row)[slots.slots - 1])
    whole = model(input_ids=torch.tensor([tokens], device=model.device)).logits
    expected = whole[0, length - 1 :].float().cpu()
    close = compare(torch.stack(ours), expected, dtype=model.dtype)
    if not close.ok:
        raise ModelError(
            f"{type(model).__name__} gives other logits in slots than by itself "
            f"({close.share:.2g} of the largest): it is not served"
        )
