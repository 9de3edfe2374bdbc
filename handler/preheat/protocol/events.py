"""An answer in parts: newline-delimited JSON, a line an event, sent as it happens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from preheat.protocol.responses import Response

CONTENT_TYPE = "application/x-ndjson"


class EventStream:
    """The events of one job.

    Args:
        send: takes a part of the answer at once; None keeps all lines for its end.
        headers: what can be said before anything is computed, for TorchServe sends the headers of
            the first part.
    """

    def __init__(self, send: Callable[[Response], None] | None, headers: Mapping[str, str]) -> None:
        self._send = send
        self._headers = {"content-type": CONTENT_TYPE, **headers}
        self._kept: list[bytes] = []

    def emit(self, event: str, /, **fields: object) -> None:
        line = _line(event, fields)
        if self._send is None:
            self._kept.append(line)
        else:
            self._send(self._part(line))

    def close(self, last: str, /, **fields: object) -> Response:
        """The last event, which is the response, after whatever was kept."""
        return self._part(b"".join([*self._kept, _line(last, fields)]))

    def _part(self, body: bytes) -> Response:
        return Response(200, body, self._headers)


def _line(event: str, fields: Mapping[str, object]) -> bytes:
    return json.dumps({"event": event, **fields}).encode() + b"\n"
