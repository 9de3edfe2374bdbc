from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from preheat.buckets import Bucket
from preheat.compilation.backends.base import EngineName, Precompiled
from preheat.compilation.backends.inductor import TorchCompile
from preheat.compilation.pace import Timing
from preheat.compilation.router import Router
from preheat.compilation.signatures import Inputs
from preheat.compilation.targets import build_router
from preheat.compilation.variants import Variant as AnyVariant
from preheat.compilation.warmup import Warmup
from preheat.compilation.watch import CompileWatch
from preheat.config.pt2 import Pt2Config
from preheat.errors import WarmupError
from preheat.models.diffusion.variants import Variant, covering, own, plan_variants

SMALL, WIDE = Bucket(8, 8), Bucket(8, 16)


class Denoiser(nn.Module):
    """Two rows a picture under guidance, as a UNet has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.scale = 1.0

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        generated: torch.Tensor = self.conv(sample) * self.scale
        return generated


class Server:
    """Serves a variant by one call of the denoiser, under the grad mode of real requests."""

    def __init__(
        self, watch: CompileWatch, backend: Any = "eager", compile: Any = None, **settings: Any
    ) -> None:
        self.denoiser, self.watch = Denoiser(), watch
        config = Pt2Config.model_validate(
            {"compile": compile or {"enable": True, "kwargs": {"backend": backend}}}
        )
        self.router: Router = build_router(
            "unet", self.denoiser, config, torch.float32, torch.device("cpu")
        )
        self.served: list[Variant] = []
        self.steps: list[Variant] = []
        options: dict[str, Any] = {"on_failure": "eager", "progress": self.note} | settings
        self.warmup = Warmup(self.serve, {"unet": self.router}, watch, **options)

    def note(self, variant: Variant, seconds: float) -> None:
        self.steps.append(variant)

    def serve(self, variant: AnyVariant) -> None:
        (meant,) = own([variant])
        self.served.append(meant)
        self.router.start_run()
        rows = variant.batch_size * (2 if meant.guidance else 1)
        with torch.inference_mode():
            self.denoiser(torch.zeros(rows, 1, variant.bucket.height, variant.bucket.width))

    def engines(self) -> dict[tuple[object, int], str]:
        return {(record.bucket, record.batch_size): record.engine for record in self.warmup.rows}


def failing(*_: object) -> Any:
    raise ValueError("no kernel")


# Compiling was asked for, in each of the ways in which there is nothing to show for it.
IN_VAIN: list[dict[str, Any]] = [
    # TorchServe's own YAMLs alone
    {"enable": False, "warning": "pt2.compile.backend: 'nonsense' is not a backend"},
    # a name that TorchServe knows and torch does not
    {"enable": True, "kwargs": {"backend": "nvfuser"}},
    {"enable": True, "kwargs": {"backend": "eager", "nonsense": 1}},
    {"enable": True, "kwargs": {"backend": "eager", "disable": True}},
    {"enable": True, "kwargs": {"backend": failing}},
    {"enable": True, "kwargs": {"backend": "openvino", "options": {"config": "nonsense"}}},
]

VARIANTS = plan_variants([SMALL, WIDE], [1, 2], [True, False], ["text-to-image"])


@given(
    st.sets(st.builds(Bucket, st.integers(1, 64), st.integers(1, 64)), min_size=1, max_size=4),
    st.sets(st.integers(1, 8), min_size=1, max_size=3),
)
def test_the_plan_holds_every_variant_once_and_the_largest_first(
    buckets: set[Bucket], sizes: set[int]
) -> None:
    plan = plan_variants(buckets, sizes, [True, False], ["text-to-image", "inpainting"])
    assert len(plan) == len(set(plan)) == len(buckets) * len(sizes) * 4
    areas = [variant.bucket.volume for variant in plan]
    assert areas == sorted(areas, reverse=True)
    assert plan[0].batch_size == max(sizes) and plan[0].guidance


@given(
    st.sets(st.integers(1, 8), min_size=1, max_size=4),
    st.sets(st.booleans(), min_size=1),
    st.sets(st.sampled_from(["text-to-image", "image-to-image", "inpainting"]), min_size=1),
)
def test_a_few_variants_meet_every_shape_that_a_target_can_be_given(
    sizes: set[int], guidance: set[bool], tasks: set[str]
) -> None:
    plan = plan_variants([SMALL, WIDE], sizes, guidance, sorted(tasks))
    few = covering(plan)
    assert set(few) <= set(plan) and list(few) == sorted(few, key=plan.index)

    def shapes(variants: tuple[Variant, ...]) -> set[tuple[object, ...]]:
        denoiser = {(v.bucket, "denoiser", v.batch_size * (1 + v.guidance)) for v in variants}
        decoder = {(v.bucket, "decoder", v.batch_size) for v in variants}
        encoder = {
            (v.bucket, "encoder", v.batch_size) for v in variants if v.task != "text-to-image"
        }
        return denoiser | decoder | encoder | {(v.bucket, v.task) for v in variants}

    assert shapes(few) == shapes(plan)


def test_after_warm_up_the_replay_compiles_nothing_and_every_variant_is_compiled(
    watch: CompileWatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(watch)
    with caplog.at_level(logging.INFO, logger="preheat"):
        server.warmup.warm(VARIANTS)
    events = watch.num_events
    assert server.warmup.verify(VARIANTS) == 0
    assert watch.num_events == events == 6, "rows 1, 2 and 4 in two buckets"
    assert set(server.engines().values()) == {"compiled"} and len(server.engines()) == 4
    assert server.steps == list(VARIANTS)
    assert "[1/8] 8x16 unet compiled in" in caplog.text


def test_a_variant_left_out_of_warm_up_is_caught_by_the_proof(
    watch: CompileWatch, caplog: pytest.LogCaptureFixture
) -> None:
    forgotten = Variant(WIDE, 2, True, "text-to-image")
    server = Server(watch)
    server.warmup.warm([variant for variant in VARIANTS if variant != forgotten])
    events = watch.num_events
    with caplog.at_level(logging.ERROR):
        assert server.warmup.verify(VARIANTS) == 1
    assert watch.num_events == events, "verification itself compiles nothing either"
    assert f"{forgotten} was not hot" in caplog.text
    assert server.engines()[WIDE, 2] == "eager" and server.engines()[WIDE, 1] == "compiled"


def test_a_variant_left_out_refuses_ready_where_the_config_says_so(watch: CompileWatch) -> None:
    forgotten = Variant(WIDE, 2, True, "text-to-image")
    server = Server(watch, on_failure="fail")
    server.warmup.warm([variant for variant in VARIANTS if variant != forgotten])
    with pytest.raises(WarmupError, match=r"on_failure is fail.*8x16 batch 2, guidance on"):
        server.warmup.verify(VARIANTS)


def test_state_that_changes_between_warm_up_and_traffic_is_caught_with_its_guard(
    watch: CompileWatch, caplog: pytest.LogCaptureFixture, names_guards: bool
) -> None:
    server = Server(watch)
    server.warmup.warm(VARIANTS)
    server.denoiser.scale = 2.0
    with caplog.at_level(logging.ERROR):
        assert server.warmup.verify(VARIANTS) > 0
    said = "scale" if names_guards else "does not name"
    assert said in caplog.text
    assert set(server.engines().values()) == {"eager"}
    assert all(said in str(record.reason) for record in server.warmup.rows)


def fails_on_wide(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    if any(isinstance(value, torch.Tensor) and value.shape[-1] == WIDE.width for value in inputs):
        raise NotImplementedError("no lowering for this width")
    return graph.forward


def test_a_bucket_whose_compile_fails_becomes_eager_alone(watch: CompileWatch) -> None:
    server = Server(watch, fails_on_wide)
    server.warmup.warm(VARIANTS)
    assert server.warmup.verify(VARIANTS) == 0, "a bucket given up in warm-up is no new fault"
    assert server.engines() == {
        (SMALL, 1): "compiled",
        (SMALL, 2): "compiled",
        (WIDE, 1): "eager",
        (WIDE, 2): "eager",
    }
    reasons = {record.bucket: record.reason for record in server.warmup.rows}
    assert reasons[SMALL] == "" and "no lowering" in str(reasons[WIDE])


def test_a_bucket_whose_compile_fails_refuses_ready_where_the_config_says_so(
    watch: CompileWatch,
) -> None:
    server = Server(watch, fails_on_wide, on_failure="fail")
    with pytest.raises(WarmupError, match=r"(?s)8x16.*no lowering"):
        server.warmup.warm(VARIANTS)


def test_two_observed_batch_sizes_make_one_graph_a_bucket(watch: CompileWatch) -> None:
    server = Server(watch)
    server.warmup.observe(
        [Variant(SMALL, 4, True, "text-to-image"), Variant(SMALL, 1, False, "text-to-image")]
    )
    variants = plan_variants([SMALL, WIDE], [1, 2, 4], [True, False], ["text-to-image"])
    server.warmup.warm(variants)
    assert watch.num_events == 4, "rows 1 and rows 2-8, in two buckets"
    assert (
        server.warmup.verify(
            plan_variants([SMALL, WIDE], [1, 2, 3, 4], [True, False], ["text-to-image"])
        )
        == 0
    )


def make_restless(target: str, watch: CompileWatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on each call of this target's compiled code is a compile event."""
    plain = TorchCompile.__call__

    def restless(code: TorchCompile, *args: Any) -> Any:
        if code.name == f"{target}-compiled":
            watch.events["cudagraph_recording"] += 1
        return plain(code, *args)

    monkeypatch.setattr(TorchCompile, "__call__", restless)


