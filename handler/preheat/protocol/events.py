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

    @property
    def num_kept(self) -> int:
        """Bytes that wait for the end; 0 where they are sent as they happen."""
        return sum(map(len, self._kept))

    @property
    def is_live(self) -> bool:
        """Whether each event is a part of the answer by itself."""
        return self._send is not None

    def drop_kept(self) -> None:
        """Say nothing of what waits for the end."""
        self._kept.clear()

    def close(self, last: str, /, **fields: object) -> Response:
        """The last event, which is the response, after whatever was kept."""
        return self._part(b"".join([*self._kept, _line(last, fields)]))

    def _part(self, body: bytes) -> Response:
        return Response(200, body, self._headers)


def _line(event: str, fields: Mapping[str, object]) -> bytes:
    return json.dumps({"event": event, **fields}).encode() + b"\n"
