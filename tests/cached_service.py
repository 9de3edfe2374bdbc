"""A whole worker with a shared cache and the counted compiler; run as a program, workers that are
killed while they write, and one that serves what the last of them left.

    python cached_service.py MODEL_FOLDER FOLDER

Each has a share of its own in FOLDER, under the name of the point where it dies, and is a fork of
one process: the imports take longer than all of them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import counted_compiler
from preheat.cache import bundle
from preheat.cache.shared import CacheUse
from preheat.config.model import ModelConfig
from preheat.models.diffusion.runner import DiffusionRunner
from preheat.status import StatusFile
from preheat.worker.worker import Worker

POINTS = ("compiling", "second", "packing", "renaming", "published")
"""Where a writer dies: in a compile, in the one after a bucket was kept for whoever takes over,
with half a bundle on the share, before it has its name, and right after.
"""


def start(model: Path, shared: Path, num_buckets: int = 1, **cache: Any) -> Worker[Any, Any]:
    """A hot worker: one variant a bucket, so one compile where there is no bundle."""
    counted_compiler.register()
    torch.compiler.reset()
    torch.compiler.set_stance("default")
    config = {
        "startupTimeout": 60,
        "pt2": {
            "compile": {"enable": True, "backend": counted_compiler.NAME},
            "shapes": {"buckets": [[64, 64 + 32 * number] for number in range(num_buckets)]},
            "cache": {"shared": str(shared), "key": "tiny"} | cache,
        },
        "pipeline": {
            "tasks": ["text-to-image"],
            "guidance": "on",
            "defaults": {"num_inference_steps": 2},
        },
    }
    return Worker[Any, Any](
        ModelConfig.parse(config), model, torch.device("cpu"), status=StatusFile(None, "tiny")
    )


def is_hot_and_serves(service: Worker[Any, Any]) -> bool:
    (answer,) = service.run(
        [service.parse({"body": {"prompt": "a cat", "height": 60, "width": 50}})]
    )
    answer.raise_if_failed()
    state = service.current_state()
    return (state.state, answer.engine, state.compiles_since_ready, state.incidents) == (
        "hot",
        "compiled",
        0,
        0,
    )


def caches(service: Worker[Any, Any]) -> set[str]:
    return {row.cache for row in service.state.buckets}


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_at(point: str) -> None:
    """Replace the step that the writer does not survive; `packing` dies with half a bundle on the
    share.
    """
    if point in ("compiling", "second"):
        DiffusionRunner.run_variant = _serve_then_die(point)  # type: ignore[method-assign]
    elif point == "packing":
        whole = bundle.pack

        def half(folder: Path, target: Any, *rest: Any) -> None:
            whole(folder, target, *rest)
            target.flush()
            os.ftruncate(target.fileno(), target.tell() // 2)
            _die()

        bundle.pack = half  # type: ignore[assignment]
    elif point == "renaming":
        Path.replace = _die  # type: ignore[assignment]
    else:
        os.fsync = _synced_or_dead  # type: ignore[assignment]


def _synced_or_dead(descriptor: int, /, sync: Callable[[int], None] = os.fsync) -> None:
    """Files reach the disk; the folder, which is synced once the bundle is in it, does not."""
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        _die()
    sync(descriptor)


def _serve_then_die(point: str) -> Any:
    """`second`: in the variant after one that was kept for whoever takes over."""
    serve, keep = DiffusionRunner.run_variant, CacheUse.keep
    kept: list[CacheUse] = []

    def keep_and_note(use: CacheUse) -> None:
        keep(use)
        kept.append(use)

    def run(self: DiffusionRunner, variant: Any) -> None:
        serve(self, variant)
        if point == "compiling" or kept:
            _die()

    CacheUse.keep = keep_and_note  # type: ignore[assignment, method-assign]
    return run


def _forked(model: Path, shared: Path, point: str) -> str:
    """How a worker ended that dies at `point`, or serves where there is none: the signal's name, or
    what its cache was.
    """
    told = shared.with_suffix(".told")
    child = os.fork()
    if child == 0:
        if point:
            _die_at(point)
        service = start(model, shared, num_buckets=2 if point == "second" else 1)
        assert is_hot_and_serves(service)
        told.write_text(" ".join(caches(service)))
        sys.exit()
    _, status = os.waitpid(child, 0)
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else told.read_text()


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    ends = {point: _forked(model, folder / point, point) for point in POINTS}
    served = shutil.copytree(folder / "published", folder / "served")
    print(json.dumps(ends | {"served": _forked(model, served, "")}))
