"""OpenVINO models on a tiny module: made in warm-up only, for what varies in the batch alone, and
compared with eager.
"""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from masked_modules import EXAMPLES, pair
from preheat.compilation.backends import openvino, openvino_graphs
from preheat.compilation.backends.base import CompiledCode
from preheat.compilation.closeness import mismatch
from preheat.compilation.router import Router
from preheat.compilation.signatures import DynamicDims, Inputs, tensor_shapes
from preheat.compilation.targets import build_router
from preheat.compilation.watch import CompileWatch, forbid_compiling
from preheat.config.model import ModelConfig
from preheat.config.pt2 import Pt2Config
from preheat.errors import ConfigError
from preheat.torchserve import server

# Not importorskip: it would import the package with its telemetry.
pytestmark = pytest.mark.skipif(
    find_spec("openvino") is None, reason="needs the extra openvino, which make test installs"
)

CPU = torch.device("cpu")
MOST_ROWS = 6


class Toy(nn.Module):
    """Called as a UNet is: positional and keyword tensors, a nested dict, plain values, a tuple
    back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.down = nn.Linear(8, 4)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        text: torch.Tensor,
        cond: dict[str, torch.Tensor] | None = None,
        mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert cond is not None and mask is None and not return_dict
        shift = self.down(text).relu() + (cond["size"] * timestep).to(sample.dtype)
        return self.conv(sample) + shift[:, :, None, None], {"shift": shift}


def inputs(rows: int, side: int = 8, dtype: torch.dtype = torch.float32) -> Inputs:
    sample, text = torch.randn(rows, 4, side, side, dtype=dtype), torch.randn(rows, 8, dtype=dtype)
    size = torch.arange(rows)[:, None]
    return (sample, torch.tensor(3.0)), {
        "text": text,
        "cond": {"size": size},
        "mask": None,
        "return_dict": False,
    }


def routed(
    module: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    options: dict[str, Any] | None = None,
) -> tuple[nn.Module, Router]:
    """A router that has seen 1 and MOST_ROWS rows, as with `batch_sizes: dynamic`."""
    module = (module if module is not None else Toy()).to(dtype).eval()
    kwargs = {"backend": "openvino", **({"options": options} if options else {})}
    config = Pt2Config.model_validate({"compile": {"enable": True, "kwargs": kwargs}})
    router = build_router("toy", module, config, dtype, device)
    router.learn([tensor_shapes(*inputs(rows)) for rows in (1, MOST_ROWS)])
    return module, router


def num_models(router: Router) -> int:
    (backend,) = router.backends
    assert isinstance(backend, openvino.OpenVINO)
    return len(backend.models)


def call(
    module: nn.Module, rows: int, side: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """What the module gives and what it would give eagerly, under the mode of serving."""
    args, kwargs = inputs(rows, side, dtype)
    with torch.inference_mode():
        return module(*args, **kwargs), type(module).forward(module, *args, **kwargs)


@pytest.fixture(autouse=True)
def stance(watch: CompileWatch) -> Iterator[None]:
    """Compiling is allowed again afterwards."""
    yield


@pytest.mark.skipif(
    torch.__version__ < "2.9",
    reason="OpenVINO's converter fails on a slice as torch 2.8 exports it",
)
def test_a_model_of_a_masked_decoder_serves_sizes_that_it_has_not_met(watch: CompileWatch) -> None:
    example, module = EXAMPLES["vae decoder"], copy.deepcopy(pair("vae decoder")[1])
    kwargs = {"backend": "openvino"}
    config = Pt2Config.model_validate({"compile": {"enable": True, "kwargs": kwargs}})
    router = build_router("vae.decoder", module, config, torch.float32, CPU)
    latents = example.picture()[:1]
    for cells in ((3, 5), (8, 9), (1, 2), (7, 1)):
        sizes = torch.tensor([cells])
        with torch.inference_mode():
            painted, expected = module(latents, sizes=sizes), router.forward(latents, sizes=sizes)
        assert (painted - expected).abs().max() < 1e-4
        assert painted.any() and not painted[:, :, 4 * cells[0] :].any()
    assert [route.engine for route in router.routes.values()] == ["openvino"]
    assert num_models(router) == 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_one_model_serves_every_batch_size_as_eager_does(
    watch: CompileWatch, dtype: torch.dtype, tolerance: float
) -> None:
    module, router = routed(dtype=dtype)
    for rows in (MOST_ROWS, 1):
        call(module, rows, dtype=dtype)
    assert [route.engine for route in router.routes.values()] == ["openvino", "openvino"]
    assert num_models(router) == 1
    forbid_compiling()
    router.freeze()
    router.start_run()
    for rows in range(1, MOST_ROWS + 1):
        result, expected = call(module, rows, dtype=dtype)
        torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance)
    assert router.run.engines == {"openvino"} and router.run.unwarmed == 0
    assert watch.num_events == 0 and not router.compiles and not router.idle


def test_a_result_is_not_overwritten_by_the_next_call() -> None:
    module, _ = routed()
    call(module, 2)
    (first, _), _ = call(module, 2)
    kept = first.clone()
    call(module, 2)
    assert torch.equal(first, kept)


def test_float32_is_float32_and_bfloat16_bfloat16() -> None:
    """A CPU with bfloat16 instructions would compute either in bfloat16: eight bits of mantissa,
    seen in one product.
    """
    module, _ = routed()
    (result, _), (expected, _) = (answer for answer in call(module, 2))
    assert (result - expected).abs().max() < 1e-5 * expected.abs().max()
    said = []
    for dtype in (torch.float32, torch.bfloat16):
        (backend,) = routed(dtype=dtype)[1].backends
        model = backend.code_for(inputs(2, dtype=dtype), DynamicDims())
        assert isinstance(model, openvino.Model)
        compiled = model.request.get_compiled_model()
        said.append(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
    # which it says where the CPU has no bfloat16
    assert said[0] == "f32" and said[1] in ("bf16", "f32")


def test_what_was_not_warmed_is_an_incident_and_makes_no_model() -> None:
    module, router = routed()
    call(module, 2)
    router.freeze()
    router.start_run()
    result, expected = call(module, 2, side=16)
    torch.testing.assert_close(result, expected)
    assert router.run.unwarmed == 1 and router.run.engines == {"eager"} and num_models(router) == 1


def test_weights_cast_inside_a_request_are_exported_too() -> None:
    """As diffusers casts an SDXL VAE of half precision."""
    module, router = routed(dtype=torch.bfloat16)
    with torch.inference_mode():
        module.to(torch.float32)
        module.register_buffer("spare", torch.zeros(1))
    result, expected = call(module, 2)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert router.run.engines >= {"openvino"}


class Unconvertible(Toy):
    """Reads a number out of a tensor, which no static graph can."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args[0].sum().item() > 1e9:
            raise AssertionError
        return super().forward(*args, **kwargs)


