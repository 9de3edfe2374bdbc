"""Loads the module that a YAML or an archive's manifest names, from tensors alone: nothing is
unpickled.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from preheat.config.family import Manifest
from preheat.config.module import ModuleConfig
from preheat.config.places import model_place
from preheat.device import DTYPES
from preheat.errors import ConfigError, HubError, ModelError, in_one_line
from preheat.user_code import load_file, make_importable

logger = logging.getLogger(__name__)


def load(config: ModuleConfig, folder: Path, manifest: Manifest, device: torch.device) -> nn.Module:
    """The module on its device, in eval mode and in the config's dtype. `folder` is the unpacked
    archive.

    Raises:
        ConfigError: the YAML names something that is not there.
        ModelError: it cannot be loaded.
        HubError: the hub does not give it.
    """
    model = manifest.get("model", {})
    weights = folder / model["serializedFile"] if model.get("serializedFile") else None
    if config.path is not None:
        module = _from_transformers(config, model_place(config.path, folder, config))
    elif config.factory is not None:
        module = _from_factory(config.factory, folder)
    elif model.get("modelFile"):
        module = _from_model_file(model["modelFile"], folder)
    else:
        raise ModelError(
            "no module is named: give module.path or module.factory in the YAML, or --model-file "
            "to torch-model-archiver (TorchScript and compiled libraries are not served)"
        )
    if weights is not None and config.path is None:
        _load_weights(module, weights)
    return module.to(device=device, dtype=DTYPES[config.dtype]).eval()


def load_tokenizer(place: str | Path) -> Any:
    """The tokenizer in a transformers folder, or None where it has none."""
    folder = Path(place)
    if folder.is_dir() and not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
    ):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=folder.is_dir())
    except (OSError, ValueError) as error:
        logger.warning("no tokenizer, so text is refused: %s", error)
        return None


def _from_transformers(config: ModuleConfig, place: str | Path) -> nn.Module:
    import transformers

    loader: Any = getattr(transformers, config.auto_class, None)
    if not hasattr(loader, "from_pretrained"):
        raise ConfigError(f"transformers has no model class {config.auto_class!r}", "module.class")
    local = Path(place).is_dir()
    try:
        module = loader.from_pretrained(place, use_safetensors=True, local_files_only=local)
    except (OSError, ValueError) as error:
        kind = ModelError if local else HubError
        raise kind(f"cannot load {config.auto_class} from {place}: {in_one_line(error)}") from None
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"{config.auto_class} loads no model but a {type(module).__name__}", "module.class"
        )
    return module


def _from_factory(name: str, folder: Path) -> nn.Module:
    package, _, function = name.partition(":")
    make_importable(folder.resolve())
    try:
        file = importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ConfigError(f"cannot be imported: {error}", "module.factory") from error
    if not _source(file).is_relative_to(folder.resolve()):
        raise ConfigError(f"{package} is not a file of the archive", "module.factory")
    make = getattr(file, function, None)
    if not callable(make):
        raise ConfigError(f"{package} has no function {function}", "module.factory")
    module = make(folder) if inspect.signature(make).parameters else make()
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"{name} returns a {type(module).__name__}, not an nn.Module", "module.factory"
        )
    return module


def _source(module: ModuleType) -> Path:
    """Where an imported module lies; `/` for one that has no file."""
    return Path(getattr(module, "__file__", None) or "/").resolve()


def _from_model_file(name: str, folder: Path) -> nn.Module:
    """As BaseHandler does: the file's one class, made without arguments
    (ts/torch_handler/base_handler.py, _load_pickled_model).
    """
    file = load_file(name, folder, "--model-file")
    classes = [
        each
        for each in vars(file).values()
        if inspect.isclass(each)
        and issubclass(each, nn.Module)
        and each.__module__ == file.__name__
    ]
    if len(classes) != 1:
        found = ", ".join(each.__name__ for each in classes) or "none"
        raise ModelError(f"{name} must define exactly one nn.Module, found {found}")
    made: nn.Module = classes[0]()
    return made


def _load_weights(module: nn.Module, file: Path) -> None:
    """A state dict from safetensors, or from torch.save with `weights_only`."""
    try:
        if file.suffix == ".safetensors":
            state = safetensors.torch.load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, safetensors.SafetensorError) as error:
        raise ModelError(
            f"{file.name} holds no state dict that can be read safely: {error}"
        ) from error
    if not isinstance(state, Mapping):
        raise ModelError(f"{file.name} holds a {type(state).__name__}, not a state dict")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{file.name} is not of this module: {error}") from error
