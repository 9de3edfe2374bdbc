"""One worker's life: load the model, compile its targets, warm every variant, verify it, serve.

The same for every family of models; what differs is behind `models.base`. Knows nothing of
TorchServe; `preheat_handler` adapts it.

Several workers of one process share what torch has one of: whether it may compile at all (allowed
while one of them warms up, forbidden as soon as that one is READY, or has failed beside one that is
hot, allowed again when the last one is closed), Dynamo's limits, which only grow, and its counters,
of which each worker's own are those since its READY but for the warm-up of others. `pt2.debug` is
the process's too, while a worker starts. So two workers can take turns; one that warms up while
another serves lets a guard that fails there compile.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeAlias
from weakref import WeakSet

import torch
from torch import nn

import preheat
from preheat.buckets import Bucket
from preheat.cache.choice import ChoiceFile
from preheat.cache.shared import (
    CacheUse,
    SharedCache,
    fingerprint,
    refuse_foreign_headers,
    synchronized_inductor_cache,
    without_headers_if_warmed,
    writable_inductor_folder,
)
from preheat.cache.trust import Trust
from preheat.compilation.backends import aot
from preheat.compilation.choosing import choose_roads
from preheat.compilation.debugging import debugging
from preheat.compilation.pace import Budget, Timing
from preheat.compilation.router import Router
from preheat.compilation.targets import (
    build_router,
    keep_graphs,
    lay_out_eager,
    uses_cuda_graphs,
)
from preheat.compilation.variants import Variant
from preheat.compilation.warmup import Warmup
from preheat.compilation.warmup_plan import WarmupPlan, served_sizes, warmed_sizes, warmup_plan
from preheat.compilation.watch import (
    CompileWatch,
    allow_compiling,
    forbid_compiling,
    raise_recompile_limits,
)
from preheat.config.family import Manifest
from preheat.config.model import ModelConfig
from preheat.device import computes, is_out_of_memory, peak_memory_bytes
from preheat.errors import ConfigError, NoBucket, OutOfMemory, PutOff, RequestError
from preheat.models.base import LoadedModel, ModelRunner, StepRunner
from preheat.models.batching import BaseJob, Execution, JobT, Outcome, ResultT, RunReport
from preheat.models.registry import load_model
from preheat.protocol.call import Call
from preheat.protocol.fields import DEADLINE_HEADER, parse_deadline
from preheat.protocol.responses import Response, from_error
from preheat.status import Phase, StatusFile
from preheat.user_code import INSTALL, imported_from, load_files
from preheat.worker.asked import AskedSizes
from preheat.worker.metrics import Metrics, discard
from preheat.worker.state import ServerState
from preheat.worker.turns import Turns

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = 120.0
"""TorchServe's responseTimeout in seconds where the YAML names none."""


@dataclass(frozen=True, slots=True)
class Prepared(Generic[JobT, ResultT]):
    """A loaded model behind its routers, of which nothing is compiled yet."""

    config: ModelConfig
    """As the model has resolved it."""
    model: LoadedModel[JobT, ResultT]
    targets: Mapping[str, nn.Module]
    runner: ModelRunner[JobT, ResultT]
    trust: Trust
    fingerprint: str

    @property
    def execution(self) -> Execution:
        return self.runner.execution

    @property
    def routers(self) -> Mapping[str, Router]:
        return self.execution.routers

    @property
    def warmed_sizes(self) -> tuple[int, ...]:
        """The batch sizes that warm-up has to meet."""
        every = any(router.wants_every_size for router in self.routers.values())
        return warmed_sizes(self.config.pt2.shapes, self.config.batchSize, every=every)

    @property
    def compiles(self) -> bool:
        return any(router.compiles for router in self.routers.values())

    @property
    def makes_code(self) -> bool:
        """Whether warm-up makes something that other starts could use."""
        return any(router.makes_code for router in self.routers.values())


