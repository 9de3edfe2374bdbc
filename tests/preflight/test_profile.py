"""`preheat profile`: shares that add up, what Amdahl allows, and the advice that follows."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from preheat.cli import app, aside
from preheat.config.model import ModelConfig
from preheat.models import tiny
from preheat.preflight.measure import measure
from preheat.preflight.profile import ELSE, ENCODING, InBucket, Operator, Profile, Stopwatch
from preheat.torchserve.server import ROOT


class Clock:
    """Seconds that go on only where somebody says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_a_part_inside_another_counts_for_itself_alone() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    clock.seconds = 1
    with watch.part("outer"):
        clock.seconds = 3
        with watch.part("inner"):
            clock.seconds = 7
        clock.seconds = 8
    clock.seconds = 10
    watch.lap()
    assert watch.seconds == {ELSE: 3, "outer": 3, "inner": 4}


@given(st.recursive(st.integers(0, 5), lambda inside: st.lists(inside, max_size=4), max_leaves=20))
def test_seconds_add_up_to_the_wall_time(tree: Any) -> None:
    clock, names = Clock(), count()
    watch = Stopwatch(clock)

    def run(node: Any) -> None:
        if isinstance(node, int):
            clock.seconds += node
            return
        with watch.part(f"part {next(names) % 3}"):
            for each in node:
                run(each)

    run(tree)
    watch.lap()
    assert sum(watch.seconds.values()) == clock.seconds


def made(**seconds: float) -> Profile:
    """Of one bucket; `unet` and `vae` are targets."""
    bucket = InBucket(bucket="64x64", wall_seconds=sum(seconds.values()), seconds=seconds)
    operators = (Operator(name="aten::mm", calls=3, share=0.5),)
    targets = tuple(name for name in ("unet", "vae") if name in seconds)
    return Profile(
        device="cpu",
        dtype="float32",
        steps=4,
        targets=targets,
        buckets=(bucket,),
        operators=operators,
    )


def test_what_compiling_gains_at_most_is_amdahls() -> None:
    found = made(unet=8.0, vae=1.0, rest=1.0)
    assert found.most_gain("unet") == pytest.approx(5)
    assert found.most_gain("unet", "vae") == pytest.approx(10)
    assert found.most_gain() == 1
    assert found.predicted(found.buckets[0], {"unet": 0.5}) == pytest.approx(6)


@pytest.mark.parametrize(
    ("seconds", "enabled", "targets"),
    [
        ({"unet": 8.0, "vae": 1.0, "rest": 1.0}, True, ("unet", "vae")),
        ({"unet": 1.0, "vae": 0.5, "rest": 8.5}, True, ("unet",)),
        ({"unet": 0.5, "rest": 9.5}, False, ()),
    ],
)
def test_the_advice_is_yaml_that_names_what_is_worth_a_compile(
    seconds: dict[str, float], enabled: bool, targets: tuple[str, ...]
) -> None:
    found = made(**seconds)
    pt2 = yaml.safe_load(found.advice())["pt2"]
    assert (pt2["compile"]["enable"], tuple(pt2.get("targets", ()))) == (enabled, targets)
    assert found.worth == targets


def test_a_whole_module_is_advised_without_targets() -> None:
    found = made(model=9.0, rest=1.0).model_copy(update={"targets": ("model",)})
    assert yaml.safe_load(found.advice()) == {"pt2": {"compile": {"enable": True}}}
    assert "at most 10.0 times" in found.advice()


def test_the_shares_of_a_pipeline_add_up_and_name_its_parts(tmp_path: Path) -> None:
    tiny.build("sd15", tmp_path / "model")
    data = {
        "pt2": {"compile": {"enable": True}, "shapes": {"buckets": [[128, 64], [64, 64]]}},
        "pipeline": {"path": "model", "defaults": {"num_inference_steps": 4}},
    }
    trace = tmp_path / "trace.json"
    found = measure(ModelConfig.parse(data), tmp_path, 2, trace)
    assert (found.steps, found.targets[0]) == (2, "unet") and len(found.buckets) == 2
    for each in found.buckets:
        assert sum(each.shares.values()) == pytest.approx(1, abs=0.03)
        parts = {"unet", "vae.decoder", "text encoders", ENCODING, ELSE}
        assert parts <= {name for name, seconds in each.seconds.items() if seconds > 0}
    assert any("conv" in operator.name for operator in found.operators)
    assert json.loads(trace.read_text())["traceEvents"]


def test_a_modules_profile_is_of_its_own_target(tmp_path: Path) -> None:
    tiny.build("bert", tmp_path / "model")
    ids = {"dtype": "int64", "shape": ["batch", "sequence"], "buckets": {"sequence": [8, 16]}}
    outputs = {"last_hidden_state": {"crop": {1: "sequence"}}}
    module = {"path": "model", "inputs": {"input_ids": ids}, "outputs": outputs}
    data = {"pt2": {"compile": {"enable": True}}, "module": module}
    found = measure(ModelConfig.parse(data), tmp_path, None, None)
    assert (found.targets, found.steps) == (("model",), None)
    assert [each.bucket for each in found.buckets] == ["sequence=16", "sequence=8"]
    assert found.share("model") > 0 and found.share(ELSE) > 0


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: object) -> Any:
    asked: list[tuple[object, ...]] = []

    def ask(*given: object) -> bytes:
        asked.append(given)
        return made(unet=8.0, vae=1.0, rest=1.0).model_dump_json().encode()

    monkeypatch.chdir(folder)
    monkeypatch.setattr(aside, "ask", ask)
    done = CliRunner().invoke(app.app, ["profile", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0 and asked[0][0] == "measure"
    return done


def test_the_command_prints_tables_json_and_a_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shipped = ROOT / "model-config" / "bert.yaml"
    text = run(monkeypatch, tmp_path, shipped, "--picture", tmp_path / "profile.svg").stdout
    assert all(word in text for word in ("80.0%", "5.00 times as fast", "aten::mm", "targets:"))
    assert "unet 80%" in (tmp_path / "profile.svg").read_text()
    document = json.loads(run(monkeypatch, tmp_path, shipped, "--json").stdout)
    assert document["most_gain"]["unet"] == pytest.approx(5)
    assert document["shares"]["64x64"]["vae"] == pytest.approx(0.1)
