"""Any nn.Module as a family: what is loaded and compiled of one, and how its requests are read."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from preheat.config.family import Manifest
from preheat.config.model import ModelConfig
from preheat.config.module import ModuleConfig
from preheat.config.places import model_place
from preheat.config.pt2 import ShapesConfig
from preheat.device import DTYPES
from preheat.errors import ConfigError
from preheat.models.base import LoadedModel
from preheat.models.batching import Execution
from preheat.models.module import loader, ranges, tensors
from preheat.models.module.job import Answer, Job
from preheat.models.module.request import Reader, Tokenizer
from preheat.models.module.runner import ModuleRunner, buckets

logger = logging.getLogger(__name__)

WHOLE = "model"
"""The target that is the module itself."""
UNREADABLE = ("text", "accept")


class ModuleModel(LoadedModel[Job, Answer]):
    """Any module."""

    def __init__(self, module: nn.Module, tokenizer: Tokenizer | None, config: ModelConfig) -> None:
        self._module, self._own = module, config.section(ModuleConfig)
        self.dtype, shapes = DTYPES[self._own.dtype], config.pt2.shapes
        if not self._own.inputs and shapes.strategy != "exact":
            # A module of unknown shapes is compiled as BaseHandler would: with torch.compile's own
            # defaults, whenever a request comes.
            logger.warning("module.inputs is not declared: its shapes are not known")
            shapes = shapes.model_copy(update={"strategy": "exact"})
        self.config = config.with_shapes(shapes)
        names = _arguments(module, self._own)
        self.reader = Reader(
            names,
            self._own.inputs or None,
            self._own.limits,
            _bounds(names, module, self._own, shapes),
            self.dtype,
            ranges.ranges(names, module, self._own),
            tokenizer,
        )
        self.sizes = buckets(self._own)
        self.fields = (*names, *UNREADABLE)

    @classmethod
    def load(
        cls, config: ModelConfig, model_dir: Path, manifest: Manifest, device: torch.device
    ) -> ModuleModel:
        own = config.section(ModuleConfig)
        module = loader.load(own, model_dir, manifest, device)
        tokenizer = None
        if own.path is not None:
            tokenizer = loader.load_tokenizer(model_place(own.path, model_dir, own))
        return cls(module, tokenizer, config)

    def targets(self) -> dict[str, nn.Module]:
        return {name: self._target(name) for name in self.config.pt2.targets or (WHOLE,)}

    def _target(self, name: str) -> nn.Module:
        """The module itself (`model`), or one inside it by its dotted name.

        Raises:
            ConfigError: there is no such module.
        """
        if name == WHOLE:
            return self._module
        found: nn.Module | None = dict(self._module.named_modules()).get(name)
        if found is None:
            raise ConfigError(
                f"{type(self._module).__name__} has no module {name!r}", "pt2.targets"
            )
        return found

    def fingerprint_facts(self) -> Mapping[str, object]:
        """Classes and settings of every module in it, the shapes of its weights, its transformers
        config, and what the YAML says of its inputs and outputs.
        """
        config = getattr(self._module, "config", None)
        weights = {
            name: (tuple(tensor.shape), str(tensor.dtype))
            for name, tensor in self._module.state_dict().items()
        }
        return {
            "section": self._own.model_dump(mode="json", include={"dtype", "inputs", "outputs"}),
            "module": repr(self._module),
            "config": config.to_dict() if config is not None and hasattr(config, "to_dict") else {},
            "weights": weights,
        }

    def runner(self, execution: Execution) -> ModuleRunner:
        """Tried eagerly: what the YAML says of inputs and outputs shows before anything is
        compiled.
        """
        runner = ModuleRunner(execution, self._module, self.config, self.reader)
        runner.try_out()
        return runner


def _arguments(module: nn.Module, config: ModuleConfig) -> tuple[str, ...]:
    """The names of the module's inputs: the YAML's, which its forward must take, or all that its
    forward takes.

    Raises:
        ConfigError: the YAML names one that it does not take.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    known = tuple(
        each.name
        for each in parameters
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    )
    open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters)
    for name in config.inputs:
        if name not in known and (known or not open_ended):
            raise ConfigError(
                f"{type(module).__name__}.forward takes no {name}; it takes {', '.join(known)}",
                f"module.inputs.{name}",
            )
    return tuple(config.inputs) or known


def _bounds(
    names: Sequence[str], module: nn.Module, config: ModuleConfig, shapes: ShapesConfig
) -> tensors.Bounds:
    largest = {name: max(sizes) for name, sizes in config.choices.items()}
    rejecting = shapes.oversize == "reject" and shapes.strategy != "exact"
    lengths = ranges.lengths(names, module)
    ranges.refuse_long_buckets(config, lengths)
    return tensors.Bounds(largest, rejecting, config.limits.max_elements, lengths)
