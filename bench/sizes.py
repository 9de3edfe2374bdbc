"""The sizes of the bench's requests: made up as users make them, or read from a log of real ones.

The generated mix, by kind, with its share of the requests and of the distinct sizes:

    phone photo   40 %, 40 %   4:3, 3:4, 16:9 and 9:16, shrunk by an app to 70-100 % of what fits,
                               to the pixel
    shop export   40 %, 20 %   a few templates (1:1, 5:4, 4:5, 3:2, 2:3 at 75, 90 or 100 %, in tens
                               of pixels) that recur
    hand crop     20 %, 40 %   any height and any width between 60 and 100 % of a bucket's, so
                               mostly seen once

"What fits" is the largest picture of that shape that one of the buckets covers, so the same mix
serves a toy of 256 pixels and a model of 1024, and every generated size is legal under every
strategy. Shares are exact up to rounding, every distinct size is asked for at least once, and the
same seed is the same list in the same order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from preheat.buckets import Bucket, smallest_covering
from preheat.errors import PreheatError
from preheat.models.diffusion.geometry import inner_size
from preheat.planning.demand import COUNT, PICTURE, csv_rows, whole

LEAST_SIDE = 16
"""Pixels; the default `pipeline.limits.min_side`."""
PHONE_SHAPES = ((3, 4), (4, 3), (9, 16), (16, 9))
PHONE_WEIGHTS = (4, 4, 1, 1)
SHOP_SHAPES = ((1, 1), (5, 4), (4, 5), (3, 2), (2, 3))
SHOP_PERCENTS = (75, 90, 100)
LEAST_CROP_PERCENT = 60
MAX_TRIES = 1000


class TrafficError(PreheatError):
    """Traffic that cannot be made: a log that is none, or more distinct sizes than there are."""


@dataclass(frozen=True, slots=True)
class Size:
    """One request's size in pixels, and where it comes from: one of KINDS, or `log`."""

    height: int
    width: int
    kind: str


@dataclass(frozen=True, slots=True)
class Kind:
    """A habit of users: its share of the requests, of the distinct sizes, and how it draws a
    (height, width).
    """

    requests: Fraction
    distinct: Fraction
    draw: Callable[[random.Random, Sequence[Bucket]], tuple[int, int]]


def reach(buckets: Sequence[Bucket], shape: tuple[int, int]) -> tuple[int, int]:
    """The largest (height, width) of the aspect ratio `shape` (height to width) that one of the
    buckets covers.
    """
    inside = (inner_size(bucket.height, bucket.width, *shape) for bucket in buckets)
    return max(inside, key=lambda size: (size[0] * size[1], size))


def _phone(rng: random.Random, buckets: Sequence[Bucket]) -> tuple[int, int]:
    (shape,) = rng.choices(PHONE_SHAPES, PHONE_WEIGHTS)
    height, width = reach(buckets, shape)
    percent = rng.randint(70, 100)
    return height * percent // 100, width * percent // 100


def _shop(rng: random.Random, buckets: Sequence[Bucket]) -> tuple[int, int]:
    height, width = reach(buckets, rng.choice(SHOP_SHAPES))
    percent = rng.choice(SHOP_PERCENTS)
    return height * percent // 1000 * 10, width * percent // 1000 * 10


