from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from preheat.watch import CompileWatch

# Tiny models gain nothing from a second thread, and lose much where test servers compete for the cores.
torch.set_num_threads(1)

TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """`make test` runs two processes: end-to-end tests, which share servers, stay in one, and so do those of a file."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(item.path.relative_to(TESTS).parts[0]))


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
