"""What the worker asks of the C library."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HANDLER = Path(__file__).parent.parent / "handler"

# Page faults of filling a block of 64 MiB once it has been filled and freed before: before and after `release_memory`.
FAULTS = """
import resource, torch
from preheat.device import keep_freed_memory, release_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
faults()
again = faults()
release_memory(torch.device("cpu"))
print(again, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way")
def test_freed_memory_is_kept_until_it_is_released_unless_the_user_has_settings_of_his_own() -> None:
    kept, released = page_faults()
    plain, _ = page_faults(MALLOC_MMAP_THRESHOLD_="1048576")
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