def test_a_module_that_cannot_be_exported_is_served_eagerly_with_the_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module, router = routed(Unconvertible())
    with caplog.at_level(logging.ERROR):
        result, expected = call(module, 2)
    torch.testing.assert_close(result, expected)
    (route,) = router.routes.values()
    assert (
        route.engine == "eager"
        and str(route.reason).startswith("openvino: ")
        and "toy: openvino failed" in caplog.text
    )
    router.freeze()
    router.start_run()
    call(module, 2)
    assert router.run.fallbacks == 1 and router.run.unwarmed == 0


def test_a_fault_of_the_model_itself_is_raised() -> None:
    module, _ = routed()
    (_, timestep), kwargs = inputs(2)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="channels"):
        module(torch.randn(2, 3, 8, 8), timestep, **kwargs)


def test_a_model_that_computes_something_else_is_found_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Eager's weights are changed between the making and the comparing."""
    module = Toy().eval()

    class Spoiling(openvino.OpenVINO):
        def code_for(self, inputs: Inputs, dims: DynamicDims) -> CompiledCode:
            model = super().code_for(inputs, dims)
            with torch.inference_mode(False):
                module.conv.weight = nn.Parameter(module.conv.weight.detach() * 1.01)
            return model

    properties = openvino.cpu_properties({})
    router = Router("toy", module.forward, [Spoiling("toy", module, properties)])
    module.forward = router  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR):
        call(module, 2)
    (route,) = router.routes.values()
    assert (
        route.engine == "eager"
        and "differs from eager" in str(route.reason)
        and "is not used" in caplog.text
    )


