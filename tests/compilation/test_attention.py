"""`pt2.attention` decides which kernel runs, in warm-up and serving alike, eager and compiled: read
from torch's profiler.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from models.diffusion.fakes import FakePipeline, config
from models.diffusion.test_engine import make_request
from preheat.buckets import Bucket
from preheat.compilation.router import Router
from preheat.compilation.targets import build_router
from preheat.compilation.watch import CompileWatch, forbid_compiling
from preheat.config.pt2 import Attention as AttentionName
from preheat.config.pt2 import Pt2Config, ShapesConfig
from preheat.models.batching import Execution
from preheat.models.diffusion.pipeline import Batch, Generated
from preheat.models.diffusion.runner import DiffusionRunner

BUCKETS = (Bucket(64, 64), Bucket(32, 64))
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
MATH = "aten::_scaled_dot_product_attention_math"


class Attention(nn.Module):
    """One head for each of two places; as many keys as a bucket has cells."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        query, key, value = self.project(cells).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(query, key, value)


class Painter(FakePipeline):
    """Calls the module once and generates nothing."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.result = module, torch.empty(0)

    def generate(self, batch: Batch, after_step: Any = None) -> Generated:
        cells = batch.bucket.volume // 64
        torch.manual_seed(cells)
        self.result = self.module(torch.randn(len(batch.rows), cells, 16))
        return Generated(
            np.zeros((len(batch.rows), batch.bucket.height, batch.bucket.width, 3), dtype=np.uint8)
        )


class Bench:
    """An engine under one `pt2.attention`, warmed in every bucket."""

    def __init__(self, attention: AttentionName, compile: dict[str, Any]) -> None:
        torch.manual_seed(0)
        module = Attention().eval()
        self.painter = Painter(module)
        self.router: Router = build_router(
            "attention",
            module,
            Pt2Config.model_validate({"compile": compile}),
            torch.float32,
            torch.device("cpu"),
        )
        shapes = ShapesConfig(buckets=BUCKETS)
        execution = Execution(
            (1,), torch.device("cpu"), {"attention": self.router}, attention=attention
        )
        self.runner = DiffusionRunner(execution, self.painter, config(shapes, 1))
        for bucket in BUCKETS:
            self.ask(bucket)
        forbid_compiling()
        self.router.freeze()

    def ask(self, bucket: Bucket) -> set[str]:
        """Serve a request of this size; returns the operators that ran."""
        request = make_request(height=bucket.height, width=bucket.width)
        job = self.runner.planner.prepare(request)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            (answer,) = self.runner.inference([job])
        answer.raise_if_failed()
        return {event.name for event in profiled.events()}


@pytest.fixture(autouse=True)
def stance(watch: CompileWatch) -> Iterator[None]:
    """Compiling is allowed again afterwards."""
    yield


@pytest.mark.parametrize(
    ("attention", "ran", "not_run"),
    [("default", FLASH, MATH), ("flash", FLASH, MATH), ("math", MATH, FLASH)],
)
def test_eager_runs_the_chosen_kernel(attention: AttentionName, ran: str, not_run: str) -> None:
    operators = Bench(attention, {"enable": False}).ask(BUCKETS[0])
    assert ran in operators and not_run not in operators


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One Inductor folder for both choices, as where somebody changes the YAML and starts again."""
    return str(tmp_path_factory.mktemp("inductor"))


@pytest.mark.parametrize("attention", ["default", "math"])
def test_inductor_compiles_the_chosen_attention_in_and_nothing_after_warm_up(
    attention: AttentionName, cache: str, watch: CompileWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under `math` the graph holds the decomposition, of which Inductor makes kernels of its own
    around the products.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", cache)
    bench = Bench(attention, {"enable": True, "kwargs": {"backend": "inductor"}})
    events = watch.num_events
    assert events == len(BUCKETS)
    for bucket in (*BUCKETS, *BUCKETS):
        operators = bench.ask(bucket)
        assert (FLASH in operators) == (attention == "default") and MATH not in operators
        compiled = bench.painter.result.clone()
        with torch.inference_mode():
            torch.manual_seed(bucket.volume // 64)
            latents = torch.randn(1, bucket.volume // 64, 16)
            expected = Attention.forward(bench.painter.module, latents)  # type: ignore[arg-type]
        torch.testing.assert_close(compiled, expected)
    assert watch.num_events == events and bench.router.run.unwarmed == 0
    assert {route.engine for route in bench.router.routes.values()} == {"compiled"}


def test_a_graph_warmed_under_one_choice_is_not_the_others() -> None:
    """Why the choice has to wrap warm-up: afterwards it is in the compiled code, and changes
    nothing.
    """
    bench = Bench("math", {"enable": True, "kwargs": {"backend": "aot_eager"}})
    bench.runner.execution = replace(bench.runner.execution, attention="flash")
    operators = bench.ask(BUCKETS[0])
    assert FLASH not in operators
