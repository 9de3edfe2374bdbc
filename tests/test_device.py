"""What the worker asks of the C library."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from preheat.device import is_out_of_memory, see_one_gpu

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


def simulated_gpus(monkeypatch: pytest.MonkeyPatch, num_gpus: int, asked_before: bool = False) -> None:
    """CUDA, as far as counting goes: it reads the variable when it is asked first."""
    visible = [os.environ.get("CUDA_VISIBLE_DEVICES")] if asked_before else []

    def count() -> int:
        visible.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
        return num_gpus if visible[0] is None else len(visible[0].split(",")) if visible[0] else 0

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", count, raising=False)


@pytest.mark.parametrize(
    ("visible", "gpu_id", "expected", "left"),
    [
        (None, 5, 0, "5"),
        (None, "5", 0, "5"),
        ("4,6", 1, 0, "6"),
        ("GPU-8932f937-d72c, GPU-3a23c669-1f69", 1, 0, "GPU-3a23c669-1f69"),
        ("MIG-40f43250-998e,MIG-13ea64ae-ea30", 0, 0, "MIG-40f43250-998e"),
        ("4,6", 2, 2, "4,6"),
        ("", 0, 0, ""),
        ("4,6", None, None, "4,6"),
    ],
    ids=["number", "text", "numbers", "uuids", "mig", "too-far", "hidden", "no-gpu"],
)
def test_a_worker_sees_the_gpu_that_it_was_given_and_no_other(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, gpu_id: int | str | None, expected: int | None, left: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    simulated_gpus(monkeypatch, 8)
    assert (see_one_gpu(gpu_id), os.environ["CUDA_VISIBLE_DEVICES"]) == (expected, left)


@pytest.mark.parametrize("visible", [None, "4,6"])
def test_where_cuda_was_asked_before_the_number_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, visible: str | None
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    simulated_gpus(monkeypatch, 8, asked_before=True)
    assert see_one_gpu(1) == 1 and os.environ.get("CUDA_VISIBLE_DEVICES") == visible
    assert "cannot hide" in caplog.text


def test_a_machine_without_gpus_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert see_one_gpu(0) == 0 and "CUDA_VISIBLE_DEVICES" not in os.environ


ASKED = """
import sys, torch
asked = []

def is_compiled():  # the first thing that whatever asks for GPUs looks at
    asker = sys._getframe(1)
    if asker.f_code.co_filename == torch.cuda.__file__:
        asked.append(f"{asker.f_code.co_name} from {asker.f_back.f_code.co_filename}:{asker.f_back.f_lineno}")
    return False

torch.cuda._is_compiled = is_compiled
assert not torch.cuda.is_available() and len(asked) == 1, "the simulation sees who asks"
asked.clear()
import preheat_handler
assert "ts.torch_handler.base_handler" in sys.modules and torch.cuda.is_available.__module__ == "torch.cuda"
print(*asked)
"""


def test_importing_the_handler_does_not_ask_for_gpus() -> None:
    """CUDA would have read CUDA_VISIBLE_DEVICES before the worker is told its GPU."""
    environment = {**os.environ, "PYTHONPATH": str(HANDLER)}
    done = subprocess.run([sys.executable, "-c", ASKED], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
