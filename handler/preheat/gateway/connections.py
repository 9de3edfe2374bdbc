"""HTTP connections that end: uvicorn's own protocol waits for a request, and for its reader, as
long as they like.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

IN_KERNEL = 1 << 17
"""Bytes that wait there to be sent: of its usual megabytes a slow reader takes none out of ours for
minutes, and seems to stand still.
"""
_TIMEOUT = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_TOO_MANY = (
    b"HTTP/1.1 429 Too Many Requests\r\nconnection: close\r\nretry-after: 5\r\n"
    b"content-length: 0\r\n\r\n"
)


@dataclass(slots=True)
class Patience:
    """What connections may take; seconds."""

    headers: float = 10.0
    """From a request's first byte to its headers' end; of a new connection from its start."""
    body: float = 120.0
    """From there to the body's end."""
    reader: float = 60.0
    """Without a byte going out although there are some to send."""
    per_address: int = 256
    """Connections; all clients behind one proxy have one address."""
    total: int = 2048
    """Connections. If so many are open, one gives way to the next: of the address that owes most
    requests the one that has for longest. Who opens many and leaves them shuts nobody out.
    """
    _open: Counter[str] = field(default_factory=Counter)
    _owing: dict[str, dict[_Patient, None]] = field(default_factory=dict)
    """By address, the connections without a whole request, those that owe it for longest first."""

    def enter(self, address: str) -> bool:
        """Count a connection in, if it may."""
        if self._open[address] >= self.per_address:
            return False
        if self._open.total() >= self.total:
            found = self._to_give_way()
            if found is None:
                return False
            found.give_way()
        self._open[address] += 1
        return True

    def _to_give_way(self) -> _Patient | None:
        most_first = sorted(self._owing.values(), key=len, reverse=True)
        idle = (each for own in most_first for each in own if not each.is_answered)
        return next(idle, None)

    def owes(self, address: str, connection: _Patient) -> None:
        """From now on it is its client's turn."""
        self.has_asked(address, connection)
        self._owing.setdefault(address, {})[connection] = None

    def has_asked(self, address: str, connection: _Patient) -> None:
        """Its request is there as a whole, or never will be."""
        own = self._owing.get(address, {})
        own.pop(connection, None)
        if not own:
            self._owing.pop(address, None)

    def leave(self, address: str) -> None:
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]


def protocol(patience: Patience) -> type[H11Protocol]:
    """For uvicorn's `http=`: one server's connections."""

    class Patient(_Patient):
        own = patience

    return Patient


class _Patient(H11Protocol):
    own: Patience

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._address: str | None = None
        self._incoming: asyncio.TimerHandle | None = None
        self._outgoing: asyncio.TimerHandle | None = None
        self._unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        address = self.client[0] if self.client else ""
        if not self.own.enter(address):
            self._refuse(_TOO_MANY)
            return
        self._address = address
        self.own.owes(address, self)
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, IN_KERNEL)
        self._expect(self.own.headers)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._expect(None)
        if self._outgoing is not None:
            self._outgoing.cancel()
            self._outgoing = None
        self._depart()

    def give_way(self) -> None:
        """To another connection. Nothing is said: to who has asked for nothing, a refusal would be
        the answer to what comes next.
        """
        self._depart()
        self.transport.abort()

    def _depart(self) -> None:
        if self._address is not None:
            self.own.has_asked(self._address, self)
            self.own.leave(self._address)
            self._address = None

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return  # refused
        before = self.cycle
        if self._is_between and self._incoming is None:
            self._expect(self.own.headers)
        super().data_received(data)
        if self.cycle is not before:
            self._expect(None)
        self._expect_body()

    def on_response_complete(self) -> None:
        if self._address is not None:
            self.own.owes(self._address, self)
        self._expect(None)  # uvicorn's timer for kept connections takes over
        super().on_response_complete()
        self._expect_body()  # of a request that had come meanwhile
        self._watch()  # less than what pauses, and nothing more comes of it

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unsent = -1  # much went out, whatever has come since

    @property
    def is_answered(self) -> bool:
        """An answer is on its way."""
        return self._is_replied or self.transport.get_write_buffer_size() > 0

    @property
    def _is_replied(self) -> bool:
        return not self._is_between and bool(self.cycle.response_started)

    @property
    def _is_between(self) -> bool:
        """No request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def _expect_body(self) -> None:
        if self._is_between:
            return
        if not self.cycle.more_body:
            self._expect(None)
            if self._address is not None:
                self.own.has_asked(self._address, self)
        elif self._incoming is None:
            self._expect(self.own.body)

    def _expect(self, seconds: float | None) -> None:
        """What comes next is to be there in so many seconds; None: nothing has to come."""
        if self._incoming is not None:
            self._incoming.cancel()
        self._incoming = None if seconds is None else self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        self._incoming = None
        self._refuse(b"" if self._is_replied else _TIMEOUT)

    def _refuse(self, answer: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.close()
            self._watch()

    def _watch(self) -> None:
        """Look whether what is unsent gets less, until it is nothing."""
        if self._outgoing is None:
            self._unsent = self.transport.get_write_buffer_size()
            if self._unsent:
                self._outgoing = self.loop.call_later(self.own.reader, self._look)

    def _look(self) -> None:
        self._outgoing = None
        if self.transport.get_write_buffer_size() == self._unsent:
            logger.warning("%s reads nothing for %g s: cut off", self._address, self.own.reader)
            self.transport.abort()
        else:
            self._watch()
