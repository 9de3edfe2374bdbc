"""`backend: auto` in whole workers: one starts cold and chooses, the next reads what was chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from preheat.compilation.watch import CompileWatch
from preheat.config.model import ModelConfig
from preheat.models import tiny
from preheat.status import StatusFile
from preheat.worker.worker import Worker

pytest.importorskip("openvino", reason="auto is OpenVINO where that is installed")

CNN: dict[str, Any] = {
    "path": ".",
    "class": "AutoModelForImageClassification",
    "inputs": {
        "pixel_values": {
            "shape": ["batch", 3, "height", "width"],
            "buckets": {"height": [32], "width": [32]},
        }
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("resnet", tmp_path_factory.mktemp("cnn") / "model").parent


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: CompileWatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    return tmp_path / "inductor"


def start(folder: Path, **pt2: Any) -> Worker[Any, Any]:
    torch.compiler.set_stance("default")
    data = {"compile": {"enable": True, "backend": "auto"}, "shapes": {"batch_sizes": [2]}} | pt2
    config = ModelConfig.parse({"batchSize": 2, "pt2": data, "module": CNN})
    return Worker[Any, Any](config, folder, torch.device("cpu"), status=StatusFile(None, "m"))


def facts(worker: Worker[Any, Any]) -> tuple[set[str], str, list[str]]:
    """The engines of the rows, who chose, and the roads that were measured."""
    ((_, roads),) = worker.current_state().roads.items()
    assert isinstance(roads, dict)
    measured = [road for road, row in roads["roads"].items() if "milliseconds" in row]
    return {row.engine for row in worker.state.buckets}, roads["source"], measured


def test_the_first_start_chooses_and_the_next_ones_take_the_same(folder: Path, kept: Path) -> None:
    with start(folder) as worker:
        assert facts(worker) == ({"openvino"}, "measured", ["openvino"])
        assert worker.state.state == "hot" and worker.state.compiles_at_boot == 0
    assert len(list(kept.glob("preheat-roads-*.json"))) == 1
    with start(folder) as worker:
        assert facts(worker) == ({"openvino"}, "kept", ["openvino"])


def test_the_choice_and_the_graphs_travel_in_the_shared_cache(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    cache = {"shared": str(tmp_path / "shared"), "key": "k"}
    with start(folder, cache=cache) as worker:
        assert facts(worker)[1] == "measured"
        assert worker.state.shared_cache["outcome"] == "published"
    with start(folder, cache=cache) as worker:
        assert facts(worker)[1] == "kept"
        assert worker.state.shared_cache["outcome"] == "loaded"
    assert "read the converted graph" in caplog.text


def test_where_nothing_is_kept_the_order_decides(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    with start(folder) as worker:
        assert facts(worker) == ({"openvino"}, "order", ["openvino"])
