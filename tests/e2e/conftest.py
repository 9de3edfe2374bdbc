"""Real TorchServe, real pipeline, real Inductor. One server for all tests that only ask; the
compile cache outlives the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import old_folders
from preheat.models import tiny
from preheat.torchserve.archive import build_archive
from served import CACHE, CONFIG, ONE_THREAD, Served, serving


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL pipeline folder."""
    return tiny.build("sdxl", tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def old_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as an older diffusers wrote it, with half-precision weights."""
    return old_folders.sdxl(tmp_path_factory.mktemp("old") / "model")


@pytest.fixture(scope="session")
def served(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """What `make demo` serves, warm."""
    work = tmp_path_factory.mktemp("served")
    archive = build_archive(CONFIG, tiny_sdxl, output=work / "archives")
    with serving(archive, work, cache=CACHE, env=ONE_THREAD) as warm:
        yield warm
