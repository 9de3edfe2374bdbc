"""The load bench's own arithmetic, and its loops against clients that answer at once."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import load_report, stages
from bench.bare import full_batches
from bench.bare_spec import Spec
from bench.clients import Seen, Traffic, arrivals
from bench.load import Run, bare_spec, mix, payloads, runs, served_yaml, warmed_sizes
from bench.processes import BareProcess
from bench.profiles import PROFILES
from preheat.buckets import Bucket
from preheat.config.model import ModelConfig
from preheat.errors import PreheatError

TINY = PROFILES["tiny"]
COUNTED = {
    "preheat_inference_seconds_count": 3.0,
    "preheat_inference_seconds_sum": 0.9,
    "preheat_rows_painted_total": 12.0,
    "preheat_rows_filled_total": 3.0,
    "preheat_pixels_painted_total": 1000.0,
    "preheat_pixels_cropped_total": 250.0,
    "preheat_preprocess_seconds_sum": 0.009,
    "preheat_encode_seconds_sum": 0.09,
}


def measured(
    milliseconds: list[float], *, num_failed: int = 0, seconds: float = 1.8
) -> dict[str, Any]:
    seen = [Seen(value, True) for value in milliseconds] + [Seen(1.0, False)] * num_failed
    return load_report.summary(Traffic(seen, seconds), COUNTED, saturated=True)


def test_a_load_is_summed_up_from_clients_and_metrics() -> None:
    row = measured([100.0, 200.0, 300.0] * 3, num_failed=2)
    assert (row["answered"], row["failed"], row["requests_per_second"]) == (9, 2, 5.0)
    assert (row["p50_ms"], row["p99_ms"]) == (200.0, 300.0)
    assert (row["rows_per_run"], row["padded_rows"], row["padded_pixels"]) == (3.0, 0.25, 0.25)
    assert (row["model_ms"], row["parse_ms"], row["encode_ms"], row["outside_model_ms"]) == (
        100.0,
        1.0,
        10.0,
        100.0,
    )


def test_a_load_that_nobody_answered_is_no_division_by_zero() -> None:
    row = load_report.summary(Traffic([Seen(5.0, False)], 1.0), {}, saturated=True)
    assert row == {"answered": 0, "failed": 1, "requests_per_second": 0.0}
    assert "nothing answered" in load_report.line({"name": "x", **row})


def test_served_is_held_against_the_bare_loop_of_the_same_batch_size(tmp_path: Path) -> None:
    def row(run: Run, rate: float) -> dict[str, Any]:
        return (
            {"name": run.name, "loop": run.loop, "traffic": run.traffic}
            | measured([10.0])
            | {"requests_per_second": rate}
        )

    loads = {
        "batching": [
            row(Run("closed", "uniform", num_clients=8), 9.6),
            row(Run("open", "uniform", share=0.8), 99.0),
        ],
        "no batching": [row(Run("closed", "uniform", num_clients=2), 4.0)],
    }
    document = {
        "profile": "tiny",
        "machine": {"cpu": "a CPU", "num_cores": 2, "gpus": []},
        "versions": {"torch": "2"},
        "on_gpu": False,
        "steps": 4,
        "batch": 4,
        "compared": [
            {
                "traffic": "uniform",
                "batch": 4,
                **load_report.compared([9.0, 11.0, 9.0], [9.6, 9.7]),
            },
            {"traffic": "uniform", "batch": 1, **load_report.compared([5.0, 5.0], [4.0])},
        ],
        "served": {name: {"loads": rows} for name, rows in loads.items()},
    }
    assert "batches of 4: 96.5%, uniform, batches of 1: 80.0%; 95% reached" in load_report.verdict(
        document
    )
    load_report.write(document, tmp_path)
    assert json.loads((tmp_path / "load.json").read_text()) == document
    assert (tmp_path / "load.png").read_bytes()[:4] == b"\x89PNG"
    assert load_report.table(document).row_count == 2 + 2 + 3


def test_a_stages_time_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is a second later than the last one."""
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)
    stopwatch = stages.Stopwatch()

    work = SimpleNamespace()

    def outer() -> None:
        work.inner()
        work.inner()

    def bad() -> None:
        raise ArithmeticError

    work.inner, work.outer, work.bad = lambda: None, outer, bad
    for name in ("inner", "outer", "bad"):
        stopwatch.watch(work, name, name)
    work.outer()
    with pytest.raises(ArithmeticError):
        work.bad()
    assert stopwatch.seconds == {"inner": 2, "outer": 3, "bad": 1}


