"""Connections that would never end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from fake_host import listening
from preheat.gateway.connections import Patience, protocol

HEAD = b"POST /whole HTTP/1.1\r\nhost: 127.0.0.1\r\n"


class App:
    def __init__(self) -> None:
        self.aborted = threading.Event()
        self.app = FastAPI()
        self.app.post("/whole")(self.whole)
        self.app.get("/endless")(self.endless)

    async def whole(self, request: Request) -> Response:
        return Response(str(len(await request.body())))

    async def endless(self, request: Request) -> Response:
        async def parts() -> object:
            try:
                while not await request.is_disconnected():
                    yield b"x" * 65_536
            finally:
                self.aborted.set()

        return StreamingResponse(parts())  # type: ignore[arg-type]


@contextmanager
def server(**patience: float) -> Iterator[tuple[App, str, Patience]]:
    own, app = Patience(**patience), App()  # type: ignore[arg-type]
    with listening(app.app, http=protocol(own)) as url:
        yield app, url, own


def _connect(url: str) -> socket.socket:
    address = httpx.URL(url)
    return socket.create_connection((address.host, address.port or 0), timeout=20)


def _rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    found = b""
    while part := connection.recv(65_536):
        found += part
    return found


@pytest.mark.parametrize("sent", [b"", b"POST /wh", HEAD])
def test_headers_that_do_not_end_are_not_waited_for(sent: bytes) -> None:
    with server(headers=0.2) as (_, url, _), _connect(url) as connection:
        connection.sendall(sent)
        assert _rest(connection).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_does_not_end_is_not_waited_for() -> None:
    with server(headers=0.2, body=0.4) as (_, url, _), _connect(url) as connection:
        connection.sendall(HEAD + b"content-length: 100\r\n\r\nabc")
        assert _rest(connection).startswith(b"HTTP/1.1 408 ")


def test_a_connection_that_is_kept_has_a_new_deadline_for_each_request() -> None:
    with server(headers=5, body=0.3) as (_, url, _), _connect(url) as connection:
        for _ in range(3):
            connection.sendall(HEAD + b"content-length: 4\r\n\r\nab")
            connection.sendall(b"cd")
            answer = b""
            while not answer.endswith(b"\r\n\r\n4"):
                answer += connection.recv(65_536)
        connection.sendall(HEAD + b"content-length: 4\r\n\r\nab")
        assert _rest(connection).startswith(b"HTTP/1.1 408 ")


def test_who_reads_nothing_is_cut_off() -> None:
    with server(reader=0.3) as (app, url, _), _connect(url) as connection:
        connection.sendall(b"GET /endless HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        assert app.aborted.wait(20)
        # others are served
        assert httpx.post(f"{url}/whole", content=b"abc", trust_env=False).text == "3"


def test_an_address_has_so_many_connections_and_gets_them_back() -> None:
    with server(per_address=3, headers=60) as (_, url, patience), ExitStack() as kept:
        first, *_ = [kept.enter_context(_connect(url)) for _ in range(3)]
        with _connect(url) as fourth:
            assert _rest(fourth).startswith(b"HTTP/1.1 429 ")
        first.sendall(HEAD + b"connection: close\r\ncontent-length: 0\r\n\r\n")
        assert b"200 OK" in _rest(first)
        first.close()
        with httpx.Client(base_url=url, trust_env=False) as http:
            assert http.post("/whole", content=b"ab").text == "2"
        assert sum(patience._open.values()) <= 3
