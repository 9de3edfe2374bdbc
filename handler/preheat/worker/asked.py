"""The sizes that requests have asked for, which `preheat plan` chooses buckets by."""

from __future__ import annotations

from typing import Any

from preheat.buckets import Bucket

MOST_SIZES = 10_000
"""Different ones that are remembered; 200 kB as JSON."""


class AskedSizes:
    """Counts requests by size: those that were served and those that no bucket covered."""

    def __init__(self) -> None:
        self._counts: dict[tuple[int, ...], int] = {}
        self._names: tuple[str, ...] = ()
        self._is_picture = False
        self._uncounted = 0

    def count(self, size: Bucket | None) -> None:
        """One request; None: of no size that buckets are planned by."""
        if size is None:
            return
        if not self._names:
            self._names, self._is_picture = tuple(name for name, _ in size.sizes), size.is_picture
        key = tuple(size[name] for name in self._names)
        if key in self._counts or len(self._counts) < MOST_SIZES:
            self._counts[key] = self._counts.get(key, 0) + 1
        else:
            self._uncounted += 1

    def document(self) -> dict[str, Any]:
        """Plain data: `dims`, the names; `picture`; `sizes`, a row [*sizes, requests] each; and
        `uncounted`, requests of sizes past `MOST_SIZES`. Another thread may count meanwhile.
        """
        counts = self._counts.copy()
        return {
            "dims": list(self._names),
            "picture": self._is_picture,
            "sizes": [[*sizes, count] for sizes, count in counts.items()],
            "uncounted": self._uncounted,
        }
