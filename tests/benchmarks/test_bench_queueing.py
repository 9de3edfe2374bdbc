"""The simulated queue: what no host could make better."""

from __future__ import annotations

import random
from collections.abc import Hashable

import pytest

from bench.queueing import simulate, sorted_beforehand
from preheat.gateway.queue import Limits

COST = {"square": 1.0, "tall": 1.4, "wide": 2.0}


def _seconds(group: Hashable, rows: int) -> float:
    """A run has a cost of its own, and one of each row."""
    return COST[str(group)] * (0.4 + 0.15 * rows)


@pytest.fixture(scope="module")
def asked() -> list[str]:
    return random.Random(0).choices(list(COST), k=400)


def test_one_client_waits_for_its_own_runs_alone() -> None:
    simulated = simulate(
        ["square", "wide"], num_clients=1, limits=Limits(1, 4, settle=0.01), seconds=_seconds
    )
    assert simulated.seconds == pytest.approx(0.01 + 0.55 + 0.01 + 1.1)
    assert simulated.p99_wait == pytest.approx(1.11)


def test_one_bucket_reaches_what_sorting_reaches() -> None:
    asked = ["square"] * 80
    simulated = simulate(asked, num_clients=8, limits=Limits(1, 4), seconds=_seconds)
    assert simulated.per_second == pytest.approx(sorted_beforehand(asked, 4, _seconds))


@pytest.mark.parametrize("num_clients", [8, 32])
def test_mixed_sizes_come_nearer_to_sorting_with_the_queue(
    asked: list[str], num_clients: int
) -> None:
    limits = Limits(1, 4)
    best = sorted_beforehand(asked, 4, _seconds)
    with_queue, without = (
        simulate(asked, num_clients=num_clients, limits=limits, seconds=_seconds, queued=queued)
        for queued in (True, False)
    )
    assert without.per_second < with_queue.per_second <= best
    assert with_queue.per_second > {8: 0.82, 32: 0.95}[num_clients] * best


def test_two_workers_do_twice_the_work(asked: list[str]) -> None:
    one, two = (
        simulate(asked, num_clients=32 * workers, limits=Limits(workers, 4), seconds=_seconds)
        for workers in (1, 2)
    )
    assert two.per_second / one.per_second == pytest.approx(2, rel=0.05)


def test_no_clients_are_no_simulation() -> None:
    with pytest.raises(ValueError, match="0 clients"):
        simulate(["square"], num_clients=0, limits=Limits(), seconds=_seconds)
