"""A call on its way to the host and its answer on the way back, in one task: it ends with the
client.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import NamedTuple

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from preheat.gateway.backend import Answer, Backend, Call

logger = logging.getLogger(__name__)


class Reply(NamedTuple):
    """What the client gets."""

    status: int
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]


Shape = Callable[[Answer], Awaitable[Reply]]
"""How the host's answer is told to the client."""


async def as_it_is(answer: Answer) -> Reply:
    return Reply(answer.status, answer.headers, answer.parts)


async def whole(body: bytes) -> AsyncIterator[bytes]:
    yield body


class Relay(Response):
    """A response that asks `backend` when it is sent, and takes the call back if the client leaves,
    be it in the queue, while it is painted, or between two parts of a stream.

    The request's body has been read before.
    """

    def __init__(self, backend: Backend, call: Call, shape: Shape = as_it_is) -> None:
        super().__init__()
        self._backend, self._call, self._shape = backend, call, shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        relay = asyncio.create_task(self._relay(send))
        left = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({relay, left}, return_when=asyncio.FIRST_COMPLETED)
            if relay.done():
                relay.result()  # raises what it raised
            else:
                logger.info("the client of a call for %s left", self._call.model)
        finally:
            for task in (relay, left):
                task.cancel()
            await asyncio.gather(relay, left, return_exceptions=True)

    async def _relay(self, send: Send) -> None:
        async with self._backend.predict(self._call) as answer:
            reply = await self._shape(answer)
            headers = [(n.encode("latin-1"), v.encode("latin-1")) for n, v in reply.headers.items()]
            start = {"type": "http.response.start", "status": reply.status, "headers": headers}
            await send(start)
            async for part in reply.body:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
