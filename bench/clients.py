"""Clients that ask in a closed loop (each waits for its answer) or an open one (they come when they
come), and what they saw.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from preheat.torchserve.client import Client, Reply
from preheat.torchserve.server import TorchServe

Protocol = Literal["rest", "grpc"]
Payload = Mapping[str, Any]
MAX_CLIENTS = 96
"""Threads of an open loop. Less than TorchServe's queue of 100, which refuses what comes on top."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as its client saw it; `milliseconds` count from when it was due."""

    milliseconds: float
    good: bool


@dataclass(frozen=True, slots=True)
class Traffic:
    """All requests of one run, and the seconds from the first that was sent to the last that was
    answered.
    """

    seen: Sequence[Seen]
    seconds: float

    @property
    def num_good(self) -> int:
        return sum(one.good for one in self.seen)


def closed_loop(
    running: TorchServe,
    payloads: Sequence[Payload],
    protocol: Protocol,
    num_clients: int,
    seconds: float,
    *,
    url: str | None = None,
) -> Traffic:
    """`num_clients` clients, each with one request under way, until `seconds` are over; they share
    one queue of payloads. `url`: of a gateway, which is asked instead of the server.
    """
    door = {"inference": url} if url is not None else {}
    numbers, lock = itertools.count(), threading.Lock()
    first: list[float] = []
    gate = threading.Barrier(num_clients, action=lambda: first.append(time.perf_counter()))

    def work() -> list[tuple[float, Seen]]:
        seen = []
        with Client.to(running, **door) as client:
            ask = _asker(client, protocol)
            ask({})  # refused, so that the connection is there and nothing was generated
            gate.wait()
            while time.perf_counter() - first[0] < seconds:
                with lock:
                    number = next(numbers)
                due = time.perf_counter()
                good = _good(ask(payloads[number % len(payloads)]))
                done = time.perf_counter()
                seen.append((done, Seen(1000 * (done - due), good)))
        return seen

    with ThreadPoolExecutor(num_clients) as pool:
        answers = [
            one for task in [pool.submit(work) for _ in range(num_clients)] for one in task.result()
        ]
    return Traffic([seen for _, seen in answers], max(done for done, _ in answers) - first[0])


def open_loop(
    running: TorchServe,
    payloads: Sequence[Payload],
    protocol: Protocol,
    rate: float,
    seconds: float,
    seed: int,
) -> Traffic:
    """Requests at `rate` a second on average, at random moments, whether or not earlier ones have
    been answered.

    One that must wait for a free client waits on its own time: latencies count from the moment a
    request was due.
    """
    dues = arrivals(rate, seconds, seed)
    with Client.to(running) as client, ThreadPoolExecutor(MAX_CLIENTS) as pool:
        ask = _asker(client, protocol)
        ask({})
        begun = time.perf_counter()

        def work(number: int, due: float) -> tuple[float, Seen]:
            good = _good(ask(payloads[number % len(payloads)]))
            done = time.perf_counter() - begun
            return done, Seen(1000 * (done - due), good)

        tasks = []
        for number, due in enumerate(dues):
            time.sleep(max(0.0, begun + due - time.perf_counter()))
            tasks.append(pool.submit(work, number, due))
        answers = [task.result() for task in tasks]
    return Traffic([seen for _, seen in answers], max(done for done, _ in answers))


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Moments in seconds from the start, of a Poisson process; at least one."""
    rng = random.Random(seed)
    moments = list(
        itertools.takewhile(lambda due: due < seconds, itertools.accumulate(_gaps(rng, rate)))
    )
    return moments or [0.0]


def _gaps(rng: random.Random, rate: float) -> Iterator[float]:
    while True:
        yield rng.expovariate(rate)


def _asker(client: Client, protocol: Protocol) -> Callable[[Payload], Reply]:
    return client.predict if protocol == "rest" else client.predict_grpc


def _good(reply: Reply) -> bool:
    """A picture: JSON is a refusal here, since nobody asks for base64."""
    return reply.status in (0, 200) and reply.body[:1] != b"{"
