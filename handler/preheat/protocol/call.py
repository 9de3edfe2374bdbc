"""A request as a host hands it over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from preheat.protocol.responses import Response


@dataclass(frozen=True, slots=True)
class Call:
    """One request of a batch, as it came."""

    row: Mapping[str, object]
    headers: Mapping[str, str] = field(default_factory=dict)
    """Names in lower case."""
    send: Callable[[Response], None] | None = None
    """Takes the parts of an answer that streams, at once; None keeps them for the end."""
    deadline: float | None = None
    """Unix time in seconds after which nobody waits for the answer."""
