"""The same YAML files through TorchServe's own BaseHandler and through our parser: one decision."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo import list_backends
from torch._dynamo.backends import registry
from ts.context import Context
from ts.torch_handler import base_handler
from ts.utils.util import PT2Backend, get_yaml_config

from preheat.config.model import ModelConfig
from preheat.config.pt2_forms import PT2_BACKENDS
from preheat.errors import ConfigError

FORMS = [
    # No section.
    "minWorkers: 1",
    # `compile`
    "pt2: {compile: {enable: true}}",
    "pt2: {compile: {enable: false}}",
    "pt2: {compile: {enable: true, backend: inductor}}",
    "pt2: {compile: {enable: yes, backend: aot_eager}}",
    "pt2: {compile: {enable: off, backend: inductor}}",
    "pt2: {compile: {enable: false, backend: nonsense}}",
    (
        "pt2: {compile: {enable: true, backend: inductor, mode: reduce-overhead, dynamic: false, "
        "fullgraph: true}}"
    ),
    (
        "pt2: {compile: {backend: inductor, options: {epilogue_fusion: true, max_autotune: false}, "
        "enable: true}}"
    ),
    "pt2: {compile: {enable: true, mode: }}",
    # `enable` is compared with == True.
    "pt2: {compile: {enable: 1}}",
    "pt2: {compile: {enable: 1.0}}",
    "pt2: {compile: {enable: 0}}",
    "pt2: {compile: {enable: 2}}",
    "pt2: {compile: {enable: 'true'}}",
    "pt2: {compile: {enable: 'on', backend: inductor}}",
    "pt2: {compile: {enable: }}",
    "pt2: {compile: {enable: [true]}}",
    # Backends that it does not know, although torch may.
    "pt2: {compile: {enable: true, backend: nonsense}}",
    "pt2: {compile: {enable: true, backend: cudagraphs}}",
    "pt2: {compile: {enable: true, backend: Inductor}}",
    "pt2: {compile: {enable: true, backend: }}",
    "pt2: {compile: {enable: true, backend: 3}}",
    "pt2: {compile: {enable: true, backend: [inductor]}}",
    *(f"pt2: {{compile: {{enable: true, backend: {backend.value}}}}}" for backend in PT2Backend),
    # Our keys beside it.
    (
        "pt2: {compile: {enable: true, backend: inductor}, shapes: {buckets: [[64, 64]]}, targets: "
        "[unet]}"
    ),
    "pt2: {compile: {enable: false}, shapes: {buckets: [[64, 64]]}}",
    "pt2: {shapes: {buckets: [[64, 64]]}}",
    "pt2: {targets: [unet], cache: {key: a}}",
    # `export`
    "pt2: {export: {aot_compile: true}}",
    "pt2: {export: {aot_compile: false}}",
    "pt2: {export: {}}",
    "pt2: {export: {aot_compile: true}, shapes: {fit: pad}}",
    "pt2: {compile: {enable: true}, export: {aot_compile: true}}",
    "pt2: {compile: {enable: false}, export: {aot_compile: true}}",
    # Legacy: the backend's name.
    "pt2: inductor",
    "pt2: nonsense",
    "pt2: ''",
    "pt2: export",
    "pt2: onnx_export",
    *(f"pt2: {backend.value}" for backend in PT2Backend),
    # Legacy: the arguments.
    "pt2: {}",
    "pt2: {backend: inductor}",
    "pt2: {backend: nonsense}",
    "pt2: {backend: inductor, mode: max-autotune}",
    "pt2: {mode: reduce-overhead}",
    "pt2: {dynamic: true, fullgraph: false}",
    "pt2: {disable: true}",
]

DEADLY = [
    "pt2:",
    "pt2: 3",
    "pt2: true",
    "pt2: []",
    "pt2: [inductor]",
    "pt2: [compile]",
    "pt2: compile",
    "pt2: torch.compile",
    "pt2: {compile: }",
    "pt2: {compile: true}",
    "pt2: {compile: inductor}",
    "pt2: {compile: {}}",
    "pt2: {compile: {backend: inductor}}",
    "pt2: {compile: {enabled: true}}",
    "pt2: {compile: [enable]}",
]

# Here we are stricter on purpose: TorchServe serves eagerly, or ignores the key, and leaves a line
# in the log at most.
REFUSED_BY_US = [
    ("pt2: {bakend: inductor}", "pt2.bakend"),
    ("pt2: {shape: {buckets: [[64, 64]]}}", "pt2.shape"),
    ("pt2: {compile: {enable: true}, backend: inductor}", "pt2.backend"),
    ("pt2: {compile: {enable: true}, shape: {fit: pad}}", "pt2.shape"),
    ("pt2: {export: {aot_compile: true}, mode: default}", "pt2.mode"),
    ("pt2: {compile: {enable: true, 3: 4}}", "pt2.compile.3"),
]


@dataclass(frozen=True)
class Decision:
    """What became of a YAML: arguments for torch.compile, or None for eager."""

    kwargs: dict[str, Any] | None


class TorchScriptHandler(base_handler.BaseHandler):  # type: ignore[misc]
    """The real initialize(), with a model that needs no file."""

    def _load_torchscript_model(self, model_pt_path: str) -> torch.nn.Module:
        return torch.nn.Linear(2, 2)


def decided_by_torchserve(path: Path, monkeypatch: pytest.MonkeyPatch) -> Decision:
    calls: list[dict[str, Any]] = []
    signature = inspect.signature(torch.compile)

    def recording_compile(model: torch.nn.Module, **kwargs: Any) -> torch.nn.Module:
        signature.bind(model, **kwargs)  # raises TypeError where the real one would
        calls.append(copy.deepcopy(kwargs))
        return model

    context = Context(
        "model",
        str(path.parent),
        {"model": {"serializedFile": "model.pt", "configFile": path.name}},
        1,
        None,
        "0.12.0",
        model_yaml_config=get_yaml_config(str(path)),
    )
    handler = TorchScriptHandler()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "compile", recording_compile)
        handler.initialize(context)
    assert handler.initialized
    assert len(calls) <= 1
    return Decision(calls[0] if calls else None)


def decided_by_us(path: Path) -> Decision:
    compile_config = ModelConfig.load(path).pt2.compile
    return Decision(dict(compile_config.kwargs) if compile_config.enable else None)


@pytest.fixture
def yaml_file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "model.yaml"
    path.write_text(request.param)
    return path


@pytest.mark.parametrize("yaml_file", FORMS, indirect=True, ids=str)
def test_the_same_decision_and_arguments(yaml_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = decided_by_torchserve(yaml_file, monkeypatch)
    assert decided_by_us(yaml_file) == theirs


@pytest.mark.parametrize("yaml_file", DEADLY, indirect=True, ids=str)
def test_what_kills_its_load_is_an_error_here(
    yaml_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        decided_by_torchserve(yaml_file, monkeypatch)
    with pytest.raises(ConfigError, match=r"^pt2"):
        decided_by_us(yaml_file)


@pytest.mark.parametrize(("yaml_file", "path"), REFUSED_BY_US, indirect=["yaml_file"], ids=str)
def test_what_it_overlooks_is_an_error_here(
    yaml_file: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided_by_torchserve(yaml_file, monkeypatch)  # it loads
    with pytest.raises(ConfigError) as caught:
        ModelConfig.load(yaml_file)
    assert caught.value.path == path


def test_the_table_decides_both_ways(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    outcomes = set()
    for form in FORMS:
        path.write_text(form)
        outcomes.add(decided_by_us(path).kwargs is None)
    assert outcomes == {True, False}


def test_our_backends_are_torchserves() -> None:
    assert list(PT2_BACKENDS) == [backend.value for backend in PT2Backend]


@pytest.mark.parametrize(
    ("data", "warned"),
    [
        (
            {"compile": {"enable": True, "backend": "nonsense"}},
            "pt2.compile.backend: 'nonsense' is not a backend",
        ),
        ({"backend": "nonsense"}, "pt2.backend: 'nonsense' is not a backend"),
        ("nonsense", "pt2: 'nonsense' is not a backend"),
        (
            {"compile": {"enable": "true"}},
            "pt2.compile.enable: 'true' is not true, so nothing is compiled",
        ),
        ({"compile": {"enable": False, "backend": "nonsense"}}, None),
        ({"compile": {"enable": True, "backend": "inductor"}}, None),
        ({"shapes": {}}, None),
    ],
)
def test_eager_against_the_looks_of_it_is_said(data: object, warned: str | None) -> None:
    warning = ModelConfig.parse({"pt2": data}).pt2.compile.warning
    assert warning is None if warned is None else warned in (warning or "")


# In a YAML of ours, beside `pipeline: {}`: what is wrong, where, and what would be right.
REFUSED_IN_OURS = [
    (
        {"compile": {"enable": True, "backend": "openvno"}},
        "pt2.compile.backend",
        "did you mean openvino?",
    ),
    (
        {"compile": {"enable": True, "backend": "inductorr"}},
        "pt2.compile.backend",
        "did you mean inductor?",
    ),
    (
        {"compile": {"enable": True, "backend": "Inductor"}},
        "pt2.compile.backend",
        "did you mean inductor?",
    ),
    (
        {"compile": {"enable": True, "backend": "zzz"}},
        "pt2.compile.backend",
        "known here: aot_cudagraphs, aot_eager,",
    ),
    (
        {"compile": {"enable": True, "backend": None}},
        "pt2.compile.backend",
        "nothing is no backend",
    ),
    ({"compile": {"enable": True, "backend": 3}}, "pt2.compile.backend", "3 is no backend"),
    (
        {"compile": {"enable": True, "backend": ["inductor"]}},
        "pt2.compile.backend",
        "['inductor'] is no backend",
    ),
    (
        {"compile": {"enable": True, "backend": 3}, "import": ["a.py"]},
        "pt2.compile.backend",
        "3 is no backend",
    ),
    (
        {"compile": {"enable": True, "backend": "relu_accuracy_error_TESTING_ONLY"}},
        "pt2.compile.backend",
        "no backend",
    ),
    ({"backend": "cudagraph"}, "pt2.backend", "did you mean cudagraphs?"),
    ("onnxrtt", "pt2", "did you mean onnxrt?"),
    ({"compile": {"enable": "true"}}, "pt2.compile.enable", "must be true or false, got 'true'"),
    ({"compile": {"enable": None}}, "pt2.compile.enable", "must be true or false, got nothing"),
    ({"compile": {"enable": 1}}, "pt2.compile.enable", "must be true or false, got 1"),
]


@pytest.mark.parametrize("family", ["pipeline", "module"])
@pytest.mark.parametrize(("data", "path", "message"), REFUSED_IN_OURS, ids=str)
def test_a_yaml_of_ours_never_means_eager_by_mistake(
    data: object, path: str, message: str, family: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.parse({"pt2": data, family: {}})
    assert caught.value.path == path and message in caught.value.message


def test_what_is_packaged_here_is_ours_whatever_it_names() -> None:
    with pytest.raises(ConfigError, match="did you mean inductor"):
        ModelConfig.parse({"pt2": {"compile": {"enable": True, "backend": "inducter"}}}, ours=True)


class PlugIn:
    """An installed package's entry point in the group `torch_dynamo_backends`."""


