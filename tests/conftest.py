from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch._dynamo import eval_frame

from preheat.compilation.watch import CompileWatch

# In every new cache folder Inductor tries each of the CPU's instruction sets with the C++ compiler
# (7 s): here those that /proc/cpuinfo lists are believed. Servers inherit it.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

# Tiny models gain nothing from a second thread, and lose much where test servers compete for the
# cores. Tests that are about threads run some others with two, in a process of their own.
NUM_THREADS = int(os.environ.get("PREHEAT_TEST_THREADS", "1"))
torch.set_num_threads(NUM_THREADS)


with suppress(ModuleNotFoundError):  # a machine lent for tests/gpu alone may have none
    from hypothesis import HealthCheck, settings

    # No test asserts on time: that a machine is busy is no fault of what it runs.
    settings.register_profile(
        "untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("untimed")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from by_server import ByServer  # a machine lent for tests/gpu alone may have no pytest-xdist

    return ByServer(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # one of several processes: a folder alone keeps its order
        from by_server import turn

        items.sort(key=lambda item: turn(item.nodeid))


@pytest.fixture(autouse=True)
def workers_are_closed() -> Iterator[None]:
    """A worker ends with the test that started it: while it is READY, nothing may compile. What it
    set in its environment goes too. Those of wider fixtures were there before.
    """
    before, environment = _workers(), dict(os.environ)
    yield
    for worker in _workers() - before:
        worker.close()
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No test depends on which files ran before it in its process."""
    before = _process()
    yield
    assert _process() == before, "this file's fixtures leave something behind"


def _workers() -> set[Any]:
    """Those of this process that are READY."""
    module = sys.modules.get("preheat.worker.worker")  # whoever has not imported it has none
    return set(module.Worker.alive) if module else set()


def _process() -> dict[str, Any]:
    """What every test of a process shares."""
    environment = dict(os.environ)
    environment.pop("PYTEST_CURRENT_TEST", None)
    return {
        "environment": environment,
        "working folder": os.getcwd(),
        "READY workers": _workers(),
        "stance": eval_frame._stance.stance,
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
    }


@pytest.fixture
def watch() -> Iterator[CompileWatch]:
    """A watch on a process that has compiled nothing, with compiling allowed again afterwards."""
    torch.compiler.reset()
    watch = CompileWatch()
    yield watch
    watch.close()
    torch.compiler.set_stance("default")
    torch.compiler.reset()


@pytest.fixture
def names_guards() -> bool:
    """Whether torch says which guard would have asked for a compile; 2.8 does not."""
    return not torch.__version__.startswith("2.8.")
