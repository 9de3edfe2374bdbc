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
)
"""End-to-end tests whose servers share nothing with other files."""


class ByServer(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist gives its bases no types
    """Which tests stay together in one process of `make test`: those of a file, and end-to-end ones
    that share a server or its cache.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        shares = file.startswith("tests/e2e/") and not file.endswith(
            tuple(f"/test_{name}.py" for name in ALONE)
        )
        return "tests/e2e" if shares else file
