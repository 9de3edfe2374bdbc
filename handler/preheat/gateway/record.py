"""What is known of the request under way: filled in by those it passes, written down at its end."""

from __future__ import annotations

import json
import logging
import logging.handlers
import re
import secrets
import time
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path

from preheat.gateway.keys import Client

REQUEST_ID = "x-request-id"
LEFT = 499
"""The status of who left before the answer began, as nginx has it; no client sees it."""
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}", re.ASCII)


@dataclass(slots=True)
class Record:
    """One request, as the access log has it: never a prompt, a key or a picture."""

    id: str
    time: float = field(default_factory=time.time)
    """Unix, when it came."""
    key: str = ""
    """The name of its key; empty without."""
    method: str = ""
    path: str = ""
    model: str = ""
    height: int | None = None
    """Pixels, as asked."""
    width: int | None = None
    steps: int | None = None
    images: int | None = None
    bucket: str = ""
    engine: str = ""
    queued_seconds: float = 0.0
    seconds: float = 0.0
    """Until the answer's end."""
    status: int = 0
    complete: bool = False
    """The whole answer was sent."""

    def line(self) -> str:
        return json.dumps({k: v for k, v in asdict(self).items() if v is not None})


current: ContextVar[Record | None] = ContextVar("record", default=None)
"""Of the request in whose task this runs."""
client: ContextVar[Client | None] = ContextVar("client", default=None)
"""Who asks; None where no keys are wanted."""


def request_id(given: str | None) -> str:
    """The client's, if it is one that a log can hold, else a new one."""
    return given if given and _ID.fullmatch(given) else secrets.token_hex(16)


def access_log(path: Path) -> logging.Logger:
    """One line a request, into a file that may be moved away meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = logging.getLogger("preheat.access")
    log.propagate = False
    log.setLevel(logging.INFO)
    log.handlers = [logging.handlers.WatchedFileHandler(path, encoding="utf-8")]
    return log
