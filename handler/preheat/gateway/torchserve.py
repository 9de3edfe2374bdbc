"""TorchServe behind the gateway."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import httpx

from preheat.errors import RequestError, Unreachable, in_one_line
from preheat.gateway.backend import Answer, Call, Health
from preheat.gateway.headers import for_client
from preheat.gateway.tokens import Tokens
from preheat.protocol.json_text import shown_name
from preheat.status import Status, read_statuses
from preheat.torchserve import readiness
from preheat.torchserve.overview import ModelView, look

T = TypeVar("T")
HOST = "127.0.0.1"
_PORTS = {"inference": 8080, "management": 8081, "metrics": 8082}
FRESH = 0.5
"""Seconds for which what the management API said is good enough for the next who asks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where a TorchServe listens (URLs) and writes."""

    inference: str
    management: str
    metrics: str
    status_dir: Path | None = None
    """Where its workers write how far they are."""
    key_file: Path | None = None
    """Its key_file.json, where it wants tokens."""
    models: tuple[str, ...] | None = None
    """Those it serves once it is up; None: those that the management API lists."""

    @classmethod
    def of(
        cls,
        recorded: Mapping[str, Any],
        given: Mapping[str, str | None],
        key_file: Path | None,
        status_dir: str | None,
    ) -> Places:
        """Of a server that was started here, by what its `server.json` says; empty: of one on
        TorchServe's own ports.

        Args:
            given: URLs by name, which go over those.
            key_file: instead of the server's own.
            status_dir: where its workers write, if `recorded` says nothing of it.
        """
        ports = {**_PORTS, **recorded.get("ports", {})}
        inference, management, metrics = (
            (given.get(name) or f"http://{HOST}:{ports[name]}").rstrip("/") for name in _PORTS
        )
        folder = recorded.get("status_dir", status_dir)
        own = Path(recorded["run_dir"], "key_file.json") if recorded else None
        return cls(
            inference=inference,
            management=management,
            metrics=metrics,
            status_dir=Path(folder) if folder else None,
            key_file=key_file or own,
            models=tuple(recorded["models"]) if recorded else None,
        )


class TorchServeBackend:
    """A `Backend`; see there."""

    def __init__(self, places: Places) -> None:
        self._places = places
        # TorchServe ends a batch after responseTimeout, so no answer is waited for forever; a
        # proxy knows nothing of this loopback; the queue, not the pool, bounds who is inside.
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=10),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,
        )
        self._tokens = Tokens(places.key_file, places.management, self._http)
        self._health = _Fresh(self._ask_health)
        self._views = _Fresh(self._look)

    @asynccontextmanager
    async def predict(self, call: Call) -> AsyncIterator[Answer]:
        response = await self._send(call)
        try:
            yield Answer(response.status_code, for_client(response.headers), _parts(response))
        finally:
            await response.aclose()

    async def _send(self, call: Call) -> httpx.Response:
        path = _path(call)
        for renewed in (False, True):
            request = self._http.build_request(
                "POST",
                f"{self._places.inference}/predictions/{path}",
                content=call.body,
                headers={**call.headers, **await self._tokens.header("inference")},
            )
            try:
                response = await self._http.send(request, stream=True)
                # a token may end, or be renewed by somebody, between the file and TorchServe
                if renewed or not await self._is_token_refused(response):
                    return response
                await response.aclose()
            except httpx.TransportError as error:
                raise _unreachable(error) from error
        raise AssertionError("unreachable")

    async def _is_token_refused(self, response: httpx.Response) -> bool:
        if response.status_code not in (400, 401) or not self._tokens.wanted:
            return False
        return b"InvalidKeyException" in await response.aread()

    async def models(self) -> list[str]:
        return [view.model for view in await self.overview()]

    async def overview(self) -> list[ModelView]:
        try:
            return await self._views.get()
        except readiness.ERRORS as error:
            raise _unreachable(error) from error

    async def health(self) -> Health:
        return await self._health.get()

    async def _look(self) -> list[ModelView]:
        token = await self._tokens.get("management")
        server = readiness.Management(self._places.management, token)
        return await asyncio.to_thread(lambda: look(server, None, self._statuses()))

    async def _ask_health(self) -> Health:
        token = await self._tokens.get("management")
        return await asyncio.to_thread(self._check, token)

    def _check(self, token: str | None) -> Health:
        statuses, places = self._statuses(), self._places
        verdict = readiness.check(places.management, places.models, None, token, statuses=statuses)
        return Health(tuple(verdict.missing), tuple(each for each in statuses if each.alive))

    def _statuses(self) -> list[Status]:
        folder = self._places.status_dir
        return read_statuses(folder) if folder is not None else []

    async def metrics(self) -> bytes:
        try:
            response = await self._http.get(f"{self._places.metrics}/metrics", timeout=10)
        except httpx.TransportError as error:
            raise _unreachable(error) from error
        return response.content if response.is_success else b""

    async def close(self) -> None:
        await self._http.aclose()


class _Fresh(Generic[T]):
    """What `ask` gives, asked for once for all who want it within `FRESH` seconds."""

    def __init__(self, ask: Callable[[], Awaitable[T]]) -> None:
        self._ask = ask
        self._lock = asyncio.Lock()
        self._known: tuple[float, T] | None = None

    async def get(self) -> T:
        async with self._lock:
            if self._known is None or time.monotonic() > self._known[0]:
                value = await self._ask()
                self._known = (time.monotonic() + FRESH, value)
            return self._known[1]


def _path(call: Call) -> str:
    """Below `/predictions`.

    Raises:
        RequestError: a name that TorchServe gives no model, such as `..`, which leads elsewhere.
    """
    for field, name in (("model", call.model), ("version", call.version)):
        if name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
            raise RequestError(f"{shown_name(name)} is not here", field, 404)
    return call.model if call.version is None else f"{call.model}/{call.version}"


async def _parts(response: httpx.Response) -> AsyncIterator[bytes]:
    if response.is_stream_consumed:
        yield response.content
        return
    try:
        async for part in response.aiter_raw():
            yield part
    except httpx.TransportError as error:
        raise _unreachable(error) from error


def _unreachable(error: Exception) -> Unreachable:
    return Unreachable(f"TorchServe does not answer: {in_one_line(error) or type(error).__name__}")
