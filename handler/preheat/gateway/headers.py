"""The headers that pass the gateway, by name: nothing else reaches a worker or a client.

TorchServe acts on some headers of anybody's (`describe`, `explain`), so a list of those that are
kept back would never be whole.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from preheat.errors import RequestError

ARRIVAL = "x-request-start"
TO_HOST = frozenset({"accept", "content-type", "x-preheat-deadline", ARRIVAL})
TO_CLIENT = frozenset({"content-type", "content-length", "retry-after"})
OWN = "x-preheat-"


def for_host(headers: Mapping[str, str]) -> dict[str, str]:
    """Those of a client's that a worker reads; when it came, unless a proxy before us knows.

    Raises:
        RequestError: one holds more than ASCII, which is nothing that a worker knows.
    """
    kept = {name.lower(): value for name, value in headers.items() if name.lower() in TO_HOST}
    for name, value in kept.items():
        if not value.isascii():
            raise RequestError("must be ASCII", name)
    return {ARRIVAL: f"t={time.time():.3f}", **kept}


def for_client(headers: Mapping[str, str]) -> dict[str, str]:
    """Those of the host's that are about the answer."""
    return {
        name.lower(): value
        for name, value in headers.items()
        if name.lower() in TO_CLIENT or name.lower().startswith(OWN)
    }