@pytest.mark.parametrize(
    ("device", "options", "words"),
    [
        ("cuda", {}, "serves on the CPU, and this worker's device is cuda"),
        ("cpu", {"device": "GPU"}, "option device is GPU"),
        ("cpu", {"mode": 1}, "unknown option mode"),
    ],
)
def test_what_it_cannot_serve_is_a_loud_eager(
    device: str, options: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        _, router = routed(device=torch.device(device), options=options)
    assert router.idle and words in str(router.reason) and words in caplog.text


def test_a_missing_package_is_a_loud_eager(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with caplog.at_level(logging.ERROR):
        module, router = routed()
    assert (
        router.idle
        and "openvino is not installed" in str(router.reason)
        and "not installed" in caplog.text
    )
    result, expected = call(module, 2)
    torch.testing.assert_close(result, expected)


def test_nothing_is_reported_over_the_network() -> None:
    """In a process of its own: other tests let torch import OpenVINO, telemetry and all."""
    script = (
        "import sys; from preheat.compilation.backends.openvino_graphs import import_openvino; "
        "import_openvino(); "
        "sys.exit(sys.modules['openvino_telemetry'] is not None or 'openvino.tools.ovc' not in "
        "sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(server.ROOT / "handler")}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=env)


def test_options_go_over_the_properties_and_name_the_cache() -> None:
    torch_options = {
        "config": {"INFERENCE_NUM_THREADS": 7},
        "model_caching": True,
        "cache_dir": "/somewhere",
    }
    properties = openvino.cpu_properties(torch_options)
    assert properties["INFERENCE_NUM_THREADS"] == 7 and properties["CACHE_DIR"] == "/somewhere"
    assert openvino.cpu_properties({})["INFERENCE_NUM_THREADS"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        ("pt2.shapes.strategy", {"shapes": {"strategy": "dynamic"}}),
        ("pt2.shapes.strategy", {"shapes": {"strategy": "exact"}}),
        ("pt2.scope", {"scope": "regional"}),
        ("pt2.attention", {"attention": "math"}),
        ("pt2.export.aot_compile", {"export": {"aot_compile": True}}),
    ],
)
def test_settings_that_mean_nothing_with_it_are_refused(path: str, extra: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=path):
        ModelConfig.parse({"pt2": {"compile": {"enable": True, "backend": "openvino"}, **extra}})
    ModelConfig.parse({"pt2": {"compile": {"enable": False, "backend": "openvino"}, **extra}})


Pair = namedtuple("Pair", "left right")


class Head(nn.Module):
    """A target that is called with another model's output, as transformers' heads are."""

    def forward(self, output: BaseModelOutput, pair: Any) -> BaseModelOutput:
        assert output.last_hidden_state is not None
        return BaseModelOutput(last_hidden_state=output.last_hidden_state + pair.left)


def test_the_outputs_of_transformers_are_exported_for_any_batch() -> None:
    def inputs(rows: int) -> Inputs:
        hidden: Any = torch.randn(rows, 5)
        return (BaseModelOutput(last_hidden_state=hidden), Pair(torch.randn(rows, 5), None)), {}

    dims = DynamicDims.varying([tensor_shapes(*inputs(rows)) for rows in (2, MOST_ROWS)])
    model = openvino.Model("head", Head(), inputs(MOST_ROWS), dims, {})
    for rows in (2, 3):
        args, kwargs = inputs(rows)
        assert model.matches((args, kwargs))
        result = model(*args, **kwargs)
        assert type(result) is BaseModelOutput and mismatch(result, Head()(*args)) is None


class Normed(Toy):
    """With a norm, whose fresh ones and zeros are as another norm's, and a weight of two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.GroupNorm(2, 4), nn.GroupNorm(2, 4)
        self.again = self.conv

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        sample, rest = super().forward(*args, **kwargs)
        return self.again(self.second(self.first(sample).sigmoid())), rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kept_graph_serves_other_weights_and_is_not_converted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    def made(seed: int) -> tuple[nn.Module, openvino.Model]:
        torch.manual_seed(seed)
        module = Normed().to(dtype).eval()
        if seed:  # trained: no norm is like another
            for weight in module.parameters():
                nn.init.normal_(weight)
        kept = openvino_graphs.KeptGraphs(tmp_path, "fingerprint")
        example = inputs(MOST_ROWS, dtype=dtype)
        return module, openvino.Model("toy", module, example, DynamicDims(), {}, kept)

    def agrees(module: nn.Module, model: openvino.Model) -> bool:
        args, kwargs = inputs(MOST_ROWS, dtype=dtype)
        with torch.inference_mode():
            return mismatch(model(*args, **kwargs), module(*args, **kwargs)) is None

    assert agrees(*made(0))
    (file,) = tmp_path.iterdir()
    monkeypatch.delattr(openvino_graphs, "export")
    for seed in (0, 1):
        assert agrees(*made(seed))
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(NameError, match="export"):
        made(0)


def test_a_graph_that_holds_weights_is_not_kept(tmp_path: Path) -> None:
    """What the converter has computed with them would be another fine-tune's."""

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight)

    module = Doubled(4, 4).eval()
    graph = openvino_graphs.converted(module, ((torch.ones(2, 4),), {}), DynamicDims())
    kept = openvino_graphs.KeptGraphs(tmp_path, "f")
    kept.write("call", replace(graph, weights={**graph.weights, "bias": ("torch.float32", (4,))}))
    assert not list(tmp_path.iterdir())
    kept.write("call", graph)
    assert kept.read("call", openvino_graphs.weights_of(module)) is not None
    other = {"weight": torch.ones(4, 4, dtype=torch.float64)}
    assert kept.read("call", other) is None and kept.read("another", other) is None


@pytest.mark.parametrize("change", ["number", "tensor", "nothing"])
def test_a_graph_serves_no_module_whose_unsaved_numbers_are_others(change: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.folder = 1.0, "/models/one"
            self.register_buffer("table", torch.ones(2), persistent=False)

    one, other = Scaled(), Scaled()
    other.folder = "/models/other"
    if change == "number":
        other.scale = 1.0005
    if change == "tensor":
        other.table = torch.tensor([1.0, 1.0005])
    same = openvino_graphs.unseen(one) == openvino_graphs.unseen(other)
    assert same == (change == "nothing")


def test_a_conversion_that_fails_leaves_the_log_as_it_was(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO's converter silences it, and lets it speak again only where it succeeds."""
    root = logging.getLogger()
    before = root.level, list(root.filters), list(root.handlers)
    openvino_graphs.import_openvino()
    monkeypatch.setattr(
        "openvino.frontend.pytorch.fx_decoder.TorchFXPythonDecoder.from_exported_program",
        mock.Mock(side_effect=RuntimeError("no such operation")),
    )
    with pytest.raises(RuntimeError, match="no such operation"):
        openvino_graphs.converted(nn.Linear(2, 2).eval(), ((torch.ones(2, 2),), {}), DynamicDims())
    assert (root.level, root.filters, root.handlers) == before
