"""A tiny module under the real Inductor; run as a program, one worker that starts cold and prints
what it had to compile.

    python cold_worker.py SHARED [NUM_WORKERS]

With NUM_WORKERS it starts when that many are there, so that imports do not spread them out.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

from preheat.cache.shared import SharedCache, synchronized_inductor_cache, without_headers_if_warmed
from preheat.cache.trust import Trust
from preheat.compilation.watch import cache_counters, cache_outcome


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mapped: torch.Tensor = self.layer(x)
        return torch.nn.functional.silu(mapped).softmax(-1)


def cache(shared: Path) -> SharedCache:
    return SharedCache(shared, Trust.resolve())


def compile_and_run(own_folder: Path) -> str | None:
    """`hit`, `partial` or `miss`, as warm-up counts it; the result is checked against eager."""
    torch.manual_seed(0)
    module, x = Tiny().eval(), torch.randn(2, 8)
    before = cache_counters(own_folder)
    with torch.no_grad():
        compiled = torch.compile(module.forward, dynamic=False)(x)
        torch.testing.assert_close(compiled, module(x))
    return cache_outcome(before, cache_counters(own_folder))


def _await(folder: Path, num_workers: int) -> None:
    (folder / f"{os.getpid()}.here").touch()
    while len(list(folder.glob("*.here"))) < num_workers:
        time.sleep(0.01)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    if len(sys.argv) > 2:
        _await(folder.parent, int(sys.argv[2]))
    began = time.monotonic()
    with (
        synchronized_inductor_cache("tiny", cache(folder)) as use,
        without_headers_if_warmed("tiny"),
    ):
        outcome = compile_and_run(use.folder)
    print(json.dumps(use.document() | {"cache": outcome, "seconds": time.monotonic() - began}))
