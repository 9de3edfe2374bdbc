"""One GPU call: an SDXL of real size on every road that a CUDA device has, in this process.

    python -m bench.gpu [--profile sdxl|tiny] [--seconds 540] [--output FOLDER]

No server and no network. What is finished is written at once to FOLDER/gpu.json, and a call that
ends before everything is done goes on where the last one was: a call ends itself after `--seconds`,
with status 3 where something is left. `tests/gpu` come first. What is compiled lies under FOLDER
too, so what was cut short is quicker the next time.

The numbers are bfloat16's. An accepted mark for SDXL on such a device, 2.40 images a second, is
FP8's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import sdxl
from preheat.config.model import ModelConfig
from preheat.device import any_device, peak_memory_bytes
from preheat.models import tiny
from preheat.status import StatusFile
from preheat.worker.worker import Worker

ROOT = Path(__file__).resolve().parents[1]
UNFINISHED = 3
"""Exit status: call again."""
MOST_CALLS, LEAST_CALLS = 10, 3
NUM_KERNELS = 20
ENGINES: Mapping[str, Mapping[str, Any]] = {
    "eager": {"enable": False},
    "compiled": {"enable": True, "dynamic": False},
    "CUDA graphs": {"enable": True, "mode": "reduce-overhead", "dynamic": False},
    "masked": {"enable": True, "dynamic": False},
}
"""Arguments of `pt2.compile`."""


class OutOfTime(BaseException):
    """The call must end; no handler of errors may think that it is one."""


@dataclass(frozen=True, slots=True)
class Scale:
    """What is painted.

    Args:
        side: of the one bucket and of the pictures, in pixels.
        masked: height and width of the pictures that leave part of the bucket empty.
        build: writes the pipeline to a folder.
        dtype: of the weights.
    """

    side: int
    masked: tuple[int, int]
    num_steps: int
    dtype: str
    build: Callable[[Path, torch.device], Path]


SCALES = {
    "sdxl": Scale(
        1024,
        (896, 832),
        20,
        "bfloat16",
        lambda folder, device: sdxl.build(sdxl.SIZES["real"], folder, device),
    ),
    "tiny": Scale(64, (48, 56), 2, "float32", lambda folder, _: tiny.build("sdxl", folder)),
}


class Record:
    """What is finished, in a file: a call that is ended at any moment loses one unit."""

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self._path = path
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.document: dict[str, Any] = {"done": before.get("done", {}), **head}
        told = {key: before.get(key, value) for key, value in head.items()}
        if told != dict(head):
            raise SystemExit(f"{path} is of another run ({told}); name another --output")

    def has(self, part: str, unit: str) -> bool:
        return unit in self.document["done"].get(part, {})

    def write(self, part: str, unit: str, result: Mapping[str, Any]) -> None:
        self.document["done"].setdefault(part, {})[unit] = dict(result)
        scratch = self._path.with_suffix(".new")
        scratch.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        scratch.replace(self._path)  # a call may be ended between two bytes
        print(f"{part}, {unit}: {json.dumps(result)[:300]}", flush=True)


class Bench:
    """The units of one run, in their order.

    Args:
        model_dir: with the pipeline in `model`.
        batches: pictures at once.
        backend: of torch.compile.
        engines: of ENGINES.
        tests: whether tests/gpu are run first.
    """

    def __init__(
        self,
        scale: Scale,
        model_dir: Path,
        device: torch.device,
        record: Record,
        *,
        batches: Sequence[int],
        backend: str,
        engines: Sequence[str] = tuple(ENGINES),
        tests: bool = True,
    ) -> None:
        self._scale, self._model_dir, self._device = scale, model_dir, device
        self._record, self._batches, self._backend = record, batches, backend
        self._engines, self._tests = engines, tests
        self._worker: Worker[Any, Any] | None = None
        self._engine = ""

    def units(self) -> Iterator[tuple[str, str, Callable[[], Mapping[str, Any]]]]:
        """Part, unit, and what measures it; only those that are not finished."""
        for part, unit, measure in self._every_unit():
            if not self._record.has(part, unit):
                yield part, unit, measure

    def run(self, go_on: Callable[[], bool] = lambda: True) -> bool:
        """Measure what is left, as long as `go_on` says so before a unit; returns whether all is
        finished.
        """
        try:
            for part, unit, measure in self.units():
                if not go_on():
                    return False
                self._record.write(part, unit, measure())
        finally:
            self._close()
        return True

    def _every_unit(self) -> Iterator[tuple[str, str, Callable[[], Mapping[str, Any]]]]:
        if self._tests:
            yield "tests/gpu", "pytest", self._test
        for engine in self._engines:
            yield engine, "start", partial(self._start, engine)
            for batch in self._batches:
                yield engine, f"batch {batch}", partial(self._batch, engine, batch)
            yield engine, "kernels", partial(self._kernels, engine)
            yield engine, "restart", partial(self._start, engine)

    def _test(self) -> dict[str, Any]:
        search = os.pathsep.join([str(ROOT), str(ROOT / "handler"), str(ROOT / "tests")])
        command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "gpu"), "-q", "-rs"]
        begun = time.perf_counter()
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider"],
            check=False,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": search},
        )
        said = done.stdout.strip().splitlines()[-15:]
        return {"status": done.returncode, "seconds": _since(begun), "said": said}

    def _start(self, engine: str) -> dict[str, Any]:
        """A worker as it starts: with nothing in memory, and what is on the disk."""
        self._close()
        torch.compiler.reset()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        begun = time.perf_counter()
        self._worker = worker = Worker[Any, Any](
            self._config(engine), self._model_dir, self._device, status=StatusFile(None, "gpu")
        )
        self._engine, state = engine, worker.current_state()
        return {
            "seconds": _since(begun),
            "compiles": state.compiles_at_boot,
            "served_by": sorted({row.engine for row in state.buckets}),
            "layout": _layout(worker.targets["unet"]),
            "peak_memory_bytes": peak_memory_bytes(self._device),
        }

    def _batch(self, engine: str, batch: int) -> dict[str, Any]:
        """Batches of this size; under masks smaller pictures in turn with those that fill the
        bucket, which no mask slows down.
        """
        worker, scale = self._serving(engine), self._scale
        kinds = {"full": (scale.side, scale.side)}
        if engine == "masked":
            kinds["smaller"] = scale.masked
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        took: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(1 + MOST_CALLS):
            for kind, size in kinds.items():
                seconds = self._paint(worker, batch, size)
                if number:  # the first one warms what warm-up does not reach
                    took[kind].append(seconds)
            if number >= LEAST_CALLS and sum(map(sum, took.values())) > 30:
                break
        state = worker.current_state()
        result: dict[str, Any] = {kind: _summed_up(times, batch) for kind, times in took.items()}
        if "smaller" in took:
            pairs = zip(took["smaller"], took["full"], strict=True)
            result["masked_over_unmasked"] = round(statistics.median(a / b for a, b in pairs), 3)
        return result | {
            "compiles_since_ready": state.compiles_since_ready,
            "eager_fallbacks": state.eager_fallbacks,
            "peak_memory_bytes": peak_memory_bytes(self._device),
        }

    def _kernels(self, engine: str) -> dict[str, Any]:
        """Where one picture's time goes, by kernel, longest first."""
        worker, side = self._serving(engine), (self._scale.side, self._scale.side)
        on_gpu = self._device.type == "cuda"
        activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
        self._paint(worker, 1, side)
        with profile(activities=activities) as profiled:
            self._paint(worker, 1, side)
        own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        rows = sorted(profiled.key_averages(), key=lambda row: -float(getattr(row, own)))
        total = sum(float(getattr(row, own)) for row in rows) or 1.0
        return {
            "milliseconds": round(total / 1000, 1),
            "longest": [
                {
                    "kernel": row.key[:100],
                    "calls": row.count,
                    "share": round(float(getattr(row, own)) / total, 4),
                }
                for row in rows[:NUM_KERNELS]
            ],
        }

    def _serving(self, engine: str) -> Worker[Any, Any]:
        """The worker of this engine, started again where an earlier call had it."""
        if self._worker is None or self._engine != engine:
            self._start(engine)
        assert self._worker is not None
        return self._worker

    def _paint(self, worker: Worker[Any, Any], batch: int, size: tuple[int, int]) -> float:
        """Seconds of one call of the model with so many rows, pictures out."""
        bodies = [
            {
                "prompt": f"a lighthouse above a stormy sea, {seed}",
                "height": size[0],
                "width": size[1],
                "seed": seed,
                "num_inference_steps": self._scale.num_steps,
                "guidance_scale": 5.0,
            }
            for seed in range(batch)
        ]
        jobs = [worker.parse({"body": body}) for body in bodies]
        begun = time.perf_counter()
        for answer in worker.run(jobs):
            answer.raise_if_failed()
        return time.perf_counter() - begun

    def _config(self, engine: str) -> ModelConfig:
        compiled = dict(ENGINES[engine])
        if compiled["enable"]:
            compiled["backend"] = self._backend
        if self._backend != "inductor":
            compiled.pop("mode", None)  # Inductor's own
        side = self._scale.side
        shapes = {
            "buckets": [[side, side]],
            "batch_sizes": list(self._batches),
            "fit": "mask" if engine == "masked" else "pad",
        }
        return ModelConfig.parse(
            {
                "batchSize": max(self._batches),
                "responseTimeout": 600,
                "pt2": {"compile": compiled, "targets": ["unet"], "shapes": shapes},
                "pipeline": {
                    "dtype": self._scale.dtype,
                    "guidance": "on",
                    "tasks": ["text-to-image"],
                },
            }
        )

    def _close(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker, self._engine = None, ""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _since(begun: float) -> float:
    return round(time.perf_counter() - begun, 2)


def _summed_up(seconds: Sequence[float], batch: int) -> dict[str, float]:
    ordered = torch.tensor(sorted(seconds), dtype=torch.float64)
    p50, p99 = (float(torch.quantile(ordered, share)) for share in (0.5, 0.99))
    return {
        "images_per_second": round(batch / p50, 3),
        "p50_ms": round(1000 * p50, 1),
        "p99_ms": round(1000 * p99, 1),
        "calls": len(seconds),
    }


def _layout(module: torch.nn.Module) -> str:
    """Of the convolutions' weights."""
    weights = [part.weight for part in module.modules() if isinstance(part, torch.nn.Conv2d)]
    last = [weight.is_contiguous(memory_format=torch.channels_last) for weight in weights]
    return "channels_last" if all(last) else "contiguous"


@contextmanager
def ending_after(seconds: float) -> Iterator[None]:
    """Whatever runs in here is cut short then.

    Raises:
        OutOfTime: it was.
    """

    def end(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _build(scale: Scale, folder: Path, device: torch.device) -> None:
    """The pipeline, where no earlier call has made it; half of one is none."""
    if folder.exists():
        return
    half = folder.with_name("half-a-model")
    shutil.rmtree(half, ignore_errors=True)
    scale.build(half, device)
    half.rename(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--profile", choices=SCALES, default="sdxl")
    parser.add_argument("--seconds", type=float, default=540, help="after which the call ends")
    parser.add_argument("--output", type=Path, default=ROOT / ".preheat" / "bench-gpu")
    parser.add_argument("--batches", default="1,2,4,8", help="pictures at once")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--no-tests", action="store_true", help="leave tests/gpu out")
    options = parser.parse_args(arguments)
    device, scale = any_device(), SCALES[options.profile]
    if options.profile == "sdxl" and device.type != "cuda":
        parser.error(f"the profile sdxl needs a CUDA GPU, and torch {torch.__version__} sees none")
    options.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(options.output / "inductor"))
    on_gpu = device.type == "cuda"
    head = {
        "profile": options.profile,
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "dtype": scale.dtype,
        "side": scale.side,
        "steps": scale.num_steps,
        "backend": options.backend,
    }
    record = Record(options.output / "gpu.json", head)
    try:
        with ending_after(options.seconds):
            _build(scale, options.output / "model", device)
            bench = Bench(
                scale,
                options.output,
                device,
                record,
                batches=[int(batch) for batch in options.batches.split(",")],
                backend=options.backend,
                tests=not options.no_tests,
            )
            bench.run()
    except OutOfTime:
        print(f"{options.seconds:.0f} s are over: call again for what is left", flush=True)
        return UNFINISHED
    print(f"finished: {options.output}/gpu.json", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