def _crop(rng: random.Random, buckets: Sequence[Bucket]) -> tuple[int, int]:
    bucket = rng.choice(buckets)
    height, width = (
        rng.randint(side * LEAST_CROP_PERCENT // 100, side)
        for side in (bucket.height, bucket.width)
    )
    return height, width


KINDS: Mapping[str, Kind] = {
    "phone photo": Kind(Fraction(40, 100), Fraction(40, 100), _phone),
    "shop export": Kind(Fraction(40, 100), Fraction(20, 100), _shop),
    "hand crop": Kind(Fraction(20, 100), Fraction(40, 100), _crop),
}


def generate(
    buckets: Sequence[Bucket], *, num_requests: int, num_distinct: int, seed: int
) -> list[Size]:
    """The sizes of `num_requests` requests, at most `num_distinct` different ones, in the order
    they are sent.

    There are fewer different ones only where a kind has fewer requests than sizes, as happens in
    very short runs.

    Raises:
        TrafficError: a number is below 1, or the buckets are too small or too few for so many
            different sizes.
    """
    if num_requests < 1 or num_distinct < 1:
        raise TrafficError(
            f"needs at least 1 request and 1 size, got {num_requests} and {num_distinct}"
        )
    rng = random.Random(seed)
    requests = _quotas(num_requests, [kind.requests for kind in KINDS.values()])
    distinct = _quotas(num_distinct, [kind.distinct for kind in KINDS.values()])
    taken: set[tuple[int, int]] = set()
    sizes = []
    for (name, kind), count, wanted in zip(KINDS.items(), requests, distinct, strict=True):
        if not count:
            continue
        pool = _pool(name, kind, min(count, max(1, wanted)), buckets, rng, taken)
        sizes += pool + rng.choices(pool, k=count - len(pool))
    rng.shuffle(sizes)
    return sizes


def read_log(path: Path, *, least: int, most: int, scale: float = 1.0, seed: int = 0) -> list[Size]:
    """The sizes in a CSV file with the columns height, width and, where it is a histogram, count.

    Without counts the rows are replayed in their order; with counts the file has no order, and the
    requests are shuffled by `seed`. Every side is multiplied by `scale`. `least` and `most`
    (pixels) are what the model allows for a side.

    Raises:
        TrafficError, LogError: the file cannot be read or a row cannot be used; names the line.
    """
    if not scale > 0:
        raise TrafficError(f"the scale must be positive, got {scale}")
    names, rows = csv_rows(path)
    missing = [name for name in PICTURE if name not in names]
    if missing:
        raise TrafficError(
            f"{path} has no column {' and no column '.join(missing)}: its first line must name the "
            f"columns height,width[,count], got {','.join(names) or 'nothing'!r}"
        )
    counted, sizes = COUNT in names, []
    for line, row in rows:
        where = f"{path}, line {line}"
        height, width = (
            _side(row, name, where, least=least, most=most, scale=scale) for name in PICTURE
        )
        sizes += [Size(height, width, "log")] * (whole(row, COUNT, where) if counted else 1)
    if not sizes:
        raise TrafficError(f"{path} holds no sizes")
    if counted:
        random.Random(seed).shuffle(sizes)
    return sizes


def sample(sizes: Sequence[Size], num_requests: int, seed: int) -> list[Size]:
    """At most `num_requests` of the sizes, drawn by `seed`, in the order they had.

    Raises:
        TrafficError: `num_requests` is below 1.
    """
    if num_requests < 1:
        raise TrafficError(f"needs at least 1 request, got {num_requests}")
    if num_requests >= len(sizes):
        return list(sizes)
    return [
        sizes[index]
        for index in sorted(random.Random(seed).sample(range(len(sizes)), num_requests))
    ]


def describe(sizes: Sequence[Size], buckets: Sequence[Bucket]) -> dict[str, object]:
    """What the requests are, for the report."""
    kinds = sorted({size.kind for size in sizes})
    return {
        "num_requests": len(sizes),
        "num_distinct_sizes": len({(size.height, size.width) for size in sizes}),
        "mix": {kind: sum(size.kind == kind for size in sizes) for kind in kinds},
        "beyond_every_bucket": sum(
            smallest_covering(buckets, Bucket(size.height, size.width)) is None for size in sizes
        ),
        "sizes": [[size.height, size.width] for size in sizes],
    }


def _quotas(total: int, shares: Sequence[Fraction]) -> list[int]:
    """`total` dealt out by `shares`, which sum to 1: rounded down, the rest to the largest
    remainders.
    """
    exact = [total * share for share in shares]
    quotas = [int(part) for part in exact]
    by_remainder = sorted(range(len(shares)), key=lambda index: quotas[index] - exact[index])
    for index in by_remainder[: total - sum(quotas)]:
        quotas[index] += 1
    return quotas


def _pool(
    name: str,
    kind: Kind,
    wanted: int,
    buckets: Sequence[Bucket],
    rng: random.Random,
    taken: set[tuple[int, int]],
) -> list[Size]:
    """`wanted` different sizes of one kind that no other kind has; adds them to `taken`."""
    pool: list[Size] = []
    for _ in range(MAX_TRIES):
        if len(pool) == wanted:
            break
        height, width = kind.draw(rng, buckets)
        if min(height, width) >= LEAST_SIDE and (height, width) not in taken:
            taken.add((height, width))
            pool.append(Size(height, width, name))
    if len(pool) < wanted:
        raise TrafficError(
            f"these buckets give only {len(pool)} different sizes of the kind {name}, not {wanted}"
        )
    return pool


def _side(
    row: Mapping[str, str], name: str, where: str, *, least: int, most: int, scale: float
) -> int:
    side = round(whole(row, name, where) * scale)
    if not least <= side <= most:
        scaled = "" if scale == 1 else f" after scaling by {scale}"
        raise TrafficError(
            f"{where}: {name} {side}{scaled} is outside what the model allows, {least} to {most} "
            "pixels"
        )
    return side
