"""Where a result was measured: processor, memory, GPU, and the versions that matter."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import psutil

PACKAGES = ("torch", "triton", "diffusers", "transformers", "openvino", "torchserve", "preheat")


def machine() -> dict[str, object]:
    """Processor, cores this process may use, RAM in bytes, and the GPUs that nvidia-smi knows."""
    return {
        "cpu": _cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)),
        "ram_bytes": psutil.virtual_memory().total,
        "gpus": _gpus(),
    }


def versions() -> dict[str, str | None]:
    """Python's version and the packages'; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = (
        info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    )
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _gpus() -> list[dict[str, str]]:
    """Name, driver and memory of each GPU; none where there is no NVIDIA driver."""
    fields = ("name", "driver_version", "memory.total")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (line.split(", ") for line in done.stdout.splitlines() if line.strip())
    return [dict(zip(("name", "driver", "memory"), row, strict=False)) for row in rows]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
