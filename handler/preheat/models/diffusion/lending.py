"""Seats that a run has left, borrowed by rows of a smaller bucket: with masks a row's picture is
the same in every bucket that holds it, and a run that goes anyway costs no more for being full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from preheat.buckets import Bucket, split_rows

T = TypeVar("T")


@dataclass(slots=True)
class Party(Generic[T]):
    """Those who share the runs of a bucket, in these batch sizes; guests come last."""

    bucket: Bucket
    batch_sizes: Sequence[int]
    members: list[T]


def lend(
    parties: Sequence[Party[T]],
    num_rows: Callable[[T], int],
    fits: Callable[[T, Bucket], bool],
) -> None:
    """Seat members of smaller buckets in the larger ones' empty seats, wherever that spares their
    own bucket a row; no party's own runs grow, and nobody is taken apart.

    Args:
        parties: with buckets of their own; changed in place, and some may be left empty.
        fits: whether a member may be seated in a bucket.
    """
    largest_first = sorted(parties, key=lambda party: -party.bucket.volume)

    def count(members: Sequence[T]) -> int:
        return sum(map(num_rows, members))

    for index, host in enumerate(largest_first):
        for party in largest_first[index + 1 :]:
            empty = _painted(host.batch_sizes, count(host.members)) - count(host.members)
            guests: list[T] = []
            for member in reversed(party.members):  # who came last
                if fits(member, host.bucket) and num_rows(member) <= empty - count(guests):
                    guests.append(member)
            guests = _worth_it(party.batch_sizes, count(party.members), guests, num_rows)
            chosen = {id(guest) for guest in guests}
            party.members = [each for each in party.members if id(each) not in chosen]
            host.members += reversed(guests)


def _worth_it(
    batch_sizes: Sequence[int], rows: int, guests: list[T], num_rows: Callable[[T], int]
) -> list[T]:
    """The first of `guests` without whom the fewest of these rows' runs are left."""
    left = [rows - sum(map(num_rows, guests[:number])) for number in range(len(guests) + 1)]
    painted = [_painted(batch_sizes, number) for number in left]
    return guests[: painted.index(min(painted))]


def _painted(batch_sizes: Sequence[int], rows: int) -> int:
    """Rows of the runs for these, empty ones among them."""
    return sum(split_rows(batch_sizes, rows)) if rows else 0
