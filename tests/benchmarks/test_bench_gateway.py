"""The gateway's bench: its own arithmetic, and one round of things that answer as told."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from bench import gateway
from bench.clients import Payload, Seen, Traffic
from bench.gateway import Bench, Round, groups, run_seconds, summary, table, verdict
from bench.load import mix, payloads
from bench.profiles import PROFILES
from preheat.buckets import Bucket
from preheat.errors import PreheatError

TINY = PROFILES["tiny"]


def made(**over: float) -> Round:
    rates = {"bare": 10.0, "simulated": 8.0, "direct": 6.0, "gateway": 7.8}
    rates |= {"direct_uniform": 9.0, "gateway_uniform": 8.9, "direct_ms": 100.0}
    return Round(**{**rates, "gateway_ms": 103.0, **over})


def test_a_run_is_filled_up_to_the_rows_that_are_warmed() -> None:
    seconds = run_seconds({("tall", 1): 4.0, ("tall", 4): 8.0, ("wide", 4): 2.0})
    assert [seconds("tall", rows) for rows in (1, 2, 4)] == [0.25, 0.5, 0.5]
    assert seconds("wide", 1) == 2.0


def test_requests_belong_to_the_smallest_bucket_that_covers_them() -> None:
    buckets = [Bucket(256, 256), Bucket(320, 192)]
    assert groups([(200, 100), (300, 10), (250, 250)], buckets) == ["320x192", "320x192", "256x256"]
    with pytest.raises(ValueError, match="no bucket covers"):
        groups([(999, 1)], buckets)


def test_ratios_are_made_within_a_round_and_told_with_their_spread() -> None:
    document = summary([made(), made(gateway=7.6), made(gateway=4.0, simulated=4.0)])
    ratios = {name: ratio["median"] for name, ratio in document["ratios"].items()}
    assert ratios["of_simulation"] == pytest.approx(0.975)
    assert ratios["direct_of_bare"] == pytest.approx(0.6)
    assert document["added_ms"] == 3.0 and all(document["reached"].values())
    assert len(document["doubts"]) == 1 and "of_bare" in document["doubts"][0]
    shown = {"profile": "tiny", "batch": 4, **document}
    assert table(shown).row_count == 8 + 4
    assert verdict(shown) == (
        "97.5% of the simulation (95% reached); 98.9% of the throughput without it (97% reached); "
        "3.0 ms added (under 5 reached)"
    )
    missed = summary([made(gateway=7.0, gateway_uniform=8.0, gateway_ms=106.0)])
    assert not any(missed["reached"].values())


class Bare:
    """Each row of a run takes a tenth of a second, whatever its bucket."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def rate(self, traffic: str, batch_size: int, seconds: float) -> float:
        self.asked.append((traffic, batch_size))
        return 10.0


def bench(bare: Bare) -> Bench:
    traffics = mix(TINY)
    requests = {name: payloads(traffics[name], TINY) for name in ("mixed", "uniform")}
    running: Any = SimpleNamespace(front="http://gateway")
    return Bench(bare, running, requests, TINY, 4, 0.0, 9.0)  # type: ignore[arg-type]


def test_a_round_asks_directly_and_through_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, str | None]] = []

    def answers(
        running: Any,
        requests: Sequence[Payload],
        protocol: str,
        num_clients: int,
        seconds: float,
        *,
        url: str | None,
    ) -> Traffic:
        asked.append((len({(one["height"], one["width"]) for one in requests}), num_clients, url))
        each = 20.0 if url is None else 22.0
        return Traffic([Seen(each, True)] * 90, seconds * each / 20)

    monkeypatch.setattr(gateway, "closed_loop", answers)
    bare = Bare()
    found = bench(bare).round(2)
    assert (found.direct, found.direct_uniform, found.direct_ms) == (10.0, 10.0, 20.0)
    assert (found.gateway, found.gateway_uniform) == pytest.approx((10 / 1.1, 10 / 1.1))
    assert found.gateway_ms == 22.0
    assert 8 < found.simulated < 10, "three are filled up to four"
    assert {size for _, size in bare.asked} == {1, 2, 4} and ("mixed", 4) in bare.asked
    urls = [url for _, _, url in asked]
    assert urls.count(None) == urls.count("http://gateway") == 3
    assert sorted(clients for _, clients, _ in asked) == [1, 1, 8, 8, 8, 8]
    assert asked[0][2] is None and asked[0][0] > 3, "the third of them begins the third round"


def test_a_round_with_a_refusal_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = Traffic([Seen(1.0, True), Seen(1.0, False)], 1.0)
    monkeypatch.setattr(gateway, "closed_loop", lambda *_, **__: refused)
    with pytest.raises(PreheatError, match="1 of 2 requests failed"):
        bench(Bare()).round(0)
