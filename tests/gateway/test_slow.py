"""Readers that read slowly, or not at all, hold nobody's place."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from preheat.errors import RequestError, Unreachable
from preheat.gateway import slow
from preheat.gateway.backend import Answer
from preheat.gateway.slow import unhurried

EVENTS = {"content-type": "application/x-ndjson"}


class Call:
    """A host's answer."""

    def __init__(self, parts: list[bytes], headers: dict[str, str] | None = None) -> None:
        self.parts, self.headers = parts, headers or {}
        self.said = 0
        self.ended = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Answer]:
        try:
            yield Answer(200, self.headers, self._say())
        finally:
            self.ended.set()

    async def _say(self) -> AsyncIterator[bytes]:
        for part in self.parts:
            await self.go.wait()
            self.said += 1
            yield part


def test_the_host_is_done_before_its_reader_begins() -> None:
    async def body() -> None:
        call = Call([b"a", b"b"])
        async with unhurried(call.open()) as answer:
            await asyncio.wait_for(call.ended.wait(), 20)
            assert await answer.read() == b"ab"

    asyncio.run(body())


def test_who_is_behind_loses_previews_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow, "NO_PREVIEWS", 100)
    events = [{"event": "step", "step": n, "preview": "x" * 60} for n in range(4)]
    events += [{"event": "step", "step": 9}, {"event": "image"}, {"event": "done"}]
    whole = b"".join(json.dumps(event).encode() + b"\n" for event in events)

    async def body() -> None:
        call = Call([whole[:50], whole[50:120], whole[120:]], EVENTS)
        async with unhurried(call.open()) as answer:
            await asyncio.wait_for(call.ended.wait(), 20)
            lines = (await answer.read()).splitlines()
            assert [json.loads(line) for line in lines] == [events[0], *events[4:]]

    asyncio.run(body())


def test_a_whole_answer_waits_for_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow, "CUT_OFF", 10)

    async def body() -> None:
        call = Call([b"x" * 8] * 5)
        async with unhurried(call.open()) as answer:
            for _ in range(20):
                await asyncio.sleep(0)
            assert call.said == 2
            assert await asyncio.wait_for(answer.read(), 20) == b"x" * 40

    asyncio.run(body())


def test_a_streams_reader_too_far_behind_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow, "CUT_OFF", 10)

    async def body() -> None:
        call = Call([b"x" * 7 + b"\n"] * 5, EVENTS)
        async with unhurried(call.open()) as answer:
            await asyncio.wait_for(call.ended.wait(), 20)
            with pytest.raises(Unreachable, match="bytes behind"):
                await answer.read()

    asyncio.run(body())


def test_who_leaves_takes_the_call_back() -> None:
    async def body() -> None:
        call = Call([b"a"])
        call.go.clear()
        async with unhurried(call.open()):
            pass
        assert call.ended.is_set()

    asyncio.run(body())


def test_a_refusal_comes_through() -> None:
    @asynccontextmanager
    async def refuses() -> AsyncIterator[Answer]:
        raise RequestError("is wrong", "prompt")
        yield

    async def body() -> None:
        with pytest.raises(RequestError, match="prompt is wrong"):
            async with unhurried(refuses()):
                pass

    asyncio.run(body())