def test_compiled_code_that_never_settles_is_given_up(
    watch: CompileWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compile event in the replay without a refusal: what a CUDA graph recorded late looks
    like.
    """
    server = Server(watch)
    server.warmup.warm(VARIANTS)
    make_restless("unet", watch, monkeypatch)
    assert server.warmup.verify(VARIANTS[:1]) == 1
    assert server.engines()[WIDE, 2] == "eager"
    events = watch.num_events
    server.serve(VARIANTS[0])
    assert watch.num_events == events and server.router.run.engines == {"eager"}


@pytest.mark.parametrize("compile", IN_VAIN)
def test_eager_though_compiling_was_asked_for_always_has_a_reason(
    watch: CompileWatch, compile: dict[str, Any]
) -> None:
    server = Server(watch, compile=compile)
    server.warmup.warm(VARIANTS)
    assert {record.engine for record in server.warmup.rows} == {"eager"}
    assert all(record.reason for record in server.warmup.rows)
    server.warmup.verify(())
    server.serve(VARIANTS[0])
    assert server.router.run.fallbacks > 0


@pytest.mark.parametrize("compile", IN_VAIN)
def test_on_failure_fail_counts_every_reason(watch: CompileWatch, compile: dict[str, Any]) -> None:
    with pytest.raises(WarmupError, match="unet has no engine"):
        Server(watch, compile=compile, on_failure="fail").warmup.warm(VARIANTS)


def test_eager_that_was_asked_for_has_none(watch: CompileWatch) -> None:
    server = Server(watch, compile={"enable": False}, on_failure="fail")
    server.warmup.warm(VARIANTS)
    assert {(record.engine, record.reason) for record in server.warmup.rows} == {("eager", "")}
    assert server.router.run.fallbacks == 0


def test_only_the_target_that_compiled_again_is_given_up(
    watch: CompileWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder's graph is recorded once more in the replay; the denoiser, which ran in the same
    variant, stays compiled.
    """
    server, decoder = Server(watch), Denoiser()
    config = Pt2Config.model_validate({"compile": {"enable": True, "kwargs": {"backend": "eager"}}})
    other = build_router("vae.decoder", decoder, config, torch.float32, torch.device("cpu"))

    def serve(variant: AnyVariant) -> None:
        server.serve(variant)
        other.start_run()
        with torch.inference_mode():
            decoder(torch.zeros(1, 1, variant.bucket.height, variant.bucket.width))

    warmup = Warmup(serve, {"unet": server.router, "vae.decoder": other}, watch, on_failure="eager")
    warmup.warm(VARIANTS)
    make_restless("vae.decoder", watch, monkeypatch)
    assert warmup.verify(VARIANTS) == 2, "in each bucket once: then it is eager"
    engines = {(record.target, record.engine) for record in warmup.rows}
    assert ("unet", "eager") not in engines and ("vae.decoder", "eager") in engines


class Slow:
    """Takes long to make and not to run, and makes no compile events."""

    engine: EngineName = "openvino"
    name = "slow"
    is_compared = True

    def matches(self, inputs: Inputs) -> bool:
        return True

    def __call__(self, sample: torch.Tensor) -> torch.Tensor:
        return sample


def test_the_making_of_code_without_compile_events_is_no_runs_time(watch: CompileWatch) -> None:
    router = Router("toy", lambda sample: sample, [Precompiled("openvino", [Slow()])])
    runs: list[int] = []

    def serve(variant: AnyVariant) -> Timing:
        router.start_run()
        router(torch.zeros(variant.batch_size))
        runs.append(variant.batch_size)
        return Timing(0.0, float(len(runs)))

    warmup = Warmup(
        serve, {"toy": router}, watch, on_failure="eager", progress=lambda variant, seconds: None
    )
    variants = [AnyVariant(SMALL, 1), AnyVariant(SMALL, 2)]
    warmup.warm(variants)
    # twice where code was made, of which the second time counts
    assert runs == [1, 1, 2]
    assert warmup.timings[variants[0]].per_step == 2.0
