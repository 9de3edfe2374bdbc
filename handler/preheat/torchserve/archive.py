"""A model folder and a model YAML become an archive that TorchServe loads.

The archive's root holds the entry file, the wings of `preheat/` that a worker needs, `<name>.yaml`,
the Python files that the YAML names and, unless weights stay outside, `model/`: the pipeline's or
transformers folder as it was. Packages that were compiled ahead of time lie in `aot/`. The model's
name is the YAML's stem.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from preheat.config.model import ModelConfig
from preheat.config.places import folder_or_hub_id
from preheat.config.pt2 import Pt2Config
from preheat.config.yaml_errors import keys_of
from preheat.errors import ArchiveError, ConfigError

logger = logging.getLogger(__name__)

ArchiveFormat = Literal["zip-store", "default", "no-archive"]

ENTRY = Path(__file__).resolve().parents[2] / "preheat_handler.py"
PACKAGE = Path(__file__).resolve().parents[1]
NO_WORKERS = frozenset({"cli", "preflight", "torchserve", "__pycache__"})
"""What of the package no worker imports (tests/test_imports.py)."""
PICKLED = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
EXPORTED = {"aot_compile": True}
MANIFEST = Path("MAR-INF", "MANIFEST.json")


def build_archive(
    config: Path,
    model: str | Path | None,
    *,
    output: Path,
    archive_format: ArchiveFormat = "zip-store",
    external: bool = False,
    aot: bool = False,
    version: str = "1.0",
) -> Path:
    """Package `model` with `config` into the folder `output`; return the archive's path.

    `model` is a diffusers pipeline folder, or the transformers folder of a `module`; None where a
    factory makes the module. With `external` it may be a hub id as well, and its weights stay where
    they are: the archive's YAML names the place. What `pt2.import` and `module.factory` name is
    packed from beside the YAML. `zip-store` and `default` (deflated) write `<name>.mar`,
    `no-archive` a folder `<name>` that TorchServe serves in place. An older archive of the name is
    replaced. With `aot`, or where the YAML says `pt2.export.aot_compile`, every target is compiled
    now, for machines like this one, and lies under `aot/`. TorchServe serves several `version`s of
    one name side by side.

    Raises:
        ConfigError: the YAML cannot be used.
        ArchiveError: the folder is no pipeline, holds pickled weights, or cannot be packaged.
    """
    if archive_format not in get_args(ArchiveFormat):
        raise ArchiveError(
            f"unknown archive format {archive_format!r}: one of "
            f"{', '.join(get_args(ArchiveFormat))}"
        )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", version, re.ASCII):
        raise ArchiveError(f"version {version!r} must be letters, digits, `.`, `_` and `-`")
    loaded = verify(config)
    for warning in loaded.warnings:
        logger.warning("%s: %s", config.name, warning)
    aot = loaded.pt2.export.aot_compile or aot
    name, place = config.stem, packaged_place(loaded, model, external=external)

    output.mkdir(parents=True, exist_ok=True)
    # In `output`, since that is the disk with room for the weights, and no other archive's
    # leftovers lie there.
    with tempfile.TemporaryDirectory(prefix=".archiving-", dir=output) as work_dir:
        work = Path(work_dir)
        (work / f"{name}.yaml").write_text(
            _adapted(config, loaded, place, aot=aot), encoding="utf-8"
        )
        files = work / "files"  # the archiver copies its contents, not the folder itself
        files.mkdir()
        (files / "preheat").mkdir()
        for wing in PACKAGE.iterdir():
            if wing.name not in NO_WORKERS:
                (files / "preheat" / wing.name).symlink_to(wing)
        if place == ".":
            (files / "model").symlink_to(Path(os.path.expanduser(str(model))).resolve())
        _copy_code(loaded, config.parent, files)
        if aot:
            _compile_ahead(work / f"{name}.yaml", files)
        return _replace(_run_archiver(name, version, work, archive_format), output)


def unpacked(config: Path, loaded: ModelConfig, place: str | None, folder: Path) -> Path:
    """Write to `folder` what a worker would find of this YAML, weights where they lie and nothing
    compiled; the YAML there.

    `place` is what `packaged_place` says with `external`.
    """
    _copy_code(loaded, config.parent, folder)
    yaml_file = folder / config.name
    yaml_file.write_text(_adapted(config, loaded, place, aot=False), encoding="utf-8")
    return yaml_file


def is_archive(path: Path) -> bool:
    """Whether `path` is what `build_archive` writes: a .mar, or a no-archive folder."""
    if path.is_dir():
        return (path / MANIFEST).is_file()
    return path.suffix == ".mar" or zipfile.is_zipfile(path)


def archives_in(path: Path) -> list[Path]:
    """`path` if it is an archive, else the archives in the folder that it is; empty where there are
    none.
    """
    if is_archive(path):
        return [path]
    return sorted(each for each in path.iterdir() if is_archive(each)) if path.is_dir() else []


def verify(config: Path) -> ModelConfig:
    """The YAML, if an archive can be made of it.

    Raises:
        ConfigError: it cannot be used, or names what is not there.
        ArchiveError: its stem is no model's name.
    """
    loaded = ModelConfig.load(config, ours=True)
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_\-.]*", config.stem):
        raise ArchiveError(
            f"{config.name}: the file's stem becomes the model's name; use letters, digits, '-' "
            "and '_'"
        )
    for key, name in _code(loaded, config.parent):
        if not (config.parent / name).exists():
            raise ConfigError(f"{config.parent / name} does not exist", key)
    loaded.family.check_here()
    return loaded


def packaged_place(loaded: ModelConfig, model: str | Path | None, *, external: bool) -> str | None:
    """What the archive's YAML says of where the model lies; None where it is no folder.

    Raises:
        ArchiveError: it lies nowhere, or is no model that can be packaged.
    """
    family = loaded.family
    if family.made_by is not None:
        if model is not None:
            raise ArchiveError(
                f"the YAML's {family.name}.factory makes the {family.name}, so there is no model "
                "folder to package"
            )
        return None
    if model is None:
        raise ArchiveError(
            "no model folder is given; for a --model-file use torch-model-archiver (README, Any "
            "other module)"
        )
    try:
        folder = folder_or_hub_id(str(model), Path(), family)
    except ConfigError as error:
        raise ArchiveError(error.message) from None
    if isinstance(folder, Path):
        _check_weights(folder)
        return str(folder.resolve()) if external else "."
    if not external:
        raise ArchiveError(
            f"no such folder: {model}. If it is a hub id, its weights can only stay outside "
            "(external)"
        )
    return folder


def _check_weights(folder: Path) -> None:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        if path.suffix.lower() in PICKLED:
            raise ArchiveError(
                f"{path}: pickled weights can run code when they are read; convert them to "
                "safetensors or delete the file"
            )
    if not any(path.suffix == ".safetensors" for path in files):
        raise ArchiveError(f"{folder} holds no safetensors weights")


def _code(loaded: ModelConfig, source: Path) -> list[tuple[str, str]]:
    """The YAML paths that name Python files and packages beside it, and what they name."""
    named = [(f"pt2.import[{index}]", name) for index, name in enumerate(loaded.pt2.imports)]
    if loaded.family.made_by is not None:
        root = loaded.family.made_by.partition(":")[0].partition(".")[0]
        file = root if (source / root).is_dir() else f"{root}.py"
        named.append((f"{loaded.family.name}.factory", file))
    return named


def _copy_code(loaded: ModelConfig, source: Path, files: Path) -> None:
    """Copied, not linked: what is imported must lie in the archive."""
    for _, name in _code(loaded, source):
        if (source / name).is_dir():
            shutil.copytree(
                source / name, files / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            (files / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, files / name)


def _adapted(config: Path, loaded: ModelConfig, place: str | None, *, aot: bool) -> str:
    """The YAML's text with the model's path and `pt2.export` set; as it was, comments included,
    where they already are.
    """
    text = config.read_text(encoding="utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    section = loaded.family.name
    own, pt2 = data.get(section) or {}, data.get("pt2") or {}
    changed: dict[str, Any] = {}
    if place is not None and own.get("path", ".") != place:
        changed[section] = {**own, "path": place}
    if aot and (not isinstance(pt2, dict) or pt2.get("export") != EXPORTED):
        changed["pt2"] = {**_modern(pt2), "export": EXPORTED}
    return (
        yaml.safe_dump({**data, **changed}, sort_keys=False, allow_unicode=True)
        if changed
        else text
    )


def _modern(pt2: Any) -> dict[str, Any]:
    """`pt2` as a mapping that has room for `export`: TorchServe's legacy forms are arguments of
    torch.compile.
    """
    if isinstance(pt2, str):
        pt2 = {"backend": pt2}
    if not any(key in keys_of(Pt2Config) for key in pt2) and pt2:
        return {"compile": {"enable": True, **pt2}}
    return dict(pt2)


def _compile_ahead(config: Path, files: Path) -> None:
    """Fill `files/aot`. A process of its own: it loads the pipeline and torch, and the archiver
    needs neither.
    """
    command = [
        sys.executable,
        "-m",
        "preheat.worker.build_packages",
        str(config),
        str(files),
        str(files / "aot"),
    ]
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, check=False, env={**os.environ, "PYTHONPATH": path}, stdout=sys.stderr.fileno()
    )
    if done.returncode:
        raise ArchiveError(
            f"compiling ahead of time failed for {config.stem}; what went wrong is said above"
        )


def _run_archiver(name: str, version: str, work: Path, archive_format: str) -> Path:
    """The archive, written below `work`. A process of its own, since the archiver empties
    $TMPDIR/<name>.
    """
    temp, exported = work / "tmp", work / "out"
    temp.mkdir()
    exported.mkdir()
    # Relative paths: the archiver splits them at commas and globs brackets, wherever the repository
    # lies.
    options = {
        "--model-name": name,
        "--version": version,
        "--handler": "preheat_handler.py",
        "--config-file": f"{name}.yaml",
        "--extra-files": "files",
        "--export-path": "out",
        "--archive-format": archive_format,
    }
    shutil.copy(ENTRY, work)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "model_archiver.model_packaging",
            *(word for pair in options.items() for word in pair),
        ],
        cwd=work,
        env={**os.environ, "TMPDIR": str(temp)},
        check=False,
        capture_output=True,
        text=True,
    )
    archive = exported / (name if archive_format == "no-archive" else f"{name}.mar")
    if done.returncode or not archive.exists():
        raise ArchiveError(
            f"the model archiver failed on {name}: {done.stderr.strip() or done.stdout.strip()}"
        )
    return archive


def _replace(archive: Path, output: Path) -> Path:
    target = output / archive.name
    if target.is_dir():
        if not (target / MANIFEST).is_file():
            raise ArchiveError(f"{target} is in the way, and it is no archive")
        shutil.rmtree(target)
    return archive.replace(target)
