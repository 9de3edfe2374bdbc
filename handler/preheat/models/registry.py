"""Which family serves a config. A family's libraries are imported only where it is served."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from preheat.config.model import ModelConfig
from preheat.models.base import Work


def has_model(manifest: Mapping[str, Any]) -> bool:
    """Whether the archive was made with --model-file or --serialized-file."""
    return not {"modelFile", "serializedFile"}.isdisjoint(manifest.get("model", {}))


def load_work(
    config: ModelConfig, model_dir: Path, manifest: Mapping[str, Any], device: torch.device
) -> Work:
    """The model that the YAML names, loaded; a family's libraries are imported only where it is
    served.
    """
    if config.module is not None:
        from preheat.models.module.model import ModuleWork

        return ModuleWork.load(config, model_dir, manifest, device)
    from preheat.models.diffusion.model import PipelineWork

    return PipelineWork.load(config, model_dir, device)