def load(
    config: ModelConfig,
    model_dir: Path,
    device: torch.device,
    *,
    manifest: Manifest | None = None,
    report: Callable[[RunReport], None] = lambda _: None,
) -> Prepared[JobT, ResultT]:
    """The first half of a worker's start; `build_packages` goes on by itself.

    Raises:
        ConfigError, ModelError: the model cannot be served as the YAML says.
    """
    config = config.in_archive(manifest or {})
    # a key that cannot be used shows before anything is loaded
    trust = Trust.resolve(config.pt2.cache.trust)
    imported = load_files(config.pt2.imports, model_dir)
    model: LoadedModel[JobT, ResultT] = load_model(config, model_dir, manifest or {}, device)
    config = model.config
    _refuse_dynamic_cuda_graphs(config, device)
    if not computes(model.dtype, device):
        logger.warning("this CPU has no instructions for %s: float32 would be faster", model.dtype)
    targets = model.targets()
    for install in (getattr(file, INSTALL) for file in imported if hasattr(file, INSTALL)):
        for target in targets.values():
            install(target)
    execution = Execution(
        batch_sizes=served_sizes(config.pt2.shapes, config.batchSize),
        device=device,
        routers={
            name: build_router(name, target, config.pt2, model.dtype, device)
            for name, target in targets.items()
        },
        attention=config.pt2.attention,
        report=report,
        budget=Budget(config.responseTimeout or DEFAULT_TIMEOUT, config.batchSize),
    )
    compiled = {
        "pt2": config.pt2.model_dump(
            mode="json", exclude={"cache", "export", "on_failure", "debug"}
        ),
        "batchSize": config.batchSize,
        "sources": imported_from(model_dir),
    }
    return Prepared(
        config=config,
        model=model,
        targets=targets,
        runner=model.runner(execution),
        trust=trust,
        fingerprint=fingerprint(device, compiled, model.fingerprint_facts()),
    )


@dataclass(slots=True)
class Pending(Generic[JobT, ResultT]):
    """One request of a batch on its way: a job, then its result, then what it is answered."""

    job: JobT | None = None
    result: ResultT | None = None
    response: Response | None = None

    @property
    def served_in(self) -> str | None:
        """The bucket of a good result; None without one."""
        result = self.result
        return result.bucket if result is not None and result.error is None else None


AnyPrepared: TypeAlias = Prepared[BaseJob, Outcome]
AnyPending: TypeAlias = Pending[BaseJob, Outcome]


