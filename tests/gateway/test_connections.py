"""Connections that would never end."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from fake_host import listening
from preheat.gateway.connections import Patience, protocol

LARGE = 1 << 24
HEAD = b"POST /whole HTTP/1.1\r\nhost: 127.0.0.1\r\n"


class App:
    def __init__(self) -> None:
        self.aborted = threading.Event()
        self.app = FastAPI()
        self.app.post("/whole")(self.whole)
        self.app.get("/endless")(self.endless)
        self.app.get("/large")(self.large)

    async def whole(self, request: Request) -> Response:
        return Response(str(len(await request.body())))

    async def large(self) -> Response:
        return Response(b"x" * LARGE)

    async def endless(self, request: Request) -> Response:
        async def parts() -> object:
            try:
                while not await request.is_disconnected():
                    yield b"x" * 65_536
            finally:
                self.aborted.set()

        return StreamingResponse(parts())  # type: ignore[arg-type]


@contextmanager
def server(**patience: float) -> Iterator[tuple[App, str]]:
    own, app = Patience(**patience), App()  # type: ignore[arg-type]
    with listening(app.app, http=protocol(own)) as url:
        yield app, url


def _connect(url: str, source: str = "127.0.0.1") -> socket.socket:
    address = httpx.URL(url)
    place = (address.host, address.port or 0)
    return socket.create_connection(place, timeout=20, source_address=(source, 0))


def _rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    found = b""
    while part := connection.recv(65_536):
        found += part
    return found


@pytest.mark.parametrize("sent", [b"", b"POST /wh", HEAD])
def test_headers_that_do_not_end_are_not_waited_for(sent: bytes) -> None:
    with server(headers=0.2) as (_, url), _connect(url) as connection:
        connection.sendall(sent)
        assert _rest(connection).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_does_not_end_is_not_waited_for() -> None:
    with server(headers=0.2, body=0.4) as (_, url), _connect(url) as connection:
        connection.sendall(HEAD + b"content-length: 100\r\n\r\nabc")
        assert _rest(connection).startswith(b"HTTP/1.1 408 ")


def test_a_connection_that_is_kept_has_a_new_deadline_for_each_request() -> None:
    with server(headers=5, body=0.3) as (_, url), _connect(url) as connection:
        for _ in range(3):
            connection.sendall(HEAD + b"content-length: 4\r\n\r\nab")
            connection.sendall(b"cd")
            answer = b""
            while not answer.endswith(b"\r\n\r\n4"):
                answer += connection.recv(65_536)
        connection.sendall(HEAD + b"content-length: 4\r\n\r\nab")
        assert _rest(connection).startswith(b"HTTP/1.1 408 ")


def test_who_reads_nothing_is_cut_off() -> None:
    with server(reader=0.3) as (app, url), _connect(url) as connection:
        connection.sendall(b"GET /endless HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        assert app.aborted.wait(20)
        # others are served
        assert httpx.post(f"{url}/whole", content=b"abc", trust_env=False).text == "3"


def _small(url: str, path: str, size: int = 4096) -> socket.socket:
    """A connection that has asked for `path`, whose kernel takes `size` bytes unread."""
    address = httpx.URL(url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    connection.settimeout(20)
    connection.connect((address.host, address.port))
    connection.sendall(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())
    return connection


def test_who_reads_slowly_gets_it_all() -> None:
    """It lasts several times the timer's seconds, all paused: what is unsent is one part."""
    with server(reader=0.3) as (_, url), _small(url, "/large", 65_536) as connection:
        got, ends = 0, time.monotonic() + 1.2
        while time.monotonic() < ends:
            got += len(connection.recv(65_536))
            time.sleep(0.01)
        while got < LARGE:
            part = connection.recv(1 << 20)
            assert part, got
            got += len(part)


def test_the_end_of_an_answer_is_not_kept_for_who_does_not_read() -> None:
    own, app, unsent = Patience(reader=0.3), FastAPI(), list[Callable[[], int]]()
    cut_off = threading.Event()

    class Seen(protocol(own)):  # type: ignore[misc]
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            unsent.append(transport.get_write_buffer_size)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            cut_off.set()

    @app.get("/")
    async def some() -> Response:
        async def parts() -> AsyncIterator[bytes]:
            while not unsent[0]():
                yield b"x" * 8192

        return StreamingResponse(parts())  # it ends before anything pauses its writer

    with listening(app, http=Seen) as url, _small(url, "/") as connection:
        assert cut_off.wait(20) and connection.fileno() > 0  # not the client has closed it


def test_an_address_has_so_many_connections_and_gets_them_back() -> None:
    with server(per_address=3, headers=60) as (_, url), ExitStack() as kept:
        first, *_ = [kept.enter_context(_connect(url)) for _ in range(3)]
        with _connect(url) as fourth:
            assert _rest(fourth).startswith(b"HTTP/1.1 429 ")
        first.sendall(HEAD + b"connection: close\r\ncontent-length: 0\r\n\r\n")
        assert b"200 OK" in _rest(first)
        first.close()
        with httpx.Client(base_url=url, trust_env=False) as http:
            assert http.post("/whole", content=b"ab").text == "2"
        for _ in range(2):  # who was refused has given back no place either
            with _connect(url) as last, _connect(url) as one_more:
                assert _rest(one_more).startswith(b"HTTP/1.1 429 ") and last.fileno() > 0


def test_who_owes_a_request_for_longest_gives_way_when_all_places_are_taken() -> None:
    with server(total=3, headers=60) as (app, url), ExitStack() as kept:
        asks = kept.enter_context(_small(url, "/endless"))
        assert asks.recv(1)
        oldest, other = [kept.enter_context(_connect(url)) for _ in range(2)]
        oldest.sendall(HEAD)
        # who connects later is accepted later
        assert httpx.post(f"{url}/whole", content=b"abc", trust_env=False).text == "3"
        assert _rest(oldest) == b""
        other.sendall(HEAD + b"connection: close\r\ncontent-length: 0\r\n\r\n")
        assert b"200 OK" in _rest(other)
        assert asks.recv(1) and not app.aborted.is_set()


def test_who_owes_many_requests_gives_way_before_who_owes_one_for_longer() -> None:
    with server(total=4, headers=60) as (_, url), ExitStack() as kept:
        honest = kept.enter_context(_connect(url, "127.0.0.2"))
        for _ in range(12):
            kept.enter_context(_connect(url))
        honest.sendall(HEAD + b"connection: close\r\ncontent-length: 0\r\n\r\n")
        assert b"200 OK" in _rest(honest)


@pytest.mark.parametrize("path", ["/endless", "/large"])
def test_nobody_gives_way_who_is_being_answered(path: str) -> None:
    with server(total=2, headers=60) as (app, url), ExitStack() as kept:
        for _ in range(2):
            assert kept.enter_context(_small(url, path)).recv(1)
        assert _rest(kept.enter_context(_connect(url))).startswith(b"HTTP/1.1 429 ")
        assert not app.aborted.is_set()
