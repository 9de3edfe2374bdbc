"""`backend: auto`: the order decides, a measurement may veto, and what was chosen once is one
choice for all workers and every later start.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from preheat.buckets import Bucket
from preheat.cache.choice import Choice, ChoiceFile
from preheat.compilation import race
from preheat.compilation.backends import inductor, openvino
from preheat.compilation.backends.base import CompiledCode, EngineName, NoCode, RoadName
from preheat.compilation.choosing import choose_roads
from preheat.compilation.roads import Roads
from preheat.compilation.router import Router
from preheat.compilation.signatures import DynamicDims, Inputs
from preheat.compilation.targets import build_router
from preheat.compilation.variants import Variant
from preheat.compilation.warmup import Warmup
from preheat.compilation.watch import CompileWatch
from preheat.config.model import ModelConfig
from preheat.config.pt2 import Pt2Config
from preheat.errors import ConfigError, WarmupError

CPU = torch.device("cpu")
ORDER: tuple[RoadName, ...] = ("aot", "openvino", "cuda_graphs")


class Clock:
    """Goes on by what is run, and by nothing else."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Fake:
    """A road: eager's numbers, or others, at a price of its own."""

    wants_every_size = idle = False
    is_compared = True
    reason: str | None = None
    dims: DynamicDims | None = None
    engine: EngineName = "openvino"

    def __init__(self, road: RoadName, model: Model, seconds: float, fault: str = "") -> None:
        self.road, self.name, self._model = road, road, model
        self._seconds, self._fault = seconds, fault

    def code_for(self, inputs: Inputs, dims: DynamicDims) -> CompiledCode:
        if self._fault == "none":
            raise NoCode(f"{self.road}: has none")
        return self

    def matches(self, inputs: Inputs) -> bool:
        return True

    def __call__(self, sample: torch.Tensor) -> torch.Tensor:
        if self._fault == "raises":
            raise ValueError("no kernel")
        self._model.clock.now += self._seconds
        return sample * (3 if self._fault == "wrong" else 2)


class Model(nn.Module):
    """Doubles; routed over fakes that take these seconds, or fail."""

    def __init__(
        self,
        seconds: Mapping[RoadName, float],
        faults: Mapping[RoadName, str] | None = None,
        clock: Any = None,
    ) -> None:
        super().__init__()
        self.clock, self.seconds = Clock(), seconds
        fakes = [Fake(road, self, seconds[road], (faults or {}).get(road, "")) for road in ORDER]
        self.router = Router(
            "toy", self.forward, fakes, roads=Roads(is_open=True, clock=clock or self.clock)
        )

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        self.clock.now += self.seconds["eager"]
        return sample * 2

    def ask(self) -> None:
        """What warm-up does until every target has chosen."""
        if self.router.roads.is_open:
            with self.router.warming(), torch.inference_mode():
                self.router(torch.ones(2))

    def choose(self, file: ChoiceFile | None, *, patience: float = 60.0, keep: bool = True) -> str:
        choose_roads(
            {"toy": self.router},
            file,
            self.ask,
            patience=patience,
            report=lambda _: None,
            keeps_failures=keep,
        )
        assert self.router.roads.chosen is not None
        return self.router.roads.chosen


def costs(*, aot: float, openvino: float, cuda_graphs: float) -> dict[RoadName, float]:
    """Of calls, where eager's take a second's hundredth."""
    return {
        "aot": aot / 100,
        "openvino": openvino / 100,
        "cuda_graphs": cuda_graphs / 100,
        "eager": 0.01,
    }


