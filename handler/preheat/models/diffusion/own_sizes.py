"""Which of two roads a picture with masks takes: the graph of its bucket, or eager code at its own
size. Both paint the same one, so what costs fewer seconds is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from preheat.buckets import Bucket, split_rows
from preheat.compilation.pace import Timing, at_load, interpolated
from preheat.models.diffusion.geometry import Plan
from preheat.models.diffusion.variants import Variant

Seconds = Mapping[int, float]
"""Of a denoising step, by the denoiser's rows."""


@dataclass(frozen=True, slots=True)
class OwnSizes:
    """What both take, as warm-up has measured it: the same request always takes the same one.

    Args:
        batch_sizes: of the runs that rows are split into.
        graphs: with masks, by bucket.
        own: of eager code, by pixels of the picture.
    """

    batch_sizes: Sequence[int] = (1,)
    graphs: Mapping[Bucket, Seconds] = field(default_factory=dict)
    own: Mapping[int, Seconds] = field(default_factory=dict)

    @classmethod
    def measured(cls, batch_sizes: Sequence[int], timings: Mapping[Variant, Timing]) -> OwnSizes:
        """Of runs that are alike the quickest counts, which nothing held up."""
        graphs: dict[Bucket, dict[int, float]] = {}
        own: dict[int, dict[int, float]] = {}
        for variant, timing in timings.items():
            if variant.alone:
                column = own.setdefault(variant.bucket.volume, {})
            elif variant.masked:
                column = graphs.setdefault(variant.bucket, {})
            else:
                continue
            rows = variant.load.rows
            column[rows] = min(column.get(rows, timing.per_step), timing.per_step)
        return cls(batch_sizes, graphs, own)

    def are_quicker(self, plan: Plan, pictures: int, *, doubled: bool) -> bool:
        """Whether eager code is, both by themselves; never for more pixels than were measured."""
        graph, most = self.graphs.get(plan.bucket), max(self.own, default=0)
        if graph is None or not plan.is_masked or plan.painted.volume > most:
            return False
        area = max(plan.painted.volume, min(self.own))  # what is left there is overhead
        every = [size * (2 if doubled else 1) for size in split_rows(self.batch_sizes, pictures)]
        alone = sum(at_load(self.own, area, rows) for rows in every)
        return alone < sum(interpolated(graph, rows) for rows in every)
