from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from preheat.watch import CompileWatch

# Tiny models gain nothing from a second thread, and lose much where test servers compete for the cores.
torch.set_num_threads(1)


ALONE = (
    "aot_archive",
    "cpu_roads",
    "exact_compiles",
    "fallback",
    "modules",
    "production_config",
    "shared_cache",
    "stock_archive",
)
"""End-to-end tests whose servers share nothing with other files."""


class ByServer(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist gives its bases no types
    """Which tests stay together in one process of `make test`: those of a file, and end-to-end ones that share a server or its cache."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if file.endswith(tuple(f"/test_{name}.py" for name in ALONE)) else "/".join(file.split("/")[:2])


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByServer:
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
