"""What the worker counts, as a Prometheus server adds it up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest

from preheat.worker import metrics
from preheat.worker.metrics import BOUNDS, Metrics
from preheat.worker.state import ServerState


class Port:
    """The metrics port: samples by name and labels."""

    def __init__(self) -> None:
        self.samples: dict[str, Counter[tuple[str, ...]]] = {}

    def __call__(
        self, kind: str, name: str, value: float, unit: str, dimensions: Mapping[str, str]
    ) -> None:
        self.samples.setdefault(name, Counter())[tuple(dimensions.values())] += value  # type: ignore[assignment]

    def within(self, bucket: str) -> dict[str, float]:
        """Requests of a bucket by the bound that they kept to."""
        rows = self.samples["preheat_request_seconds_bucket"]
        return {le: num for (name, le), num in rows.items() if name == bucket}


class Clock:
    """Both clocks that the metrics read, as the test wants them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 1000.0
        monkeypatch.setattr(metrics, "perf_counter", lambda: self.seconds)
        monkeypatch.setattr(metrics, "time", lambda: 1.7e9 + self.seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def counted() -> tuple[Metrics, Port]:
    port = Port()
    told = Metrics(port)
    told.expect(["64x64", "96x96"], [])
    told.ready(ServerState("0", "pipeline", "buckets"))
    return told, port


def test_latencies_add_up_as_a_histogram_with_every_bound_from_the_start(clock: Clock) -> None:
    told, port = counted()
    bounds = {*(f"{bound:g}" for bound in BOUNDS), "+Inf"}
    assert port.within("64x64") == port.within("96x96") == dict.fromkeys(bounds, 0)
    for seconds in (0.01, 6.0, 299.0, 1000.0):
        arrivals = [told.took({})]
        clock.seconds += seconds
        told.left(arrivals, ["64x64"])
    within = port.within("64x64")
    assert set(within) == bounds
    assert [within[le] for le in ("0.01", "5", "10", "120", "300", "+Inf")] == [1, 1, 2, 2, 3, 4]
    assert port.samples["preheat_request_seconds_sum"]["64x64",] == pytest.approx(1305.01)
    assert sum(port.within("96x96").values()) == 0


def test_only_what_was_served_counts_and_a_size_that_is_no_bucket_is_no_label(
    clock: Clock,
) -> None:
    told, port = counted()
    told.left([told.took({}) for _ in range(2)], ["7x9", None])
    assert port.within("none")["+Inf"] == 1 and port.within("64x64")["+Inf"] == 0
    assert port.within("7x9") == {}


@pytest.mark.parametrize(
    ("header", "waited"),
    [
        ("t=1700000990", 10),
        ("t=1700000990.000", 10),
        ("1700000990000", 10),
        ("t=1700000990000000", 10),
        ("", 0),
        ("yesterday", 0),
        ("nan", 0),
        ("t=-inf", 0),
        ("t=1700001010", 0),
        ("t=0", 0),
    ],
)
def test_the_clock_starts_when_the_proxy_says_so_if_that_can_be(
    header: str, waited: float, clock: Clock
) -> None:
    told, port = counted()
    told.left([told.took({"x-request-start": header})], ["64x64"])
    assert port.samples["preheat_request_seconds_sum"]["64x64",] == pytest.approx(waited)


def test_a_worker_that_starts_is_counted_before_it_is_ready() -> None:
    port = Port()
    Metrics(port).start()
    assert port.samples == {"preheat_worker_starts_total": Counter({(): 1})}
