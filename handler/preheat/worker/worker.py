"""One worker's life: load the model, compile its targets, warm every variant, prove it, serve.

The same for every family of models; what differs is behind `work.Work`. Knows nothing of
TorchServe; `preheat_handler` adapts it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import preheat
from preheat.cache.shared import (
    CacheUse,
    SharedCache,
    fingerprint,
    synchronized_inductor_cache,
    without_headers_if_warmed,
    writable_inductor_folder,
)
from preheat.cache.trust import Trust
from preheat.compilation.backends import aot
from preheat.compilation.debugging import debugging
from preheat.compilation.pace import Budget, Load, Timing
from preheat.compilation.router import Router
from preheat.compilation.targets import build_router, uses_cuda_graphs, wants_every_size
from preheat.compilation.variants import Variant
from preheat.compilation.warmup import Record, Warmup, WarmupProgress
from preheat.compilation.warmup_plan import WarmupPlan, served_sizes, warmed_sizes, warmup_plan
from preheat.compilation.watch import CompileWatch, raise_recompile_limits
from preheat.config.model import ModelConfig
from preheat.device import computes, peak_memory_bytes
from preheat.errors import ConfigError, PutOff
from preheat.models.batching import RunReport
from preheat.models.registry import load_work
from preheat.protocol.fields import DEADLINE_HEADER, parse_deadline
from preheat.protocol.responses import Response
from preheat.status import Phase as StatePhase
from preheat.status import StatusFile
from preheat.user_code import INSTALL, imported_from, load_files
from preheat.worker.metrics import Metrics, discard
from preheat.worker.state import ServerState

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = 120.0
"""TorchServe's responseTimeout in seconds where the YAML names none."""


