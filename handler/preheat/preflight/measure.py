"""Runs requests eagerly for `preheat profile`, and writes where their time went as JSON.

    python -m preheat.preflight.measure <file to write> <model>.yaml <archive's root> <steps or 0>
        [<trace to write>]

A process of its own, as `preflight.look`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from preheat.buckets import Bucket
from preheat.config.model import ModelConfig
from preheat.config.pt2 import ExportConfig
from preheat.config.pt2_forms import CompileConfig
from preheat.device import any_device, share_cpu, synchronize
from preheat.errors import ModelError, PreheatError
from preheat.models.base import TimedPart
from preheat.preflight.profile import ENCODING, InBucket, Operator, Profile, Stopwatch
from preheat.worker.worker import AnyPrepared, load

_RUNS = 3
"""Timed requests a bucket, after one that is not; the middle one counts."""
_MOST_OPERATORS = 10


def measure(config: ModelConfig, root: Path, steps: int | None, trace: Path | None) -> Profile:
    """Where the time of one request of each bucket goes, compiling off.

    Raises:
        PreheatError: the model cannot be served, or has no buckets to ask for.
    """
    device = any_device(config.deviceType)
    pt2 = config.pt2.model_copy(update={"compile": CompileConfig(), "export": ExportConfig()})
    eager = config.model_copy(update={"pt2": pt2})
    prepared: AnyPrepared = load(eager, root, device)
    sizes = prepared.model.sizes
    if not sizes:
        raise ModelError("no sizes are known to ask for: declare module.inputs")
    parts = prepared.model.parts()
    every = [_in_bucket(prepared, parts, size, steps) for size in sizes]
    largest = max(sizes, key=lambda size: size.volume)
    return Profile(
        device=str(device),
        dtype=str(prepared.model.dtype).removeprefix("torch."),
        steps=prepared.runner.num_steps(steps),
        targets=tuple(name for name, part in parts.items() if part.is_target),
        buckets=tuple(every),
        operators=_operators(prepared, largest, steps, trace),
    )


def _in_bucket(
    prepared: AnyPrepared, parts: Mapping[str, TimedPart], size: Bucket, steps: int | None
) -> InBucket:
    _answer(prepared, size, steps, Stopwatch())
    runs = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        watch = Stopwatch(partial(_now, prepared.execution.device))
        with _timed(parts, watch):
            _answer(prepared, size, steps, watch)
        watch.lap()
        runs.append((time.perf_counter() - began, watch.seconds))
    wall, seconds = sorted(runs, key=lambda run: run[0])[len(runs) // 2]
    return InBucket(bucket=str(size), wall_seconds=wall, seconds=seconds)


def _answer(prepared: AnyPrepared, size: Bucket, steps: int | None, watch: Stopwatch) -> None:
    """A request on its way through the served path, alone in its batch."""
    runner = prepared.runner
    results, _ = runner.batches.timed([runner.example(size, steps)])
    with watch.part(ENCODING):
        runner.postprocess(results)


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


@contextmanager
def _timed(parts: Mapping[str, TimedPart], watch: Stopwatch) -> Iterator[None]:
    """In here every call of a part's own is counted as the part's."""

    def counted(name: str, call: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with watch.part(name):
                return call(*args, **kwargs)

        return timed

    with ExitStack() as stack:
        for name, part in parts.items():
            for owner, attribute in part.calls:
                stack.enter_context(_replaced(owner, attribute, partial(counted, name)))
        yield


@contextmanager
def _replaced(owner: Any, attribute: str, change: Any) -> Iterator[None]:
    own = vars(owner).get(attribute)  # a router, or what casts a VAE's tensors
    setattr(owner, attribute, change(getattr(owner, attribute)))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, attribute)
        else:
            setattr(owner, attribute, own)


def _operators(
    prepared: AnyPrepared, size: Bucket, steps: int | None, trace: Path | None
) -> tuple[Operator, ...]:
    on_gpu = prepared.execution.device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as profiled:
        _answer(prepared, size, steps, Stopwatch())
    if trace is not None:
        profiled.export_chrome_trace(str(trace))
    own = {
        each.key: (each.self_device_time_total if on_gpu else each.self_cpu_time_total, each.count)
        for each in profiled.key_averages()
    }
    total = sum(seconds for seconds, _ in own.values()) or 1.0
    ordered = sorted(own.items(), key=lambda item: -item[1][0])[:_MOST_OPERATORS]
    return tuple(
        Operator(name=name, calls=calls, share=seconds / total)
        for name, (seconds, calls) in ordered
    )


def main(out: str, config: str, root: str, steps: str, *trace: str) -> None:
    loaded = ModelConfig.load(Path(config), ours=True)
    share_cpu(loaded.minWorkers)
    found = measure(loaded, Path(root), int(steps) or None, Path(trace[0]) if trace else None)
    Path(out).write_text(found.model_dump_json(), encoding="utf-8")


if __name__ == "__main__":
    logging.basicConfig(level=logging.CRITICAL)
    try:
        main(*sys.argv[1:])
    except (PreheatError, OSError) as error:
        print(f"preheat: {error}", file=sys.stderr)
        sys.exit(1)
