"""Tiny models of the real classes, made on the spot: the demo's and the tests'.

Every one has the parts, names and folder layout of the real thing, at a few hundred thousand
parameters, seeded. A family's own are in its folder.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path

import torch

from preheat.config.model import ModelConfig
from preheat.models.registry import FAMILIES

NAMES = {name: kind for kind in ModelConfig.families().values() for name in kind.tiny}


def build(name: str, folder: Path) -> Path:
    """Write the tiny model of this name to `folder`, replacing what is there; return `folder`.

    A pipeline's default picture is 256x256 pixels. Weights are safetensors, the same bytes every
    time.
    """
    if name not in NAMES:
        raise ValueError(f"unknown model {name!r}: one of {', '.join(NAMES)}")
    family = NAMES[name]
    package = FAMILIES[family.name].partition(":")[0].rpartition(".")[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = importlib.import_module(f"{package}.tiny").parts(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tiny-", dir=folder.parent) as scratch:
        for part in parts:
            part.save_pretrained(Path(scratch, "new"))
        if (folder / family.weights_index).exists():
            folder.rename(Path(scratch, "old"))
        Path(scratch, "new").rename(folder)
    return folder
