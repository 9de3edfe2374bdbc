"""The GPU call on a CPU, with the tiny pipeline and nothing compiled: to its end, in two calls."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import SCALES, UNFINISHED, Bench, OutOfTime, Record, ending_after, main
from preheat.models import tiny


def stops_after(units: int) -> Callable[[], bool]:
    left = iter(range(units))
    return lambda: next(left, None) is not None


def test_it_runs_to_its_end_although_it_was_stopped_in_the_middle(tmp_path: Path) -> None:
    tiny.build("sdxl", tmp_path / "model")
    path = tmp_path / "gpu.json"

    def bench() -> Bench:
        record = Record(path, {"profile": "tiny"})
        return Bench(
            SCALES["tiny"],
            tmp_path,
            torch.device("cpu"),
            record,
            batches=[1],
            backend="eager",
            engines=("eager", "masked"),
            tests=False,
        )

    assert not bench().run(stops_after(2))
    first = json.loads(path.read_text())["done"]
    assert list(first) == ["eager"] and list(first["eager"]) == ["start", "batch 1"]
    assert bench().run()
    done: dict[str, Any] = json.loads(path.read_text())["done"]
    assert {unit: done["eager"][unit] for unit in first["eager"]} == first["eager"], "not again"
    assert list(done) == ["eager", "masked"]
    for engine, units in done.items():
        assert list(units) == ["start", "batch 1", "kernels", "restart"]
        assert units["start"]["served_by"] == [{"eager": "eager", "masked": "compiled"}[engine]]
        told = units["batch 1"]
        assert told["full"]["images_per_second"] > 0 and told["full"]["calls"] >= 3
        assert (told["compiles_since_ready"], told["eager_fallbacks"]) == (0, 0)
        assert ("masked_over_unmasked" in told) == (engine == "masked")
        assert units["kernels"]["longest"]


def test_a_record_of_another_run_is_not_added_to(tmp_path: Path) -> None:
    Record(tmp_path / "gpu.json", {"torch": "2.11"}).write("eager", "start", {})
    with pytest.raises(SystemExit, match=r"is of another run .*2\.11"):
        Record(tmp_path / "gpu.json", {"torch": "2.13"})


def test_a_call_ends_itself_before_its_limit(tmp_path: Path) -> None:
    with pytest.raises(OutOfTime), ending_after(0.01):
        threading.Event().wait(60)
    command = ["--profile", "tiny", "--seconds", "0.001", "--no-tests", "--output", str(tmp_path)]
    assert main(command) == UNFINISHED
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_real_size_is_refused_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path)])
    assert "needs a CUDA GPU" in capsys.readouterr().err
