"""An answer is taken from the host as fast as it comes, however slowly its reader reads: so that
who is slow holds nobody's place.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any

from preheat.errors import Unreachable
from preheat.gateway.backend import Answer
from preheat.protocol.events import CONTENT_TYPE

NO_PREVIEWS = 1 << 18
"""Bytes of a stream that its reader is behind: it gets no more previews."""
CUT_OFF = 1 << 26
"""A stream of events ends there: more than a picture's worth of pixels waits. Of another answer no
more is taken until its reader has read.
"""


class _Behind:
    """What has come and was not read."""

    def __init__(self) -> None:
        self.size = 0
        self._parts: deque[bytes] = deque()
        self._more = asyncio.Event()
        self._less = asyncio.Event()
        self._source: asyncio.Task[None] | None = None

    def add(self, part: bytes) -> None:
        self._parts.append(part)
        self.size += len(part)
        self._more.set()

    async def room(self) -> None:
        """Wait until less than `CUT_OFF` is here; the connection's own timer ends who never reads
        (`connections.Patience.reader`).
        """
        while self.size > CUT_OFF:
            self._less.clear()
            await self._less.wait()

    def end(self, source: asyncio.Task[None]) -> None:
        """Nothing more comes of it; what it raised is raised to the reader."""
        self._source = source
        self._more.set()

    async def read(self) -> AsyncIterator[bytes]:
        while True:
            while self._parts:
                part = self._parts.popleft()
                self.size -= len(part)
                self._less.set()
                yield part
            if self._source is not None:
                self._source.result()
                return
            self._more.clear()
            await self._more.wait()


@asynccontextmanager
async def unhurried(call: AbstractAsyncContextManager[Answer]) -> AsyncIterator[Answer]:
    """The answer of `call`, whose context ends as soon as the host has said all of it. Leaving
    this context takes the call back.
    """
    first: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    behind = _Behind()
    pump = asyncio.create_task(_pump(call, first, behind))
    pump.add_done_callback(behind.end)
    try:
        either: set[asyncio.Future[Any]] = {first, pump}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not first.done():
            pump.result()  # raises why there is no answer
        yield replace(first.result(), parts=behind.read())
    finally:
        pump.cancel()
        await asyncio.gather(pump, return_exceptions=True)


async def _pump(
    call: AbstractAsyncContextManager[Answer], first: asyncio.Future[Answer], behind: _Behind
) -> None:
    async with call as answer:
        first.set_result(answer)
        is_events = answer.headers.get("content-type", "").startswith(CONTENT_TYPE)
        parts = _without_late_previews(answer.parts, behind) if is_events else answer.parts
        async for part in parts:
            behind.add(part)
            if is_events and behind.size > CUT_OFF:
                raise Unreachable(f"the reader is {behind.size} bytes behind: cut off")
            await behind.room()


async def _without_late_previews(
    parts: AsyncIterator[bytes], behind: _Behind
) -> AsyncIterator[bytes]:
    """Whole lines; while the reader is behind, those with a preview are left out."""
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if behind.size < NO_PREVIEWS or b'"preview"' not in line:
                yield line + b"\n"
    if rest:
        yield rest
