"""The bench's traffic and its report; nothing here is timed."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from bench import report, sizes
from bench.machine import machine, versions
from bench.profiles import PROFILES, STRATEGIES, WITHOUT_SHAPES, model_yaml
from bench.report import Answer, Measured
from bench.rounds import turns
from bench.sizes import LEAST_SIDE, Size, TrafficError
from bench.traffic import (
    BUCKETS,
    USERS,
    Asked,
    Contender,
    Served,
    add_bounds,
    bucket_sizes,
    in_rounds,
    payloads,
    plan_buckets,
)
from preheat.buckets import Bucket, smallest_covering
from preheat.config.diffusion import PipelineConfig
from preheat.config.model import ModelConfig
from preheat.errors import LogError
from preheat.planning.demand import PICTURE, Demand
from preheat.planning.plan import usage
from preheat.torchserve.client import Reply

TINY = PROFILES["tiny"].buckets
LIMITS = {"least": 16, "most": 2048}


def generated(seed: int = 0, num_requests: int = 150, num_distinct: int = 30) -> list[Size]:
    return sizes.generate(TINY, num_requests=num_requests, num_distinct=num_distinct, seed=seed)


def log(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "sizes.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_same_seed_is_the_same_traffic_and_another_is_not() -> None:
    assert generated(3) == generated(3) != generated(4)


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
@pytest.mark.parametrize("seed", range(20))
def test_every_size_is_legal_under_every_strategy(profile: Any, seed: int) -> None:
    made = sizes.generate(profile.buckets, num_requests=90, num_distinct=30, seed=seed)
    assert all(smallest_covering(profile.buckets, Bucket(size.height, size.width)) for size in made)
    assert all(min(size.height, size.width) >= LEAST_SIDE for size in made)


def test_the_mix_is_as_documented() -> None:
    described = sizes.describe(generated(), TINY)
    assert described["mix"] == {"phone photo": 60, "shop export": 60, "hand crop": 30}
    assert described["num_requests"] == 150 and described["num_distinct_sizes"] == 30
    assert described["beyond_every_bucket"] == 0
    kinds = {
        kind: {(s.height, s.width) for s in generated() if s.kind == kind} for kind in sizes.KINDS
    }
    assert {kind: len(found) for kind, found in kinds.items()} == {
        "phone photo": 12,
        "shop export": 6,
        "hand crop": 12,
    }
    assert all(height % 10 == width % 10 == 0 for height, width in kinds["shop export"])


@pytest.mark.parametrize(("num_requests", "num_distinct"), [(1, 1), (6, 6), (12, 6), (7, 50)])
def test_short_runs_have_every_request_and_no_more_sizes_than_asked(
    num_requests: int, num_distinct: int
) -> None:
    made = generated(0, num_requests, num_distinct)
    assert len(made) == num_requests
    assert len({(size.height, size.width) for size in made}) <= max(num_distinct, len(sizes.KINDS))


def test_sizes_grow_with_the_buckets() -> None:
    large = sizes.generate(PROFILES["sdxl"].buckets, num_requests=50, num_distinct=20, seed=0)
    assert min(size.height * size.width for size in large) > max(
        size.height * size.width for size in generated()
    )


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0)])
def test_no_traffic_is_refused(numbers: tuple[int, int]) -> None:
    with pytest.raises(TrafficError, match="at least 1"):
        generated(0, *numbers)


def test_more_sizes_than_there_are_is_refused() -> None:
    with pytest.raises(TrafficError, match="different sizes of the kind"):
        sizes.generate([Bucket(32, 32)], num_requests=900, num_distinct=600, seed=0)


def test_a_log_is_replayed_in_its_order(tmp_path: Path) -> None:
    path = log(tmp_path, "\ufeffWidth, Height\n300,200\n100,150\n300,200\n")
    assert sizes.read_log(path, **LIMITS) == [
        Size(200, 300, "log"),
        Size(150, 100, "log"),
        Size(200, 300, "log"),
    ]


def test_a_histogram_is_shuffled_by_the_seed(tmp_path: Path) -> None:
    path = log(tmp_path, "height,width,count,app\n200,300,40,x\n100,150,2,y\n")
    first, again, other = (sizes.read_log(path, **LIMITS, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert [first.count(Size(*size, "log")) for size in ((200, 300), (100, 150))] == [40, 2]


def test_a_log_can_be_scaled_and_sampled(tmp_path: Path) -> None:
    path = log(tmp_path, "height,width\n" + "".join(f"{side},1024\n" for side in range(500, 600)))
    read = sizes.read_log(path, **LIMITS, scale=0.25)
    assert read[:2] == [Size(125, 256, "log"), Size(125, 256, "log")] and len(read) == 100
    few = sizes.sample(read, 10, seed=1)
    assert (
        few == sizes.sample(read, 10, seed=1) == sorted(few, key=lambda size: size.height)
        and len(few) == 10
    )
    assert sizes.sample(read, 1000, seed=1) == read
    with pytest.raises(TrafficError, match="at least 1"):
        sizes.sample(read, 0, seed=1)


def test_what_no_bucket_covers_is_counted(tmp_path: Path) -> None:
    read = sizes.read_log(log(tmp_path, "height,width\n1000,1000\n100,100\n"), **LIMITS)
    assert sizes.describe(read, TINY)["beyond_every_bucket"] == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no column height and no column width.*nothing"),
        ("height;width\n1;2\n", "no column height and no column width.*height;width"),
        ("height,count\n100,1\n", "no column width"),
        ("height,width\n", "holds no sizes"),
        ("height,width\n100,100\n100\n", "line 3: width must be a whole number above 0, got ''"),
        ("height,width\n100,12.5\n", "line 2: width must be a whole number above 0, got '12.5'"),
        ("height,width\n-5,100\n", "line 2: height must be a whole number above 0"),
        (
            "height,width\n100,99999\n",
            "line 2: width 99999 is outside what the model allows, 16 to 2048 pixels",
        ),
        ("height,width\n8,100\n", "line 2: height 8 is outside"),
        ("height,width,count\n100,100,0\n", "line 2: count must be a whole number above 0"),
        (b"height,width\n\xff,1\n", "is not UTF-8"),
    ],
)
def test_a_log_that_cannot_be_used_says_where_and_why(
    tmp_path: Path, text: str | bytes, said: str
) -> None:
    with pytest.raises((TrafficError, LogError), match=said):
        sizes.read_log(log(tmp_path, text), **LIMITS)


def test_a_log_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LogError, match=r"cannot read .*No such file"):
        sizes.read_log(tmp_path / "none.csv", **LIMITS)


def test_a_bad_scale_is_refused_and_a_scaled_side_is_named_as_such(tmp_path: Path) -> None:
    path = log(tmp_path, "height,width\n100,100\n")
    with pytest.raises(TrafficError, match="scale must be positive"):
        sizes.read_log(path, **LIMITS, scale=0)
    with pytest.raises(TrafficError, match=r"height 10 after scaling by 0\.1 is outside"):
        sizes.read_log(path, **LIMITS, scale=0.1)


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("backend", ["inductor", "openvino", "auto"])
def test_every_strategy_has_a_model_yaml_that_the_handler_takes(
    profile: Any, strategy: str, backend: str
) -> None:
    planned = [Bucket(64, 64)]
    config = ModelConfig.parse(
        model_yaml(profile, strategy, backend=backend, planned=planned, dtype="bfloat16")
    )
    assert config.section(PipelineConfig).dtype == "bfloat16"
    assert (config.pt2.shapes.fit == "mask") == (strategy == "masked")
    named = config.pt2.compile.kwargs["backend"]
    assert named == ("inductor" if strategy in WITHOUT_SHAPES else backend)
    served = {"eager": "exact", "planned": "buckets", "masked": "buckets"}.get(strategy, strategy)
    assert config.pt2.shapes.strategy == served
    assert (config.pt2.shapes.buckets == (Bucket(64, 64),)) == (strategy == "planned")
    assert config.pt2.compile.enable == (strategy != "eager")
    # Plain torch.compile decides on its own when sizes become dynamic.
    assert ("dynamic" in config.pt2.compile.kwargs) == (strategy not in ("eager", "exact"))
    assert (
        config.section(PipelineConfig).tasks == ("text-to-image",)
        and config.section(PipelineConfig).guidance == "on"
    )


def test_planned_buckets_compute_at_most_15_percent_in_vain_where_the_hand_made_compute_33() -> (
    None
):
    profile, made = PROFILES["tiny"], generated()
    demand = Demand(PICTURE, Counter((size.height, size.width) for size in made))
    choice = plan_buckets(made, profile.max_planned)
    assert usage(demand, profile.buckets).waste == pytest.approx(0.328, abs=0.001)
    assert choice.usage.waste <= 0.15 and choice.usage.left == 0 and choice.gap <= 0.02
    assert len(plan_buckets(made, 1).buckets) == 1, "no more than are allowed"


def test_percentiles_lie_between_the_nearest_ranks() -> None:
    values = [float(value) for value in range(101)]
    assert [report.percentile(values, percent) for percent in (0, 50, 95, 99, 100)] == [
        0,
        50,
        95,
        99,
        100,
    ]
    assert report.percentile([1.0, 2.0], 75) == pytest.approx(1.75)
    assert report.percentile([7.0], 99) == 7.0


SIZES = [(200, 200), (100, 100)]


def measured(
    *rounds: list[float], num_requests: int | None = None, dtype: str = "float32", **state: Any
) -> Measured:
    """Requests of two sizes in turn, milliseconds by round."""
    answers = [
        [
            Answer(value, 200, 1000, 0.25, "compiled", SIZES[place % 2], "256x256", 30.0 + place)
            for place, value in enumerate(each)
        ]
        for each in rounds
    ]
    seen = {
        "compiles_at_boot": 3,
        "compiles_since_ready": 0,
        "peak_memory_bytes": 2**29,
        "ready_seconds": 5.0,
    }
    total = num_requests or sum(map(len, rounds))
    return Measured(9.0, answers, seen | state, total, dtype=dtype)


def test_a_summary_says_what_was_measured() -> None:
    eager = measured([200.0] * 4)
    row = report.summary(measured([100.0] * 4, compiles_since_ready=2), eager, eager)
    assert (row["compiles_at_boot"], row["compiles_since_ready"], row["ready_seconds"]) == (
        3,
        2,
        9.0,
    )
    assert (row["p50_ms"], row["p99_ms"], row["p99_over_p50"], row["requests_per_second"]) == (
        100,
        100,
        1,
        10,
    )
    assert (row["throughput_over_eager"], row["padded_share"], row["engines"]) == (
        2.0,
        0.25,
        {"compiled": 4},
    )
    assert row["psnr_db"] == {"median": 31.5, "least": 30.0}
    alone = report.summary(eager, None)
    assert (alone["throughput_over_eager"], alone["x_eager"]) == (None, None)


def test_ratios_are_of_a_round_and_the_median_of_the_rounds_is_told() -> None:
    """A machine twice as slow in the second round changes no ratio."""
    eager = measured([200.0, 50.0], [400.0, 100.0], [200.0, 50.0])
    mine = measured([100.0, 100.0], [200.0, 200.0], [120.0, 130.0])
    row = report.summary(mine, eager, measured([400.0, 100.0], [800.0, 200.0], [400.0, 100.0]))
    assert row["x_eager"] == {"median": 1.25, "low": 1.0, "high": 1.25, "rounds": 3}
    assert row["x_first_eager"]["median"] == 2.5
    assert row["slowest_size_x_eager"] == 0.5, "the small size loses what the large one wins"


def test_a_machine_that_drifts_is_told_and_a_quiet_one_is_not() -> None:
    eager = measured([200.0, 50.0], [400.0, 100.0])
    runs = {"eager": eager, "mine": measured([100.0, 25.0], [200.0, 50.0])}
    (drift,) = report.doubtful(runs, {"float32": eager})
    assert drift.startswith("eager float32 itself: the rounds spread over 67%")
    runs["mine"] = measured([100.0, 25.0], [100.0, 25.0])
    assert any(
        said.startswith("mine over eager") for said in report.doubtful(runs, {"float32": eager})
    )
    quiet = measured([200.0, 50.0], [201.0, 50.0])
    assert report.doubtful({"eager": quiet}, {"float32": quiet}) == []


def test_who_begins_changes_from_turn_to_turn() -> None:
    assert [turns("abc", index) for index in range(4)] == [
        list(o) for o in ("abc", "bca", "cab", "abc")
    ]
    assert turns([], 3) == []


def test_what_is_computed_in_vain_bounds_what_can_be_reached() -> None:
    eager = report.summary(measured([200.0]), measured([200.0]))
    mine = report.summary(measured([100.0]), measured([200.0]))
    assert report.bound(mine | {"padded_share": 0.4}, eager | {"padded_share": 0.04}, mine) == 1.25
    assert report.bound(mine, eager, report.summary(measured([]), None)) is None


def test_planned_buckets_are_bounded_by_those_made_by_hand() -> None:
    contenders = [Contender(name, "bfloat16") for name in ("eager", "buckets", "planned")]
    row = report.summary(measured([100.0]), measured([200.0]))
    users = {one.name: row | {"padded_share": 0.25} for one in contenders}
    users[contenders[2].name]["padded_share"] = 0.1
    own = {contenders[0].name: row, contenders[1].name: row}
    add_bounds(contenders, users, own)
    assert [users[one.name]["x_eager_bound"] for one in contenders] == [2.0, 2.0, 2.4]


def test_equal_pictures_are_as_near_as_can_be_told() -> None:
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert report.decibels(black, black) == report.MOST_DECIBELS
    assert report.decibels(black, grey) == 0.0
    assert report.decibels(black, black + 1) == pytest.approx(48.13, abs=0.01)


def test_a_run_that_was_cut_short_is_compared_over_what_it_answered() -> None:
    eager = measured([100.0, 100.0, 900.0, 900.0])
    row = report.summary(measured([50.0, 50.0], num_requests=4), eager)
    assert (row["throughput_over_eager"], row["answered"], row["not_sent"]) == (2.0, 2, 2)


def test_a_refused_request_is_counted_and_is_no_latency() -> None:
    answers = [Answer(100.0, 200, 1000, 0.5, "eager"), Answer(1.0, 503)]
    row = report.summary(Measured(1.0, [answers], {}, 2), measured([100.0, 100.0]))
    assert (row["answered"], row["failed"], row["p50_ms"], row["padded_share"]) == (
        1,
        1,
        100.0,
        0.5,
    )
    assert row["milliseconds"] == [[100.0, None]] and row["throughput_over_eager"] == 1.0
    assert "p50_ms" not in report.summary(Measured(1.0, [answers[1:]], {}, 1), None)


def test_padding_is_weighed_by_the_pixels_painted() -> None:
    answers = [Answer(1.0, 200, 3000, 0.0, "compiled"), Answer(1.0, 200, 1000, 0.8, "compiled")]
    assert report.summary(Measured(1.0, [answers], {}, 2), None)["padded_share"] == 0.2


class Answering:
    """A server's client; the requests it was sent are in `log`, under its name."""

    def __init__(self, name: str, log: list[tuple[str, int]]) -> None:
        self._name, self._log = name, log

    def predict(self, payload: Mapping[str, Any]) -> Reply:
        self._log.append((self._name, payload["seed"]))
        if payload["seed"] == 2:
            raise httpx.ConnectError("gone")
        buffer = io.BytesIO()
        Image.new("RGB", (payload["width"], payload["height"])).save(buffer, "png")
        headers = {
            "x-preheat-bucket": "200x200",
            "x-preheat-padding": "0.5",
            "x-preheat-engine": "compiled",
        }
        return Reply(200, buffer.getvalue(), 10.0, headers)


