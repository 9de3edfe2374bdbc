"""The variants of a pipeline: what needs a graph of its own, in which order they are warmed, and
which few meet every shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from preheat.buckets import Bucket, joined, round_up, smallest_covering
from preheat.compilation import variants
from preheat.compilation.pace import Load
from preheat.models.diffusion.geometry import smaller
from preheat.models.diffusion.masking.seats import Seat, VaeBuckets


@dataclass(frozen=True, slots=True)
class Variant(variants.Variant):
    """A pipeline's. `guidance` doubles the denoiser's batch; `masked` has rows that do not fill the
    bucket; one that is `alone` has none around it and runs eagerly.
    """

    guidance: bool
    task: str
    masked: bool = False
    alone: bool = False
    painted: Bucket | None = None
    """What its rows fill of the bucket; None: all of it."""
    seat: Seat | None = None
    """Where its pictures lie at the VAE, if that has buckets of its own."""

    @property
    def load(self) -> Load:
        rows = self.batch_size * (2 if self.guidance else 1)
        return Load(self.bucket.volume, rows, self.batch_size, 1, eager=self.alone)

    @property
    def details(self) -> str:
        masked = f", masked {self.painted or self.bucket}" if self.masked else ""
        guidance = "on" if self.guidance else "off"
        return f"batch {self.batch_size}, guidance {guidance}, {self.task}{masked}"


def own(every: Sequence[variants.Variant]) -> list[Variant]:
    """As the pipeline's, which `plan_variants` made and warm-up hands back."""
    return [variant for variant in every if isinstance(variant, Variant)]


def plan_variants(
    buckets: Iterable[Bucket],
    batch_sizes: Iterable[int],
    guidance: Iterable[bool],
    tasks: Sequence[str],
    masks: Iterable[bool] = (False,),
) -> tuple[Variant, ...]:
    """Every variant, largest first: a bucket that does not fit into memory shows at once, and
    memory pools grow once.
    """
    every = (Variant(*choice) for choice in product(buckets, batch_sizes, guidance, tasks, masks))
    return tuple(
        sorted(
            every,
            key=lambda v: (
                -v.bucket.volume,
                v.bucket.height,
                -v.batch_size,
                not v.guidance,
                tasks.index(v.task),
                not v.masked,
            ),
        )
    )


def alone_variants(
    largest: Bucket,
    multiple: int,
    least_side: int,
    batch_sizes: Sequence[int],
    guidance: Iterable[bool],
    task: str,
) -> tuple[Variant, ...]:
    """Those that show how long eager code takes for pictures smaller than the largest bucket: a
    quarter and half of its sides, and all but `multiple` of it (pixels).
    """
    least = Bucket(least_side, least_side)
    shares = [Bucket(-(-largest.height // part), -(-largest.width // part)) for part in (4, 2)]
    sizes = {round_up(joined([share, least]), multiple): None for share in shares}
    sizes |= {size: None for size in [smaller(largest, multiple)] if size and size.covers(least)}
    ends = sorted({min(batch_sizes), max(batch_sizes)})
    return tuple(
        Variant(size, number, doubled, task, alone=True)
        for size, number, doubled in product(sizes, ends, guidance)
        if size != largest
    )


def seated(variants: Sequence[Variant], vae: VaeBuckets, multiple: int) -> tuple[Variant, ...]:
    """`variants`, each with its seat at the VAE, and one more for each seat that none of them has
    and a picture whose sides are multiples of `multiple` can have.
    """
    known = [replace(each, seat=vae.seat(each.painted or each.bucket)) for each in variants]
    buckets = list({each.bucket for each in known})
    met = {each.seat for each in known}
    more: dict[Variant, list[Variant]] = {}
    for seat, picture in vae.seats(buckets, multiple).items():
        bucket = smallest_covering(buckets, picture)
        if seat in met:
            continue
        # as few rows as there are, and an image, which meets the encoder too
        like = min(
            (each for each in known if each.bucket == bucket and each.masked),
            key=lambda each: (each.batch_size, each.guidance, each.task == "text-to-image"),
        )
        more.setdefault(like, []).append(replace(like, painted=picture, seat=seat))
    return tuple(each for like in known for each in (*more.get(like, ()), like))


def covering(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """A few of `variants` that meet, in each bucket, every row count, batch size and task, and
    every seat at the VAE: enough where nothing is compiled.
    """

    def met(variant: Variant) -> set[tuple[object, ...]]:
        rows = variant.batch_size * (2 if variant.guidance else 1)
        facts: set[tuple[object, ...]] = {
            ("rows", rows, variant.masked),
            ("task", variant.task),
            ("pictures", variant.batch_size),
        }
        if variant.task != "text-to-image":
            facts.add(("images", variant.batch_size))
        own = {(variant.bucket, *fact) for fact in facts}
        if variant.seat is None:
            return own
        return own | {("seat", variant.seat, variant.task != "text-to-image")}

    missing = set[tuple[object, ...]]().union(*map(met, variants))
    chosen: set[Variant] = set()
    while missing:
        # of equals the first: the largest
        best = max(variants, key=lambda variant: len(met(variant) & missing))
        chosen.add(best)
        missing -= met(best)
    return tuple(variant for variant in variants if variant in chosen)