@pytest.mark.parametrize("backend", ["cudagraphs", "tvm", "eager_noexcept", "a_plug_in"])
def test_a_yaml_of_ours_may_name_whatever_torch_compile_knows(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_backends(())  # discovers the real plug-ins, once
    monkeypatch.setitem(registry._BACKENDS, "a_plug_in", PlugIn())
    config = ModelConfig.parse(
        {"pt2": {"compile": {"enable": True, "backend": backend}}, "pipeline": {}}
    )
    assert config.pt2.compile.enable and config.pt2.compile.warning is None


def test_files_that_are_imported_may_bring_a_backend_of_their_own() -> None:
    compiled = {"enable": True, "backend": "my_backend"}
    assert ModelConfig.parse(
        {"pt2": {"compile": compiled, "import": ["mine.py"]}, "module": {}}
    ).pt2.compile.enable


@pytest.mark.parametrize(
    ("data", "legacy"), [("inductor", True), ({}, True), ({"compile": {"enable": True}}, False)]
)
def test_legacy_forms_are_marked(data: object, legacy: bool) -> None:
    assert ModelConfig.parse({"pt2": data}).pt2.compile.legacy is legacy


def test_parsing_twice_works_where_torchserve_raises(tmp_path: Path) -> None:
    data = {"pt2": {"compile": {"enable": True, "backend": "inductor"}}}
    assert ModelConfig.parse(data) == ModelConfig.parse(data)
