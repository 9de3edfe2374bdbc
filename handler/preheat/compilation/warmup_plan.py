"""Which variants warm-up meets, and why those are enough: a pure function of the shapes and of what
is known of the targets.

Dynamo guards on the shapes, dtypes and layouts of a target's inputs. A variant whose calls all have
signatures that others have met shows nothing new, in warm-up or in the replay: batch 2 without
guidance is batch 1 with it, and at the denoiser one task is as good as another. That variants stand
for each other so is no matter of faith: `probe` meets them eagerly first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from preheat.compilation.variants import Variant
from preheat.config.pt2 import ShapesConfig


class Variants(Protocol):
    """What a family of models knows of its variants; see `models.base.ModelRunner`."""

    def variants(self, batch_sizes: Sequence[int]) -> Sequence[Variant]: ...

    def covering(self, variants: Sequence[Variant]) -> Sequence[Variant]: ...

    def extremes(self, variants: Sequence[Variant]) -> Sequence[Variant]: ...

    def between(self, variants: Sequence[Variant]) -> Sequence[Variant]: ...


@dataclass(frozen=True, slots=True)
class WarmupPlan:
    """Variants in the order they are run."""

    observe: Sequence[Variant]
    """Run eagerly: their shapes show which dimensions one graph has to cover."""
    probe: Sequence[Variant]
    """Run eagerly: must meet no signature that the family's `covering` of them misses. Empty:
    nothing to find out.
    """
    warm: Sequence[Variant]
    verify: Sequence[Variant]
    """Replayed with compiling forbidden."""
    num_graphs: int
    """An upper bound per code object."""


def served_sizes(shapes: ShapesConfig, most: int) -> tuple[int, ...]:
    """The batch sizes that a run can have; `most` is TorchServe's batchSize."""
    served = tuple(range(1, most + 1)) if shapes.batch_sizes == "dynamic" else shapes.batch_sizes
    return (max(served),) if shapes.invariant else served


def warmed_sizes(shapes: ShapesConfig, most: int, *, every: bool) -> tuple[int, ...]:
    """Those that warm-up has to meet so that every served one is hot: `every` one, or those between
    which one graph serves.
    """
    served = served_sizes(shapes, most)
    if shapes.batch_sizes != "dynamic" or every:
        return served
    return tuple(sorted({served[0], served[min(1, len(served) - 1)], served[-1]}))


def warmup_plan(
    family: Variants,
    served: Sequence[int],
    warmed: Sequence[int],
    *,
    graphs_per_variant: int,
    compiles: bool,
    idle: bool,
    covers: bool,
) -> WarmupPlan:
    """What is warmed and replayed.

    Args:
        served: the batch sizes that a run can have.
        warmed: those that warm-up has to meet.
        graphs_per_variant: how many at most a code object needs.
        compiles: whether a target runs compiled code.
        idle: whether no target has anything faster than eager.
        covers: whether `family.covering` may be believed where something compiles; what `probe`
            finds out.
    """
    variants = family.variants(warmed)
    shortened = covers or not compiles
    warm = family.covering(variants) if shortened else variants
    smallest = [variant for variant in variants if variant.bucket == variants[-1].bucket]
    sizes = sorted({variant.batch_size for variant in smallest})[:2]
    probe = [variant for variant in smallest if variant.batch_size in sizes]
    needs_probe = compiles and covers and len(family.covering(probe)) < len(probe)
    if compiles:
        every = family.variants(served)
        chosen = family.covering(every) if covers else every
        verify = [*chosen, *family.between(chosen)]
    elif idle:
        verify = []  # eager code is what it was the first time
    else:
        # Compiled code alone can be asked for a guard that it did not meet in warm-up. Of packages,
        # whose second step of each run went the way of a request already, one run a bucket is
        # enough: the last, which is the smallest.
        verify = list({variant.bucket: variant for variant in warm}.values())
    return WarmupPlan(
        observe=family.extremes(variants),
        probe=probe if needs_probe else [],
        warm=warm,
        verify=verify,
        num_graphs=graphs_per_variant * len(variants),
    )
