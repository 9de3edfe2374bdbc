from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from preheat.watch import CompileWatch

# Tiny models gain nothing from a second thread, and lose much where test servers compete for the cores.
torch.set_num_threads(1)


class ByFolder(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist gives its bases no types
    """Of the processes of `make test`, one runs all end-to-end tests, which share servers; the tests of a file stay together."""

    def _split_scope(self, nodeid: str) -> str:
        return "/".join(nodeid.partition("::")[0].split("/")[:2])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFolder:
    return ByFolder(config, log)


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
