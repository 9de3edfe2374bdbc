"""Looks at the machine and at a model for `preheat doctor`, and writes what it saw as JSON.

    python -m preheat.preflight.look <file to write> [<model>.yaml <archive's root> [<prompts>]]

A process of its own: what it imports is torch, and code of the archive. The model is loaded as a
worker loads it, and its smallest bucket traced by Dynamo without a compiler behind it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import graph_break_reasons

from preheat.compilation.backends import aot, inductor, openvino
from preheat.compilation.router import Router, every
from preheat.compilation.variants import Variant
from preheat.compilation.warmup import Warmup
from preheat.compilation.watch import (
    CompileWatch,
    allow_compiling,
    forbid_compiling,
    raise_recompile_limits,
)
from preheat.config.model import ModelConfig
from preheat.config.pt2 import ExportConfig
from preheat.config.pt2_forms import CompileConfig
from preheat.config.schema import FrozenDict
from preheat.device import any_device, computes, share_cpu
from preheat.errors import ConfigError, PreheatError
from preheat.preflight.facts import OPTIONAL, Break, Guard, Machine, Model, Seen
from preheat.worker.worker import AnyPrepared, load

_RUNS = 3
"""Of the traced variant, once it is traced: what counts its calls shows by then."""
_GRAPHS = 64
"""Of one code object: past it, what compiles at every call would look as if it could not be traced.
"""
_MOST = 20
"""Findings of a kind that are worth telling."""


def machine() -> Machine:
    """This one, as a worker's torch sees it."""
    gpus = range(torch.cuda.device_count())
    return Machine(
        torch=torch.__version__,
        cuda=bool(torch.backends.cuda.is_built()),  # type: ignore[no-untyped-call]
        gpus=tuple(torch.cuda.get_device_properties(index).total_memory for index in gpus),
        nvrtc=_has_nvrtc(),
        packages=frozenset(name for name in OPTIONAL if importlib.util.find_spec(name)),
        bfloat16=computes(torch.bfloat16, torch.device("cpu")),
        memory_bytes=_memory_bytes(),
    )


def _has_nvrtc() -> bool:
    """Whether cuDNN could load it (it names the library by its major version alone)."""
    major = (torch.version.cuda or "12").partition(".")[0]
    try:
        ctypes.CDLL(f"libnvrtc.so.{major}")
    except OSError:
        return False
    return True


def _memory_bytes() -> int:
    """Of RAM, or what the cgroup may have of it (version 2, then 1)."""
    every = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            every.append(int(Path("/sys/fs/cgroup", file).read_text()))
        except (OSError, ValueError):  # no such version; "max"
            continue
    return min(every)


def examine(config: ModelConfig, root: Path, prompts: Sequence[str] = ()) -> Model:
    """What loading and tracing it shows."""
    # the doctor's own check tells of a GPU that is not there
    device = any_device(config.deviceType)
    pt2 = config.pt2
    missing = None
    if pt2.compile.enable:
        roads = [openvino.why_not] if pt2.openvino or pt2.compile.auto else []
        roads += [] if pt2.openvino else [inductor.why_not]
        reasons = [why_not(device, pt2) for why_not in roads]
        missing = None if None in reasons else "; ".join(filter(None, reasons))
    try:
        stale = _stale(config, root, device)
        prepared: AnyPrepared = load(_traced(config), root, device)
    except PreheatError as error:
        path = error.path if isinstance(error, ConfigError) else ""
        said = error.message if isinstance(error, ConfigError) else str(error)
        return Model(refusal=said, path=path, missing=missing)
    dropped = tuple(prepared.model.num_dropped(text) for text in prompts)
    found = Model(missing=missing, stale=stale, dropped=dropped)
    if not pt2.compile.enable or prepared.config.pt2.shapes.strategy == "exact":
        return found
    return found.model_copy(update=_trace(prepared, root))


