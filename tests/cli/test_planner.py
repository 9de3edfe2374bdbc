"""`preheat plan` from its files to what it prints; the plans themselves are tried in
tests/planning.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from preheat.cli import app, planner
from preheat.config.model import ModelConfig
from preheat.errors import LogError, PreheatError
from preheat.planning.cost import fitted, measured
from preheat.planning.demand import read, read_csv
from preheat.status import STATUS_DIR_VARIABLE

LOG = "height,width,count\n64,64,50\n64,96,20\n96,64,20\n40,50,9\n500,500,1\n"


def row(bucket: str, seconds: float, **keys: Any) -> dict[str, Any]:
    return {
        "bucket": bucket,
        "batch_size": 1,
        "target": "unet",
        "engine": "compiled",
        "warm_seconds": 10.0,
        "cache": "miss",
        "reason": "",
        "seconds_per_step": seconds,
    } | keys


STATE = {
    "strategy": "buckets",
    "buckets": [row("64x64", 0.1), row("128x64", 0.2), row("128x128", 0.4)],
    "peak_memory_bytes": 500 * 2**20,
    "asked_sizes": {
        "dims": ["height", "width"],
        "picture": True,
        "sizes": [[64, 64, 5], [100, 128, 5]],
        "uncounted": 2,
    },
}


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(STATUS_DIR_VARIABLE, raising=False)
    path = tmp_path / "sizes.csv"
    path.write_text(LOG)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app.app, ["plan", *map(str, arguments)], catch_exceptions=False)


def as_json(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def state_file(folder: Path, document: object, name: str = "state.json") -> Path:
    (folder / name).write_text(json.dumps(document))
    return folder / name


def test_a_log_becomes_buckets_in_yaml_that_the_config_takes(log: Path) -> None:
    plan = as_json("--csv", log, "--max-buckets", 2, "--cover", 0.99)
    assert (plan["requests"], plan["sizes"], plan["unit"], plan["chosen"]) == (100, 5, "cells", 2)
    chosen = plan["choices"][1]
    assert chosen["left_share"] == 0.01 and chosen["gap"] < 1e-6
    config = ModelConfig.parse(yaml.safe_load(plan["yaml"]))
    buckets = [dict(bucket.sizes) for bucket in config.pt2.shapes.buckets]
    assert buckets == chosen["buckets"] and config.pt2.shapes.oversize == "eager"
    assert len(plan["choices"]) > 2, "more than asked for are shown, for the knee"


def test_the_terminal_shows_gap_knee_matrix_and_yaml(log: Path) -> None:
    text = run("--csv", log).stdout
    words = ("gap", "knee", "proven best", "strategy", "dynamic", "fixed", "exact", "buckets: [[")
    assert all(word in text for word in words)
    assert "no seconds were measured" in text and "docs/benchmarks.md" in text


def test_the_fewest_buckets_that_waste_no_more_than_allowed(log: Path) -> None:
    plan = as_json("--csv", log, "--max-waste", 0.2, "--max-buckets", 8)
    wastes = [choice["waste"] for choice in plan["choices"][: plan["chosen"]]]
    assert wastes[-1] <= 0.2 and all(waste > 0.2 for waste in wastes[:-1])
    with pytest.raises(PreheatError, match="1 buckets still waste"):
        run("--csv", log, "--max-waste", 0.2, "--max-buckets", 1)


def test_a_must_have_bucket_is_in_the_plan(log: Path) -> None:
    plan = as_json("--csv", log, "--must", "512x512", "--max-buckets", 3)
    assert {"height": 512, "width": 512} in plan["choices"][2]["buckets"]
    for wrong in ("512", "512x", "0x512", "axb"):
        with pytest.raises(PreheatError, match="such as 1024x768"):
            run("--csv", log, "--must", wrong)


def test_lengths_of_a_module(log: Path) -> None:
    log.write_text("sequence\n" + "12\n" * 10 + "100\n")
    plan = as_json("--csv", log, "--max-buckets", 2)
    assert plan["dimensions"] == ["sequence"] and plan["strategies"] == []
    assert "buckets: {sequence: [16, 104]}" in plan["yaml"]
    assert "a worker's state would tell" in run("--csv", log).stdout


@pytest.mark.parametrize("name", ["plan.png", "plan.svg"])
@pytest.mark.parametrize("text", [LOG, "sequence\n10\n20\n500\n"], ids=["sizes", "lengths"])
def test_a_picture_of_sizes_and_buckets(log: Path, name: str, text: str) -> None:
    log.write_text(text)
    run("--csv", log, "--picture", log.with_name(name))
    if name.endswith("png"):
        assert min(Image.open(log.with_name(name)).size) > 400
    else:
        assert "<svg" in log.with_name(name).read_text()


def test_a_picture_that_cannot_be_written_is_a_clear_error(log: Path) -> None:
    with pytest.raises(PreheatError, match=r"cannot write .*nowhere"):
        run("--csv", log, "--picture", log.parent / "nowhere" / "plan.png")


@pytest.mark.parametrize("module", ["scipy.optimize", "matplotlib"])
def test_what_is_not_installed_is_named(
    log: Path, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PreheatError, match=r"pip install 'preheat\[plan\]'"):
        run("--csv", log, "--picture", log.with_name("plan.png"))


def test_a_state_gives_sizes_seconds_warm_up_and_memory(log: Path) -> None:
    plan = as_json("--cost", state_file(log.parent, [{"customizedMetadata": {"preheat": STATE}}]))
    assert (plan["requests"], plan["uncounted"], plan["unit"]) == (10, 2, "seconds")
    one, two = plan["choices"]
    assert (one["warm_seconds"], two["warm_seconds"]) == (10, 20)
    assert 0 < two["memory_bytes"] - one["memory_bytes"] < 100 * 2**20
    assert {each["strategy"]: each["measured"] for each in plan["strategies"]}["buckets"]
    text = run("--cost", log.with_name("state.json")).stdout
    assert "2 more requests had sizes that the workers had no room to remember" in text


def test_measured_strategies_replace_documented_ratios(log: Path) -> None:
    state = state_file(log.parent, {"preheat": STATE})
    dynamic = {"strategy": "dynamic", "buckets": [row("64x64", 0.05, warm_seconds=7.0)]}
    other = state_file(log.parent, dynamic, "dynamic.json")
    before, after = as_json("--cost", state), as_json("--cost", state, "--cost", other)
    rows = [{each["strategy"]: each for each in plan["strategies"]} for plan in (before, after)]
    assert rows[0]["dynamic"]["measured"] is False and rows[1]["dynamic"]["measured"] is True
    assert rows[1]["dynamic"]["start_seconds"] == 7
    assert rows[1]["dynamic"]["request_seconds"] < rows[1]["buckets"]["request_seconds"]


def test_a_curve_goes_through_what_was_measured_and_never_falls() -> None:
    for seconds in ((0.1, 0.2, 0.4), (0.4, 0.2, 0.1), (0.1, 0.1, 0.9)):
        curve = fitted(dict(zip((4096, 8192, 16384), seconds, strict=True)))
        assert curve is not None
        costs = [curve(cells) for cells in range(0, 40000, 100)]
        assert costs == sorted(costs)
    curve = fitted({100: 1.0 + 100 + 1e4, 200: 1.0 + 200 + 4e4, 300: 1.0 + 300 + 9e4})
    assert curve is not None and curve.worst_error < 1e-6
    assert curve(400) == pytest.approx(1 + 400 + 16e4)
    assert fitted({}) is None
    near = fitted({61440: 0.05, 65536: 0.049})
    assert near is not None and near(2 * 61440) > 1.9 * near(61440), "noise is no constant"


def test_rows_of_eager_buckets_are_the_eager_curve() -> None:
    rows = [row("64x64", 0.1), row("64x64", 0.3, batch_size=4), row("96x64", 0.9, engine="eager")]
    found = measured({"buckets": rows})
    assert found.seconds is not None and found.seconds(64 * 64) == pytest.approx(0.1)
    assert found.eager_seconds is not None
    assert found.eager_seconds(96 * 64) == pytest.approx(0.9)
    assert found.warm_seconds == 20 and found.num_buckets == 1, "of what was compiled"


def test_of_a_worker_that_serves_eagerly_buckets_are_in_proportion(log: Path) -> None:
    rows = [row("64x64", 0.1, engine="eager"), row("128x128", 0.4, engine="eager")]
    plan = as_json("--cost", state_file(log.parent, STATE | {"buckets": rows}))
    found = {each["strategy"]: each for each in plan["strategies"]}
    assert plan["unit"] == "seconds"
    assert found["eager"]["measured"] and not found["buckets"]["measured"]
    assert found["buckets"]["start_seconds"] > 20, "what is documented: nothing was compiled"


def test_a_warm_up_from_the_cache_is_said(log: Path) -> None:
    rows = [row("64x64", 0.1, cache="hit"), row("128x128", 0.4)]
    state = state_file(log.parent, STATE | {"buckets": rows})
    assert "found compiled code" in run("--cost", state).stdout
    assert "found compiled code" not in run("--cost", state_file(log.parent, STATE)).stdout


def test_workers_here_tell_what_they_were_asked(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PreheatError, match="give a log of sizes"):
        run()
    folder = log.parent / "status"
    folder.mkdir()
    monkeypatch.setenv(STATUS_DIR_VARIABLE, str(folder))
    with pytest.raises(LogError, match="no sizes were asked for yet"):
        run()
    sizes: Mapping[str, Any] = STATE["asked_sizes"]  # type: ignore[assignment]
    for pid in (1, 2):
        (folder / f"fox-{pid}.sizes").write_text(json.dumps({"model": "fox", **sizes}))
    assert as_json()["requests"] == 20
    (folder / "bear-3.sizes").write_text(json.dumps({"model": "bear", **sizes}))
    with pytest.raises(PreheatError, match="say --model"):
        run()
    assert as_json("--model", "bear")["requests"] == 10


def test_the_cost_is_of_the_model_whose_sizes_are_planned(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STATUS_DIR_VARIABLE, str(log.parent))
    asked: Mapping[str, Any] = STATE["asked_sizes"]  # type: ignore[assignment]
    (log.parent / "bear-1.sizes").write_text(json.dumps({"model": "bear", **asked}))
    progress = {"pid": os.getpid(), "state": "ready", "done": 1, "total": 1, "buckets": []}
    for model in ("bear", "fox"):
        (log.parent / f"{model}-1.json").write_text(
            json.dumps({"model": model, **progress, "served": STATE if model == "fox" else {}})
        )
    assert as_json()["unit"] == "cells", "of bear, the only one asked, nothing was measured"
    (log.parent / "bear-1.json").write_text(
        json.dumps({"model": "bear", **progress, "served": STATE})
    )
    assert as_json()["unit"] == "seconds"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", r"height,width\[,count\], or one dimension"),
        ("", "got 'nothing'"),
        ("height,width\n", "holds no sizes"),
        ("sequence\nx\n", "line 2: sequence must be a whole number above 0, got 'x'"),
        ("sequence,count\n5\n", "line 2: count must be"),
    ],
)
def test_a_log_that_cannot_be_read_says_where(log: Path, text: str, said: str) -> None:
    log.write_text(text)
    with pytest.raises(LogError, match=said):
        read_csv(log)


def test_other_columns_of_an_access_log_do_not_matter(log: Path) -> None:
    log.write_text("time,height,width,code\n1,64,32,200\n2,64,32,400\n")
    assert read_csv(log).counts == {(64, 32): 2}


@pytest.mark.parametrize("document", ["[]", "{}", '{"buckets": 1}', "no JSON", '{"models": []}'])
def test_what_is_no_state_is_refused(log: Path, document: str) -> None:
    log.write_text(document)
    with pytest.raises(PreheatError, match="holds no state of a worker"):
        planner.read_state(log)


def test_a_state_with_buckets_of_another_kind_is_refused() -> None:
    with pytest.raises(PreheatError, match="no state of a worker"):
        measured({"buckets": [row("height=64 width=32", 0.1)]})


def test_the_gateways_access_log_is_a_log_of_sizes(tmp_path: Path) -> None:
    log = tmp_path / "access.jsonl"
    painted = {"id": "a", "path": "/predictions/tiny", "height": 300, "width": 200, "status": 200}
    rows: list[dict[str, object]] = [painted, painted, {**painted, "height": 999, "status": 400}]
    rows += [{**painted, "width": 1, "status": status} for status in (401, 429, 499, 504)]
    rows += [{"id": "b", "path": "/predictions/tiny", "status": 200}]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    demand = read(log)
    assert demand.counts == {(300, 200): 2, (999, 200): 1} and demand.is_picture


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"status": 200}\n', "no sizes"),
        ('{"status": 200}\n[]\n', "line 2 is none"),
        ('{"a": 1}\n', "line 1 is none"),
        ("{\n", "line 1 is none"),
    ],
)
def test_what_is_no_access_log_is_refused_by_line(tmp_path: Path, text: str, why: str) -> None:
    log = tmp_path / "access.jsonl"
    log.write_text(text)
    with pytest.raises(LogError, match=why):
        read(log)
