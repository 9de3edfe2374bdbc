from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from preheat.compilation.watch import CompileWatch

# Tiny models gain nothing from a second thread, and lose much where test servers compete for the
# cores. Tests that are about threads run some others with two, in a process of their own.
NUM_THREADS = int(os.environ.get("PREHEAT_TEST_THREADS", "1"))
torch.set_num_threads(NUM_THREADS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from by_server import ByServer  # a machine lent for tests/gpu alone may have no pytest-xdist

    return ByServer(config, log)


@pytest.fixture
def watch() -> Iterator[CompileWatch]:
    """A watch on a process that has compiled nothing, with compiling allowed again afterwards."""
    torch._dynamo.reset()
    watch = CompileWatch()
    yield watch
    watch.close()
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


@pytest.fixture
def names_guards() -> bool:
    """Whether torch says which guard would have asked for a compile; 2.8 does not."""
    return not torch.__version__.startswith("2.8.")
