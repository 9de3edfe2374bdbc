"""The forecast's own arithmetic."""

from __future__ import annotations

import json

import pytest

from bench.cpu_models import MODELS
from bench.forecast import CPU, DENOISERS, off, step_ratio, summary
from bench.profiles import PROFILES
from preheat.errors import PreheatError
from preheat.preflight.profile import InBucket, Profile

MEASURED = json.loads(CPU.read_bytes())


@pytest.mark.parametrize("backend", ["openvino", "inductor"])
def test_the_ratio_is_what_bench_cpu_has_measured(backend: str) -> None:
    assert 0.1 < step_ratio(MEASURED, "tiny", "float32", backend) < 1
    assert step_ratio({}, "tiny", "float32", "eager") == 1.0


def test_the_denoisers_are_those_of_bench_cpu() -> None:
    assert set(DENOISERS) <= set(PROFILES) and set(DENOISERS.values()) <= set(MODELS)


def test_a_ratio_that_nobody_has_measured_is_asked_for() -> None:
    with pytest.raises(PreheatError, match=r"no nvfuser of tiny in float32.*give --ratio"):
        step_ratio(MEASURED, "tiny", "float32", "nvfuser")


def test_the_denoisers_part_alone_gets_faster() -> None:
    seconds = {"unet": 0.6, "vae.decoder": 0.2, "encoding": 0.1, "everything else": 0.1}
    one = InBucket(bucket="256x256", wall_seconds=1.0, seconds=seconds)
    profile = Profile(
        device="cpu",
        dtype="float32",
        steps=4,
        targets=("unet", "vae.decoder"),
        buckets=(one,),
        operators=(),
    )
    forecast = {"256x256": profile.predicted(one, {"unet": 0.5})}
    assert off(forecast, {"256x256": 0.8}) == pytest.approx({"256x256": -0.125})


def test_the_worst_bucket_counts_by_its_median_round() -> None:
    found = summary([{"a": 0.01, "b": -0.14}, {"a": 0.02, "b": -0.1}, {"a": 0.0, "b": -0.3}])
    assert found["off"] == {"a": 0.01, "b": -0.14} and found["worst"] == -0.14
    assert found["reached"] and len(found["doubts"]) == 1
    assert not summary([{"a": 0.16}])["reached"]
