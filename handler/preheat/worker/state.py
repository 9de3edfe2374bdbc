"""What a worker says about itself: the state that `GET /models/{name}?customized=true` returns, and
the file that shows warm-up.

Both are plain data. The state answers "is it hot, and has it stayed hot"; the status file lets
`preheat ready` draw progress while `initialize()` runs, when TorchServe itself can only say "not
ready".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from preheat.compilation.pace import Pace
from preheat.compilation.warmup import WarmupRow
from preheat.status import Phase


@dataclass(slots=True)
class ServerState:
    """The design's state object. Counters count requests, not denoising steps."""

    version: str
    family: str
    """The YAML's section that says what is served: `pipeline`, `module` or `text`."""
    strategy: str
    state: Phase = "loading"
    fingerprint: str = ""
    shared_cache: Mapping[str, object] = field(default_factory=dict)
    """outcome (loaded, published, unchanged, unshared), reason and waited_seconds; empty without
    `pt2.cache.shared`.
    """
    buckets: Sequence[WarmupRow] = ()
    """One row per bucket, batch size and target."""
    roads: Mapping[str, object] = field(default_factory=dict)
    """By target: `chosen`, `source` (`named`, `measured`, `order`, `kept`), and `roads`, a row for
    each that was looked at: what was measured in milliseconds a call, beside eager, on the largest
    bucket, and the `reason` that it does not serve."""
    unfit: Mapping[str, int] = field(default_factory=dict)
    """By kind of run, such as "1024x1024, guidance": the least batch size that did
    not fit into memory. Such runs are split into smaller ones."""
    unfit_seconds: Mapping[str, int] = field(default_factory=dict)
    """By kind of run, after how many seconds what did not fit while serving is tried again; what
    did not fit in warm-up never is."""
    padding: Mapping[str, float | str] = field(default_factory=dict)
    """What padding was measured to change in a module's outputs: `max_error` and `max_share`, of
    the largest magnitude (or words), and `exact`, the header's word. Of a pipeline with `fit: mask`
    what masks change in its denoiser, and in the VAE where that is compiled, `border_share` and
    `outside_error` too; empty for others."""
    own_sizes: Sequence[Mapping[str, object]] = ()
    """With `fit: mask` how long a step takes eagerly at some sizes, by the denoiser's rows: a
    picture for which that is less than in its bucket is painted so."""
    request_defaults: Mapping[str, object] = field(default_factory=dict)
    """Of a pipeline what a request gets that does not say (`height` and `width`,
    `num_inference_steps`, `guidance_scale`, `strength`), and `fit` and `oversize`; of a language
    model its `slots`; empty for others."""
    warnings: list[str] = field(default_factory=list)
    """What the YAML says that loads and is hardly meant."""
    compiles_at_boot: int = 0
    compiles_since_ready: int = 0
    eager_fallbacks: int = 0
    """Requests that ran eagerly although compiled code was wanted: failed buckets and incidents."""
    incidents: int = 0
    """Requests that met a shape or guard nobody foresaw."""
    put_off: int = 0
    """Requests that their batch had no time left for: answered 503, not begun."""
    planned_eager: int = 0
    """Requests served eagerly on purpose: outside every bucket (`oversize: eager`), or quicker at
    their own size (`fit: mask`)."""
    requests: int = 0
    ready_seconds: float = 0.0
    num_threads: int = 0
    """Of torch on the CPU, in this worker."""
    peak_memory_bytes: int = 0

    def document(self, pace: Pace) -> dict[str, object]:
        """As JSON, without nulls: TorchServe would drop their keys."""
        facts = {name: getattr(self, name) for name in self.__slots__}
        return facts | {"buckets": [_document(row, pace) for row in self.buckets]}


def _document(row: WarmupRow, pace: Pace) -> dict[str, object]:
    """A row: the bucket's name, height and width in pixels (of a module `dims`, names and sizes),
    and the seconds of a step as estimated now (of a module, of a run).
    """
    sizes = dict(row.bucket.sizes)
    return {
        "bucket": str(row.bucket),
        **(sizes if row.bucket.is_picture else {"dims": sizes}),
        "batch_size": row.batch_size,
        "target": row.target,
        "engine": row.engine,
        "warm_seconds": row.warm_seconds,
        "cache": row.cache,
        "reason": row.reason,
        "seconds_per_step": round(pace.per_step(row.load.area, row.load.rows), 6),
    }
