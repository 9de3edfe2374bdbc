"""What the worker asks of the C library, of CUDA and of the kernel, and which failures mean that
memory ran out.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preheat import device
from preheat.device import (
    any_device,
    cpu_quota,
    is_device_lost,
    is_out_of_memory,
    num_cores,
    pick_device,
    see_one_gpu,
    share_cpu,
)
from preheat.errors import ConfigError

HANDLER = Path(__file__).parent.parent / "handler"

# Page faults of filling blocks of 128 MiB in all that have been filled and freed before: before and
# after `release_memory`.
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


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way"
)
def test_freed_memory_is_kept_until_it_is_released_unless_the_user_has_settings_of_his_own() -> (
    None
):
    kept, released = page_faults()
    plain, _ = page_faults(MALLOC_ARENA_MAX="8")
    assert 4 * kept < plain and 4 * kept < released


def page_faults(**settings: str) -> list[int]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))
    }
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env={**clean, "PYTHONPATH": str(HANDLER), **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(word) for word in done.stdout.split()]


def cuda_error(text: str, code: int | None = None) -> Exception:
    """What torch raises for a CUDA runtime's error; before 2.8 it was a plain RuntimeError."""
    error: Exception = getattr(torch, "AcceleratorError", RuntimeError)(text)
    if code is not None:
        error.error_code = code  # type: ignore[attr-defined]
    return error


