"""Seats that a larger bucket's run has left: who borrows them, and what comes back."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from models.diffusion.test_engine import REQUESTS, Bench
from preheat.buckets import Bucket, split_rows
from preheat.errors import DeadlinePassed
from preheat.models.diffusion.lending import Party, lend
from preheat.protocol.call import Call

SMALL, LARGE = Bucket(64, 64), Bucket(128, 128)
SIDES = st.sampled_from([32, 64, 96, 128])


@dataclass(frozen=True, eq=False)
class Guest:
    rows: int
    painted: Bucket


guests = st.builds(Guest, st.integers(1, 4), st.builds(Bucket, SIDES, SIDES))
parties = st.lists(
    st.builds(
        Party[Guest],
        st.builds(Bucket, SIDES, SIDES),
        st.sets(st.integers(1, 8), min_size=1).map(sorted),
        st.lists(guests, min_size=1, max_size=6),
    ),
    max_size=5,
    unique_by=lambda party: party.bucket,
)


def painted(party: Party[Guest]) -> int:
    rows = sum(guest.rows for guest in party.members)
    return sum(split_rows(party.batch_sizes, rows)) if rows else 0


def seated(parties: list[Party[Guest]]) -> None:
    lend(parties, lambda guest: guest.rows, lambda guest, bucket: bucket.covers(guest.painted))


@given(parties)
def test_nobody_is_lost_and_no_run_grows_for_guests(parties: list[Party[Guest]]) -> None:
    before = {party.bucket: (list(party.members), painted(party)) for party in parties}
    home = {guest: party.bucket for party in parties for guest in party.members}
    seated(parties)
    assert sorted(home, key=id) == sorted((g for p in parties for g in p.members), key=id)
    rows = {party.bucket: painted(party) for party in parties}
    for party in parties:
        members, most = before[party.bucket]
        assert rows[party.bucket] <= most
        came = [guest for guest in party.members if home[guest] != party.bucket]
        own = [guest for guest in members if guest in party.members]
        assert party.members == own + came, "who borrows comes last"
        for guest in came:
            assert party.bucket.covers(guest.painted)
            assert home[guest].volume <= party.bucket.volume
            assert rows[home[guest]] < before[home[guest]][1], "for nothing"


def test_one_moves_where_that_spares_its_own_run() -> None:
    one, three = [Guest(1, SMALL)], [Guest(1, LARGE) for _ in range(3)]
    both = [Party(SMALL, [1, 4], one.copy()), Party(LARGE, [4], three.copy())]
    seated(both)
    assert [party.members for party in both] == [[], three + one]
    # who would leave an empty seat behind stays
    four = [Guest(1, SMALL) for _ in range(4)]
    full = [Party(SMALL, [4], four.copy()), Party(LARGE, [4], three.copy())]
    seated(full)
    assert [party.members for party in full] == [four, three]


def masked(**shapes: Any) -> Bench:
    return Bench(**{"buckets": [SMALL, LARGE], "fit": "mask", "batch_sizes": (2, 4)} | shapes)


def sizes(bench: Bench) -> list[tuple[str, list[str]]]:
    return [
        (str(batch.bucket), [str(row.size) for row in batch.rows]) for batch in bench.canvas.batches
    ]


def png(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), 77, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def test_a_small_picture_borrows_a_seat_and_says_where_it_was_painted() -> None:
    bench = masked()
    image = {"image": png(40), "strength": 1.0}
    large = [bench.job(height=128, width=100, seed=seed, **image) for seed in (1, 2, 3)]
    jobs = [bench.job(height=40, width=40, seed=4, **image), *large]
    answers = bench.run(jobs)
    assert sizes(bench) == [("128x128", ["128x104"] * 3 + ["40x40"])]
    assert [answer.bucket for answer in answers] == ["128x128"] * 4
    assert answers[0].pictures[0].getpixel((39, 39)) == (39, 39, 4)
    (batch,) = bench.canvas.batches
    assert {row.image.size for row in batch.rows if row.image} == {(128, 128)}
    assert batch.rows[3].image and batch.rows[3].image.getpixel((39, 39)) == (77, 77, 77)
    assert batch.masked and bench.reports[0].num_real_rows == 4


def test_who_streams_stays_where_its_headers_say() -> None:
    bench = masked()
    call = {"prompt": "a", "height": 40, "width": 40, "seed": 1, "stream": True}
    streamed = bench.runner.preprocess(Call({"body": call}, {}, None, None))
    bench.run([streamed, *(bench.job(height=128, width=128, seed=seed) for seed in (1, 2, 3))])
    assert sorted(bucket for bucket, _ in sizes(bench)) == ["128x128", "64x64"]


@pytest.mark.parametrize("shapes", [{"invariant": True}, {"fit": "pad"}])
def test_nobody_borrows_where_that_would_change_a_picture(shapes: dict[str, Any]) -> None:
    bench = masked(**shapes)
    jobs = [bench.job(height=128, width=128, seed=seed) for seed in (1, 2, 3)]
    bench.run([*jobs, bench.job(height=40, width=40, seed=4)])
    assert [bucket for bucket, _ in sizes(bench)] == ["128x128", "64x64"]


def test_guests_whose_hosts_are_late_are_painted_all_the_same() -> None:
    bench = Bench(buckets=[Bucket(64, 96), Bucket(96, 64), LARGE], fit="mask", batch_sizes=(4,))
    late = [replace(bench.job(height=128, width=128, seed=n), deadline=1.0) for n in (1, 2)]
    guests = [bench.job(height=64, width=96, seed=3), bench.job(height=96, width=64, seed=4)]
    answers = bench.run([*late, *guests])
    assert [type(answer.error) for answer in answers[:2]] == [DeadlinePassed] * 2
    for answer, job in zip(answers[2:], guests, strict=True):
        assert answer.pictures[0].size == (job.plan.width, job.plan.height)


@settings(max_examples=100, deadline=None)
@given(st.lists(REQUESTS, min_size=1, max_size=8))
def test_everybody_gets_their_own_pictures_whoever_is_seated_where(
    wishes: list[dict[str, Any]],
) -> None:
    bench = Bench(fit="mask", batch_sizes=(4,))
    jobs = [bench.job(**wish) for wish in wishes]
    for wish, job, answer in zip(wishes, jobs, bench.run(jobs), strict=True):
        assert answer.error is None and len(answer.pictures) == wish["num_images"]
        for index, picture in enumerate(answer.pictures):
            assert picture.size == (wish["width"], wish["height"])
            top, left = job.plan.crop.top, job.plan.crop.left
            assert picture.getpixel((0, 0)) == (top, left, (wish["seed"] + index) % 251)
