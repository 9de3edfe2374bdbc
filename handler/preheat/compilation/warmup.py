"""Makes every variant hot before READY, then verifies it: warm through the served path, replay, and
nothing may compile.

Warm-up knows neither pipelines nor modules. It is given `serve`, which runs one variant exactly as
a request would run, and the routers that stand in for the compiled targets.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from preheat.buckets import Bucket
from preheat.compilation.backends.base import EngineName, slowest
from preheat.compilation.modes import Route, Visits
from preheat.compilation.pace import Load, Timing
from preheat.compilation.router import Router, every
from preheat.compilation.signatures import Signature
from preheat.compilation.variants import Variant
from preheat.compilation.watch import (
    CompileWatch,
    allow_compiling,
    cache_counters,
    cache_outcome,
    forbid_compiling,
)
from preheat.errors import WarmupError

logger = logging.getLogger(__name__)

Visited = Mapping[str, Visits]
"""What the targets met of a variant, by their names."""
# Compile, record, replay: CUDA graphs need three calls until nothing happens any more
# (torch/_inductor/cudagraph_trees.py).
_MAX_PASSES = 4


@dataclass(frozen=True, slots=True)
class WarmupRow:
    """What warm-up did for one target in one bucket and batch size; a row of the state."""

    bucket: Bucket
    batch_size: int
    target: str
    engine: EngineName
    load: Load
    """Of the variant with the most rows."""
    warm_seconds: float
    cache: str
    """`hit`, `miss`, `partial`, or `none` where nothing was looked up."""
    reason: str
    """Why it is not the engine that was asked for; empty where it is."""


class Warmup:
    """One run of warm-up and verification.

    Args:
        serve: runs one variant through the served path.
        routers: by target name.
        on_failure: `eager` gives up the shapes at fault; `fail` raises.
        progress: called after each variant with the seconds that it took.
        own_folder: see `watch.cache_counters`.
    """

    def __init__(
        self,
        serve: Callable[[Variant], Timing | None],
        routers: Mapping[str, Router],
        watch: CompileWatch,
        *,
        on_failure: Literal["eager", "fail"],
        progress: Callable[[Variant, float], None] = lambda *_: None,
        own_folder: Path | None = None,
    ) -> None:
        self._serve, self._routers, self._watch = serve, routers, watch
        self._on_failure, self._progress, self._own_folder = on_failure, progress, own_folder
        self.timings: dict[Variant, Timing] = {}
        """Of each variant's last run, which was that of the verification where it was replayed."""
        self._rows: dict[tuple[Bucket, int, str], WarmupRow] = {}

    @property
    def rows(self) -> list[WarmupRow]:
        return list(self._rows.values())

    def observe(self, variants: Iterable[Variant]) -> None:
        """Run variants eagerly to learn which input dimensions vary between them; one graph will
        cover those.

        Packages that were compiled ahead of time know them already, and eager code does not care.
        """
        variants = list(variants)
        if variants and all(router.knows_dims for router in self._routers.values()):
            for router in self._routers.values():
                router.learn(None)
            return
        with every(self._routers, Router.observing) as calls:
            for variant in variants:
                self._serve(variant)
        for name, router in self._routers.items():
            if calls[name].shapes:
                router.learn(calls[name].shapes.values())

    def shows_nothing_new(self, variants: Sequence[Variant], few: Sequence[Variant]) -> bool:
        """Whether `few` of the variants, run eagerly, give every target all signatures that all of
        them do.
        """
        if not variants:
            return True
        met: dict[Variant, set[tuple[str, Signature]]] = {}
        for variant in variants:
            with every(self._routers, Router.observing) as calls:
                self._serve(variant)
            met[variant] = {
                (name, key)
                for name, router in self._routers.items()
                if router.compiles
                for key in calls[name].shapes
            }
        found = set().union(*met.values()) <= set().union(*(met[variant] for variant in few))
        if not found:
            logger.warning(
                "variants differ in more than rows and pictures: every single one is warmed and "
                "replayed"
            )
        return found

    def choose(self, variants: Sequence[Variant]) -> None:
        """Run variants, the largest first, until every target has chosen its road, or all have
        run.
        """
        allow_compiling()
        for variant in variants:
            if not any(router.roads.is_open for router in self._routers.values()):
                return
            with every(self._routers, Router.warming):
                self._serve(variant)

    def warm(self, variants: Sequence[Variant]) -> None:
        """Compile every variant.

        Raises:
            WarmupError: a target could not be compiled and `on_failure` is `fail`.
        """
        allow_compiling()
        for done, variant in enumerate(variants, start=1):
            events = self._watch.num_events
            with every(self._routers, Router.warming) as visited:
                seconds, outcome = self._warm_until_quiet(variant)
            self._note(variant, visited, seconds, outcome)
            how = "in" if self._watch.num_events > events else "already, ran in"
            logger.info(
                "[%d/%d] %s %s %s %.1f s (%s%s)",
                done,
                len(variants),
                variant.bucket,
                _engines(visited),
                how,
                seconds,
                variant.details,
                f", cache {outcome}" if outcome else "",
            )
            self._progress(variant, seconds)
            self._fail_if_asked(variant, visited)

    def _warm_until_quiet(self, variant: Variant) -> tuple[float, str | None]:
        started, counters = time.perf_counter(), cache_counters(self._own_folder)
        for _ in range(_MAX_PASSES):
            made = self._made()
            self._time(variant)
            if self._made() == made:
                break
        return time.perf_counter() - started, cache_outcome(
            counters, cache_counters(self._own_folder)
        )

    def _made(self) -> tuple[int, ...]:
        """Grows with all that is made. What makes no compile events, such as OpenVINO's models and
        their race with eager, must not count as a run's own time either.
        """
        codes = (len(router.verified) for router in self._routers.values())
        return (self._watch.num_events, *codes)

    def verify(self, variants: Iterable[Variant]) -> int:
        """Replay every variant with compiling forbidden; returns the number of variants at fault.

        Any compile event, and any guard that would have asked for one, is a fault of warm-up. The
        shapes at fault are given up to `eager`, so that no request can meet them.

        Raises:
            WarmupError: there is a fault and `on_failure` is `fail`.
        """
        forbid_compiling()
        num_faults = 0
        for variant in variants:
            events = self._watch.num_events
            with every(self._routers, lambda each: each.replaying(self._num_events)) as visited:
                self._time(variant)
            why = "compiled again in the replay" if self._watch.num_events != events else None
            if self._give_up(visited, why):
                num_faults += 1
                logger.error("verification: %s was not hot after warm-up", variant)
                self._note(variant, visited, 0.0, None)
                self._fail_if_asked(variant, visited)
        for router in self._routers.values():
            router.freeze()
        return num_faults

    def _num_events(self) -> int:
        return self._watch.num_events

    def _time(self, variant: Variant) -> None:
        timing = self._serve(variant)
        if timing is not None:
            self.timings[variant] = timing

    def _give_up(self, visited: Visited, why: str | None) -> bool:
        """Turn the shapes at fault in the last replay into eager ones: those whose calls compiled,
        or all where no call did.
        """
        found, known = False, any(visits.recompiled for visits in visited.values())
        for name, visits in visited.items():
            router = self._routers[name]
            for key, route in visits.routes.items():
                at_fault = why is not None and (key in visits.recompiled or not known)
                if route.engine != "eager" and at_fault:
                    route = Route("eager", why)
                if route.engine == "eager" and router.routes.get(key) != route:
                    visits.routes[key], found = route, True
                    router.give_up(key, route)
        return found

    def _note(
        self, variant: Variant, visited: Visited, seconds: float, outcome: str | None
    ) -> None:
        """Fold what this variant did into the rows of the state: the slowest engine, the sum of
        seconds.
        """
        for name, router in self._routers.items():
            idle = [Route("eager", router.reason)] if router.idle else []
            routes = list(visited[name].routes.values()) or idle
            if not routes:
                continue
            key = (variant.bucket, variant.batch_size, name)
            before = self._rows.get(key)
            engines = {route.engine for route in routes} | ({before.engine} if before else set())
            slower = next((route for route in routes if route.reason), None)
            loads = [variant.load, *([before.load] if before else [])]
            self._rows[key] = WarmupRow(
                bucket=variant.bucket,
                batch_size=variant.batch_size,
                target=name,
                engine=slowest(engines),
                load=max(loads, key=lambda load: load.rows),
                warm_seconds=round(seconds + (before.warm_seconds if before else 0.0), 3),
                cache=_fold_outcome(before.cache if before else "none", outcome or "none"),
                reason=(slower and slower.reason) or (before.reason if before else ""),
            )

    def _fail_if_asked(self, variant: Variant, visited: Visited) -> None:
        if self._on_failure != "fail":
            return
        for name, router in self._routers.items():
            routes = visited[name].routes.values()
            reason = router.reason if router.idle else None
            bad = next((route.reason for route in routes if route.engine == "eager"), reason)
            if bad is not None:
                raise WarmupError(
                    f"pt2.on_failure is fail, and {name} has no engine for {variant}: {bad}"
                )


def _fold_outcome(before: str, now: str) -> str:
    known = {before, now} - {"none"}
    return "partial" if len(known) > 1 else next(iter(known), "none")


def _engines(visited: Visited) -> str:
    """Which targets the last variant met on which engine, such as `unet, vae.decoder compiled`."""
    by_engine: dict[str, list[str]] = {}
    for name, visits in visited.items():
        for engine in sorted({route.engine for route in visits.routes.values()}):
            by_engine.setdefault(engine, []).append(name)
    return (
        "; ".join(f"{', '.join(names)} {engine}" for engine, names in by_engine.items())
        or "all eager"
    )
