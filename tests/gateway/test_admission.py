"""Waiting for a place inside the host, in asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from preheat.errors import DeadlinePassed, QueueFull
from preheat.gateway.admission import UNKNOWN_SECONDS, Admission, Costs
from preheat.gateway.queue import Limits
from preheat.torchserve.overview import BucketView


def _run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(body, 20))


class Host:
    """Runs what it gets until told to stop."""

    def __init__(self, **limits: int) -> None:
        self.admission = Admission(Limits(**limits))
        self.inside: list[str] = []
        self.changed = asyncio.Condition()
        self.go_on = asyncio.Event()

    async def ask(self, name: str, group: str = "A", **seconds: float) -> str:
        async with self.admission.place("key", group, 0.01, **seconds):
            await self._note(name)
            await self.go_on.wait()
        return name

    async def _note(self, name: str) -> None:
        async with self.changed:
            self.inside.append(name)
            self.changed.notify_all()

    async def until(self, *names: str) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: self.inside == [*names])


def test_a_place_is_waited_for_and_given_back() -> None:
    async def body() -> None:
        host = Host()
        asked = [asyncio.create_task(host.ask(name)) for name in "abc"]
        await host.until("a", "b")
        assert host.admission.queue.num_queued == 1
        host.go_on.set()
        assert await asyncio.gather(*asked) == ["a", "b", "c"]
        assert host.admission.queue.num_inside == host.admission.queue.num_queued == 0

    _run(body())


def test_who_leaves_the_queue_never_reaches_the_host() -> None:
    async def body() -> None:
        host = Host()
        asked = [asyncio.create_task(host.ask(name)) for name in "abcd"]
        await host.until("a", "b")
        asked[2].cancel()
        asked[0].cancel()  # and who leaves the host makes room
        await host.until("a", "b", "d")
        host.go_on.set()
        await asyncio.gather(*asked, return_exceptions=True)
        assert [task.cancelled() for task in asked] == [True, False, True, False]

    _run(body())


def test_who_leaves_the_host_fills_its_place_while_it_paints() -> None:
    async def body() -> None:
        host = Host()
        asked = [asyncio.create_task(host.ask(name, held=0.05)) for name in "abc"]
        await host.until("a", "b")
        asked[0].cancel()
        await asyncio.wait({asked[0]})
        assert host.admission.queue.num_inside == 2 and host.admission.queue.num_queued == 1
        await host.until("a", "b", "c")
        host.go_on.set()  # who was answered keeps nothing
        await asyncio.gather(*asked[1:])
        assert host.admission.queue.num_inside == 0

    _run(body())


def test_who_leaves_before_it_is_sent_fills_no_place() -> None:
    async def body() -> None:
        host = Host()
        asked = [asyncio.create_task(host.ask(name, held=60.0)) for name in "abc"]
        await host.until("a", "b")
        host.admission.resize(Limits(num_workers=2))  # c has its turn, and has not been told
        assert host.admission.queue.num_inside == 3
        asked[2].cancel()
        await asyncio.wait({asked[2]})
        assert host.admission.queue.num_inside == 2
        host.go_on.set()
        await asyncio.gather(*asked[:2])
        assert host.inside == ["a", "b"]

    _run(body())


def test_a_deadline_ends_the_wait_though_nothing_else_happens() -> None:
    async def body() -> None:
        host = Host()
        asked = [asyncio.create_task(host.ask(name)) for name in "ab"]
        await host.until("a", "b")
        with pytest.raises(DeadlinePassed, match="turn did not come"):
            await host.ask("c", patience=0.05)
        host.go_on.set()
        await asyncio.gather(*asked)
        assert host.inside == ["a", "b"]

    _run(body())


def test_a_full_queue_refuses_and_more_workers_make_room() -> None:
    async def body() -> None:
        host = Host(max_queued=1)
        asked = [asyncio.create_task(host.ask(name)) for name in "abc"]
        await host.until("a", "b")
        with pytest.raises(QueueFull):
            await host.ask("d")
        host.admission.resize(Limits(num_workers=2))
        await host.until("a", "b", "c")
        host.go_on.set()
        await asyncio.gather(*asked)

    _run(body())


def test_work_is_what_the_workers_measured() -> None:
    rows = [
        BucketView("64x64", 1, "unet", "compiled", "", 0.1),
        BucketView("64x64", 4, "unet", "compiled", "", 0.2),
        BucketView("64x64", 4, "vae.decoder", "compiled", "", 0.1),
        BucketView("128x64", 4, "unet", "compiled", "", 0.4),
        BucketView("128x128", 4, "unet", "compiled", "", 0.0),
    ]
    costs = Costs.of(rows)
    assert costs.seconds("64x64", steps=10) == pytest.approx(10 * 0.2 / 4)
    assert costs.seconds("64x64", steps=10, rows=2) == pytest.approx(10 * 0.2 / 2)
    assert costs.seconds("9x9", steps=10) == pytest.approx(10 * 0.3 / 4)
    assert costs.seconds("128x128", steps=10) == costs.seconds("9x9", steps=10)
    assert Costs.of([]).seconds("64x64", steps=3) == 3 * UNKNOWN_SECONDS
