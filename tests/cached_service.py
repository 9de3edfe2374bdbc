"""A whole worker with a shared cache and the counted compiler; run as a program, one that is killed
while it writes, or serves and prints what its cache was.

python cached_service.py MODEL_FOLDER SHARED compiling|second|packing|renaming|published|serving
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import counted_compiler
from preheat.cache import bundle, store
from preheat.cache.shared import CacheUse
from preheat.config.model import ModelConfig
from preheat.models.diffusion.runner import DiffusionRunner
from preheat.status import StatusFile
from preheat.worker.worker import Worker


def start(model: Path, shared: Path, num_buckets: int = 1, **cache: Any) -> Worker[Any, Any]:
    """A hot worker: one variant a bucket, so one compile where there is no bundle."""
    counted_compiler.register()
    torch._dynamo.reset()
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
        store._sync_folder = _die  # type: ignore[assignment]


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[3] != "serving":
        _die_at(sys.argv[3])
    service = start(
        Path(sys.argv[1]), Path(sys.argv[2]), num_buckets=2 if sys.argv[3] == "second" else 1
    )
    assert is_hot_and_serves(service)
    print(*caches(service))