@given(
    st.lists(
        st.floats(0.1, 3).filter(lambda x: abs(x - race.SLOWER) > 1e-6), min_size=3, max_size=3
    ),
    st.lists(st.sampled_from(["", "none", "raises", "wrong"]), min_size=3, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_the_first_road_is_taken_that_works_agrees_and_is_not_slower(
    prices: list[float], faults: list[str]
) -> None:
    price, fault = dict(zip(ORDER, prices, strict=True)), dict(zip(ORDER, faults, strict=True))
    model = Model(costs(**{str(road): price[road] for road in ORDER}), fault)
    good = [road for road in ORDER if not fault[road]]
    expected = next((road for road in good if price[road] <= race.SLOWER), "eager")
    assert model.choose(None) == next(iter(good), "eager"), "without a file the order decides"
    model = Model(costs(**{str(road): price[road] for road in ORDER}), fault)
    model.ask()
    router = model.router
    assert router.roads.chosen == expected
    # a lost race is no failure, and whatever else leaves nothing but eager is one
    assert (router.reason is None) == (expected != "eager" or all(not each for each in faults))
    with router.replaying(), torch.inference_mode():
        assert torch.equal(router(torch.ones(2)), torch.full((2,), 2.0))
    assert router.idle == (expected == "eager")


def test_a_race_is_of_five_pairs_unless_it_is_about_to_be_lost() -> None:
    clock = Clock()

    def taking(seconds: float) -> Any:
        def call() -> None:
            clock.now += seconds

        return call

    won = race.run(taking(0.01), taking(0.02), patient=True, clock=clock)
    assert won.num_pairs == 5 and won.ratio == pytest.approx(0.5) and not won.is_lost
    lost = race.run(taking(0.1), taking(0.05), patient=True, clock=clock)
    assert lost.is_lost and 10 < lost.num_pairs < 20, "two seconds of pairs"
    assert race.run(taking(0.1), taking(0.05), patient=False, clock=clock).num_pairs == 5
    assert race.run(taking(9), taking(9), patient=True, clock=clock).num_pairs == 1
    noisy = cycle([0.9, 0.01, 0.01])  # a neighbour that holds up every third call
    robust = race.run(lambda: taking(next(noisy))(), taking(0.02), patient=True, clock=clock)
    assert not robust.is_lost


def test_restarts_with_any_clock_serve_by_what_was_chosen_first(tmp_path: Path) -> None:
    file = ChoiceFile(tmp_path, "fingerprint, 1 threads")
    first = Model(costs(aot=2, openvino=0.5, cuda_graphs=0.1))
    assert first.choose(file) == "openvino" and first.router.roads.source == "measured"
    dice = torch.Generator().manual_seed(0)
    for _ in range(20):
        prices = (torch.rand(3, generator=dice) * 3 + 0.1).tolist()
        again = Model(costs(aot=prices[0], openvino=prices[1], cuda_graphs=prices[2]))
        assert again.choose(file) == "openvino" and again.router.roads.source == "kept"
        with again.router.warming(), torch.inference_mode():
            again.router(torch.ones(2))
        again.router.freeze()
        assert set(again.router.roads.races) == {"openvino"}, "measured, for the state only"
        assert {route.engine for route in again.router.routes.values()} == {"openvino"}
    other = Model(costs(aot=0.5, openvino=0.5, cuda_graphs=0.1))
    assert other.choose(ChoiceFile(tmp_path, "another fingerprint")) == "aot"


def test_what_cannot_be_had_any_more_or_read_is_chosen_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = ChoiceFile(tmp_path, "f")
    file.write({"toy": Choice("compiled")})
    assert Model(costs(aot=1, openvino=1, cuda_graphs=1)).choose(file) == "aot"
    assert file.read() == {"toy": Choice("aot")} and "cannot be had" in caplog.text
    for content in ("no JSON", "[]", '{"toy": 3}', '{"toy": {"rod": 1}}'):
        file.path.write_text(content)
        assert Model(costs(aot=2, openvino=1, cuda_graphs=1)).choose(file) == "openvino"
    assert file.read() == {"toy": Choice("openvino")}


@pytest.mark.parametrize("keep", [True, False])
def test_failures_are_tried_again_unless_a_race_was_lost_beside_them(
    tmp_path: Path, keep: bool
) -> None:
    file, slow = ChoiceFile(tmp_path, "f"), costs(aot=3, openvino=3, cuda_graphs=3)
    broken: dict[RoadName, str] = dict.fromkeys(ORDER, "raises")
    assert Model(slow, broken).choose(file, keep=keep) == "eager" and not file.path.exists()
    partly: dict[RoadName, str] = {"aot": "raises"}
    model = Model(slow, partly)
    assert model.choose(file, keep=keep) == "eager"
    assert "no kernel" in str(model.router.reason)
    assert file.path.exists() == keep
    if keep:
        again = Model(slow)
        assert again.choose(file) == "eager" and "no kernel" in str(again.router.reason)


def test_where_nothing_can_be_written_or_another_is_waited_for_too_long_the_order_decides(
    tmp_path: Path,
) -> None:
    slow = costs(aot=3, openvino=0.5, cuda_graphs=0.5)
    with ChoiceFile(tmp_path, "f").locked(0, lambda _: None) as held:
        assert held
        late = Model(slow)
        assert late.choose(ChoiceFile(tmp_path, "f"), patience=0) == "aot"
    assert late.router.roads.source == "order" and late.router.roads.races["aot"].is_lost
    assert not ChoiceFile(tmp_path, "f").path.exists()


def _start(folder: Path, number: int, together: Any, said: Any) -> None:
    """A worker: its clock makes one road win that no other's does, and the last one's core is busy
    with something else.
    """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    prices = [0.3, 2.5, 2.5, 2.5]
    prices = prices[-number:] + prices[:-number]
    model = Model(costs(aot=prices[0], openvino=prices[1], cuda_graphs=prices[2]))
    together.wait()
    chosen = model.choose(ChoiceFile(folder, "f"))
    said.put((chosen, model.router.roads.source))


def _spin() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    while True:
        time.perf_counter()


def test_four_workers_that_start_together_on_a_busy_core_choose_one_road(tmp_path: Path) -> None:
    forked = multiprocessing.get_context("fork")
    together, said = forked.Barrier(4), forked.Queue()
    busy = forked.Process(target=_spin, daemon=True)
    busy.start()
    workers = [forked.Process(target=_start, args=(tmp_path, n, together, said)) for n in range(4)]
    try:
        for worker in workers:
            worker.start()
        told = [said.get(timeout=60) for _ in workers]
    finally:
        busy.kill()
        for worker in workers:
            worker.join()
    assert len({chosen for chosen, _ in told}) == 1
    assert sorted(source for _, source in told) == ["kept"] * 3 + ["measured"]


@pytest.fixture
def stance(watch: CompileWatch) -> Iterator[CompileWatch]:
    yield watch


def routed(config: Mapping[str, Any]) -> Router:
    parsed = Pt2Config.model_validate(
        {"compile": {"enable": True, "kwargs": {"backend": "auto"}}, **config}
    )
    return build_router("toy", nn.Conv2d(1, 1, 3), parsed, torch.float32, CPU)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"shapes": {"strategy": "dynamic"}}, "pt2.shapes.strategy"),
        ({"attention": "math"}, "pt2.attention"),
    ],
)
def test_a_key_that_rules_a_road_out_takes_it_off_the_list_with_the_reason(
    config: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "why_not", lambda *_: None)
    router = routed(config)
    assert router.roads_to_be_had == ("compiled", "eager") and router.roads.is_open
    told: Any = router.roads.document()["roads"]
    assert words in told["openvino"]["reason"] and router.reason is None


