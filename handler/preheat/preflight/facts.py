"""What `preheat doctor` knows when it judges: of the machine, and of the model.

Gathered in a process of its own (`preflight.look`), since it imports torch and users' code, and
given to the checks as plain data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from preheat.config.model import ModelConfig


class Fact(BaseModel):
    """Plain data that one process writes and another reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Machine(Fact):
    """Where the worker will run, as its torch sees it."""

    torch: str
    """Its version."""
    cuda: bool
    """Whether that torch is built for CUDA."""
    gpus: tuple[int, ...] = ()
    """Bytes of memory of each that torch can use."""
    nvrtc: bool = False
    """Whether NVIDIA's runtime compiler (libnvrtc) can be loaded."""
    packages: frozenset[str] = frozenset()
    """Those of `OPTIONAL` that are installed."""
    bfloat16: bool = False
    """Whether the CPU has instructions for it."""
    memory_bytes: int
    """Of RAM that the process may have."""


OPTIONAL = ("openvino", "peft", "scipy")
"""Packages that some YAML keys need and that are no dependency."""


class Break(Fact):
    """A place at which Dynamo ends a graph and goes on in Python."""

    target: str
    reason: str
    where: str
    """`file.py:12`, relative to the archive where it lies in it."""


class Guard(Fact):
    """What torch would compile again for, of a call whose signature had been warmed."""

    target: str
    condition: str


class Model(Fact):
    """What loading it as a worker does, and tracing its smallest bucket, showed."""

    refusal: str | None = None
    """Why no worker gets READY with it; nothing below is known then."""
    path: str = ""
    """The YAML path of the refusal, if it is about one."""
    missing: str | None = None
    """Why no engine can be had here, though compiling was asked for."""
    failures: Mapping[str, str] = {}
    """By target: why it could not be traced."""
    breaks: tuple[Break, ...] = ()
    guards: tuple[Guard, ...] = ()
    stale: str | None = None
    """Why the archive's packages cannot be used."""
    dropped: tuple[int, ...] = ()
    """Of each prompt that was given: tokens at its end that nobody reads."""


class Seen(Fact):
    """What `preflight.look` writes."""

    machine: Machine
    model: Model | None = None


def free_bytes(folder: Path) -> int:
    """What a user may still write to the disk that `folder`, or its nearest parent, is on."""
    import os

    while not folder.exists():
        folder = folder.parent
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


@dataclass(frozen=True)
class Context:
    """All that a check may look at."""

    config: ModelConfig
    machine: Machine
    model: Model | None = None
    """None: none was given, or it is none that lies here."""
    weight_bytes: int = 0
    """Of its safetensors files; 0: not known."""
    server: Mapping[str, str] = field(default_factory=dict)
    """TorchServe's config.properties."""
    environ: Mapping[str, str] = field(default_factory=dict)
    state: Mapping[str, Any] | None = None
    """A worker's, which has measured."""
    free_bytes: Callable[[Path], int] = free_bytes

    @property
    def on_gpu(self) -> bool:
        """Whether a worker would run on one."""
        wanted = self.config.deviceType
        return bool(self.machine.gpus) if wanted is None else wanted == "gpu"

    @property
    def num_workers(self) -> int:
        return self.config.minWorkers or 1