def test_every_server_gets_a_request_before_the_next_request_is_sent() -> None:
    log: list[tuple[str, int]] = []
    wanted = [Size(100, 200, "log"), Size(200, 200, "log"), Size(100, 100, "log")]
    asked = Asked(wanted, payloads(wanted, 4), [np.zeros((100, 200, 3), np.uint8)])
    served = {
        name: Served(cast(Any, Answering(name, log)), 1.0, {"shapes": {"fit": fit}})
        for name, fit in (("pad", "pad"), ("mask", "mask"))
    }
    answers = in_rounds(served, asked, 2, until=float("inf"))
    assert [number for _, number in log] == [0, 0, 1, 1, 2, 2] * 2
    assert [name for name, _ in log[:4]] == ["pad", "mask", "mask", "pad"]
    assert [len(each) for each in answers["pad"]] == [3, 3]
    first, _, gone = answers["mask"][0]
    assert (first.painted_pixels, first.padding, first.decibels) == (40000, 0.5, 99.0)
    assert answers["mask"][0][1].padding == 0.0, "all of its cells were asked for"
    assert answers["pad"][0][1].padding == 0.5, "as the header says"
    assert answers["mask"][1][0].decibels is None, "compared once"
    assert not gone.good
    assert in_rounds(served, asked, 2, until=0.0) == {"pad": [[]], "mask": [[]]}


