"""Where a model lies: what `pipeline.path`, `module.path` and `--model` may say, and which folder
is meant.

Three things look alike and are told apart by their form alone: `tiny:<name>` is a model that is
made on the spot; what is absolute or begins with `./`, `../` or `~` is a folder; `name` and
`org/name` are a folder where there is one, else a hub id. Standard library only: the command looks
before a server starts, the worker once more in its archive.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from preheat.config.family import FamilyConfig
from preheat.errors import ConfigError

TINY_PREFIX = "tiny:"


def tiny_name(path: str, family: FamilyConfig) -> str | None:
    """`sdxl` of `tiny:sdxl`; None where `path` is something else.

    Raises:
        ConfigError: no tiny model of that name, or it belongs to the other section.
    """
    if not path.startswith(TINY_PREFIX):
        return None
    name = path.removeprefix(TINY_PREFIX)
    if name not in family.tiny:
        known = ", ".join(TINY_PREFIX + each for each in family.tiny)
        raise ConfigError(
            f"there is no tiny {family.name} {name!r}; known: {known}", f"{family.name}.path"
        )
    return name


def is_hub_id(path: str) -> bool:
    """Whether `path` can be a model of the hub: `name` or `org/name`, and nothing that only a
    folder is written as.
    """
    return re.fullmatch(r"(?!\.{1,2}(/|$))[\w.-]+(/[\w.-]+)?", path, re.ASCII) is not None


def folder_or_hub_id(path: str, base: Path, family: FamilyConfig) -> str | Path:
    """What `path` names, seen from the folder `base`: a model folder that exists (absolute), or a
    hub id.

    Raises:
        ConfigError: it is neither, or the folder is no model.
    """
    folder = Path(os.path.abspath(base / os.path.expanduser(path)))
    if not folder.is_dir():
        if is_hub_id(path):
            return path
        raise ConfigError(f"no such folder: {folder}", f"{family.name}.path")
    if not (folder / family.weights_index).is_file():
        raise ConfigError(
            f"{folder} is not {family.kind}: it has no {family.weights_index}",
            f"{family.name}.path",
        )
    return folder


def model_place(path: str, archive: Path, family: FamilyConfig) -> str | Path:
    """Where `pipeline.path` or `module.path` points, given the unpacked archive: a model folder, or
    a hub id.

    Raises:
        ConfigError: there is no such folder, or no model in it, or `.` could mean several.
    """
    if path == ".":
        return _inside(archive, family)
    if tiny_name(path, family) is not None:
        raise ConfigError(
            f"{path} is made by `preheat serve` and `preheat archive`, not by a worker; "
            "use . for the model that lies in the archive",
            f"{family.name}.path",
        )
    return folder_or_hub_id(path, archive, family)


def _inside(archive: Path, family: FamilyConfig) -> Path:
    """The archive's model folder: its root (the stock archiver flattens folders), else `model/`,
    else the only one.
    """
    index, where = family.weights_index, f"{family.name}.path"
    for folder in (archive, archive / "model"):
        if (folder / index).is_file():
            return folder
    found = sorted(folder.name for folder in archive.iterdir() if (folder / index).is_file())
    if len(found) > 1:
        raise ConfigError(
            f". could mean {' or '.join(found)}, which both have a {index}; name one", where
        )
    if not found:
        raise ConfigError(
            f"the archive holds no model: no {index} at its root or in a folder of it", where
        )
    return archive / found[0]