ASYNCHRONOUS = "\nCUDA kernel errors might be asynchronously reported at some other API call"

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("aoti_torch_empty_strided(4, ...) API call failed at /tmp/x.cpp, line 9"),
    RuntimeError("aoti_torch_empty_strided_pinned(\n4) API call failed at /tmp/x.cpp, line 9"),
    cuda_error(f"CUDA error: out of memory{ASYNCHRONOUS}"),
    cuda_error("CUDA error: memory, in another version's words", code=2),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
]
LOST = [
    f"CUDA error: an illegal memory access was encountered{ASYNCHRONOUS}",
    f"CUDA error: device-side assert triggered{ASYNCHRONOUS}",
    "CUDA error: unspecified launch failure",
]
THE_MODELS_OWN = [
    RuntimeError("aoti_torch_cpu_convolution(...) API call failed at /tmp/x.cpp, line 9"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    ValueError("not enough values to unpack"),
    ValueError("the word limit is out of memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_every_allocators_failure_is_out_of_memory_and_no_lost_device(error: Exception) -> None:
    assert is_out_of_memory(error) and not is_device_lost(error)


@pytest.mark.skipif(
    not hasattr(torch, "AcceleratorError"), reason="torch before 2.8 tells no lost device"
)
@pytest.mark.parametrize("error", [cuda_error(text) for text in LOST], ids=str)
def test_a_broken_context_is_a_lost_device(error: Exception) -> None:
    assert is_device_lost(error) and not is_out_of_memory(error)


@pytest.mark.parametrize("error", THE_MODELS_OWN, ids=str)
def test_the_models_own_failures_are_neither(error: Exception) -> None:
    assert not is_out_of_memory(error) and not is_device_lost(error)


def test_the_yaml_may_keep_a_worker_off_the_gpu_it_was_given() -> None:
    assert pick_device(0, "cpu") == pick_device(None) == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU here")
@pytest.mark.parametrize("wanted", [None, "gpu"])
def test_a_gpu_that_torch_cannot_use_stops_the_load_with_torchs_reason(wanted: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        pick_device("3", wanted)
    assert caught.value.path == "deviceType"
    assert "gave this worker GPU 3, which torch" in caught.value.message
    assert (
        "not compiled with CUDA" in caught.value.message or "NVIDIA driver" in caught.value.message
    )
    assert caught.value.message.endswith("say deviceType: cpu")
    assert any_device() == torch.device("cpu")


def test_a_driver_that_is_too_old_is_said_in_torchs_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 12020).\nPlease update it."
        )

    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(
        ConfigError, match=r"too old \(found version 12020\)\. To serve on the CPU, say"
    ):
        pick_device(0)


def test_a_gpu_that_the_yaml_insists_on_and_torchserve_does_not_give_stops_the_load() -> None:
    with pytest.raises(ConfigError, match="deviceType: gpu, and TorchServe gave this worker none"):
        pick_device(None, "gpu")


V1 = "4:memory:/pod\n2:cpu,cpuacct:{path}\n"

QUOTAS = [
    ("no cgroups at all", {}, None),
    (
        "version 2, none set",
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000"},
        None,
    ),
    (
        "version 2, the root of a container",
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000"},
        2,
    ),
    ("rounded up", {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
    ("less than one", {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1000 100000"}, 1),
    (
        "version 2, the least of those it lies in",
        {
            "proc/self/cgroup": "0::/pods/one/main\n",
            "sys/fs/cgroup/pods/cpu.max": "800000 100000",
            "sys/fs/cgroup/pods/one/cpu.max": "300000 100000",
            "sys/fs/cgroup/pods/one/main/cpu.max": "max 100000",
        },
        3,
    ),
    (
        "a sibling's is not ours",
        {"proc/self/cgroup": "0::/one\n", "sys/fs/cgroup/two/cpu.max": "100000 100000"},
        None,
    ),
    (
        "outside its own root",
        {"proc/self/cgroup": "0::/../../one\n", "sys/fs/cgroup/one/cpu.max": "500000 100000"},
        5,
    ),
    (
        "version 1",
        {
            "proc/self/cgroup": V1.format(path="/pod"),
            "sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_period_us": "100000\n",
        },
        3,
    ),
    (
        "version 1, none set",
        {
            "proc/self/cgroup": V1.format(path="/"),
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
    (
        "version 1, under the host's path, which is not there",
        {
            "proc/self/cgroup": V1.format(path="/kubepods/pod1/abc"),
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        4,
    ),
    (
        "both at once, version 2 beside",
        {
            "proc/self/cgroup": V1.format(path="/") + "0::/\n",
            "sys/fs/cgroup/unified/cgroup.procs": "1",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "600000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
        6,
    ),
    ("nonsense", {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "a b c"}, None),
]


@pytest.mark.parametrize(
    ("files", "cores"), [case[1:] for case in QUOTAS], ids=[case[0] for case in QUOTAS]
)
def test_cpu_quotas_of_both_versions_count(
    files: dict[str, str], cores: int | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == cores


@given(
    affinity=st.integers(1, 64),
    quota=st.none() | st.integers(1, 64),
    told=st.none() | st.integers(1, 64),
    workers=st.none() | st.integers(0, 9),
)
def test_workers_share_the_cores_that_they_may_use(
    affinity: int, quota: int | None, told: int | None, workers: int | None
) -> None:
    given_threads: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS", "PREHEAT_CPUS"):
            patch.setenv(name, "")  # so that whatever is set in here is undone
            patch.delenv(name)
        if told is not None:
            patch.setenv("PREHEAT_CPUS", str(told))
        patch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
        patch.setattr(device, "cpu_quota", lambda: quota)
        patch.setattr(torch, "set_num_threads", given_threads.append)
        share_cpu(workers)
        cores = num_cores()
        assert cores == min(limit for limit in (affinity, quota, told) if limit is not None)
        assert os.environ.get("TORCHINDUCTOR_COMPILE_THREADS") == (
            str(cores) if cores < affinity else None
        )
    (threads,) = given_threads
    assert threads >= 1 and (threads == 1 or threads * (workers or cores) <= cores)


def test_omp_num_threads_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(
        torch, "set_num_threads", lambda _: pytest.fail("the user has said how many")
    )
    share_cpu(2)


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "all", "\u0663"])
def test_a_number_of_cores_that_is_none_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREHEAT_CPUS", text)
    with pytest.raises(ConfigError, match="PREHEAT_CPUS: must be a whole number above 0"):
        num_cores()


def simulated_gpus(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, asked_before: bool = False
) -> None:
    """CUDA, as far as counting goes: it reads the variable when it is asked first."""
    visible = [os.environ.get("CUDA_VISIBLE_DEVICES")] if asked_before else []

    def count() -> int:
        visible.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
        return num_gpus if visible[0] is None else len(visible[0].split(",")) if visible[0] else 0

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr("torch._C._cuda_getDeviceCount", count, raising=False)


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
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    gpu_id: int | str | None,
    expected: int | None,
    left: str,
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
        caller = asker.f_back
        asked.append(f"{asker.f_code.co_name} from {caller.f_code.co_filename}:{caller.f_lineno}")
    return False

torch.cuda._is_compiled = is_compiled
assert not torch.cuda.is_available() and len(asked) == 1, "the simulation sees who asks"
asked.clear()
import preheat_handler
assert "ts.torch_handler.base_handler" in sys.modules
assert torch.cuda.is_available.__module__ == "torch.cuda"
print(*asked)
"""


def test_importing_the_handler_does_not_ask_for_gpus() -> None:
    """CUDA would have read CUDA_VISIBLE_DEVICES before the worker is told its GPU."""
    environment = {**os.environ, "PYTHONPATH": str(HANDLER)}
    done = subprocess.run(
        [sys.executable, "-c", ASKED], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