def test_on_a_cpu_openvino_comes_before_inductor_and_what_is_missing_is_off_the_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(openvino, "why_not", lambda *_: None)
    monkeypatch.setattr(inductor, "why_not", lambda *_: None)
    assert routed({}).roads_to_be_had == ("openvino", "compiled", "eager")
    monkeypatch.setattr(inductor, "why_not", lambda *_: "no compiler")
    assert routed({}).roads_to_be_had == ("openvino", "eager")
    monkeypatch.setattr(openvino, "why_not", lambda *_: "not installed")
    bare = routed({})
    assert bare.idle and "not installed; no compiler" in str(bare.reason)


@pytest.mark.parametrize(("on_failure", "lost"), [("fail", True), ("fail", False)])
def test_on_failure_counts_no_lost_race(watch: CompileWatch, on_failure: Any, lost: bool) -> None:
    faults: dict[RoadName, str] = {} if lost else dict.fromkeys(ORDER, "wrong")
    model = Model(costs(aot=3, openvino=3, cuda_graphs=3), faults)

    def serve(variant: Variant) -> None:
        model.router.start_run()
        with torch.inference_mode():
            model.router(torch.ones(variant.batch_size))

    warmup = Warmup(serve, {"toy": model.router}, watch, on_failure=on_failure)
    variants = [Variant(Bucket(8, 8), 2), Variant(Bucket(8, 8), 1)]
    warmup.choose(variants)
    if lost:
        warmup.warm(variants)
        assert warmup.verify([]) == 0
        assert {(row.engine, row.reason) for row in warmup.rows} == {("eager", "")}
        serve(variants[0])
        assert model.router.run.fallbacks == 0
    else:
        with pytest.raises(WarmupError, match="differs from eager"):
            warmup.warm(variants)


def test_a_named_backend_that_loses_is_served_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Model(costs(aot=3, openvino=3, cuda_graphs=3))
    model.router.roads.is_open = False
    with model.router.warming(), torch.inference_mode():
        model.router(torch.ones(2))
    assert [route.engine for route in model.router.routes.values()] == ["openvino"]
    assert "it serves all the same" in caplog.text


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ({"options": {}}, r"pt2\.compile\.options: is not for backend: auto"),
        ({"recompile_limit": 8}, r"pt2\.compile\.recompile_limit"),
        ({"mode": "fastest"}, r"pt2\.compile\.mode: Inductor has no mode"),
    ],
)
def test_beside_auto_stands_what_inductor_alone_may_need(
    beside: dict[str, Any], words: str
) -> None:
    def parsed(compile_: dict[str, Any]) -> Pt2Config:
        return ModelConfig.parse({"pt2": {"compile": {"enable": True, **compile_}}}, ours=True).pt2

    with pytest.raises(ConfigError, match=words):
        parsed({"backend": "auto", **beside})
    pt2 = parsed({"backend": "auto", "dynamic": False, "fullgraph": True, "mode": "default"})
    assert pt2.compile.auto
    assert pt2.compile.for_inductor == {"dynamic": False, "fullgraph": True, "mode": "default"}
    assert not parsed({}).compile.auto, "enable: true alone is Inductor"