class Service:
    """A model that is being made hot and then serves.

    Args:
        config: the model's YAML.
        model_dir: the unpacked archive.
        device: see `device.pick_device`.
        status: where progress is shown.
        metrics: told what was warmed and, after READY, of every call.
        leave_out: see `warmup.Warmup`.
        manifest: the archive's, where a module may be named.

    Raises:
        ConfigError, ModuleError, PipelineError: the model cannot be served as the YAML says.
        WarmupError: `on_failure: fail`, and a variant could not be made hot.
    """

    def __init__(
        self,
        config: ModelConfig,
        model_dir: Path,
        device: torch.device,
        *,
        status: StatusFile,
        metrics: Metrics | None = None,
        leave_out: Collection[Variant] = (),
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        started = time.perf_counter()
        config = config.in_archive(manifest or {})
        self.config, self._device, self._status = config, device, status
        self._metrics = metrics or Metrics(discard)
        self.state = ServerState(preheat.__version__, config.pt2.shapes.strategy)
        self._watch = CompileWatch()
        self.state.warnings = list(config.warnings)
        for warning in config.warnings:
            logger.warning("%s", warning)
        # a key that cannot be used shows before anything is loaded
        trust = Trust.resolve(config.pt2.cache.trust)
        imported = load_files(config.pt2.imports, model_dir)
        self._work = load_work(config, model_dir, manifest or {}, device)
        self._shapes = self._work.shapes
        self.state.strategy = self._shapes.strategy
        _refuse_dynamic_cuda_graphs(config, device)
        if not computes(self._work.dtype, device):
            logger.warning(
                "this CPU has no instructions for %s: float32 would be faster", self._work.dtype
            )
        self._routers = self._build_routers(imported)
        self._budget = Budget(config.responseTimeout or DEFAULT_TIMEOUT)
        self._loads: dict[tuple[str, int], Load] = {}
        self._work.engage(self._routers, self._report, self._budget)
        self._metrics.expect([str(size) for size in self._work.sizes], self._work.fields)
        self.state.fingerprint = self._fingerprint(model_dir)
        if config.pt2.export.aot_compile:
            self._attach_packages(model_dir / aot.FOLDER, trust)
        with debugging(config.pt2.debug), self._sharing_compiles(trust, started) as sharing:
            phase = self._heat(leave_out, sharing)
        self._events_at_ready = self._watch.num_events
        self.state.compiles_at_boot = self._events_at_ready
        self.state.ready_seconds = round(time.perf_counter() - started, 3)
        self.state.state = phase
        self._metrics.ready(self.current_state())
        status.serve(self.state.document()["preheat"])
        logger.info(
            "%s after %.1f s: %d compile events",
            self.state.state,
            self.state.ready_seconds,
            self._events_at_ready,
        )

    def begin_call(self) -> None:
        """A batch has come: `responseTimeout` runs from now until its answers go back together."""
        self._budget.end()
        self._budget.begin()

    def parse(
        self,
        row: Mapping[str, object],
        headers: Mapping[str, str] | None = None,
        send: Callable[[Response], None] | None = None,
    ) -> Any:
        """A TorchServe input row, which came with these headers (names in lower case), as a job.

        A request that streams gives the parts of its answer to `send`, from now on; None keeps them
        for the end.

        Raises:
            RequestError: anything about it that cannot be served.
        """
        headers = headers or {}
        return self._work.parse(row, headers, parse_deadline(headers.get(DEADLINE_HEADER)), send)

    def run(self, jobs: Sequence[Any]) -> list[Any]:
        """Serve the jobs; answers come in their order."""
        answers = list(self._work.run(jobs))
        self.state.requests += len(jobs)
        for answer in answers:
            if answer.error is None:
                self._count(answer)
            else:
                self._metrics.failed(answer.error.code)
                self.state.put_off += isinstance(answer.error, PutOff)
        self._metrics.state(self.current_state())
        self._status.serve(self.state.document()["preheat"])
        return answers

    def respond(self, answers: Sequence[Any]) -> list[Response]:
        """Answers as TorchServe rows."""
        return self._work.respond(answers)

    def current_state(self) -> ServerState:
        """The state with the figures that are read when asked for."""
        self.state.compiles_since_ready = self._watch.num_events - self._events_at_ready
        self.state.unfit = dict(self._work.unfit())
        self._show_pace()
        self.state.peak_memory_bytes = peak_memory_bytes(self._device)
        return self.state

    def _build_routers(self, imported: Iterable[ModuleType]) -> dict[str, Router]:
        work, pt2 = self._work, self.config.pt2.model_copy(update={"shapes": self._shapes})
        targets = {name: work.target(name) for name in pt2.targets or work.default_targets()}
        for install in (getattr(file, INSTALL) for file in imported if hasattr(file, INSTALL)):
            for target in targets.values():
                install(target)
        return {
            name: build_router(name, target, pt2, work.dtype, self._device)
            for name, target in targets.items()
        }

    def _fingerprint(self, model_dir: Path) -> str:
        compiled = self.config.pt2.model_dump(
            mode="json", exclude={"cache", "export", "on_failure", "debug"}
        )
        compiled["batchSize"] = self.config.batchSize
        compiled |= {
            **self._work.settings(),
            "imports": self.config.pt2.imports,
            "sources": imported_from(model_dir),
        }
        return fingerprint(self._device, compiled, self._work.structure())

    def _attach_packages(self, folder: Path, trust: Trust) -> None:
        """Give the routers what was compiled when the archive was built; what cannot be used leaves
        a reason there.
        """
        modules = {name: self._work.target(name) for name in self._routers}
        aot.attach(self._routers, modules, folder, self.state.fingerprint, trust, self._device)

    @contextmanager
    def _sharing_compiles(self, trust: Trust, started: float) -> Iterator[CacheUse | None]:
        """Compile in here: with the shared cache, if there is one. Gives what becomes of it."""
        cache = self.config.pt2.cache
        # not with a package for everything
        compiles = any(router.compiles for router in self._routers.values())
        if not compiles or self._shapes.strategy == "exact":
            yield None
            return
        if cache.shared is None:
            writable_inductor_folder()
            with self._headers():
                yield None
            return
        shared = SharedCache(
            Path(cache.shared), trust, self.state.fingerprint, self._device, cache.max_bytes
        )
        # Half of the time, so that a worker that has waited in vain can still compile.
        patience = (self.config.startupTimeout or 120) / 2 - (time.perf_counter() - started)
        with synchronized_inductor_cache(
            cache.key or "default", shared, patience=max(0.0, patience), report=self._show_waiting
        ) as use:
            with self._headers():
                yield use
            fallen = [row for row in self.state.buckets if row["engine"] == "eager"]
            # Who found nothing shares what did compile. The others, who fail as it did, do not
            # replace it at every start.
            if fallen and use.digest:
                use.withhold(f"{len(fallen)} rows of warm-up fell to eager")
        self.state.shared_cache = use.document()

    def _headers(self) -> AbstractContextManager[None]:
        if self.config.pt2.compile.kwargs.get("backend", "inductor") != "inductor":
            return nullcontext()
        return without_headers_if_warmed(self.state.fingerprint)

    def _show_waiting(self, message: str) -> None:
        text = f"{message} (half of startupTimeout, {self.config.startupTimeout or 120} s)"
        logger.info("shared compile cache: %s", text)
        self._status.write("loading", text)

    def _heat(self, leave_out: Collection[Variant], sharing: CacheUse | None) -> StatePhase:
        """Warm-up and proof; the state that the worker is in afterwards."""
        # plain torch.compile: for comparison, or because the YAML tells of no shapes
        if self._shapes.strategy == "exact":
            why = (
                "strategy exact"
                if self.config.pt2.shapes.strategy == "exact"
                else "module.inputs is not declared"
            )
            logger.warning("nothing is warmed (%s): requests will wait for the compiler", why)
            raise_recompile_limits(0)  # past Dynamo's own it would go eager and call that compiled
            for router in self._routers.values():
                router.open()
            return "cold"
        self.state.state = "warming"
        plan = self._plan()
        raise_recompile_limits(plan.num_graphs)
        warmup = Warmup(
            self._work.serve_variant,
            self._routers,
            self._watch,
            on_failure=self.config.pt2.on_failure,
            progress=partial(self._show, sharing),
            leave_out=leave_out,
            own_folder=sharing.folder if sharing is not None else None,
        )
        warmup.observe(plan.observe)
        covers = self._compiles() and warmup.shows_nothing_new(
            plan.probe, self._work.covering(plan.probe)
        )
        plan = self._plan(covers=covers)
        self._status.plan(Counter(str(variant.bucket) for variant in plan.warm))
        warmup.warm(plan.warm)
        # That a package fails shows in its first run only: then what was warmed has compiled after
        # all, without a probe.
        proven = self._plan(covers=covers).verify
        num_faults = warmup.prove(proven)
        self.state.buckets = [_row(record) for record in warmup.records]
        logger.info("proof: %d variants replayed, %d at fault", len(proven), num_faults)
        self.state.padding = dict(self._work.measure_padding())
        self._learn_pace(warmup.timings)
        return "hot"

    def _learn_pace(self, timings: Mapping[Variant, Timing]) -> None:
        """From here on requests that cannot end in time are refused or put off."""
        for variant, timing in timings.items():
            self._budget.pace.measured(variant.load, timing)
            key = (str(variant.bucket), variant.batch_size)
            if key not in self._loads or self._loads[key].rows < variant.load.rows:
                self._loads[key] = variant.load
        assert self._budget.timeout is not None
        too_much = self._work.overload(self._budget.pace, self._budget.timeout)
        if too_much is not None:
            logger.warning("%s", too_much)

    def _show_pace(self) -> None:
        rows: list[Mapping[str, Any]] = []
        for row in self.state.buckets:
            load = self._loads.get((row["bucket"], row["batch_size"]))
            seconds = self._budget.pace.per_step(load.area, load.rows) if load else 0.0
            rows.append({**row, "seconds_per_step": round(seconds, 6)})
        self.state.buckets = rows

    def _plan(self, *, covers: bool = True) -> WarmupPlan:
        """What is warmed and replayed, for all that is known of the targets now."""
        blocks = sum(1 for name in self._routers for _ in self._work.target(name).modules())
        return warmup_plan(
            self._work,
            served_sizes(self._shapes, self.config.batchSize),
            self._warmed_sizes(),
            # blocks share theirs in a target
            graphs_per_variant=2 if self.config.pt2.scope == "full" else blocks,
            compiles=self._compiles(),
            idle=all(router.idle for router in self._routers.values()),
            covers=covers,
        )

    def _compiles(self) -> bool:
        return any(router.compiles for router in self._routers.values())

    def _warmed_sizes(self) -> tuple[int, ...]:
        every = wants_every_size(self.config.pt2.compile.kwargs, self._device)
        return warmed_sizes(self._shapes, self.config.batchSize, every=every)

    def _show(self, sharing: CacheUse | None, step: WarmupProgress) -> None:
        self._status.step(str(step.variant.bucket), step.seconds)
        if sharing is not None:
            sharing.keep()

    def _report(self, run: RunReport) -> None:
        if self.state.state in ("hot", "cold"):
            self._metrics.run(run)

    def _count(self, answer: Any) -> None:
        self.state.incidents += answer.incident
        self.state.eager_fallbacks += answer.is_fallback
        self.state.planned_eager += answer.is_planned_eager
        self._metrics.answered(answer)


def _refuse_dynamic_cuda_graphs(config: ModelConfig, device: torch.device) -> None:
    """CUDA graphs are recorded per size, so with any size allowed they would be recorded inside
    requests.
    """
    if config.pt2.shapes.strategy == "dynamic" and uses_cuda_graphs(
        config.pt2.compile.kwargs, device
    ):
        raise ConfigError(
            "records CUDA graphs, which strategy: dynamic cannot; use mode: default",
            "pt2.compile.mode",
        )


def _row(record: Record) -> dict[str, Any]:
    """A row of the state. TorchServe drops keys whose value is null, so what is absent is said in
    words.
    """
    sizes = dict(record.bucket.sizes)
    return {
        "bucket": str(record.bucket),
        **(sizes if record.bucket.is_picture else {"dims": sizes}),
        "batch_size": record.batch_size,
        "target": record.target,
        "engine": record.engine,
        "warm_seconds": record.warm_seconds,
        "cache": record.cache or "none",
        "reason": record.reason or "",
    }
