"""Real TorchServe, real pipeline, real Inductor. One server for all tests that only ask; the compile cache outlives the run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from preheat import server, tiny
from preheat.archiving import build_archive
from preheat.client import Client
from served import CACHE, CONFIG, Served


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL pipeline folder."""
    return tiny.build("sdxl", tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def served(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """What `make demo` serves, warm."""
    work = tmp_path_factory.mktemp("served")
    archive = build_archive(CONFIG, tiny_sdxl, output=work / "archives")
    running = server.start([archive], work / "run", ports=server.Ports.free(), cache=CACHE)
    try:
        running.wait_ready(900)
        with Client.to(running) as client:
            yield Served(running, client)
    finally:
        running.stop()
