"""What bench-start serves and reports; nothing here is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import start
from bench.profiles import PROFILES
from preheat.config.model import ModelConfig


def row(ready: float) -> dict[str, Any]:
    return {
        "ready_seconds": ready,
        "first_image_seconds": ready + 1,
        "first_request_ms": 1000.0,
        "first_ten_p99_ms": 1001.5,
        "engine": "compiled",
        "initialize_seconds": ready - 5,
        "warmed": {"hit": 1, "partial": 0, "miss": 2},
    }


DOCUMENT: dict[str, Any] = {
    "profile": "tiny",
    "machine": {"cpu": "a processor", "num_cores": 2, "gpus": []},
    "on_gpu": False,
    "versions": {"torch": "2.13.0"},
    "buckets": [[256, 256]],
    "starts": {
        "eager": row(10),
        "cold": row(100),
        "second": row(20),
        "aot": {"error": "PreheatError: no package"},
    },
}


@pytest.mark.parametrize("scenario", start.TITLES)
@pytest.mark.parametrize("profile", PROFILES)
def test_every_scenario_is_a_config_that_loads(tmp_path: Path, scenario: str, profile: str) -> None:
    runs = start.Bench(PROFILES[profile], tmp_path, tmp_path, backend="auto", num_threads=1)
    config = ModelConfig.parse(runs.config(scenario))
    assert config.pt2.compile.enable == (scenario != "eager")
    assert config.minWorkers == (4 if scenario == "four" else 1)
    assert (config.pt2.cache.shared is not None) == (scenario in ("four", "second"))
    # nobody stops waiting while there is hope
    assert (config.startupTimeout or 0) / 2 >= start.READY_SECONDS


def test_ratios_are_made_of_what_was_measured() -> None:
    assert start.ratios(DOCUMENT["starts"]) == {"cold over second worker": 5.0}


def test_the_result_is_a_file_a_picture_and_a_table(tmp_path: Path) -> None:
    start.write(DOCUMENT, tmp_path)
    assert json.loads((tmp_path / "start.json").read_text()) == DOCUMENT
    assert (tmp_path / "start.png").stat().st_size > 5000
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    console.print(start.table(DOCUMENT))
    text = console.export_text()
    assert "second worker, shared cache" in text and "failed" in text
    assert "1001.5" in text
