"""What the worker asks of the C library."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from preheat.device import is_out_of_memory

HANDLER = Path(__file__).parent.parent / "handler"

# Page faults of filling blocks of 128 MiB in all that have been filled and freed before: before and after `release_memory`.
FAULTS = """
import resource, numpy, torch
from preheat.device import keep_freed_memory, release_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [numpy.ones(2**21) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
again = [faults() for _ in range(20)][-1]
release_memory(torch.device("cpu"))
print(again, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way")
def test_freed_memory_is_kept_until_it_is_released_unless_the_user_has_settings_of_his_own() -> None:
    kept, released = page_faults()
    plain, _ = page_faults(MALLOC_ARENA_MAX="8")
    assert 4 * kept < plain and 4 * kept < released


def page_faults(**settings: str) -> list[int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env={**clean, "PYTHONPATH": str(HANDLER), **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(word) for word in done.stdout.split()]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("aoti_torch_empty_strided(4, ...) API call failed at /tmp/x.cpp, line 9"), True),
        (RuntimeError("aoti_torch_empty_strided_pinned(\n4) API call failed at /tmp/x.cpp, line 9"), True),
        (RuntimeError("aoti_torch_cpu_convolution(...) API call failed at /tmp/x.cpp, line 9"), False),
        (ValueError("not enough values to unpack"), False),
    ],
)
def test_every_allocators_failure_is_told_from_the_models_own(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
