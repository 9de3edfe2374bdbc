"""A backend with a queue before it: who waits here costs the host nothing."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from preheat.errors import Unreachable
from preheat.gateway.admission import Admission, Costs
from preheat.gateway.asked import Asked, Model, read
from preheat.gateway.backend import Answer, Backend, Call, Health
from preheat.gateway.queue import Entry, Limits, Queue
from preheat.gateway.record import client, current
from preheat.gateway.slow import unhurried
from preheat.protocol.fields import DEADLINE_HEADER, parse_deadline
from preheat.torchserve.overview import ModelView

logger = logging.getLogger(__name__)

FRESH = 2.0
"""Seconds after which the host is looked at again."""
TRAVEL = 0.02
"""Seconds from here to the host's queue, at most as a rule: it collects so much later."""
ANYBODY = ""
"""The queue's key of who needs none."""


@dataclass(slots=True)
class _Host:
    """A model's places, and what its workers say of it."""

    admission: Admission
    model: Model
    costs: Costs
    drops_left: bool
    """It stops painting for who has left: continuous batching."""


class Queued:
    """A `Backend` before another one. `max_queued` requests wait for each model, and
    `max_queued_per_key` of one key.
    """

    def __init__(self, inner: Backend, *, max_queued: int = 100, max_queued_per_key: int = 100):
        self._inner, self._max_queued, self._per_key = inner, max_queued, max_queued_per_key
        self._hosts: dict[str, _Host] = {}
        self._looked = -math.inf
        self._has_seen = False
        self._looking: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def predict(self, call: Call) -> AsyncIterator[Answer]:
        host = await self._host(call.model)
        if host is None:  # the host says that there is no such model
            async with self._inner.predict(call) as answer:
                yield answer
            return
        deadline = parse_deadline(call.headers.get(DEADLINE_HEADER))
        asked = await read(call.body, call.headers.get("content-type", ""), host.model)
        record, who = current.get(), client.get()
        if record is not None:
            record.model, record.height, record.width = call.model, asked.height, asked.width
            record.steps, record.images = asked.steps, asked.num_images
        if who is not None:
            who.spend(asked.pixel_steps)
        patience = math.inf if deadline is None else deadline - time.time()
        name = who.name if who is not None else ANYBODY
        seconds = _seconds(host, asked)
        held = 0.0 if host.drops_left else host.admission.run_seconds(seconds)
        turn = host.admission.place(name, asked.group, seconds, patience, held)
        async with unhurried(self._served(turn, call)) as answer:
            yield answer

    @asynccontextmanager
    async def _served(
        self, turn: AbstractAsyncContextManager[Entry], call: Call
    ) -> AsyncIterator[Answer]:
        """The answer when its turn has come; the place is free when it ends."""
        record, came = current.get(), time.monotonic()
        async with turn:
            if record is not None:
                record.queued_seconds = round(time.monotonic() - came, 4)
            async with self._inner.predict(call) as answer:
                if record is not None:
                    record.bucket = answer.headers.get("x-preheat-bucket", "")
                    record.engine = answer.headers.get("x-preheat-engine", "")
                yield answer

    async def _host(self, model: str) -> _Host | None:
        """What is known of it; looked at again in the background, for the first time at once.

        Raises:
            Unreachable: no look has succeeded yet, so neither prices nor places are known.
        """
        is_due = not self._has_seen or time.monotonic() - self._looked > FRESH
        if self._looking is None and is_due:
            self._looking = asyncio.create_task(self._look())
        if model not in self._hosts and self._looking is not None:
            await asyncio.shield(self._looking)
        if not self._has_seen:
            raise Unreachable("the workers have not been seen yet; send it again later")
        return self._hosts.get(model)

    async def _look(self) -> None:
        try:
            views = await self._inner.overview()
        except Unreachable as error:
            logger.warning("the queue knows of the workers what it knew before: %s", error)
        else:
            self._has_seen = True
            for view in views:
                self._update(view)
            for gone in self._hosts.keys() - {view.model for view in views}:
                del self._hosts[gone]
        finally:
            self._looked, self._looking = time.monotonic(), None

    def _update(self, view: ModelView) -> None:
        rows = [row for worker in view.workers for row in worker.buckets]
        defaults = next((w.request_defaults for w in view.workers if w.request_defaults), {})
        has_slots = "slots" in defaults
        limits = self._limits(view, has_slots=has_slots)
        model, costs = Model.of([row.bucket for row in rows], defaults), Costs.of(rows)
        known = self._hosts.get(view.model)
        if known is None:
            self._hosts[view.model] = _Host(Admission(limits), model, costs, has_slots)
            return
        if rows:  # while its only worker starts again, it is as it was
            known.model, known.costs, known.drops_left = model, costs, has_slots
        if limits != known.admission.queue.limits:
            known.admission.resize(limits)

    def _limits(self, view: ModelView, *, has_slots: bool) -> Limits:
        """Slots take a request as soon as one is free, whatever the others are doing: each is a
        worker for runs of one.
        """
        workers, size = max(1, view.ready or view.wanted), max(1, view.batch_size)
        return Limits(
            num_workers=workers * size if has_slots else workers,
            batch_size=1 if has_slots else size,
            settle=0.0 if has_slots else view.max_batch_delay + TRAVEL,
            max_queued=self._max_queued,
            max_queued_per_key=self._per_key,
        )

    async def models(self) -> list[str]:
        return await self._inner.models()

    async def overview(self) -> list[ModelView]:
        return await self._inner.overview()

    async def health(self) -> Health:
        return await self._inner.health()

    async def metrics(self) -> bytes:
        theirs = await self._inner.metrics()
        return theirs + "".join(f"{line}\n" for line in self._lines()).encode()

    def _lines(self) -> Iterator[str]:
        queues = {name: host.admission.queue for name, host in self._hosts.items()}
        gauges: tuple[tuple[str, str, Callable[[Queue], float]], ...] = (
            ("queued", "Requests that wait at the gateway.", lambda q: q.num_queued),
            ("inside", "Requests inside the host.", lambda q: q.num_inside),
            ("queued_seconds", "Seconds of work that wait.", lambda q: round(q.seconds_queued, 6)),
        )
        for name, text, value in gauges:
            yield f"# HELP preheat_gateway_{name} {text}"
            yield f"# TYPE preheat_gateway_{name} gauge"
            for model, queue in queues.items():
                yield f'preheat_gateway_{name}{{ModelName="{model}"}} {value(queue)}'

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        await self._inner.close()


def _seconds(host: _Host, asked: Asked) -> float:
    return host.costs.seconds(str(asked.bucket), asked.steps, asked.num_images)
