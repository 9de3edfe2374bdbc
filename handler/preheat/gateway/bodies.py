"""Requests' bodies, of which none grows over a limit."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from preheat.errors import RequestError

MAX_BYTES = 33_554_432
"""As `max_request_size` in archive/config.properties: TorchServe takes no more."""
_DRAINED = 4
"""Times the limit that is read and thrown away: who is cut off while it sends sees no answer."""


class BodyLimit:
    """An ASGI middleware: who reads a body of more than `max_bytes` gets a `RequestError` of code
    413.
    """

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BYTES) -> None:
        self._app, self._max = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size <= self._max:
                return message
            while message.get("more_body") and size <= _DRAINED * self._max:
                message = await receive()
                size += len(message.get("body", b""))
            raise RequestError(f"has more than {self._max} bytes, which are allowed", "body", 413)

        await self._app(scope, limited, send)
