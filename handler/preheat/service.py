"""One worker's life: load the pipeline, compile its targets, warm every variant, prove it, serve.

Knows nothing of TorchServe; `preheat_handler` adapts it.
"""

from __future__ import annotations

import io
import logging
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch._logging._internal import set_logs

import preheat
from preheat import aot, images
from preheat.buckets import Bucket
from preheat.cache import fingerprint
from preheat.compilation import Phase, Router, build_router
from preheat.config import ModelConfig, ShapesConfig
from preheat.device import DTYPES, peak_memory_bytes
from preheat.engine import Answer, Engine, Job, RunReport
from preheat.errors import ConfigError, RequestError
from preheat.metrics import Metrics, discard
from preheat.pipelines import DiffusionPipeline
from preheat.request import ImageRequest, parse_row
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
        self._pipeline = DiffusionPipeline.load(_model_path(config.pipeline.path, model_dir), config.pipeline, device)
        self._shapes = _resolved_shapes(config.pt2.shapes, self._pipeline)
        self._routers = self._build_routers()
        self._engine = Engine(
            self._pipeline,
            self._routers,
            self._shapes,
            max_rows=config.batchSize,
            attention=config.pt2.attention,
            report=self._count,
        )
        self.state.fingerprint = self._fingerprint()
        if config.pt2.export.aot_compile:
            self._attach_packages(model_dir / aot.FOLDER)
        self._heat(leave_out)
        self._events_at_ready = self._watch.num_events
        self.state.compiles_at_boot = self._events_at_ready
        self.state.ready_seconds = round(time.perf_counter() - started, 3)
        self.state.state = "hot"
        self._metrics.ready(self.current_state(), self._shapes.buckets)
        status.write("hot")
        logger.info("hot after %.1f s: %d compile events", self.state.ready_seconds, self._events_at_ready)

    def parse(self, row: Mapping[str, object], content_type: str | None = None) -> Job:
        """A TorchServe input row, which came with this Content-Type, as a job.

        Raises:
            RequestError: anything about it that cannot be served.
        """
        pipeline = self.config.pipeline
        request = parse_row(
            row,
            content_type=content_type,
            limits=pipeline.limits,
            defaults=pipeline.defaults,
            guidance=pipeline.guidance,
            tasks=pipeline.tasks,
        )
        family = self._pipeline.family
        if request.negative_prompt is not None and family.guidance == "embedded":
            raise RequestError(f"{family.name} models take no negative prompt", "negative_prompt")
        return self._prepare(request)

    def run(self, jobs: Sequence[Job]) -> list[Answer]:
        """Paint the jobs; answers come in their order."""
        answers = self._engine.run(jobs)
        self.state.requests += len(jobs)
        for answer in answers:
            if answer.error is None:
                self._metrics.answered(answer.job.plan, len(answer.pictures), answer.engine)
        self._metrics.state(self.current_state())
        return answers

    def current_state(self) -> ServerState:
        """The state with the figures that are read when asked for."""
        self.state.compiles_since_ready = self._watch.num_events - self._events_at_ready
        self.state.peak_memory_bytes = peak_memory_bytes(self._device)
        return self.state

    def _prepare(self, request: ImageRequest) -> Job:
        return self._engine.prepare(request, limits=self.config.pipeline.limits, default=self._shapes.buckets[0])

    def _build_routers(self) -> dict[str, Router]:
        pt2, dtype = self.config.pt2, DTYPES[self.config.pipeline.dtype]
        names = pt2.targets or self._pipeline.default_targets()
        return {name: build_router(name, self._pipeline.target(name), pt2, dtype, self._device) for name in names}

    def _fingerprint(self) -> str:
        compiled = self.config.pt2.model_dump(mode="json", exclude={"cache", "export", "on_failure", "debug"})
        compiled["dtype"] = self.config.pipeline.dtype
        compiled["batchSize"] = self.config.batchSize
        return fingerprint(self._device, compiled, self._pipeline.structure())

    def _attach_packages(self, folder: Path) -> None:
        """Give the routers what was compiled when the archive was built; what cannot be used leaves a reason there."""
        trust = Trust.resolve(self.config.pt2.cache.trust)
        modules = {name: self._pipeline.target(name) for name in self._routers}
        aot.attach(self._routers, modules, folder, self.state.fingerprint, trust, self._device)

    def _heat(self, leave_out: Collection[Variant]) -> None:
        """Warm-up and proof. `exact` has neither: it is plain torch.compile, kept for comparison."""
        if self._shapes.strategy == "exact":
            logger.warning("strategy exact: nothing is warmed, requests will wait for the compiler")
            for router in self._routers.values():
                router.phase = Phase.OPEN
            return
        variants: Sequence[Variant] = self._plan_variants()
        self.state.state = "warming"
        raise_recompile_limits(self._num_graphs(len(variants)))
        warmup = Warmup(
            self._serve_variant,
            self._routers,
            self._watch,
            on_failure=self.config.pt2.on_failure,
            progress=self._show,
            leave_out=leave_out,
        )
        warmup.observe(self._extremes(variants))
        variants = self._to_replay(self._warm(warmup, variants))
        num_faults = warmup.prove(variants)
        self.state.buckets = [_row(record) for record in warmup.records]
        logger.info("proof: %d variants replayed, %d at fault", len(variants), num_faults)

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

    def _to_replay(self, warmed: Sequence[Variant]) -> Sequence[Variant]:
        """What the proof runs again. Only compiled code can be asked for a guard that it did not meet in warm-up: of packages, whose
        second step of each run went the way of a request already, one run a bucket is enough, and eager code has nothing to prove.
        """
        if any(router.compiles for router in self._routers.values()):
            return warmed
        if all(router.idle for router in self._routers.values()):
            return ()
        return list({variant.bucket: variant for variant in warmed}.values())  # the last of each bucket: the smallest

    def _plan_variants(self) -> tuple[Variant, ...]:
        sizes = self._shapes.batch_sizes
        if sizes == "dynamic":
            sizes = tuple(sorted({1, min(2, self.config.batchSize), self.config.batchSize}))
        return plan_variants(self._shapes.buckets, sizes, self._pipeline.guidance_variants, self._pipeline.tasks)

    def _extremes(self, variants: Sequence[Variant]) -> list[Variant]:
        """The variants whose shapes show which dimensions one graph must cover; none where every graph is static."""
        largest, smallest = variants[0], variants[-1]
        if self._shapes.strategy == "dynamic":
            sizes = {variant.bucket: variant for variant in variants if variant.guidance == largest.guidance}
            return [largest, *sizes.values()]
        if self._shapes.batch_sizes == "dynamic":
            guided = [v for v in variants if v.bucket == smallest.bucket and v.task == smallest.task]
            return [guided[0], guided[-1]]
        return []

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

    def _count(self, run: RunReport) -> None:
        if self.state.state != "hot":
            return
        self.state.incidents += run.num_requests * run.incident
        self.state.planned_eager += run.num_requests * run.planned_eager
        self.state.eager_fallbacks += run.num_requests * run.is_fallback
        self._metrics.run(run)