def test_bucket_sizes_are_the_buckets_own_in_turn() -> None:
    made = bucket_sizes(PROFILES["small"])
    assert len(made) == PROFILES["small"].num_requests
    assert {Bucket(size.height, size.width) for size in made} == set(PROFILES["small"].buckets)


def canned() -> dict[str, Any]:
    runs = {
        "eager (float32)": measured([200.0, 210.0]),
        "buckets, masked (bfloat16)": measured([100.0, 101.0]),
        "exact": measured([99.0, 40_000.0]),
    }
    rows: dict[str, Any] = {
        name: report.summary(run, runs["eager (float32)"]) for name, run in runs.items()
    }
    traffic = {
        "requests": sizes.describe(generated(0, 2, 2), TINY),
        "strategies": {**rows, "fixed": {"error": "ServerError: it [ended]\nlog"}},
        "doubts": [],
    }
    return {
        "profile": "tiny",
        "machine": machine(),
        "on_gpu": False,
        "versions": versions(),
        "steps": 4,
        "rounds": 1,
        "traffics": {USERS: traffic, BUCKETS: traffic},
    }


def test_a_report_is_a_json_file_a_picture_and_a_table(tmp_path: Path) -> None:
    document = canned()
    report.write(document, tmp_path / "results")
    assert json.loads((tmp_path / "results" / "traffic.json").read_text()) == document
    assert (tmp_path / "results" / "traffic.png").read_bytes().startswith(b"\x89PNG")
    shown = io.StringIO()
    Console(width=120, file=shown).print(report.table(document, USERS))
    text = shown.getvalue()
    assert (
        "buckets, masked (bfloat16)" in text
        and "failed" in text
        and str(versions()["torch"]) in text
    )
    assert "2.04 (2.04-2.04)" in text


def test_a_report_without_answers_has_no_picture(tmp_path: Path) -> None:
    document = canned()
    for traffic in document["traffics"].values():
        traffic["strategies"] = {"fixed": {"error": "ServerError: it ended"}}
    report.write(document, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["traffic.json"]


def test_the_machine_is_named() -> None:
    described = machine()
    assert described["cpu"] and described["num_cores"] and isinstance(described["gpus"], list)
    assert all(versions()[name] for name in ("python", "torch", "diffusers", "torchserve"))
