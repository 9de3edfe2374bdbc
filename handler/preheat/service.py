"""One worker's life: load the pipeline, compile its targets, warm every variant, prove it, serve.

Knows nothing of TorchServe; `preheat_handler` adapts it.
"""

from __future__ import annotations

import io
import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import preheat
from preheat import aot, images
from preheat.admission import check_cost
from preheat.buckets import Bucket, round_up
from preheat.cache import SharedCache, fingerprint, synchronized_inductor_cache
from preheat.compilation import Phase, Router, build_router, uses_cuda_graphs
from preheat.config import ModelConfig, ShapesConfig
from preheat.debugging import debugging
from preheat.device import DTYPES, peak_memory_bytes
from preheat.engine import Answer, Engine, Job, RunReport
from preheat.errors import ConfigError, RequestError
from preheat.metrics import Metrics, discard
from preheat.pipelines import DiffusionPipeline
from preheat.request import DEADLINE_HEADER, ImageRequest, parse_deadline, parse_row
from preheat.state import ServerState, StatusFile
from preheat.trust import Trust
from preheat.warmup import Record, Step, Variant, Warmup, covering, plan_variants
from preheat.watch import CompileWatch, raise_recompile_limits

logger = logging.getLogger(__name__)


class Service:
    """A model that is being made hot and then serves.

    Args:
        config: the model's YAML.
        model_dir: what a relative `pipeline.path` starts from; `.` is its folder `model`.
        device: see `device.pick_device`.
        status: where progress is shown.
        metrics: told what was warmed and, after READY, of every call.
        leave_out: see `warmup.Warmup`.

    Raises:
        ConfigError, PipelineError: the model cannot be served as the YAML says.
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
    ) -> None:
        started = time.perf_counter()
        self.config, self._device, self._status = config, device, status
        self._metrics = metrics or Metrics(discard)
        self.state = ServerState(preheat.__version__, config.pt2.shapes.strategy)
        self._watch = CompileWatch()
        _log_compile_config(config)
        trust = Trust.resolve(config.pt2.cache.trust)  # a key that cannot be used shows before anything is loaded
        self._pipeline = DiffusionPipeline.load(_model_path(config.pipeline.path, model_dir), config.pipeline, device)
        self._shapes = _resolved_shapes(config, self._pipeline)
        _refuse_dynamic_cuda_graphs(config, device)
        self._routers = self._build_routers()
        self._engine = Engine(
            self._pipeline,
            self._routers,
            self._shapes,
            max_rows=config.batchSize,
            device=device,
            attention=config.pt2.attention,
            report=self._report,
        )
        self.state.fingerprint = self._fingerprint()
        if config.pt2.export.aot_compile:
            self._attach_packages(model_dir / aot.FOLDER, trust)
        with debugging(config.pt2.debug), self._sharing_compiles(trust, started) as own_folder:
            self._heat(leave_out, own_folder)
        self._events_at_ready = self._watch.num_events
        self.state.compiles_at_boot = self._events_at_ready
        self.state.ready_seconds = round(time.perf_counter() - started, 3)
        self.state.state = "cold" if self._shapes.strategy == "exact" else "hot"
        self._metrics.ready(self.current_state(), self._shapes.buckets)
        status.write(self.state.state)
        logger.info(
            "%s after %.1f s: %d compile events", self.state.state, self.state.ready_seconds, self._events_at_ready
        )

    def parse(self, row: Mapping[str, object], headers: Mapping[str, str] | None = None) -> Job:
        """A TorchServe input row, which came with these headers (names in lower case), as a job.

        Raises:
            RequestError: anything about it that cannot be served.
        """
        pipeline = self.config.pipeline
        request = parse_row(
            row,
            content_type=(headers or {}).get("content-type"),
            limits=pipeline.limits,
            defaults=pipeline.defaults,
            guidance=pipeline.guidance,
            tasks=pipeline.tasks,
        )
        family = self._pipeline.family
        if request.negative_prompt is not None and family.guidance == "embedded":
            raise RequestError(f"{family.name} models take no negative prompt", "negative_prompt")
        job = self._prepare(request, parse_deadline((headers or {}).get(DEADLINE_HEADER)))
        least_area = min(bucket.area for bucket in self._shapes.buckets)
        check_cost(request, job.plan.bucket, least_area=least_area, max_cost=pipeline.limits.max_cost)
        return job

    def run(self, jobs: Sequence[Job]) -> list[Answer]:
        """Paint the jobs; answers come in their order."""
        answers = self._engine.run(jobs)
        self.state.requests += len(jobs)
        for answer in answers:
            if answer.error is None:
                self._count(answer)
        self._metrics.state(self.current_state())
        return answers

    def current_state(self) -> ServerState:
        """The state with the figures that are read when asked for."""
        self.state.compiles_since_ready = self._watch.num_events - self._events_at_ready
        self.state.peak_memory_bytes = peak_memory_bytes(self._device)
        return self.state

    def _prepare(self, request: ImageRequest, deadline: float | None = None) -> Job:
        limits = self.config.pipeline.limits
        return self._engine.prepare(request, limits=limits, default=self._shapes.buckets[0], deadline=deadline)

    def _build_routers(self) -> dict[str, Router]:
        pt2, dtype = self.config.pt2, DTYPES[self.config.pipeline.dtype]
        names = pt2.targets or self._pipeline.default_targets()
        return {name: build_router(name, self._pipeline.target(name), pt2, dtype, self._device) for name in names}

    def _fingerprint(self) -> str:
        compiled = self.config.pt2.model_dump(mode="json", exclude={"cache", "export", "on_failure", "debug"})
        compiled["dtype"] = self.config.pipeline.dtype
        compiled["batchSize"] = self.config.batchSize
        return fingerprint(self._device, compiled, self._pipeline.structure())

    def _attach_packages(self, folder: Path, trust: Trust) -> None:
        """Give the routers what was compiled when the archive was built; what cannot be used leaves a reason there."""
        modules = {name: self._pipeline.target(name) for name in self._routers}
        aot.attach(self._routers, modules, folder, self.state.fingerprint, trust, self._device)

    @contextmanager
    def _sharing_compiles(self, trust: Trust, started: float) -> Iterator[Path | None]:
        """Compile in here: with the shared cache, if there is one. Gives the Inductor folder that is then this worker's own."""
        cache = self.config.pt2.cache
        compiles = any(router.compiles for router in self._routers.values())  # not with a package for everything
        if cache.shared is None or not compiles or self._shapes.strategy == "exact":
            yield None
            return
        shared = SharedCache(Path(cache.shared), trust, self.state.fingerprint, self._device, cache.max_bytes)
        # Half of the time, so that a worker that has waited in vain can still compile.
        patience = (self.config.startupTimeout or 120) / 2 - (time.perf_counter() - started)
        with synchronized_inductor_cache(
            cache.key or "default", shared, patience=max(0.0, patience), report=self._show_waiting
        ) as use:
            yield use.folder
            fallen = [row for row in self.state.buckets if row["engine"] == "eager"]
            if fallen:
                use.withhold(f"{len(fallen)} rows of warm-up fell to eager")
        self.state.shared_cache = use.document()

    def _show_waiting(self, message: str) -> None:
        text = f"{message} (half of startupTimeout, {self.config.startupTimeout or 120} s)"
        logger.info("shared compile cache: %s", text)
        self._status.write("loading", text)

    def _heat(self, leave_out: Collection[Variant], own_folder: Path | None) -> None:
        """Warm-up and proof. `exact` has neither: it is plain torch.compile, kept for comparison."""
        if self._shapes.strategy == "exact":
            logger.warning("strategy exact: nothing is warmed, requests will wait for the compiler")
            for router in self._routers.values():
                router.phase = Phase.OPEN
            return
        variants: Sequence[Variant] = self._plan_variants(self._warmed_sizes())
        self.state.state = "warming"
        raise_recompile_limits(self._num_graphs(len(variants)))
        warmup = Warmup(
            self._serve_variant,
            self._routers,
            self._watch,
            on_failure=self.config.pt2.on_failure,
            progress=self._show,
            leave_out=leave_out,
            own_folder=own_folder,
        )
        warmup.observe(self._extremes(variants))
        proven = self._to_prove(self._warm(warmup, variants))
        num_faults = warmup.prove(proven)
        self.state.buckets = [_row(record) for record in warmup.records]
        logger.info("proof: %d variants replayed, %d at fault", len(proven), num_faults)

    def _warm(self, warmup: Warmup, variants: Sequence[Variant]) -> Sequence[Variant]:
        """Warm every variant, or a few where nothing has to be compiled; returns those that were warmed.

        That a package fails shows in its first run only: then everything is warmed after all.
        """
        for chosen in (covering(variants), variants):
            if chosen is not variants and any(router.compiles for router in self._routers.values()):
                continue
            self._status.plan(Counter(str(variant.bucket) for variant in chosen))
            warmup.warm(chosen)
            if not any(router.compiles for router in self._routers.values()):
                return chosen
        return variants

    def _to_prove(self, warmed: Sequence[Variant]) -> Sequence[Variant]:
        """What is replayed: every variant that can be served, where compiled code might have missed one."""
        if all(router.idle for router in self._routers.values()):
            return ()  # eager code is what it was the first time
        if not any(router.compiles for router in self._routers.values()):
            # Compiled code alone can be asked for a guard that it did not meet in warm-up. Of packages, whose second step of each
            # run went the way of a request already, one run a bucket is enough: the last, which is the smallest.
            return list({variant.bucket: variant for variant in warmed}.values())
        served = list(self._plan_variants(self._served_sizes()))
        if self._shapes.strategy == "dynamic":
            served += {self._between(variant): None for variant in served}
        return served

    def _plan_variants(self, sizes: Iterable[int]) -> tuple[Variant, ...]:
        return plan_variants(self._shapes.buckets, sizes, self._pipeline.guidance_variants, self._pipeline.tasks)

    def _served_sizes(self) -> tuple[int, ...]:
        """The batch sizes that a run can have."""
        sizes = self._shapes.batch_sizes
        served = tuple(range(1, self.config.batchSize + 1)) if sizes == "dynamic" else sizes
        return (max(served),) if self._shapes.invariant else served

    def _warmed_sizes(self) -> tuple[int, ...]:
        """Those that warm-up has to meet so that every served one is hot: CUDA graphs are recorded for each size."""
        served = self._served_sizes()
        if self._shapes.batch_sizes != "dynamic" or uses_cuda_graphs(self.config.pt2.compile.kwargs, self._device):
            return served
        return tuple(sorted({served[0], served[min(1, len(served) - 1)], served[-1]}))

    def _extremes(self, variants: Sequence[Variant]) -> list[Variant]:
        """The variants whose shapes show which dimensions one graph must cover; none where every graph is static."""
        largest, smallest = variants[0], variants[-1]
        if self._shapes.strategy == "dynamic":
            sizes = {variant.bucket: variant for variant in variants if variant.guidance == largest.guidance}
            return [largest, *sizes.values(), self._between(largest)]
        if self._shapes.batch_sizes == "dynamic":
            guided = [v for v in variants if v.bucket == smallest.bucket and v.task == smallest.task]
            return [guided[0], guided[-1]]
        return []

    def _between(self, variant: Variant) -> Variant:
        """The variant at about half its size: what `strategy: dynamic` has to serve beside the buckets themselves."""
        grid, bucket = self._pipeline.grid, variant.bucket
        half = round_up(Bucket(max(2 * grid, bucket.height // 2), max(2 * grid, bucket.width // 2)), grid)
        return replace(variant, bucket=half)

    def _num_graphs(self, num_variants: int) -> int:
        """An upper bound of graphs per code object: regional blocks share theirs among all blocks of a target."""
        if self.config.pt2.scope == "full":
            return 2 * num_variants
        blocks = sum(1 for name in self._routers for _ in self._pipeline.target(name).modules())
        return num_variants * blocks

    def _serve_variant(self, variant: Variant) -> None:
        """Run one variant as requests would: every limit, image decoder and encoder on the way is met too."""
        jobs = [self._prepare(self._sample(variant, seed)) for seed in range(variant.batch_size)]
        answers = self._engine.run(jobs)
        for job, answer in zip(jobs, answers, strict=True):
            answer.raise_if_failed()
            for picture in answer.pictures:
                images.encode(picture, job.request.output_format)

    def _sample(self, variant: Variant, seed: int) -> ImageRequest:
        """A request that meets exactly this variant, in as few steps as the schedulers take."""
        defaults = self.config.pipeline.defaults
        with_image, with_mask = variant.task != "text-to-image", variant.task == "inpainting"
        return ImageRequest(
            prompt="a picture",
            negative_prompt=None,
            height=variant.bucket.height,
            width=variant.bucket.width,
            num_inference_steps=2,
            guidance_scale=max(2.0, defaults.guidance_scale) if variant.guidance else 0.0,
            seed=seed,
            image=_blank(variant.bucket, "RGB") if with_image else None,
            mask_image=_blank(variant.bucket, "L") if with_mask else None,
            strength=1.0,
            num_images=1,
            output_format=defaults.output_format,
            response_format="image",
        )

    def _show(self, step: Step) -> None:
        self._status.step(str(step.variant.bucket), step.seconds)

    def _report(self, run: RunReport) -> None:
        if self.state.state in ("hot", "cold"):
            self._metrics.run(run)

    def _count(self, answer: Answer) -> None:
        self.state.incidents += answer.incident
        self.state.eager_fallbacks += answer.is_fallback
        self.state.planned_eager += answer.is_planned_eager
        self._metrics.answered(answer)


def _model_path(path: str, model_dir: Path) -> str | Path:
    """`.` is the archive's own `model` folder; a relative folder lies in the archive; anything else is a path or a hub id."""
    if path == ".":
        return model_dir / "model"
    inside = model_dir / path
    return inside if inside.is_dir() else path


def _resolved_shapes(config: ModelConfig, pipeline: DiffusionPipeline) -> ShapesConfig:
    """The shapes with buckets filled in and checked against what the pipeline needs and the limits allow."""
    shapes, limits = config.pt2.shapes, config.pipeline.limits
    buckets = shapes.buckets or (pipeline.default_bucket,)
    for index, bucket in enumerate(buckets):
        for side, pixels in enumerate((bucket.height, bucket.width)):
            if pixels % pipeline.multiple:
                raise ConfigError(
                    f"{pixels} is not a multiple of {pipeline.multiple}, which {pipeline.family.name} needs",
                    f"pt2.shapes.buckets[{index}][{side}]",
                )
        if max(bucket.height, bucket.width) > limits.max_side or bucket.area > limits.max_image_pixels:
            raise ConfigError(
                f"{bucket} is over pipeline.limits (max_side {limits.max_side}, max_image_pixels {limits.max_image_pixels})",
                f"pt2.shapes.buckets[{index}]",
            )
        if min(bucket.height, bucket.width) < limits.min_side:
            raise ConfigError(
                f"{bucket} is under pipeline.limits.min_side ({limits.min_side})", f"pt2.shapes.buckets[{index}]"
            )
    return shapes.model_copy(update={"buckets": tuple(buckets)})


def _refuse_dynamic_cuda_graphs(config: ModelConfig, device: torch.device) -> None:
    """CUDA graphs are recorded per size, so with any size allowed they would be recorded inside requests."""
    if config.pt2.shapes.strategy == "dynamic" and uses_cuda_graphs(config.pt2.compile.kwargs, device):
        raise ConfigError("records CUDA graphs, which strategy: dynamic cannot; use mode: default", "pt2.compile.mode")


def _log_compile_config(config: ModelConfig) -> None:
    """Pass on what the config has to say about itself."""
    pt2 = config.pt2
    if pt2.compile.warning:
        logger.warning("%s", pt2.compile.warning)
    if pt2.compile.legacy:
        logger.warning("this form of pt2 is deprecated by TorchServe; use pt2: {compile: {enable: true, ...}}")


def _blank(bucket: Bucket, mode: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (bucket.width, bucket.height), "white").save(buffer, "png")
    return buffer.getvalue()


def _row(record: Record) -> dict[str, Any]:
    """A row of the state. TorchServe drops keys whose value is null, so what is absent is said in words."""
    return {
        "height": record.bucket.height,
        "width": record.bucket.width,
        "batch_size": record.batch_size,
        "target": record.target,
        "engine": record.engine,
        "warm_seconds": record.warm_seconds,
        "cache": record.cache or "none",
        "reason": record.reason or "",
    }
