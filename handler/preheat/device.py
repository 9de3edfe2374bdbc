"""Which device serves, its share of the machine, its memory: the one place that asks for CUDA."""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from preheat.errors import ConfigError

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

CPUS_VARIABLE = "PREHEAT_CPUS"

_OUT_OF_MEMORY = re.compile(
    # "CUDA error", "CUDA driver error" (the virtual memory API), "Triton Error [CUDA]"; cuBLAS,
    # cuDNN 8 and 9, cuSOLVER.
    r"DefaultCPUAllocator|\bout of memory\b|_ALLOC(ATION)?_FAILED|"
    # cuDNN, with "GET was" or "FIND was": no engine whose workspace could be had.
    r"unable to find an engine to execute",
    re.IGNORECASE,
)
_CUDA_OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation, an AcceleratorError's `error_code`."""
_FAILED_ALLOCATION = re.compile(r"aoti_torch_empty_strided\w*\(.*API call failed", re.DOTALL)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 2**25
"""Blocks up to this size are kept; it is the most that every glibc takes."""


def num_gpus() -> int:
    """GPUs that TorchServe counts, as NVML or CUDA_VISIBLE_DEVICES tells: CUDA is not asked, which
    would read that variable now and for good. To be called before `see_one_gpu`.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return 0
    if named is not None:
        return len([name for name in named.split(",") if name.strip()])
    try:
        return max(0, torch.cuda._raw_device_count_nvml())
    except OSError:  # no driver, no libnvidia-ml: a torch with CUDA on a machine without a GPU
        return 0


def see_one_gpu(gpu_id: int | str | None) -> int | str | None:
    """Hide from this process every GPU but the one that TorchServe gave it; returns the number that
    it has from now on, 0.

    Compiled code is for one number: workers of several GPUs would share nothing. CUDA reads
    CUDA_VISIBLE_DEVICES once, at its first call; where that has been (see `cuda_unasked`), and
    where there is no such GPU, all stays as it was.
    """
    if gpu_id is None or not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return gpu_id
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    # Numbers or UUIDs, of GPUs or of MIG slices: what TorchServe counts is a place among them.
    every = None if named is None else [name.strip() for name in named.split(",")]
    if every is not None and int(gpu_id) >= len(every):
        return gpu_id
    os.environ["CUDA_VISIBLE_DEVICES"] = (
        every[int(gpu_id)] if every is not None else str(int(gpu_id))
    )
    num_seen = torch._C._cuda_getDeviceCount()
    if num_seen == 1:
        return 0
    if num_seen:
        logger.warning(
            "cannot hide other GPUs from this worker: it shares no compiled code with their workers"
        )
    if named is None:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = named
    return gpu_id


@contextmanager
def cuda_unasked() -> Iterator[None]:
    """Import in here what asks for GPUs on import, as TorchServe's BaseHandler does: it is told
    that there are none.
    """
    answer = torch.cuda.is_available
    torch.cuda.is_available = lambda: False
    try:
        yield
    finally:
        torch.cuda.is_available = answer


def pick_device(
    gpu_id: int | str | None, wanted: Literal["cpu", "gpu"] | None = None
) -> torch.device:
    """The device of this worker, made current.

    `gpu_id` is what TorchServe assigns in `context.system_properties`, `wanted` the YAML's
    `deviceType`. TorchServe 0.12 does not narrow CUDA_VISIBLE_DEVICES per worker, so without
    `set_device` every worker would also hold a context on GPU 0.

    Raises:
        ConfigError: there is a GPU for this worker that torch cannot use, or none although the YAML
            insists on one. A model that is sized for a GPU would compile for hours on a CPU, or be
            served a hundred times slower without a word.
    """
    if wanted == "cpu" or (gpu_id is None and wanted is None):
        return torch.device("cpu")
    if gpu_id is None:
        raise ConfigError(
            "gpu, and TorchServe gave this worker none: it counts those that nvidia-smi shows",
            "deviceType",
        )
    device = torch.device("cuda", int(gpu_id))
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.set_device(device)
    except (AssertionError, RuntimeError) as error:  # the first: a torch without CUDA
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        text = (
            f"TorchServe gave this worker GPU {gpu_id}, which torch {torch.__version__} cannot "
            f"use: {reason}"
        )
        raise ConfigError(
            f"{text}. To serve on the CPU, say deviceType: cpu", "deviceType"
        ) from error
    return device


def any_device(wanted: Literal["cpu", "gpu"] | None = None) -> torch.device:
    """Where no TorchServe deals them out the first GPU, or the CPU: of a machine without one, or
    because that is wanted.
    """
    return pick_device(0 if wanted != "cpu" and torch.cuda.is_available() else None)


def use_tensor_cores(device: torch.device) -> None:
    """Multiply float32 matrices in TF32 where the GPU can, which is what importing BaseHandler does
    where it sees one.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        torch.set_float32_matmul_precision("high")


