"""What torch tells about compiling, as `pt2.debug` asks: its own logs, and its trace files in a
folder that stays bounded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch._logging._internal import set_logs

from preheat.config.pt2 import DebugConfig

logger = logging.getLogger(__name__)


@contextmanager
def debugging(debug: DebugConfig) -> Iterator[None]:
    """Everything that compiles inside is logged and traced as `debug` says; the trace folder is
    pruned at the end.
    """
    if debug.recompiles or debug.guards or debug.graph_breaks:
        set_logs(recompiles=debug.recompiles, guards=debug.guards, graph_breaks=debug.graph_breaks)
    if debug.trace_dir is None:
        yield
        return
    folder = Path(debug.trace_dir) / "preheat-traces"  # a folder of our own, since it is pruned
    dynamo_config: Any = torch._dynamo.config
    dynamo_config.debug_dir_root = str(folder)
    inductor_config.trace.enabled = True
    try:
        yield
    finally:
        inductor_config.trace.enabled = False
        num_removed = prune(folder, debug.trace_bytes)
        logger.info("compile traces are in %s (%d old files removed)", folder, num_removed)


def prune(folder: Path, max_bytes: int) -> int:
    """Delete the oldest files below `folder` until it holds at most `max_bytes`; returns how many
    went.
    """
    found: list[tuple[int, int, Path]] = []
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another worker prunes too
            facts = path.stat()
            if S_ISREG(facts.st_mode):
                found.append((facts.st_mtime_ns, facts.st_size, path))
    total, num_removed = sum(size for _, size, _ in found), 0
    for _, size, path in sorted(found):
        if total <= max_bytes:
            break
        path.unlink(missing_ok=True)
        total -= size
        num_removed += 1
    return num_removed
