from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import cpu_report
from bench.cpu import summarize
from bench.cpu_engines import TITLES, Distant
from bench.machine import machine, versions
from preheat.errors import PreheatError


def cells() -> dict[str, dict[str, Any]]:
    """Every engine a millisecond slower than the one before; the last one failed."""
    made: dict[str, dict[str, Any]] = {
        name: {
            "compile_seconds": 1.0,
            "error": 1e-6,
            "milliseconds": [10.0 + place, 20.0 + place, 90.0],
        }
        for place, name in enumerate(TITLES)
    }
    made[list(TITLES)[-1]] = {"failed": "not installed"}
    made["frozen"]["milliseconds"] = [5.0, 5.0, 45.0]
    return made


def test_the_fastest_median_wins_and_ratios_are_of_the_same_round() -> None:
    row = summarize(cells())
    assert row["winner"] == "frozen"
    engines = row["engines"]
    assert engines["eager"]["times_eager"] == 1.0 and engines["frozen"]["times_eager"] == 2.0
    assert engines["eager"]["median_ms"] == 20.0 and engines["eager"]["p90_ms"] == 76.0
    assert "milliseconds" not in engines["eager"] and engines[list(TITLES)[-1]] == {
        "failed": "not installed"
    }


def test_table_and_picture_show_every_cell(tmp_path: Path) -> None:
    model = {"title": "a net", "call": "batch 1", "dtypes": {"float32": summarize(cells())}}
    document = {
        "machine": machine(),
        "versions": versions(),
        "num_threads": 2,
        "models": {"net": model},
    }
    console = Console(width=120, record=True, file=(tmp_path / "table").open("w"))
    console.print(cpu_report.table(document))
    text = console.export_text()
    assert (
        all(title in text for title in TITLES.values())
        and "not installed" in text
        and "* 5.0 (2.00 x; 1 s)" in text
    )
    cpu_report.draw(document, tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").stat().st_size > 1000


def test_without_its_environment_ipex_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.cpu_engines.IPEX_PYTHON", tmp_path / "python")
    with pytest.raises(PreheatError, match="make setup-ipex"):
        Distant("unet", "float32")
