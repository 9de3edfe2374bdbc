"""Who comes in: a request's id, its key, and its line in the access log."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from ipaddress import ip_address
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from preheat.errors import RequestError
from preheat.gateway import errors
from preheat.gateway.keys import Keys, bearer
from preheat.gateway.record import LEFT, REQUEST_ID, Record, client, current, request_id

OPEN = ("/health", "/v2", "/warmup", "/metrics")
"""Paths, with all below them, that want no key, as `/` does: probes have none."""


class Door:
    """An ASGI middleware, the outermost. Without `keys` everybody may ask, except for other sites'
    pages in the browser of who may.

    Args:
        local: only by the names of this machine: another name that leads here is a page's that
            would read what is answered (DNS rebinding).
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys | None = None,
        access: logging.Logger | None = None,
        local: bool = False,
    ) -> None:
        self._app, self._keys, self._access, self._local = app, keys, access, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = Record(request_id(headers.get(REQUEST_ID)))
        record.method, record.path = scope["method"], scope["path"]
        begun = time.perf_counter()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = record.id
                record.status = message["status"]
            await send(message)
            if message["type"] == "http.response.body":
                record.complete = not message.get("more_body", False)

        holds, asks = current.set(record), client.set(None)
        try:
            self._admit(scope["path"], headers, record)
            await self._app(scope, receive, named)
        except RequestError as error:
            await errors.refused(Request(scope), error)(scope, receive, named)
        except Exception:  # a fault of ours: the server answers it, outside of all middlewares
            record.status = record.status or 500
            raise
        finally:
            current.reset(holds)
            client.reset(asks)
            record.seconds = round(time.perf_counter() - begun, 4)
            record.status = record.status or LEFT
            if self._access is not None and not _is_open(scope["path"]):
                self._access.info("%s", record.line())

    def _admit(self, path: str, headers: Mapping[str, str], record: Record) -> None:
        """Let it in, or raise `RequestError`."""
        if self._keys is None:
            self._check_origin(headers)
        elif not _is_open(path):
            key = bearer(headers)
            if key is None:
                raise RequestError("needs a key: Authorization: Bearer <key>", None, 401)
            found = self._keys.find(key)
            if found is None:
                raise RequestError("this key is not known here", None, 401)
            client.set(found)
            record.key = found.name

    def _check_origin(self, headers: Mapping[str, str]) -> None:
        host = headers.get("host", "")
        if self._local and not is_loopback(_split("host", f"//{host}").hostname or ""):
            raise RequestError("only this machine's own names lead here", None, 403)
        origin = headers.get("origin")
        if origin is not None and _split("origin", origin).netloc != host:
            raise RequestError("another site's page may not ask", None, 403)


def is_loopback(host: str) -> bool:
    """Whether it names this machine for itself alone; another name may lead anywhere."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _split(name: str, url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        raise RequestError("is no such thing", name) from None


def _is_open(path: str) -> bool:
    return path == "/" or any(path == each or path.startswith(f"{each}/") for each in OPEN)
