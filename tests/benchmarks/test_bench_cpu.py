from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import cpu_report
from bench.cpu import summarize
from bench.cpu_engines import TITLES, Distant, Local, Product, engines_of
from bench.cpu_models import num_operations
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
    made["ipex"] = {"failed": "not installed"}
    made["frozen"]["milliseconds"] = [5.0, 5.0, 45.0]
    made["openvino masked"]["milliseconds"] = [
        1.5 * took for took in made["openvino"]["milliseconds"]
    ]
    made["eager masked"]["milliseconds"] = [1.0, 1.0, 1.0]
    return made


def summarized() -> dict[str, Any]:
    """By a machine that makes a product in 4, 8 and 36 ms, and the module's call in half of it."""
    return summarize(cells(), [4.0, 8.0, 36.0], Product.NUM_OPERATIONS // 2)


def test_the_fastest_median_wins_and_ratios_are_of_the_same_round() -> None:
    row = summarized()
    assert row["winner"] == "frozen", "masks do another work"
    engines = row["engines"]
    assert engines["eager"]["times_eager"] == 1.0 and engines["frozen"]["times_eager"] == 2.0
    assert engines["eager"]["median_ms"] == 20.0 and engines["eager"]["p90_ms"] == 76.0
    assert "milliseconds" not in engines["eager"]
    assert engines["ipex"] == {"failed": "not installed"}


def test_a_share_of_the_limit_is_of_the_same_rounds_product() -> None:
    row = summarized()
    assert (row["limit_ms"], row["engines"]["eager"]["share_of_limit"]) == (4.0, 0.2)
    assert row["engines"]["frozen"]["share_of_limit"] == 0.4
    assert row["gigaflops_of_a_product"] == round(2 * 2048**3 / 8e-3 / 1e9)


def test_masks_are_held_against_the_same_engine_without() -> None:
    engines = summarized()["engines"]
    assert engines["openvino masked"]["over_unmasked"] == 1.5
    assert "over_unmasked" not in engines["openvino"]


def test_rounds_that_disagree_are_told() -> None:
    (said,) = summarized()["doubts"]
    assert said.startswith("frozen over eager: the rounds spread over 100%")
    steady = cells()
    steady["frozen"]["milliseconds"] = [5.0, 10.0, 45.0]
    assert summarize(steady, [1.0] * 3, 1)["doubts"] == []


@pytest.mark.parametrize("masked", [False, True])
def test_the_tiny_unet_runs_with_masks_and_without(masked: bool) -> None:
    engine = Local("eager masked" if masked else "eager", "unet", "bfloat16")
    assert engine.step() > 0 and 0 < engine.error < 0.1
    assert ("eager masked" in engines_of("unet")) and ("eager masked" not in engines_of("bert"))


def test_operations_are_counted() -> None:
    assert num_operations("resnet") == pytest.approx(2 * 4.1e9, rel=0.02), (
        "twice its published MACs"
    )


def test_table_and_picture_show_every_cell(tmp_path: Path) -> None:
    row = summarized()
    del row["engines"]["openvino masked"]  # a module that cannot be masked has none
    model = {"title": "a net", "call": "batch 1", "dtypes": {"float32": row}}
    document = {
        "machine": machine(),
        "versions": versions(),
        "num_threads": 2,
        "models": {"net": model},
    }
    console = Console(width=120, record=True, file=(tmp_path / "table").open("w"))
    console.print(cpu_report.table(document))
    text = console.export_text()
    assert all(title in text for title in TITLES.values())
    assert "not installed" in text and "* 5.0 (2.00 x; 40%; 1 s)" in text
    cpu_report.draw(document, tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").stat().st_size > 1000


def test_without_its_environment_ipex_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.cpu_engines.IPEX_PYTHON", tmp_path / "python")
    with pytest.raises(PreheatError, match="make setup-ipex"):
        Distant("unet", "float32")
