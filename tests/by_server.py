"""How `make test` deals the tests out to its processes."""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

ALONE = (
    "aot_archive",
    "cpu_roads",
    "exact_compiles",
    "fallback",
    "modules",
    "production_config",
    "shared_cache",
    "stock_archive",
    "text",
    "true_readiness",
)
"""End-to-end tests whose servers share nothing with other files."""
LONG = (
    "compilation/test_aot",
    "worker/test_service",
    "cache/test_cache",
    "models/diffusion/test_faults",
    "compilation/test_openvino",
)
"""Other files of a minute and more."""


def turn(nodeid: str) -> int:
    """When a test is dealt out: what takes longest first, so that no process waits for the other in
    the end.
    """
    scope = ByServer.scope(nodeid)
    if scope.startswith("tests/e2e"):
        return 0 if scope == "tests/e2e" else 1
    return 2 if scope.startswith(tuple(f"tests/{name}" for name in LONG)) else 3


class ByServer(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist gives its bases no types
    """Which tests stay together in one process of `make test`: those of a file, and end-to-end ones
    that share a server or its cache.
    """

    def _split_scope(self, nodeid: str) -> str:
        return self.scope(nodeid)

    @staticmethod
    def scope(nodeid: str) -> str:
        """The tests of one name run in one process."""
        file = nodeid.partition("::")[0]
        shares = file.startswith("tests/e2e/") and not file.endswith(
            tuple(f"/test_{name}.py" for name in ALONE)
        )
        return "tests/e2e" if shares else file
