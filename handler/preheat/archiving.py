"""A pipeline folder and a model YAML become an archive that TorchServe loads.

The archive's root holds the entry file, the package `preheat/`, `<name>.yaml` and, unless weights stay outside,
`model/`: the pipeline folder as it was. The model's name is the YAML's stem.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from preheat.config import ModelConfig
from preheat.errors import ArchiveError

ArchiveFormat = Literal["zip-store", "default", "no-archive"]

ENTRY = Path(__file__).resolve().parents[1] / "preheat_handler.py"
PACKAGE = Path(__file__).resolve().parent
PICKLED = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
MANIFEST = Path("MAR-INF", "MANIFEST.json")


def build_archive(
    config: Path,
    model: str | Path,
    *,
    output: Path,
    archive_format: ArchiveFormat = "zip-store",
    external: bool = False,
) -> Path:
    """Package `model` with `config` into the folder `output`; return the archive's path.

    `model` is a diffusers pipeline folder; with `external` it may be a hub id as well, and its weights stay where they
    are: the archive's YAML names the place. `zip-store` and `default` (deflated) write `<name>.mar`, `no-archive` a
    folder `<name>` that TorchServe serves in place. An older archive of the name is replaced.

    Raises:
        ConfigError: the YAML cannot be used.
        ArchiveError: the folder is no pipeline, holds pickled weights, or cannot be packaged.
    """
    ModelConfig.load(config)
    name = _model_name(config)
    if archive_format not in get_args(ArchiveFormat):
        raise ArchiveError(f"unknown archive format {archive_format!r}: one of {', '.join(get_args(ArchiveFormat))}")
    folder = Path(model)
    if folder.is_dir():
        _check_weights(folder)
    elif not external:
        raise ArchiveError(f"no such folder: {model}. If it is a hub id, its weights can only stay outside (external)")
    place = "." if not external else str(folder.resolve()) if folder.is_dir() else str(model)

    output.mkdir(parents=True, exist_ok=True)
    # In `output`, since that is the disk with room for the weights, and no other archive's leftovers lie there.
    with tempfile.TemporaryDirectory(prefix=".archiving-", dir=output) as work_dir:
        work = Path(work_dir)
        (work / f"{name}.yaml").write_text(_placed(config, place), encoding="utf-8")
        files = work / "files"  # the archiver copies its contents, not the folder itself
        files.mkdir()
        (files / "preheat").symlink_to(PACKAGE)
        if not external:
            (files / "model").symlink_to(folder.resolve())
        return _replace(_run_archiver(name, work, archive_format), output)


def _model_name(config: Path) -> str:
    name = config.stem
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_\-.]*", name):
        raise ArchiveError(f"{config.name}: the file's stem becomes the model's name; use letters, digits, '-' and '_'")
    return name


def _check_weights(folder: Path) -> None:
    if not (folder / "model_index.json").is_file():
        raise ArchiveError(f"{folder} is no diffusers pipeline: it has no model_index.json")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        if path.suffix.lower() in PICKLED:
            raise ArchiveError(
                f"{path}: pickled weights can run code when they are read; convert them to safetensors or delete the file"
            )
    if not any(path.suffix == ".safetensors" for path in files):
        raise ArchiveError(f"{folder} holds no safetensors weights")


def _placed(config: Path, place: str) -> str:
    """The YAML's text with `pipeline.path` set; as it was, comments included, where that is already so."""
    text = config.read_text(encoding="utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    pipeline = data.get("pipeline") or {}
    if pipeline.get("path", ".") == place:
        return text
    return yaml.safe_dump({**data, "pipeline": {**pipeline, "path": place}}, sort_keys=False, allow_unicode=True)


def _run_archiver(name: str, work: Path, archive_format: str) -> Path:
    """The archive, written below `work`. A process of its own, since the archiver empties $TMPDIR/<name>."""
    temp, exported = work / "tmp", work / "out"
    temp.mkdir()
    exported.mkdir()
    # Relative paths: the archiver splits them at commas and globs brackets, wherever the repository lies.
    options = {
        "--model-name": name,
        "--version": "1.0",
        "--handler": "preheat_handler.py",
        "--config-file": f"{name}.yaml",
        "--extra-files": "files",
        "--export-path": "out",
        "--archive-format": archive_format,
    }
    shutil.copy(ENTRY, work)
    done = subprocess.run(
        [sys.executable, "-m", "model_archiver.model_packaging", *(word for pair in options.items() for word in pair)],
        cwd=work,
        env={**os.environ, "TMPDIR": str(temp)},
        check=False,
        capture_output=True,
        text=True,
    )
    archive = exported / (name if archive_format == "no-archive" else f"{name}.mar")
    if done.returncode or not archive.exists():
        raise ArchiveError(f"the model archiver failed on {name}: {done.stderr.strip() or done.stdout.strip()}")
    return archive


def _replace(archive: Path, output: Path) -> Path:
    target = output / archive.name
    if target.is_dir():
        if not (target / MANIFEST).is_file():
            raise ArchiveError(f"{target} is in the way, and it is no archive")
        shutil.rmtree(target)
    return archive.replace(target)
