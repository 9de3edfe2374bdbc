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

import preheat

_GENERATED = re.compile(
    r"cmov|cx8|cx16|mmx|pni|s?sse\w*|avx\w*|amx_\w+|fma4?|f16c|bmi[12]|abm|popcnt|movbe|adx|gfni|v?aes|v?pclmulqdq|sha\w+|xop|tbm"
    r"|fp|fphp|asimd\w*|sve\w*|sme\w*|bf16|i8mm|atomics|crc32|pmull|jscvt|fcma|i?lrcpc\w*|flagm2?|frint"
)
"""As /proc/cpuinfo names them, of x86 and ARM."""
_PACKAGES = ("torch", "triton", "diffusers", "transformers", "openvino")
_PASSING = {"_name_or_path", "_commit_hash", "_diffusers_version", "_use_default_values"}
"""Keys of a component's config: where its folder lies today and who wrote it, and a list that
diffusers makes of a set, in an order that is another one in each process (configuration_utils.py,
register_to_config)."""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def fingerprint(
    device: torch.device, config: Mapping[str, Any], structure: Mapping[str, Any]
) -> str:
    """Digest of machine, versions, compile config and model structure; weights do not count.

    Args:
        device: where the code runs.
        config: the part of the model YAML that decides what is compiled, as plain data.
        structure: classes and configs of the pipeline's components.

    It is the same in every process: whatever stands in `config` and `structure` for that process
    alone is left out.
    """
    facts = {
        "device": _device_facts(device),
        "versions": {name: _version(name) for name in _PACKAGES} | {"cuda": torch.version.cuda},
        "preheat": preheat.__version__,
        "python": platform.python_version(),
        "libc": platform.libc_ver(),  # shared objects built against a newer one do not load
        "config": settled(config),
        "structure": settled(structure),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def settled(value: Any) -> Any:
    """Plain data that says what `value` does and is equal in every process: no places, no
    addresses, sets in order.
    """
    if isinstance(value, Mapping):
        return {str(key): settled(item) for key, item in value.items() if key not in _PASSING}
    if isinstance(value, (list, tuple)):
        return [settled(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(settled(item)) for item in value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return _ADDRESS.sub("", str(value))


def _device_facts(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return [
            "cuda",
            torch.cuda.get_device_name(device),
            str(torch.cuda.get_device_capability(device)),
        ]
    return [device.type, platform.machine(), *_cpu_features()]


def _cpu_features() -> list[str]:
    """Instruction sets that compilers use unasked, sorted (Linux): code compiled for more than a
    machine has crashes it.

    The kernel's list has more, which comes and goes with its updates and the microcode's:
    mitigations, TSX, what hypervisors add.
    """
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return []
    for line in info.read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return sorted(
                flag for flag in line.partition(":")[2].split() if _GENERATED.fullmatch(flag)
            )
    return []


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
