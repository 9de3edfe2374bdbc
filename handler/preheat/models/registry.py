"""Which family serves a config. A family's libraries are imported only where it is served."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from preheat.config.family import Manifest
from preheat.config.model import ModelConfig
from preheat.models.base import LoadedModel
from preheat.models.batching import JobT, ResultT

FAMILIES = {
    "pipeline": "preheat.models.diffusion.model:DiffusionModel",
    "module": "preheat.models.module.model:ModuleModel",
    "text": "preheat.models.text.model:TextModel",
}
"""By the YAML's section: who loads the model that it names."""


def load_model(
    config: ModelConfig, model_dir: Path, manifest: Manifest, device: torch.device
) -> LoadedModel[JobT, ResultT]:
    """The model that the YAML, or else the archive's manifest, names; see `LoadedModel.load`."""
    module, _, name = FAMILIES[config.family.name].partition(":")
    family: type[LoadedModel[JobT, ResultT]] = getattr(importlib.import_module(module), name)
    return family.load(config, model_dir, manifest, device)