def share_cpu(num_workers: int | None, num_gpus: int = 0) -> None:
    """Give this worker its share of the cores, once and before anything is compiled.

    Every worker's OpenMP pool takes all cores by default, and two pools that spin on the same cores
    are many times slower than one. Dynamo guards on the number of threads, so it must not change
    later. OMP_NUM_THREADS has the last word.
    """
    cores = num_cores()
    if cores < len(os.sched_getaffinity(0)):  # which is what Inductor counts
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(cores))
    if "OMP_NUM_THREADS" not in os.environ:
        # A YAML that names no number of workers gets one per GPU from TorchServe, or one per core.
        torch.set_num_threads(max(1, cores // (num_workers or num_gpus or cores)))


def num_cores() -> int:
    """Cores that the workers may use together: those that the process may run on, that its cgroups
    pay for, and at most PREHEAT_CPUS.

    Raises:
        ConfigError: PREHEAT_CPUS is no whole number above 0.
    """
    limits = [len(os.sched_getaffinity(0)), cpu_quota()]
    if text := os.environ.get(CPUS_VARIABLE):
        if not text.isascii() or not text.isdigit() or int(text) < 1:
            raise ConfigError(f"must be a whole number above 0, got {text!r}", CPUS_VARIABLE)
        limits.append(int(text))
    return min(limit for limit in limits if limit is not None)


def cpu_quota(root: Path = Path("/")) -> int | None:
    """Cores that the quotas of this process's cgroups amount to, rounded up; None where there is no
    quota.

    Whatever is set on a cgroup holds for those inside it, so the least on the way up counts. A
    container may see its own cgroup as the root, or (version 1) be told a path that exists on the
    host alone: what is not there is passed over.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:  # hierarchy:controllers:path
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = ["sys/fs/cgroup", "sys/fs/cgroup/unified"]
        elif "cpu" in controllers.split(","):
            mounts = [f"sys/fs/cgroup/{controllers}", "sys/fs/cgroup/cpu"]
        else:
            continue
        inside = [part for part in path.split("/") if part not in ("", "..")]
        for mount in mounts:
            quotas += [
                _quota_of(root.joinpath(mount, *inside[:depth])) for depth in range(len(inside) + 1)
            ]
    return min((math.ceil(quota) for quota in quotas if quota is not None), default=None)


def _quota_of(cgroup: Path) -> float | None:
    """cpu.max of version 2, else the two files of version 1 (kernel: admin-guide/cgroup-v2,
    scheduler/sched-bwc).
    """
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = (word for file in files for word in (cgroup / file).read_text().split())
            return int(quota) / int(period) if quota not in ("max", "-1") else None
        except (OSError, ValueError):
            continue
    return None


def keep_freed_memory() -> None:
    """Let this process keep what tensors on the CPU give back, and use it again, as CUDA's caching
    allocator does.

    glibc returns what lies free at its heap's end to the kernel, which zeroes every page when it is
    touched next: a tenth of a tiny SDXL's run on two cores. A worker's shapes are its buckets', so
    the same blocks are wanted again. `release_memory` returns them. A setting of the user's own
    (mallopt(3), GLIBC_TUNABLES) has the last word; other C libraries are left as they are.
    """
    own = [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    libc = _glibc()
    if libc is None or own:
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def computes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has instructions for it: a CPU without those for bfloat16 computes it more
    slowly than float32.
    """
    return (
        device.type != "cpu"
        or dtype is not torch.bfloat16
        or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no memory left.

    torch's allocators have an error of their own, for CUDA, or a plain RuntimeError. CUDA's
    libraries allocate past them, and their failures are known by their words alone. Code from
    AOTInductor loses even those: what is left is the name of the call that failed, an allocation
    (AOTI_TORCH_ERROR_CODE_CHECK in torch/csrc/inductor/aoti_runtime/utils.h).
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):  # the others' words are about something else
        return False
    text = str(error)
    by_code = getattr(error, "error_code", None) == _CUDA_OUT_OF_MEMORY
    return (
        by_code
        or _OUT_OF_MEMORY.search(text) is not None
        or _FAILED_ALLOCATION.match(text) is not None
    )


def is_device_lost(error: BaseException) -> bool:
    """Whether the device's context is broken (illegal address, device assert): every later call
    would fail too.
    """
    return isinstance(error, getattr(torch, "AcceleratorError", ())) and not is_out_of_memory(error)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> None:
    """Give back what a failed run has left; call it outside the `except` block, whose traceback
    holds the tensors.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: on the GPU (allocator peak) or in RAM (VmHWM, Linux)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
