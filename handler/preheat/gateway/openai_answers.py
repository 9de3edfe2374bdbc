"""A worker's answers as OpenAI's images API gives them: pictures in JSON, and events as they
happen.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType
from typing import Any

from preheat.errors import RunError
from preheat.gateway import openai_replies
from preheat.gateway.backend import Answer
from preheat.gateway.relay import Reply

THEIR_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "num_images": "n",
        "mask_image": "mask",
        "mask_channel": "mask",
        "num_previews": "partial_images",
        "height": "size",
        "width": "size",
    }
)
"""Of our fields, where OpenAI's have others."""
_SAID = {"quality": "auto", "background": "opaque"}
"""What clients read as given in every event."""
_TAIL = 2000
"""Bytes: more than a worker says after the pictures."""
_SIDES = re.compile(rb'"width": *(\d+), *"height": *(\d+)')
_NO_TOKENS = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
"""Clients read it as given too; nothing here is counted in tokens."""


async def pictures(answer: Answer) -> Reply:
    """All pictures in one document: the worker's, with what OpenAI's has beside."""
    if answer.status != 200:
        return await openai_replies.refusal(answer, THEIR_NAMES)
    headers = {**openai_replies.own(answer), "content-type": "application/json"}
    return Reply(200, headers, _completed(answer.parts))


async def _completed(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A worker's document with `created` and `size` at its end. Megabytes of base64 go through as
    they come: parsed and written anew they cost this process three times as much.
    """
    tail = b""
    async for part in parts:
        tail += part
        if len(tail) > _TAIL:
            yield tail[:-_TAIL]
            tail = tail[-_TAIL:]
    sides = _SIDES.search(tail)
    more = f', "created": {int(time.time())}'
    if sides is not None:
        more += f', "size": "{sides[1].decode()}x{sides[2].decode()}"'
    yield tail.rstrip()[:-1] + more.encode() + b"}"


class Events:
    """A stream: partial images out of previews, then the pictures, as server-sent events.

    Args:
        prefix: `image_generation` or `image_edit`.
        size: what was asked for, which events before the last say.
    """

    def __init__(self, prefix: str, size: str) -> None:
        self._prefix, self._size = prefix, size
        self._shown: Counter[int] = Counter()
        self._ended = False

    async def __call__(self, answer: Answer) -> Reply:
        if answer.status != 200:
            return await openai_replies.refusal(answer, THEIR_NAMES)
        return openai_replies.events(answer, self._events(answer.parts))

    async def _events(self, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            async for event in openai_replies.told(parts):
                yield self._told(event)
        except RunError as error:
            yield self._failed(error.body())
        if not self._ended:
            yield self._failed({"message": "the worker ended before its answer did"})

    def _told(self, event: Mapping[str, Any]) -> bytes:
        kind = event["event"]
        if kind == "error":
            return self._failed(event)
        if kind == "image":
            facts = {name: value for name, value in event.items() if name != "event"}
            return self._event("completed", {**facts, "size": _size(event), "usage": _NO_TOKENS})
        if "preview" in event:
            index = event["index"]
            self._shown[index] += 1
            return self._event(
                "partial_image",
                {
                    "b64_json": event["preview"],
                    "partial_image_index": self._shown[index] - 1,
                    "index": index,
                    "size": self._size,
                    "output_format": "jpeg",
                },
            )
        self._ended = self._ended or kind == "done"
        # a comment: proxies see that it lives, clients skip it
        progress = f" {event['step']}/{event['of']}" if kind == "step" else ""
        return f": {kind}{progress}\n\n".encode()

    def _event(self, kind: str, fields: Mapping[str, Any]) -> bytes:
        name = f"{self._prefix}.{kind}"
        document = {"type": name, "created_at": int(time.time()), **_SAID, **fields}
        return f"event: {name}\ndata: {json.dumps(document)}\n\n".encode()

    def _failed(self, said: Mapping[str, Any]) -> bytes:
        self._ended = True
        document = openai_replies.failure(said, THEIR_NAMES)
        return f"event: error\ndata: {json.dumps(document)}\n\n".encode()


def _size(said: Mapping[str, Any]) -> str:
    return f"{said['width']}x{said['height']}"