def _traced(config: ModelConfig) -> ModelConfig:
    """The same, behind the backend of Dynamo's that compiles nothing."""
    if not config.pt2.compile.enable:
        return config
    compile_ = CompileConfig(enable=True, kwargs=FrozenDict.of({"backend": "eager"}))
    pt2 = config.pt2.model_copy(update={"compile": compile_, "export": ExportConfig()})
    return config.model_copy(update={"pt2": pt2})


def _stale(config: ModelConfig, root: Path, device: torch.device) -> str | None:
    """Why a worker would not use the packages in the archive; None where it would, or there are
    none.
    """
    if not config.pt2.export.aot_compile or not (root / aot.FOLDER).is_dir():
        return None
    prepared: AnyPrepared = load(config, root, device)
    folder = root / aot.FOLDER
    aot.attach(
        prepared.routers, prepared.targets, folder, prepared.fingerprint, prepared.trust, device
    )
    return next(filter(None, (router.reason for router in prepared.routers.values())), None)


def _trace(prepared: AnyPrepared, root: Path) -> Mapping[str, object]:
    """Fields of `Model`: the smallest variant traced and then run as traffic would."""
    runner, routers = prepared.runner, prepared.routers
    variants = runner.variants(prepared.warmed_sizes)
    chosen = variants[-1]
    raise_recompile_limits(_GRAPHS)
    watch = CompileWatch()
    warmup = Warmup(runner.run_variant, routers, watch, on_failure="eager")
    graph_break_reasons.clear()
    try:
        warmup.observe(runner.extremes(variants))
        warmup.warm([chosen])
    except (PreheatError, RuntimeError) as error:
        return {"failures": {"model": str(error)}}
    finally:
        watch.close()
    names = ", ".join(routers)
    breaks = {_break(names, reason, root): None for reason in graph_break_reasons}
    failures = {row.target: row.reason for row in warmup.rows if row.reason}
    guards = list(dict.fromkeys(_broken(prepared, chosen)))
    return {
        "failures": failures,
        "breaks": tuple(breaks)[:_MOST],
        "guards": tuple(guards)[:_MOST],
    }


def _broken(prepared: AnyPrepared, variant: Variant) -> Iterator[Guard]:
    """The guards that fail when the warmed variant is run again."""
    forbid_compiling()
    try:
        for _ in range(_RUNS):
            with every(prepared.routers, Router.replaying) as visited:
                prepared.runner.run_variant(variant)
            for name, visits in visited.items():
                known = prepared.routers[name].routes
                for key, route in visits.routes.items():
                    if route.reason and known.get(key) != route:
                        yield Guard(target=name, condition=" ".join(route.reason.split()))
    finally:
        allow_compiling()


def _break(target: str, reason: Any, root: Path) -> Break:
    first = str(reason.reason).strip().splitlines()[0]
    if first.startswith("generic_jump"):  # torch/_dynamo/symbolic_convert.py
        first = "a branch that depends on what is in a tensor"
    if not reason.user_stack:
        return Break(target=target, reason=first, where="")
    frame = reason.user_stack[-1]
    file = Path(frame.filename)
    if file.is_relative_to(root.resolve()):
        file = file.relative_to(root.resolve())
    line = f" ({frame.line.strip()})" if frame.line else ""
    return Break(target=target, reason=first, where=f"{file}:{frame.lineno}{line}")


def main(out: Path, *model: str) -> None:
    seen = None
    if model:
        config, root, *files = map(Path, model)
        prompts = [line for file in files for line in file.read_text().splitlines() if line]
        loaded = ModelConfig.load(config, ours=True)
        share_cpu(loaded.minWorkers)
        seen = examine(loaded, root, prompts)
    out.write_text(Seen(machine=machine(), model=seen).model_dump_json(), encoding="utf-8")


if __name__ == "__main__":
    logging.basicConfig(level=logging.CRITICAL)
    try:
        main(Path(sys.argv[1]), *sys.argv[2:])
    except (PreheatError, OSError) as error:
        print(f"preheat: {error}", file=sys.stderr)
        sys.exit(1)
