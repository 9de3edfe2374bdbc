"""What commands do in a process of its own, since it imports torch and users' code."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from preheat.errors import PreheatError

if TYPE_CHECKING:
    from preheat.config.model import ModelConfig


def staged(
    config: Path, model: str | None, folder: Path
) -> tuple[ModelConfig, Path | None, str | None]:
    """The YAML, what a worker would find of it, written to `folder` (None where no model is named),
    and where its model lies.

    Raises:
        ConfigError, ArchiveError: no archive can be made of it.
    """
    from preheat.cli.app import place_of_model
    from preheat.torchserve.archive import packaged_place, unpacked, verify

    loaded = verify(config)
    family = loaded.family
    if family.made_by is None and model is None and family.path in (None, "."):
        return loaded, None, None
    named = None if family.made_by is not None and model is None else place_of_model(config, model)
    place = packaged_place(loaded, named, external=True)
    return loaded, unpacked(config, loaded, place, folder), place


def ask(module: str, *arguments: object) -> bytes:
    """What `python -m preheat.preflight.<module> <file to write> <arguments>` writes.

    Raises:
        PreheatError: it ends otherwise than it should, as where memory runs out.
    """
    from preheat.torchserve.archive import PACKAGE

    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory(prefix="preheat-") as temp:
        out = Path(temp, "out.json")
        done = subprocess.run(
            [sys.executable, "-m", f"preheat.preflight.{module}", out, *map(str, arguments)],
            check=False,
            # as the server does: threads that spin on few cores slow each other down by a factor
            env={"GOMP_SPINCOUNT": "1000", **os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise PreheatError(f"loading the model ended: {said[0].removeprefix('preheat: ')}")
        return out.read_bytes()
