from __future__ import annotations

import collections
import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from transformers.modeling_outputs import BaseModelOutput

from preheat.compilation.backends.inductor import TorchCompile
from preheat.compilation.router import Router
from preheat.compilation.signatures import DynamicDims, leaves, map_tensors, signature
from preheat.compilation.targets import build_router
from preheat.compilation.watch import CompileWatch, forbid_compiling, raise_recompile_limits
from preheat.config.model import ModelConfig
from preheat.config.pt2 import Pt2Config
from preheat.errors import ConfigError

CPU = torch.device("cpu")


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.scale = 2.0

    def forward(self, sample: torch.Tensor, flag: bool = False) -> torch.Tensor:
        generated: torch.Tensor = self.conv(sample) * self.scale
        return generated + 1 if flag else generated


def compiled(
    watch: CompileWatch, module: nn.Module | None = None, **pt2: Any
) -> tuple[nn.Module, Router]:
    module = module if module is not None else Toy()
    config = Pt2Config.model_validate(
        {"compile": {"enable": True, "kwargs": {"backend": "eager"}}} | pt2
    )
    return module, build_router("toy", module, config, torch.float32, CPU)


def sample(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def test_a_warmed_shape_runs_compiled_and_equals_eager(watch: CompileWatch) -> None:
    module, router = compiled(watch)
    inputs = sample(2, 4, 8, 8)
    module(inputs)
    forbid_compiling()
    router.freeze()
    router.start_run()
    result = module(inputs)
    assert router.run.engines == {"compiled"} and router.run.unwarmed == 0
    torch.testing.assert_close(result, module.conv(inputs) * 2.0)  # type: ignore[operator]


def test_the_memory_format_that_a_tensor_arrives_in_needs_no_graph_of_its_own(
    watch: CompileWatch,
) -> None:
    module, router = compiled(watch)
    inputs = sample(2, 4, 8, 8)
    plain = module(inputs)
    events = watch.num_events
    torch.testing.assert_close(module(inputs.contiguous(memory_format=torch.channels_last)), plain)
    assert watch.num_events == events == 1 and len(router.routes) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda x: (x[:1],),
        lambda x: (x[..., :4],),
        lambda x: (x, True),
    ],
    ids=["batch", "width", "flag"],
)
def test_an_unwarmed_call_runs_eagerly_at_once_and_is_an_incident(
    watch: CompileWatch,
    change: Callable[[torch.Tensor], tuple[Any, ...]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    module, router = compiled(watch)
    inputs = sample(2, 4, 8, 8)
    module(inputs)
    forbid_compiling()
    router.freeze()
    events = watch.num_events
    router.start_run()
    with caplog.at_level(logging.ERROR):
        result = module(*change(inputs))
    assert router.run.unwarmed == 1 and router.run.engines == {"eager"}
    assert watch.num_events == events
    assert result.shape == change(inputs)[0].shape
    assert "toy runs eagerly" in caplog.text and "input shapes" in caplog.text


def test_a_guard_that_no_signature_shows_is_refused_named_and_served_eagerly(
    watch: CompileWatch, caplog: pytest.LogCaptureFixture, names_guards: bool
) -> None:
    module, router = compiled(watch)
    inputs = sample(2, 4, 8, 8)
    module(inputs)
    forbid_compiling()
    router.freeze()
    events = watch.num_events
    router.start_run()
    module.scale = 3.0  # type: ignore[assignment]
    with caplog.at_level(logging.ERROR):
        result = module(inputs)
    assert router.run.unwarmed == 1 and watch.num_events == events
    assert ("scale" if names_guards else "does not name") in caplog.text, (
        "the guard that failed is named"
    )
    torch.testing.assert_close(result, module.conv(inputs) * 3.0)  # type: ignore[operator]


def test_one_graph_serves_every_batch_size_but_one_once_the_dimension_is_learnt(
    watch: CompileWatch,
) -> None:
    module, router = compiled(watch)
    with router.observing() as calls:
        for rows in (1, 8):
            module(sample(rows, 4, 8, 8))
    assert len(calls.shapes) == 2 and not calls.examples
    router.learn(calls.shapes.values())
    assert router.dims.ranges == {"0": {0: (1, 8)}}
    events = watch.num_events
    for rows in (2, 1):
        module(sample(rows, 4, 8, 8))
    assert watch.num_events == events + 2
    forbid_compiling()
    router.freeze()
    router.start_run()
    for rows in range(1, 9):
        module(sample(rows, 4, 8, 8))
    assert router.run.unwarmed == 0 and watch.num_events == events + 2
    module(sample(9, 4, 8, 8))
    assert router.run.unwarmed == 1, "past the largest size that was seen nothing is promised"


def picky_backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    if any(isinstance(value, torch.Tensor) and value.shape[-1] == 16 for value in inputs):
        raise NotImplementedError("no lowering for this width")
    return graph.forward


def test_a_shape_whose_compile_fails_stays_eager_alone_with_its_reason(watch: CompileWatch) -> None:
    module, router = compiled(watch, compile={"enable": True, "kwargs": {"backend": picky_backend}})
    module(sample(1, 4, 1, 8))
    assert module(sample(1, 4, 1, 16)).shape == (1, 4, 1, 16)
    engines = [(route.engine, route.reason) for route in router.routes.values()]
    assert engines[0] == ("compiled", None)
    assert engines[1][0] == "eager" and "no lowering" in str(engines[1][1])
    router.freeze()
    router.start_run()
    module(sample(1, 4, 1, 16))
    assert router.run.fallbacks == 1 and router.run.unwarmed == 0


def test_a_fault_of_the_model_itself_is_not_taken_for_a_compile_failure(
    watch: CompileWatch,
) -> None:
    module, _ = compiled(watch)
    with pytest.raises(RuntimeError, match="channels"):
        module(sample(1, 3, 8, 8))


def test_a_second_module_of_the_class_runs_the_graphs_of_the_first_and_is_compiled(
    watch: CompileWatch,
) -> None:
    """As a worker that was started again in this process: weights are inputs of Dynamo's graphs."""
    inputs = sample(2, 4, 8, 8)
    first, _ = compiled(watch)
    first(inputs)
    events = watch.num_events
    module, router = compiled(watch)
    result = module(inputs)
    assert [route.engine for route in router.routes.values()] == ["compiled"]
    assert watch.num_events == events and (result != first(inputs)).any()
    torch.testing.assert_close(result, module.conv(inputs) * 2.0)  # type: ignore[operator]


class Opaque(Toy):
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, sample: torch.Tensor, flag: bool = False) -> torch.Tensor:
        return super().forward(sample, flag)


def test_a_module_that_compiles_to_nothing_is_found_out(watch: CompileWatch) -> None:
    module, router = compiled(watch, Opaque())
    module(sample(1, 4, 8, 8))
    (route,) = router.routes.values()
    # 2.8 loses `self` of such a method
    said = "missing 1 required" if torch.__version__.startswith("2.8.") else "no graph"
    assert route.engine == "eager" and said in str(route.reason)


def test_bad_arguments_of_torch_compile_mean_eager_and_a_reason(watch: CompileWatch) -> None:
    config = Pt2Config.model_validate({"compile": {"enable": True, "kwargs": {"mode": "fastest"}}})
    module = Toy()
    router = build_router("toy", module, config, torch.float32, CPU)
    assert router.idle and "refused its arguments" in str(router.reason)
    assert module(sample(1, 4, 8, 8)).shape == (1, 4, 8, 8)


@pytest.mark.parametrize("options", [{"freezing": True}, {"max_autotune": False, "cpp.threads": 1}])
def test_options_reach_inductor_as_the_yaml_has_them(
    options: dict[str, Any], watch: CompileWatch
) -> None:
    """torch takes keys out of the dict, which a config's own would not let it."""
    config = ModelConfig.parse(
        {"pt2": {"compile": {"enable": True, "backend": "inductor", "options": options}}}
    ).pt2
    router = build_router("toy", Toy(), config, torch.float32, CPU)
    assert router.reason is None and router.backends[0].engine == "compiled"
    assert config.compile.kwargs["options"] == options


def test_without_a_compiler_everything_is_eager_and_says_so(
    watch: CompileWatch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = Pt2Config.model_validate(
        {"compile": {"enable": True, "kwargs": {"backend": "inductor"}}}
    )
    with caplog.at_level(logging.ERROR):
        router = build_router("toy", Toy(), config, torch.float32, CPU)
    assert (
        router.idle
        and "no-such-compiler" in str(router.reason)
        and "no-such-compiler" in caplog.text
    )


def test_regional_scope_needs_repeated_blocks(watch: CompileWatch) -> None:
    with pytest.raises(ConfigError, match=r"pt2\.scope"):
        compiled(watch, scope="regional")


def test_the_signature_ignores_which_strides_a_side_of_one_has_no_use_for() -> None:
    plain = torch.zeros(2, 1, 3, 3)
    odd = plain.transpose(0, 1).contiguous().transpose(0, 1)
    none = DynamicDims()
    assert signature((plain,), {}, none) == signature((odd,), {}, none)
    assert signature((plain,), {"a": None}, none) != signature((plain,), {"a": 1}, none)
    assert signature((), {"c": {"x": plain}}, none) != signature((), {"c": {"x": plain[:1]}}, none)


class FakeIpex:
    """What `ipex.optimize` promises: an optimised copy of the module."""

    def __init__(self) -> None:
        self.dtypes: list[torch.dtype] = []

    def optimize(
        self, module: nn.Module, dtype: torch.dtype, inplace: bool, weights_prepack: bool
    ) -> nn.Module:
        assert not inplace and not weights_prepack
        self.dtypes.append(dtype)
        return copy.deepcopy(module)


def test_ipex_serves_channels_last_models_and_inputs(
    watch: CompileWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeIpex()
    monkeypatch.setenv("TS_IPEX_ENABLE", "true")
    monkeypatch.setitem(__import__("sys").modules, "intel_extension_for_pytorch", fake)
    module = Toy()
    seen: list[bool] = []
    module.conv.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    router = build_router("toy", module, Pt2Config(), torch.bfloat16, CPU)
    module(sample(2, 4, 8, 8))
    router.freeze()
    router.start_run()
    module(sample(3, 4, 8, 8))
    assert router.run.engines == {"ipex"} and router.run.unwarmed == 0
    # compared with eager, raced against it, then served
    assert fake.dtypes == [torch.bfloat16] and len(seen) > 3 and all(seen)
    assert module.conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("device", "ahead", "expected"),
    [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)],
)
def test_on_a_gpu_what_torch_compiles_has_channels_last_weights_and_what_a_package_is_given_has_not(
    watch: CompileWatch, device: str, ahead: bool, expected: bool
) -> None:
    module = Toy()
    own = {
        "compile": {"enable": True, "kwargs": {"backend": "eager"}},
        "export": {"aot_compile": ahead},
    }
    build_router("toy", module, Pt2Config.model_validate(own), torch.float32, torch.device(device))
    assert module.conv.weight.is_contiguous(memory_format=torch.channels_last) is expected


def test_without_a_compiler_convolutions_are_channels_last(watch: CompileWatch) -> None:
    module, inputs = Toy(), sample(2, 4, 8, 8)
    with torch.no_grad():
        plain = module(inputs)
        router = build_router("toy", module, Pt2Config(), torch.float32, CPU)
        torch.testing.assert_close(module(inputs), plain)
    assert module.conv.weight.is_contiguous(memory_format=torch.channels_last)
    router.freeze()
    router.start_run()
    module(inputs)
    assert router.run.engines == {"eager"} and router.run.unwarmed == 0


def test_ipex_that_is_not_installed_is_a_loud_eager(
    watch: CompileWatch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TS_IPEX_ENABLE", "true")
    monkeypatch.setitem(__import__("sys").modules, "intel_extension_for_pytorch", None)
    with caplog.at_level(logging.WARNING):
        router = build_router("toy", Toy(), Pt2Config(), torch.float32, CPU)
    assert router.idle and "not installed" in str(router.reason) and "not installed" in caplog.text


def test_ipex_leaves_a_module_without_convolutions_in_its_layout(
    watch: CompileWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TS_IPEX_ENABLE", "true")
    monkeypatch.setitem(__import__("sys").modules, "intel_extension_for_pytorch", FakeIpex())
    module = nn.Sequential(nn.Linear(8, 8))
    seen: list[bool] = []
    module[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    router = build_router("toy", module, Pt2Config(), torch.float32, CPU)
    module(sample(2, 4, 4, 8))
    router.freeze()
    router.start_run()
    module(sample(2, 4, 4, 8))
    assert router.run.engines == {"ipex"} and all(seen)


class BrokenIpex(FakeIpex):
    """Refuses float16, gets bfloat16 wrong, and spoils its copy of any other module."""

    def optimize(
        self, module: nn.Module, dtype: torch.dtype, inplace: bool, weights_prepack: bool
    ) -> nn.Module:
        if dtype == torch.float16:
            raise AssertionError("no float16 here")
        if dtype == torch.bfloat16:
            wrong = super().optimize(module, dtype, inplace, weights_prepack)
            wrong.conv.weight.data.mul_(1.5)  # type: ignore[union-attr, operator]
            return wrong
        spoilt = super().optimize(module, dtype, inplace, weights_prepack)
        spoilt.conv.register_parameter("weight", None)  # type: ignore[union-attr]
        return spoilt


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.float16, "no float16 here"),
        (torch.float32, "ipex failed"),
        (torch.bfloat16, "differs from eager"),
    ],
)
def test_what_ipex_fails_on_is_served_by_the_module_as_it_was(
    dtype: torch.dtype,
    words: str,
    watch: CompileWatch,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("TS_IPEX_ENABLE", "true")
    monkeypatch.setitem(__import__("sys").modules, "intel_extension_for_pytorch", BrokenIpex())
    module, inputs = Toy(), sample(1, 4, 8, 8)
    expected = module(inputs)
    with caplog.at_level(logging.ERROR):
        router = build_router("toy", module, Pt2Config(), dtype, CPU)
        torch.testing.assert_close(module(inputs), expected)
    assert words in caplog.text
    router.freeze()
    router.start_run()
    torch.testing.assert_close(module(inputs), expected)
    assert router.run.engines == {"eager"} and router.run.fallbacks == 1


def test_past_the_recompile_limit_a_shape_is_eager_and_counted_while_earlier_ones_stay_compiled(
    watch: CompileWatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Dynamo alone would go eager without a word, and the answer be called compiled."""
    module, router = compiled(
        watch, compile={"enable": True, "kwargs": {"backend": "eager", "dynamic": False}}
    )
    with dynamo_config.patch(recompile_limit=3, fail_on_recompile_limit_hit=False):
        raise_recompile_limits(0)
        router.open()
        ran = []
        for rows in (1, 2, 3, 4, 5, 2):
            router.start_run()
            module(sample(rows, 4, 8, 8))
            ran.append((router.run.engines, router.run.fallbacks))
    assert ran == [({"compiled"}, 0)] * 3 + [({"eager"}, 1)] * 2 + [({"compiled"}, 0)]
    assert caplog.text.count("recompile limit is reached") == 1


Pair = collections.namedtuple("Pair", "left right")


class Named(collections.OrderedDict[str, Any]):
    """A dict of a type that pytree does not know."""


@pytest.mark.parametrize(
    ("value", "paths"),
    [
        ({"a": [torch.ones(1), 2], "b": (torch.ones(1),)}, ["0.a.0", "0.a.1", "0.b.0"]),
        (BaseModelOutput(last_hidden_state=torch.ones(1)), ["0.last_hidden_state"]),
        (Pair(torch.ones(1), None), ["0.0", "0.1"]),
        (Named(a=torch.ones(1)), ["0.a"]),
        (collections.defaultdict(lambda: torch.zeros(1), a=torch.ones(1)), ["0.a"]),
        (torch.ones(2, 2).max(0), ["0.0", "0.1"]),
    ],
)
def test_containers_keep_their_type_and_their_contents_have_paths(
    value: Any, paths: list[str]
) -> None:
    doubled = map_tensors(value, lambda tensor: tensor * 2)
    assert type(doubled) is type(value) and [path for path, _ in leaves((value,), {})] == paths
    before, after = (dict(leaves((each,), {})) for each in (value, doubled))
    assert all(
        torch.equal(after[path], leaf * 2)
        if isinstance(leaf, torch.Tensor)
        else after[path] == leaf
        for path, leaf in before.items()
    )


class Head(nn.Module):
    """A target that is called with another model's output, as transformers' heads are."""

    def forward(self, output: BaseModelOutput, pair: Any) -> BaseModelOutput:
        assert output.last_hidden_state is not None
        return BaseModelOutput(last_hidden_state=output.last_hidden_state + pair.left)


def test_a_target_may_take_and_give_the_outputs_of_transformers(watch: CompileWatch) -> None:
    forward = Head().forward
    copying = TorchCompile("toy", lambda: torch.compile(forward, backend="eager"), cuda_graphs=True)
    router = Router("toy", forward, [copying])

    def call() -> None:
        router.start_run()
        result = router(
            BaseModelOutput(last_hidden_state=torch.ones(2, 3)), Pair(torch.ones(3), None)
        )
        assert type(result) is BaseModelOutput and torch.equal(
            result.last_hidden_state, torch.full((2, 3), 2.0)
        )

    for mode in (router.observing, router.warming, router.replaying):
        with mode():
            call()
    router.freeze()
    call()
    assert router.run.engines == {"compiled"} and not router.run.unwarmed


def test_events_are_added_up_while_another_kind_is_seen(watch: CompileWatch) -> None:
    """As the status file's thread does."""

    class Meanwhile(int):
        def __radd__(self, other: int) -> int:
            watch.events["another"] += 1
            return int(self) + other

    watch.events["a"], watch.events["b"] = Meanwhile(1), 1
    assert watch.num_events == 2
    assert watch.events["another"] == 1