def test_every_stage_has_a_column() -> None:
    document = {"batch": 4, "stages_ms": {"text to image": dict.fromkeys(stages.STAGES, 1.0)}}
    shown = load_report.stages_table(document)
    assert [column.header for column in shown.columns][1:] == list(
        stages.STAGES
    ) and shown.row_count == 1


def test_arrivals_are_random_on_average_as_many_as_asked_and_the_same_again() -> None:
    moments = arrivals(50.0, 100.0, seed=1)
    assert (
        moments == sorted(moments) == arrivals(50.0, 100.0, seed=1) != arrivals(50.0, 100.0, seed=2)
    )
    assert 0 < moments[0] and moments[-1] < 100 and len(moments) == pytest.approx(5000, rel=0.1)
    assert arrivals(0.001, 1.0, seed=1) == [0.0]


def test_the_bare_loop_paints_every_request_in_full_batches_of_one_bucket() -> None:
    buckets = [Bucket(64, 64), Bucket(96, 32)]
    sizes = [(60, 60), (90, 20), (64, 64), (10, 10), (50, 40)]
    batches = list(full_batches(sizes, buckets, 2))
    assert all(
        len(batch) == 2 and all(bucket.covers(Bucket(*size)) for size in batch)
        for bucket, batch in batches
    )
    generated = Counter(size for _, batch in batches for size in batch)
    assert not Counter(sizes) - generated
    with pytest.raises(ValueError, match="no bucket covers 100x100"):
        list(full_batches([(100, 100)], buckets, 2))


@pytest.mark.parametrize("backend", ["auto", "inductor"])
def test_both_roads_get_the_same_buckets_sizes_steps_and_compiler(backend: str) -> None:
    traffics = mix(TINY)
    config = served_yaml(TINY, 4, backend=backend, max_delay=20)
    parsed = ModelConfig.parse(config)
    spec = bare_spec(TINY, Path("/m"), traffics, batch=4, backend=backend)
    assert [bucket for bucket in parsed.pt2.shapes.buckets] == [
        Bucket(*size) for size in spec.buckets
    ]
    assert (
        parsed.pt2.shapes.batch_sizes == (1, 2, 4)
        and set(spec.batch_sizes) <= {1, 2, 4}
        and parsed.batchSize == 4
    )
    assert config["pt2"]["compile"] == {"enable": True, "backend": spec.backend, "dynamic": False}
    asked = payloads(traffics["mixed"], TINY)
    assert [(one["height"], one["width"]) for one in asked] == traffics["mixed"]
    assert {one["num_inference_steps"] for one in asked} == {spec.num_steps}
    assert Spec(**json.loads(spec.to_json())).num_steps == spec.num_steps
    assert all(list(full_batches(sizes, TINY.buckets, 4)) for sizes in traffics.values())


def test_warmed_sizes_end_at_the_batch() -> None:
    assert [warmed_sizes(batch) for batch in (1, 2, 3, 4, 6)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 6],
    ]


def test_loads_are_of_every_kind_and_named_apart() -> None:
    loads = runs(4)
    kinds = {(run.loop, run.protocol) for run in loads["batching"]}
    assert kinds == {("closed", "rest"), ("closed", "grpc"), ("open", "rest"), ("open", "grpc")}
    for rows in loads.values():
        assert len({run.name for run in rows}) == len(rows)
        first_open = next(index for index, run in enumerate(rows) if run.loop == "open")
        assert all(run.loop == "open" for run in rows[first_open:])


def test_a_served_rate_is_held_against_the_bare_ones_beside_it() -> None:
    row = load_report.compared([10.0, 12.0, 8.0, 8.0], [11.0, 9.0, 2.0])
    assert row["shares"] == [1.0, 0.9, 0.25] and row["share"] == 0.9
    assert (
        "90.0% (100.0%, 90.0%, 25.0%; 7.33 requests/s against 9.50)"
        in load_report.compared_line({"traffic": "mixed", "batch": 4, **row})
    )


def test_a_bare_process_that_fails_says_why() -> None:
    with pytest.raises(
        PreheatError, match=r"bench\.bare failed: .*unexpected keyword argument 'nonsense'"
    ):
        BareProcess(SimpleNamespace(to_json=lambda: '{"nonsense": 1}'), {})  # type: ignore[arg-type]
