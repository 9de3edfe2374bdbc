"""The fingerprint: everything a compiled artifact depends on, as one digest."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_GENERATED = re.compile(
    r"cmov|cx8|cx16|mmx|pni|s?sse\w*|avx\w*|amx_\w+|fma4?|f16c|bmi[12]|abm|popcnt|movbe|adx|gfni|v?aes|v?pclmulqdq|sha\w+|xop|tbm"
    r"|fp|fphp|asimd\w*|sve\w*|sme\w*|bf16|i8mm|atomics|crc32|pmull|jscvt|fcma|i?lrcpc\w*|flagm2?|frint"
)
"""As /proc/cpuinfo names them, of x86 and ARM."""
_PACKAGES = ("torch", "triton", "diffusers", "transformers")


def fingerprint(device: torch.device, config: Mapping[str, Any], structure: Mapping[str, Any]) -> str:
    """Digest of machine, versions, compile config and model structure; weights do not count.

    Args:
        device: where the code runs.
        config: the part of the model YAML that decides what is compiled, as plain data.
        structure: classes and configs of the pipeline's components.
    """
    facts = {
        "device": _device_facts(device),
        "versions": {name: _version(name) for name in _PACKAGES} | {"cuda": torch.version.cuda},
        "python": platform.python_version(),
        "libc": platform.libc_ver(),  # shared objects built against a newer one do not load
        "config": config,
        "structure": structure,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _device_facts(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return ["cuda", torch.cuda.get_device_name(device), str(torch.cuda.get_device_capability(device))]
    return [device.type, platform.machine(), *_cpu_features()]


def _cpu_features() -> list[str]:
    """Instruction sets that compilers use unasked, sorted (Linux): code compiled for more than a machine has crashes it.

    The kernel's list has more, which comes and goes with its updates and the microcode's: mitigations, TSX, what hypervisors add.
    """
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return []
    for line in info.read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return sorted(flag for flag in line.partition(":")[2].split() if _GENERATED.fullmatch(flag))
    return []


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
