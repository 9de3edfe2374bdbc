"""Which family serves a config. A family's libraries are imported only where it is served."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from preheat.config.model import ModelConfig
from preheat.models.base import Work

FAMILIES = {
    "pipeline": "preheat.models.diffusion.model:PipelineWork",
    "module": "preheat.models.module.model:ModuleWork",
}
"""By the YAML's section: who loads the model that it names."""


def load_work(
    config: ModelConfig, model_dir: Path, manifest: Mapping[str, Any], device: torch.device
) -> Work:
    """The model that the YAML, or else the archive's manifest, names.

    Raises:
        ConfigError, ModuleError, PipelineError: it cannot be served as the YAML says.
    """
    module, _, name = FAMILIES[config.family.name].partition(":")
    family = getattr(importlib.import_module(module), name)
    work: Work = family.load(config, model_dir, manifest, device)
    return work
