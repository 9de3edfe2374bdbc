"""Step time of AOTInductor packages against torch.compile and eager: one process, one module, the same inputs, taken in turn.

    python bench/aot_steps.py <archive made with --format no-archive --aot> [rounds]

Prints one JSON object per package and batch size: median milliseconds, and the median of the rounds' ratios aot / compiled.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from preheat import aot
from preheat.aot_build import Rehearsal
from preheat.compilation import leaves
from preheat.config import ModelConfig
from preheat.device import pick_device
from preheat.state import StatusFile
from preheat.trust import Trust
from preheat.watch import eagerly


def main(archive: Path, rounds: int = 40) -> None:
    config = ModelConfig.load(next(archive.glob("*.yaml")))
    device = pick_device(0)
    worker = Rehearsal(config, archive, device, status=StatusFile(None, "bench"))
    routers, modules = worker._routers, {name: worker._work.target(name) for name in worker._routers}
    aot.attach(routers, modules, archive / aot.FOLDER, worker.state.fingerprint, Trust.resolve(), device)
    torch._dynamo.config.recompile_limit = 100
    for wanted in worker._wanted:
        router, (args, kwargs) = routers[wanted.target], wanted.plan.inputs
        package = next(each for each in router.ahead if each.matches(args, kwargs))
        forward = router._forward
        compiled = torch.compile(forward, dynamic=False)
        for path, leaf in leaves(args, kwargs):  # as warm-up does: one graph for every batch size but 1
            for dim, (_, most) in wanted.plan.dims.ranges.get(path, {}).items():
                torch._dynamo.mark_dynamic(leaf, dim, min=2, max=most)
        with torch.inference_mode():
            compiled(*args, **kwargs)
            engines: dict[str, Callable[..., Any]] = {"aot": package, "compiled": compiled, "eager": forward}
            times: dict[str, list[float]] = {name: [] for name in engines}
            for round_ in range(rounds + 3):
                for name in list(engines)[round_ % 3 :] + list(engines)[: round_ % 3]:
                    seconds = _time(engines[name], args, kwargs, eager=name == "eager", device=device)
                    if round_ >= 3:
                        times[name].append(1000 * seconds)
        ratio = statistics.median(a / c for a, c in zip(times["aot"], times["compiled"], strict=True))
        rows = next(leaf.shape[0] for _, leaf in leaves(args, kwargs) if isinstance(leaf, torch.Tensor) and leaf.dim())
        print(
            json.dumps(
                {
                    "target": wanted.target,
                    "buckets": wanted.buckets,
                    "rows": rows,
                    "milliseconds": {name: round(statistics.median(taken), 2) for name, taken in times.items()},
                    "aot_to_compiled": round(ratio, 3),
                }
            ),
            flush=True,
        )


def _time(call: Callable[..., Any], args: Any, kwargs: Any, *, eager: bool, device: torch.device) -> float:
    started = time.perf_counter()
    if eager:
        with eagerly():
            call(*args, **kwargs)
    else:
        call(*args, **kwargs)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(argument) for argument in sys.argv[2:3]))
