"""Which road a picture with masks takes, by an injected table; and that both paint the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.plain_diffusers import Plain
from models.diffusion.test_engine import Bench
from preheat.buckets import Bucket
from preheat.compilation.pace import Budget, Load, Timing
from preheat.compilation.router import Router
from preheat.config.model import ModelConfig
from preheat.models import tiny
from preheat.models.diffusion.geometry import alone, plan
from preheat.models.diffusion.own_sizes import OwnSizes
from preheat.models.diffusion.runner import DiffusionRunner
from preheat.models.diffusion.variants import Variant, alone_variants
from preheat.protocol.call import Call
from preheat.status import StatusFile
from preheat.worker.worker import Worker

BUCKET, GRID = Bucket(256, 256), 16
ALWAYS = OwnSizes((1, 4), {BUCKET: {1: 1e9}}, {256 * 256: {1: 0.0}})


def masked(height: int, width: int) -> Any:
    return plan(
        height,
        width,
        buckets=[BUCKET],
        fit="mask",
        oversize="reject",
        multiple=GRID,
        has_image=False,
    )


def variant(side: int, rows: int, *, own: bool) -> Variant:
    return Variant(Bucket(side, side), rows, False, "text-to-image", masked=not own, alone=own)


TABLE = OwnSizes.measured(
    (1, 4),
    {
        variant(256, 1, own=False): Timing(0.0, 4.0),
        variant(256, 4, own=False): Timing(0.0, 16.0),
        variant(64, 1, own=True): Timing(0.0, 1.0),
        variant(64, 4, own=True): Timing(0.0, 3.0),
        variant(128, 1, own=True): Timing(0.0, 2.0),
        variant(128, 4, own=True): Timing(0.0, 8.0),
        variant(192, 1, own=True): Timing(0.0, 6.0),
        variant(192, 4, own=True): Timing(0.0, 24.0),
    },
)


def test_what_costs_fewer_seconds_is_taken() -> None:
    taken = {
        side: TABLE.are_quicker(masked(side, side), 1, doubled=False)
        for side in (16, 128, 144, 176, 192, 208, 256)
    }
    assert taken == {16: True, 128: True, 144: True, 176: False, 192: False, 208: False, 256: False}


def test_a_picture_of_few_pixels_costs_the_overhead_of_a_step() -> None:
    slow = replace(TABLE, own={64 * 64: {1: 5.0}, 128 * 128: {1: 6.0}})
    assert not slow.are_quicker(masked(16, 16), 1, doubled=False)


@given(st.integers(1, 256), st.integers(1, 256), st.integers(1, 9), st.booleans())
def test_nothing_is_painted_alone_that_was_not_measured_or_fills_its_bucket(
    height: int, width: int, pictures: int, doubled: bool
) -> None:
    known = replace(ALWAYS, own={128 * 128: {1: 0.0}})
    one = masked(height, width)
    own = known.are_quicker(one, pictures, doubled=doubled)
    assert own == (one.painted.volume <= 128 * 128 and one.painted != BUCKET)
    assert not OwnSizes().are_quicker(one, pictures, doubled=doubled)


@given(st.integers(1, 256), st.integers(1, 256))
def test_both_roads_cut_the_same_picture_out_of_what_is_painted(height: int, width: int) -> None:
    one = masked(height, width)
    other = alone(one)
    assert (other.crop, other.scaled, other.image_at) == (one.crop, one.scaled, one.image_at)
    assert (other.bucket, other.painted, other.bypass) == (one.painted, one.painted, True)


@given(st.integers(1, 64), st.integers(1, 64), st.sampled_from([8, 16, 32]), st.integers(1, 64))
def test_sizes_that_are_measured_lie_on_the_grid_inside_the_bucket(
    height: int, width: int, grid: int, least: int
) -> None:
    bucket = Bucket(max(least, height * grid), max(least, width * grid))
    bucket = Bucket(-(-bucket.height // grid) * grid, -(-bucket.width // grid) * grid)
    for each in alone_variants(bucket, grid, least, [1, 2, 4], [True], "text-to-image"):
        assert bucket.covers(each.bucket) and each.bucket != bucket
        assert each.bucket.height % grid == each.bucket.width % grid == 0
        assert each.bucket.covers(Bucket(least, least)) and each.batch_size in (1, 4)


def test_the_time_of_eager_runs_is_known_apart() -> None:
    budget = Budget()
    graph, small = Load(256, 1, 1, 1), Load(1, 1, 1, 1, eager=True)
    budget.measured(graph, Timing(0.0, 1.0))
    assert budget.pace_of(small).seconds(small) == 1 / 256
    budget.measured(replace(small, area=64), Timing(0.0, 3.0))
    assert budget.pace_of(small).seconds(small) == 3.0
    budget.pace_of(small).saw(small, 300.0)
    assert budget.pace_of(graph).seconds(graph) == 1.0


class Compiled(Router):
    """One that has something to be quicker than eager code."""

    idle = False


@pytest.mark.parametrize(
    ("shapes", "sizes"),
    [
        ({"fit": "mask"}, {"16x16", "32x32", "56x64"}),
        ({"fit": "mask", "invariant": True}, set()),
        ({"fit": "pad"}, set()),
    ],
)
def test_eager_code_is_measured_where_there_are_two_roads(
    shapes: dict[str, Any], sizes: set[str]
) -> None:
    bench = Bench(buckets=[Bucket(64, 64)], **shapes)
    assert not bench.runner.measure_alone({}), "nothing is compiled"
    bench.runner.execution = replace(
        bench.runner.execution, routers={"unet": Compiled("unet", lambda: None)}
    )
    assert {str(variant.bucket) for variant in bench.runner.measure_alone({})} == sizes


def test_what_a_request_may_cost_does_not_depend_on_its_road() -> None:
    bench = Bench(buckets=[Bucket(64, 64)], fit="mask")
    call = Call({"body": {"prompt": "a", "height": 40, "width": 40}}, {}, None, None)
    for known in (OwnSizes(), OwnSizes((1,), {Bucket(64, 64): {1: 2.0}}, {64 * 56: {1: 1.0}})):
        bench.runner.planner.own_sizes = known
        with patch("preheat.models.diffusion.runner.check_cost") as checked:
            job = bench.runner.preprocess(call)
        assert checked.call_args.args[1] == Bucket(64, 64)
    assert job.plan.bucket == Bucket(40, 40) and job.bypass


@pytest.mark.skipif(
    torch.__version__ < "2.9",
    reason="OpenVINO's converter fails on a slice as torch 2.8 exports it",
)
def test_a_picture_is_painted_without_its_bucket_where_that_is_quicker(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    tiny.build("sdxl", tmp_path / "model")
    pt2 = {
        "compile": {"enable": True, "backend": "openvino"},
        "shapes": {"buckets": [[64, 64]], "fit": "mask", "mask_only": True},
    }
    own = {"path": "model", "guidance": "off", "tasks": ["text-to-image"]}
    config = ModelConfig.parse({"pt2": pt2, "pipeline": own})
    plain = Plain(tmp_path / "model", 8)
    request = {
        "prompt": "a cat",
        "height": 41,
        "width": 30,
        "seed": 5,
        "num_inference_steps": 2,
        "guidance_scale": 0.0,
    }
    told = {}
    cpu, status = torch.device("cpu"), StatusFile(None, "tiny")
    with Worker[Any, Any](config, tmp_path, cpu, status=status) as service:
        assert isinstance(service.runner, DiffusionRunner)
        assert [row["size"] for row in service.state.own_sizes] == ["16x16", "32x32", "56x64"]
        for known in (OwnSizes(), OwnSizes((1,), {Bucket(64, 64): {1: 2.0}}, {64 * 56: {1: 1.0}})):
            service.runner.planner.own_sizes = known
            (answer,) = service.run([service.parse({"body": request})])
            answer.raise_if_failed()
            told[answer.bucket] = answer.engine
            off = np.asarray(answer.pictures[0]).astype(int) - plain.picture(request)
            assert np.abs(off).max() <= 1
        state = service.current_state()
    assert told == {"64x64": "openvino", "48x32": "eager"}
    assert (state.planned_eager, state.eager_fallbacks, state.incidents) == (1, 0, 0)
