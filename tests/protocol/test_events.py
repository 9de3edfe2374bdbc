"""Answers in parts, whatever the family."""

from __future__ import annotations

import json

import pytest

from preheat.protocol.events import EventStream
from preheat.protocol.responses import Response

HEADERS = {"x-preheat-bucket": "sequence=16"}


@pytest.mark.parametrize("live", [True, False])
def test_the_client_reads_the_same_lines_at_once_or_at_the_end(live: bool) -> None:
    sent: list[Response] = []
    stream = EventStream(sent.append if live else None, HEADERS)
    stream.emit("queued")
    stream.emit("token", text="a\n", index=0)
    assert len(sent) == (2 if live else 0)
    parts = [*sent, stream.close("done", code=None)]
    assert b"".join(part.body for part in parts).splitlines(keepends=True) == [
        b'{"event": "queued"}\n',
        b'{"event": "token", "text": "a\\n", "index": 0}\n',
        b'{"event": "done", "code": null}\n',
    ]
    for part in parts:
        assert part.code == 200
        assert part.headers == {"content-type": "application/x-ndjson", **HEADERS}


def test_what_json_cannot_say_is_the_callers_fault() -> None:
    with pytest.raises(TypeError):
        EventStream(None, {}).emit("step", preview=b"")
    assert json.loads(EventStream(None, {}).close("done").body) == {"event": "done"}