class Worker(Generic[JobT, ResultT]):
    """A model that is being made hot and then serves.

    Args:
        config: the model's YAML.
        model_dir: the unpacked archive.
        device: see `device.pick_device`.
        status: where progress is shown.
        metrics: given what was warmed and, after READY, every call.
        manifest: the archive's, where a module may be named.

    Raises:
        ConfigError, ModelError: the model cannot be served as the YAML says.
        WarmupError: `on_failure: fail`, and a variant could not be made hot.
    """

    alive: ClassVar[WeakSet[Worker[Any, Any]]] = WeakSet()
    """Those of this process that are READY and not closed."""

    def __init__(
        self,
        config: ModelConfig,
        model_dir: Path,
        device: torch.device,
        *,
        status: StatusFile,
        metrics: Metrics | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        started = time.perf_counter()
        self._status, self._metrics = status, metrics or Metrics(discard)
        self._asked = AskedSizes()
        self._folder: Path | None = None
        """Where compiled code is kept that later starts will find."""
        self.state = ServerState(
            preheat.__version__, config.family.name, config.pt2.shapes.strategy
        )
        self.state.warnings = list(config.warnings)
        for warning in config.warnings:
            logger.warning("%s", warning)
        with ExitStack() as undo:
            self._watch = CompileWatch()
            undo.callback(self._watch.close)
            prepared: Prepared[JobT, ResultT] = load(
                config, model_dir, device, manifest=manifest, report=self._report
            )
            self._prepared, self.config, self.model = prepared, prepared.config, prepared.model
            self.runner, self.routers = prepared.runner, prepared.routers
            self.targets, self._budget = prepared.targets, prepared.execution.budget
            undo.callback(self.runner.close)
            self.turns: Turns[JobT, ResultT] | None = None
            if isinstance(self.runner, StepRunner) and config.continuousBatching:
                self.turns = Turns(self, self.runner)
            self._get_ready(model_dir, started)
            self._open = undo.pop_all()

    def _get_ready(self, model_dir: Path, started: float) -> None:
        prepared, pt2 = self._prepared, self.config.pt2
        self.state.strategy = self.config.pt2.shapes.strategy
        self.state.fingerprint = prepared.fingerprint
        self.state.request_defaults = self.model.request_defaults()
        self.state.num_threads = torch.get_num_threads()
        self._metrics.expect([str(size) for size in self.model.sizes], self.model.fields)
        if pt2.export.aot_compile:
            # what cannot be used leaves a reason in its router
            aot.attach(
                prepared.routers,
                prepared.targets,
                model_dir / aot.FOLDER,
                prepared.fingerprint,
                prepared.trust,
                prepared.execution.device,
            )
        with (
            self._beside_others(),
            debugging(pt2.debug),
            self._sharing_compiles(prepared.trust, started) as sharing,
        ):
            phase = self._warm_up(sharing, started)
        Worker.alive.add(self)
        self.state.compiles_at_boot = self._events_at_ready
        self.state.ready_seconds = round(time.perf_counter() - started, 3)
        self.state.state = phase
        self._metrics.ready(self.current_state())
        self._status.serve(self.document)
        logger.info(
            "%s after %.1f s: %d compile events",
            self.state.state,
            self.state.ready_seconds,
            self._events_at_ready,
        )

    def close(self) -> None:
        """Let go of what the process holds for this worker; it serves nothing afterwards. When the
        last one goes, compiling is allowed again.
        """
        if self in Worker.alive:
            Worker.alive.remove(self)
            self._open.close()
            if not Worker.alive:
                allow_compiling()

    def __enter__(self) -> Worker[JobT, ResultT]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def preprocess(self, calls: Iterable[Call | Response]) -> list[Pending[JobT, ResultT]]:
        """A batch has come, and `responseTimeout` runs from now on: each request as a job, or with
        its response if it is refused, which costs the others nothing. What is answered already
        stays so.
        """
        self._budget.end()
        self._budget.begin()
        with self._metrics.timed("preheat_preprocess_seconds"):
            return [
                Pending(response=call) if isinstance(call, Response) else self.pending(call)
                for call in calls
            ]

    def inference(
        self, pending: Sequence[Pending[JobT, ResultT]]
    ) -> Sequence[Pending[JobT, ResultT]]:
        """Serve the jobs, in as few calls of the model as their differences allow."""
        jobs = {index: each.job for index, each in enumerate(pending) if each.job is not None}
        for index, result in zip(jobs, self.run(list(jobs.values())), strict=True):
            pending[index].result = result
        return pending

    def postprocess(self, pending: Sequence[Pending[JobT, ResultT]]) -> list[Response]:
        """One response a request. What was computed, and counted as served, may fail even here."""
        results = [each.result for each in pending if each.result is not None]
        served = [result for result in results if result.error is None]
        with self._metrics.timed("preheat_encode_seconds"):
            encoded = iter(self.runner.postprocess(results))
        for result in served:
            if result.error is not None:
                self._metrics.failed(result.error.code)
        return [each.response or next(encoded) for each in pending]

    def pending(self, call: Call) -> Pending[JobT, ResultT]:
        """A request as a job, or with its response if it is refused."""
        try:
            return Pending(job=self.parse(call.row, call.headers, call.send))
        except RequestError as error:
            self._metrics.refused(error.field)
            if isinstance(error, NoBucket):
                self._count_size(error.asked)
            return Pending(response=from_error(error))
        except (MemoryError, RuntimeError) as error:  # torch's CPU allocator raises the latter
            if not is_out_of_memory(error):
                raise
            failure = OutOfMemory("the request's inputs do not fit into memory")
            self._metrics.failed(failure.code)
            return Pending(response=from_error(failure))

    def parse(
        self,
        row: Mapping[str, object],
        headers: Mapping[str, str] | None = None,
        send: Callable[[Response], None] | None = None,
    ) -> JobT:
        """One request as a job; for the arguments see `Call`.

        Raises:
            RequestError: anything about it that cannot be served.
        """
        headers = headers or {}
        deadline = parse_deadline(headers.get(DEADLINE_HEADER))
        return self.runner.preprocess(Call(row, headers, send, deadline))

    def run(self, jobs: Sequence[JobT]) -> list[ResultT]:
        """Serve the jobs; results come in their order."""
        results = list(self.runner.inference(jobs))
        self.served(results)
        return results

    def served(self, results: Sequence[ResultT]) -> None:
        """Count requests that are through, or have failed."""
        self.state.requests += len(results)
        for result in results:
            if result.error is None:
                self._count(result)
            else:
                self._metrics.failed(result.error.code)
                self.state.put_off += isinstance(result.error, PutOff)
            if not isinstance(result.error, PutOff):  # who comes again is counted then
                self._count_size(result.job.asked)
        self._metrics.state(self.current_state())
        self._status.serve(self.document)

    def current_state(self) -> ServerState:
        """The state with the figures that are read when asked for."""
        self.state.compiles_since_ready = self._watch.num_events - self._events_at_ready
        unfit = self.runner.batches.unfit
        self.state.unfit, self.state.unfit_seconds = unfit.sizes(), unfit.waits()
        self.state.peak_memory_bytes = peak_memory_bytes(self._prepared.execution.device)
        return self.state

    def document(self) -> dict[str, object]:
        """The current state as JSON, but for the asked sizes, which may be many."""
        return self.current_state().document(self._budget.pace)

    def description(self) -> dict[str, object]:
        """The current state as JSON, and the sizes that were asked for."""
        return self.document() | {"asked_sizes": self._asked.document()}

    @contextmanager
    def _beside_others(self) -> Iterator[None]:
        """Compile in here, which no other worker's requests have done. Where it fails, those who
        are hot compile nothing from then on, as before.
        """
        try:
            yield
        except BaseException:
            if any(other.state.state == "hot" for other in Worker.alive):
                forbid_compiling()
            raise
        finally:
            self._events_at_ready = self._watch.num_events
            for other in Worker.alive:
                other._events_at_ready += self._events_at_ready  # its watch has seen them too

    @contextmanager
    def _sharing_compiles(self, trust: Trust, started: float) -> Iterator[CacheUse | None]:
        """Compile in here: with the shared cache, if there is one. Gives what becomes of it."""
        cache = self.config.pt2.cache
        # not with a package for everything
        if not self._prepared.makes_code:
            yield None
            return
        if self.config.pt2.shapes.strategy == "exact":  # compiled in requests, but from there too
            writable_inductor_folder()
            refuse_foreign_headers()
            yield None
            return
        if cache.shared is None:
            self._folder = writable_inductor_folder()
            yield None
            return
        shared = SharedCache(
            Path(cache.shared),
            trust,
            self.state.fingerprint,
            self._prepared.execution.device,
            cache.max_bytes,
        )
        with synchronized_inductor_cache(
            cache.key or "default",
            shared,
            timeout=self._patience(started),
            report=self._show_waiting,
        ) as use:
            self._folder = None if use.reason else use.folder
            yield use
            fallbacks = [row for row in self.state.buckets if row.engine == "eager" and row.reason]
            # Who found nothing shares what did compile. The others, who fail as it did, do not
            # replace it at every start.
            if fallbacks and use.digest:
                use.withhold(f"{len(fallbacks)} rows of warm-up are eager")
        self.state.shared_cache = use.document()

    def _patience(self, started: float) -> float:
        """Seconds to wait for another worker: half of the time, so that one that has waited for
        nothing can still compile.
        """
        spent = time.perf_counter() - started
        return max(0.0, (self.config.startupTimeout or 120) / 2 - spent)

    def _headers(self) -> AbstractContextManager[None]:
        named = self.config.pt2.compile.for_inductor.get("backend", "inductor")
        if named != "inductor" or not self._prepared.compiles:
            return nullcontext()
        return without_headers_if_warmed(self.state.fingerprint)

    def _show_waiting(self, message: str) -> None:
        text = f"{message} (half of startupTimeout, {self.config.startupTimeout or 120} s)"
        logger.info("%s", text)
        self._status.write("loading", text)

    def _warm_up(self, sharing: CacheUse | None, started: float) -> Phase:
        """Warm-up and verification; the state that the worker is in afterwards."""
        # plain torch.compile: for comparison, or because the YAML tells of no shapes
        if self.config.pt2.shapes.strategy == "exact":
            logger.warning("nothing is warmed (strategy exact): requests wait for the compiler")
            raise_recompile_limits(0)  # past Dynamo's own it would go eager and call that compiled
            for router in self.routers.values():
                router.open()
            return "cold"
        self.state.state = "warming"
        plan = self._plan()
        raise_recompile_limits(plan.num_graphs)
        warmup = Warmup(
            self.runner.run_variant,
            self.routers,
            self._watch,
            on_failure=self.config.pt2.on_failure,
            progress=partial(self._show, sharing),
            own_folder=sharing.folder if sharing is not None else None,
        )
        if self._folder is not None:
            keep_graphs(self.routers.values(), self._folder, self.state.fingerprint)
        warmup.observe(plan.observe)
        self._choose_roads(warmup, started)
        with self._headers():
            self._make_hot(warmup)
        self.state.buckets = warmup.rows
        self.state.roads = {name: router.roads.document() for name, router in self.routers.items()}
        self.state.padding = dict(self.runner.measure_padding())
        alone = self.runner.measure_alone(_hot(warmup))
        self.state.own_sizes = [_document(*each) for each in alone.items()]
        self._learn_pace({**warmup.timings, **alone})
        return "hot"

    def _choose_roads(self, warmup: Warmup, started: float) -> None:
        """Settle what serves each target that `backend: auto` has left open."""
        # what can be had is part of it: packages, or a compiler, may come later
        roads = {name: router.roads_to_be_had for name, router in self.routers.items()}
        context = f"{self.state.fingerprint}, {torch.get_num_threads()} threads, {roads}"
        choose_roads(
            self.routers,
            ChoiceFile(self._folder, context) if self._folder is not None else None,
            lambda: warmup.choose(self._plan().warm),
            patience=self._patience(started),
            report=self._show_waiting,
            keeps_failures=self.config.pt2.on_failure == "eager",
        )
        for name, router in self.routers.items():
            if router.roads.chosen == "eager":
                lay_out_eager(self.targets[name], self.config.pt2, self._prepared.execution.device)

    def _make_hot(self, warmup: Warmup) -> None:
        plan = self._plan()
        covers = self._prepared.compiles and warmup.shows_nothing_new(
            plan.probe, self.runner.covering(plan.probe)
        )
        plan = self._plan(covers=covers)
        self._status.plan(Counter(str(variant.bucket) for variant in plan.warm))
        warmup.warm(plan.warm)
        # That a package fails shows in its first run only: then what was warmed has compiled after
        # all, without a probe.
        verified = self._plan(covers=covers).verify
        num_faults = warmup.verify(verified)
        logger.info("verification: %d variants replayed, %d at fault", len(verified), num_faults)

    def _learn_pace(self, timings: Mapping[Variant, Timing]) -> None:
        """From here on requests that cannot end in time are refused or put off."""
        for variant, timing in timings.items():
            self._budget.measured(variant.load, timing)
        assert self._budget.timeout is not None
        too_much = self.runner.overload(self._budget.pace, self._budget.timeout)
        if too_much is not None:
            logger.warning("%s", too_much)

    def _plan(self, *, covers: bool = True) -> WarmupPlan:
        """What is warmed and replayed, for all that is known of the targets now."""
        blocks = sum(1 for name in self.routers for _ in self.targets[name].modules())
        return warmup_plan(
            self.runner,
            self._prepared.execution.batch_sizes,
            self._prepared.warmed_sizes,
            # blocks share theirs in a target
            graphs_per_variant=2 if self.config.pt2.scope == "full" else blocks,
            compiles=self._prepared.compiles,
            idle=all(router.idle for router in self.routers.values()),
            covers=covers,
        )

    def _show(self, sharing: CacheUse | None, variant: Variant, seconds: float) -> None:
        self._status.step(str(variant.bucket), seconds)
        if sharing is not None:
            sharing.keep()

    def _report(self, run: RunReport) -> None:
        if self.state.state in ("hot", "cold"):
            self._metrics.run(run)

    def _count_size(self, size: Bucket | None) -> None:
        self._asked.count(size)
        self._status.keep_sizes(self._asked.document)

    def _count(self, answer: Outcome) -> None:
        self.state.incidents += answer.unwarmed
        self.state.eager_fallbacks += answer.is_fallback
        self.state.planned_eager += answer.job.bypass
        self._metrics.answered(answer)


def _hot(warmup: Warmup) -> Mapping[Variant, Timing]:
    """The timings of those that no target runs eagerly."""
    slow = {(row.bucket, row.batch_size) for row in warmup.rows if row.engine == "eager"}
    return {
        variant: timing
        for variant, timing in warmup.timings.items()
        if (variant.bucket, variant.batch_size) not in slow
    }


def _document(variant: Variant, timing: Timing) -> dict[str, object]:
    """What was measured of a size without a bucket."""
    return {
        "size": str(variant.bucket),
        "rows": variant.load.rows,
        "seconds_per_step": round(timing.per_step, 6),
    }


AnyWorker: TypeAlias = Worker[BaseJob, Outcome]
"""For who passes jobs and results on unread."""


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
