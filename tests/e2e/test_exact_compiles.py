"""The bench's own check can fail: with the stance removed, compiles inside requests happen and are
seen.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.profiles import PROFILES, model_yaml
from bench.report import Measured
from bench.sizes import Size
from bench.traffic import measure

TINY = PROFILES["tiny"]
NEW_SIZES = [
    Size(height, width, "log") for height, width in ((64, 64), (96, 160), (200, 136), (64, 64))
]


def measured(strategy: str, model: Path, folder: Path) -> Measured:
    """A real TorchServe under that strategy; Dynamo compiles as ever, but without Inductor, which
    makes it quick.
    """
    config = model_yaml(TINY, strategy, backend="eager")
    run = measure(TINY.name, config, model, NEW_SIZES, folder / "run" / "server", num_steps=1)
    assert [answer.status for answer in run.answers] == [200] * len(NEW_SIZES)
    assert {answer.engine for answer in run.answers} == {"compiled"}
    assert run.state["strategy"] == strategy and run.ready_seconds > 0
    # no cache is left for the next one
    assert list((folder / "run").iterdir()) == [folder / "run" / "server"]
    return run


def test_exact_compiles_inside_requests(tiny_sdxl: Path, tmp_path: Path) -> None:
    run = measured("exact", tiny_sdxl, tmp_path)
    assert run.state["compiles_at_boot"] == 0
    # the first size, and the second that makes it dynamic
    assert run.state["compiles_since_ready"] >= 2
    assert [answer.painted_pixels for answer in run.answers] == [
        size.height * size.width for size in NEW_SIZES
    ]


@pytest.mark.parametrize("strategy", ["buckets", "dynamic", "fixed"])
def test_the_others_do_not(strategy: str, tiny_sdxl: Path, tmp_path: Path) -> None:
    state = measured(strategy, tiny_sdxl, tmp_path).state
    assert state["compiles_at_boot"] > 0
    assert (state["compiles_since_ready"], state["incidents"], state["eager_fallbacks"]) == (
        0,
        0,
        0,
    )
