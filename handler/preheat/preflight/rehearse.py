"""Starts a worker as TorchServe would, for `preheat init`, and writes its state as JSON.

    python -m preheat.preflight.rehearse <file to write> <model>.yaml <archive's root>

A process of its own, as `preflight.look`. Of a pipeline's buckets the smallest alone is compiled.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from preheat.config.model import ModelConfig
from preheat.device import any_device, share_cpu
from preheat.errors import PreheatError
from preheat.status import StatusFile
from preheat.worker.worker import Worker


def rehearse(config: ModelConfig, root: Path) -> dict[str, object]:
    """The state of a worker that has started with the smallest bucket."""
    shapes = config.pt2.shapes
    smallest = sorted(shapes.buckets, key=lambda bucket: bucket.volume)[:1]
    small = config.with_shapes(shapes.model_copy(update={"buckets": tuple(smallest)}))
    with Worker[Any, Any](small, root, any_device(), status=StatusFile(None, "init")) as worker:
        return worker.document()


def main(out: Path, config: Path, root: Path) -> None:
    loaded = ModelConfig.load(config, ours=True)
    share_cpu(loaded.minWorkers)
    out.write_text(json.dumps(rehearse(loaded, root)), encoding="utf-8")


if __name__ == "__main__":
    logging.basicConfig(level=logging.CRITICAL)
    try:
        main(*map(Path, sys.argv[1:4]))
    except (PreheatError, OSError) as error:
        print(f"preheat: {error}", file=sys.stderr)
        sys.exit(1)
