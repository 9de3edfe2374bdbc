"""API keys: hashes in a file, and quotas with a clock that the tests turn."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preheat.errors import GatewayError, QuotaSpent
from preheat.gateway.keys import Client, Keys, Quota, bearer, create


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.jsonl"


def test_a_key_is_found_and_stands_nowhere(path: Path) -> None:
    keys = {name: create(path, name, Quota(requests_per_minute=5)) for name in ("ann", "bob")}
    found = Keys(path)
    for name, key in keys.items():
        client = found.find(key)
        assert client is not None and client.name == name
        assert client.quota == Quota(requests_per_minute=5)
        assert key.removeprefix("preheat-") not in path.read_text()
    assert found.find("preheat-wrong") is None and found.find("") is None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_key_that_is_taken_out_is_refused_at_once(path: Path) -> None:
    ann, bob = (create(path, name, Quota()) for name in ("ann", "bob"))
    keys = Keys(path)
    kept = keys.find(bob)
    path.write_text(path.read_text().splitlines()[1] + "\n")
    assert keys.find(ann) is None
    assert keys.find(bob) is kept, "what it has spent is not forgotten"


def test_a_file_that_is_broken_meanwhile_withdraws_no_key(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = create(path, "ann", Quota())
    keys = Keys(path)
    path.write_text("{")
    assert keys.find(key) is not None
    assert "line 1 is no JSON" in caplog.text


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ([], "no object"),
        ({"name": "ann"}, "sha256 must"),
        ({"name": "a b", "sha256": "0" * 64}, "name must"),
        ({"name": "ann", "sha256": "0" * 64, "quota": 1}, "quota is no field"),
        ({"name": "ann", "sha256": "0" * 64, "requests_per_minute": 0}, "number above 0"),
        ({"name": "ann", "sha256": "0" * 64, "requests_per_minute": True}, "number above 0"),
    ],
)
def test_a_wrong_line_is_named(path: Path, row: object, why: str) -> None:
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(GatewayError, match=why) as refused:
        Keys(path)
    assert f"{path}, line 1" in str(refused.value)


def test_a_name_has_one_key(path: Path) -> None:
    create(path, "ann", Quota())
    with pytest.raises(GatewayError, match="already"):
        create(path, "ann", Quota())
    path.write_text(path.read_text() * 2)
    with pytest.raises(GatewayError, match="twice"):
        Keys(path)


@pytest.mark.parametrize("name", ["", "a b", "-", "ü", "a" * 65])
def test_a_name_that_is_none_is_refused(path: Path, name: str) -> None:
    with pytest.raises(GatewayError, match="a name of"):
        create(path, name, Quota())


def test_no_file_is_no_open_door(path: Path) -> None:
    with pytest.raises(GatewayError, match="cannot read"):
        Keys(path)


def test_requests_over_the_quota_wait_for_their_share() -> None:
    now = [0.0]
    client = Client("ann", Quota(requests_per_minute=2), lambda: now[0])
    client.spend(1e9)
    client.spend(1e9)
    with pytest.raises(QuotaSpent, match="2 requests a minute") as refused:
        client.spend(0)
    assert refused.value.retry_after == 30
    now[0] = 30.0
    client.spend(0)


def test_a_picture_larger_than_a_minutes_worth_is_owed() -> None:
    now = [0.0]
    client = Client("ann", Quota(pixel_steps_per_minute=100), lambda: now[0])
    client.spend(300)
    with pytest.raises(QuotaSpent) as refused:
        client.spend(50)
    assert refused.value.retry_after == 60 * 250 / 100


def test_what_one_quota_refuses_is_not_taken_from_the_other() -> None:
    client = Client("a", Quota(requests_per_minute=2, pixel_steps_per_minute=10), lambda: 0.0)
    client.spend(10)
    for _ in range(3):
        with pytest.raises(QuotaSpent, match="pixel-steps"):
            client.spend(10)


@given(
    st.lists(st.tuples(st.floats(0, 20), st.floats(0, 30)), max_size=60),
    st.sampled_from([10.0, 60.0]),
)
def test_no_more_is_spent_than_the_quota(asked: list[tuple[float, float]], limit: float) -> None:
    """Over any time: a minute's worth to begin with, the share since, and one request's debt."""
    now, spent = 0.0, 0.0
    client = Client("ann", Quota(pixel_steps_per_minute=limit), lambda: now)
    for waited, amount in asked:
        now += waited
        try:
            client.spend(amount)
        except QuotaSpent as refused:
            assert refused.retry_after > 0
        else:
            spent += amount
        assert spent <= limit + now * limit / 60 + max(0.0, 30 - limit) + 1e-6


@pytest.mark.parametrize(
    ("header", "key"),
    [("Bearer k", "k"), ("bearer  k ", "k"), ("Basic k", None), ("Bearer", None), ("", None)],
)
def test_a_key_comes_as_a_bearer(header: str, key: str | None) -> None:
    assert bearer({"authorization": header}) == key
