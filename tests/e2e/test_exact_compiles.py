"""The bench's own check can fail: with the stance removed, compiles inside requests happen and are
seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench import traffic
from bench.profiles import PROFILES, model_yaml
from bench.report import Answer
from bench.sizes import Size
from bench.traffic import Asked, Contender, in_rounds, payloads, serving

TINY = PROFILES["tiny"]
NEW_SIZES = [
    Size(height, width, "log") for height, width in ((64, 64), (96, 160), (200, 136), (64, 64))
]


@dataclass(frozen=True)
class Run:
    answers: Sequence[Answer]
    state: Mapping[str, Any]


def measured(strategy: str, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A real TorchServe under that strategy; Dynamo compiles as ever, but without Inductor, which
    makes it quick.
    """
    monkeypatch.setattr(traffic, "STATE", folder)
    contender = Contender(strategy, "float32")
    config = model_yaml(TINY, strategy, backend="eager")
    asked = Asked(NEW_SIZES, payloads(NEW_SIZES, 1), ())
    with serving(TINY, contender, config, model, math.inf) as served:
        (answers,) = in_rounds({"it": served}, asked, 1, math.inf)["it"]
        run = Run(answers, served.client.state())
    assert [answer.status for answer in run.answers] == [200] * len(NEW_SIZES)
    assert {answer.engine for answer in run.answers} == {"compiled"}
    assert run.state["strategy"] == strategy and served.ready_seconds > 0
    # no cache is left for the next one
    assert list((folder / "run").iterdir()) == [contender.folder]
    return run


def test_exact_compiles_inside_requests(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = measured("exact", tiny_sdxl, tmp_path, monkeypatch)
    assert run.state["compiles_at_boot"] == 0
    # the first size, and the second that makes it dynamic
    assert run.state["compiles_since_ready"] >= 2
    assert [answer.painted_pixels for answer in run.answers] == [
        size.height * size.width for size in NEW_SIZES
    ]


@pytest.mark.parametrize("strategy", ["buckets", "dynamic", "fixed"])
def test_the_others_do_not(
    strategy: str, tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = measured(strategy, tiny_sdxl, tmp_path, monkeypatch).state
    assert state["compiles_at_boot"] > 0
    assert (state["compiles_since_ready"], state["incidents"], state["eager_fallbacks"]) == (
        0,
        0,
        0,
    )
