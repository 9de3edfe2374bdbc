"""The variants of a pipeline: what needs a graph of its own, in which order they are warmed, and
which few meet every shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from preheat.buckets import Bucket
from preheat.compilation import variants
from preheat.compilation.pace import Load


@dataclass(frozen=True, slots=True)
class Variant(variants.Variant):
    """A pipeline's. `guidance` doubles the denoiser's batch; `masked` has rows that do not fill the
    bucket.
    """

    guidance: bool
    task: str
    masked: bool = False

    @property
    def load(self) -> Load:
        rows = self.batch_size * (2 if self.guidance else 1)
        return Load(self.bucket.volume, rows, self.batch_size, 1)

    @property
    def details(self) -> str:
        masked = ", masked" if self.masked else ""
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


def covering(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """A few of `variants` that meet, in each bucket, every row count, batch size and task: enough
    where nothing is compiled.
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
        return {(variant.bucket, *fact) for fact in facts}

    missing = set[tuple[object, ...]]().union(*map(met, variants))
    chosen: set[Variant] = set()
    while missing:
        # of equals the first: the largest
        best = max(variants, key=lambda variant: len(met(variant) & missing))
        chosen.add(best)
        missing -= met(best)
    return tuple(variant for variant in variants if variant in chosen)