def _model_path(path: str, model_dir: Path) -> str | Path:
    """`.` is the archive's own `model` folder; a relative folder lies in the archive; anything else is a path or a hub id."""
    if path == ".":
        return model_dir / "model"
    inside = model_dir / path
    return inside if inside.is_dir() else path


def _resolved_shapes(shapes: ShapesConfig, pipeline: DiffusionPipeline) -> ShapesConfig:
    """The shapes with buckets filled in and checked against what the pipeline needs."""
    buckets = shapes.buckets or (pipeline.default_bucket,)
    for index, bucket in enumerate(buckets):
        for side, pixels in enumerate((bucket.height, bucket.width)):
            if pixels % pipeline.multiple:
                raise ConfigError(
                    f"{pixels} is not a multiple of {pipeline.multiple}, which {pipeline.family.name} needs",
                    f"pt2.shapes.buckets[{index}][{side}]",
                )
    return shapes.model_copy(update={"buckets": tuple(buckets)})


def _log_compile_config(config: ModelConfig) -> None:
    """Pass on what the config has to say, and torch's own compile logs where `debug` asks for them."""
    pt2 = config.pt2
    if pt2.compile.warning:
        logger.warning("%s", pt2.compile.warning)
    if pt2.compile.legacy:
        logger.warning("this form of pt2 is deprecated by TorchServe; use pt2: {compile: {enable: true, ...}}")
    debug = pt2.debug
    if debug.recompiles or debug.guards or debug.graph_breaks:
        set_logs(recompiles=debug.recompiles, guards=debug.guards, graph_breaks=debug.graph_breaks)


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
