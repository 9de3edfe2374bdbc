"""The engines of `bench.cpu`, each as Preheat's router runs it: built, warmed, and one timed call
at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from bench.cpu_models import MODELS, cast, first_tensor, make
from preheat.compilation.backends import aot
from preheat.compilation.closeness import compare
from preheat.compilation.signatures import DynamicDims, map_tensors
from preheat.compilation.targets import build_router
from preheat.config.pt2 import Pt2Config
from preheat.device import DTYPES, keep_freed_memory, share_cpu
from preheat.errors import PreheatError
from preheat.torchserve import server

IPEX_PYTHON = server.ROOT / ".venv-ipex" / "bin" / "python"
CPU = torch.device("cpu")
TITLES = {
    "eager": "eager",
    "channels_last": "eager, channels_last",
    "ipex": "IPEX (torch 2.8)",
    "inductor": "Inductor",
    "frozen": "Inductor, frozen",
    "tuned": "Inductor, frozen and tuned",
    "aot": "AOTInductor",
    "openvino": "OpenVINO",
    "eager masked": "eager, masked",
    "inductor masked": "Inductor, masked",
    "openvino masked": "OpenVINO, masked",
}
MASKED = " masked"
"""Ends the names of engines that run the module with masks, in the same bucket."""
SLOW = ("inductor", "frozen", "tuned", "aot", "inductor masked")
"""They run a C++ compiler for up to a minute, or minutes."""
COMPILE: Mapping[str, Mapping[str, Any]] = {
    "inductor": {"backend": "inductor"},
    "frozen": {"backend": "inductor", "options": {"freezing": True}},
    "tuned": {"backend": "inductor", "options": {"freezing": True, "max_autotune": True}},
    "openvino": {"backend": "openvino"},
}
"""Arguments of `pt2.compile`."""


class Steps(Protocol):
    """What takes its turn. `step` is one call in seconds."""

    def step(self) -> float: ...


class Engine(Steps, Protocol):
    """One cell: a module in one dtype on one engine."""

    compile_seconds: float
    error: float
    """Of the result against eager float32, as a share of the largest magnitude."""

    def close(self) -> None: ...


class Local:
    """An engine of this environment.

    Raises:
        PreheatError: it fell back to eager; the message is the reason.
    """

    def __init__(self, engine: str, model: str, dtype: str) -> None:
        engine, masked = engine.removesuffix(MASKED), engine.endswith(MASKED)
        module, inputs = make(model, masked=masked)
        with torch.inference_mode():
            expected = first_tensor(module(*inputs[0], **inputs[1])).clone()
        self._call: Any = module.to(DTYPES[dtype])
        self._inputs = cast(inputs, DTYPES[dtype])
        began = time.perf_counter()
        if engine == "channels_last":
            self._to_channels_last()
        elif engine == "aot":
            self._package()
        elif engine != "eager":
            self._route(engine, DTYPES[dtype])
        self.step()
        self.compile_seconds = 0.0 if engine == "eager" else time.perf_counter() - began
        with torch.inference_mode():
            result = first_tensor(self._call(*self._inputs[0], **self._inputs[1]))
            self.error = compare(result, expected).share

    def step(self) -> float:
        args, kwargs = self._inputs
        with torch.inference_mode():
            began = time.perf_counter()
            self._call(*args, **kwargs)
            return time.perf_counter() - began

    def close(self) -> None:
        """Nothing outlives it."""

    def _to_channels_last(self) -> None:
        self._call.to(memory_format=torch.channels_last)

        def change(tensor: torch.Tensor) -> torch.Tensor:
            return (
                tensor.contiguous(memory_format=torch.channels_last)
                if tensor.dim() == 4
                else tensor
            )

        self._inputs = map_tensors(self._inputs[0], change), map_tensors(self._inputs[1], change)

    def _package(self) -> None:
        made = aot.PackageSpec(self._inputs, DynamicDims())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.pt2")
            aot.build(self._call, made, path, {})
            entry = aot.describe(path, "model", (), made)
            self._module, self._call = (
                self._call,
                aot.Package(entry, path.read_bytes(), self._call, CPU),
            )

    def _route(self, engine: str, dtype: torch.dtype) -> None:
        kwargs = COMPILE.get(engine)
        config = Pt2Config.model_validate(
            {"compile": {"enable": kwargs is not None, "kwargs": dict(kwargs or {})}}
        )
        router = build_router("model", self._call, config, dtype, CPU)
        self.step()
        route = next(iter(router.routes.values()), None)
        reason = router.reason if route is None else route.reason
        if reason is not None:
            raise PreheatError(reason)
        router.freeze()


class Distant:
    """IPEX in its own environment: the same module in a process that makes a step for each line it
    is sent.

    Raises:
        PreheatError: it is not installed, or fell back to eager.
    """

    def __init__(self, model: str, dtype: str) -> None:
        if not IPEX_PYTHON.exists():
            raise PreheatError("not installed: make setup-ipex")
        search = os.pathsep.join([str(server.ROOT), str(server.ROOT / "handler")])
        self._process = subprocess.Popen(
            [str(IPEX_PYTHON), "-m", "bench.cpu_engines", model, dtype],
            env={**os.environ, "PYTHONPATH": search, "TS_IPEX_ENABLE": "true"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            built = self._read()
        except PreheatError:
            self.close()
            raise
        self.compile_seconds, self.error = built["compile_seconds"], built["error"]

    def step(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return float(self._read()["seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # its loop ends
        self._process.wait(60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"failed": "the process ended"}
        if "failed" in answer:
            raise PreheatError(answer["failed"])
        return answer


class Product:
    """The most that this machine computes in a dtype: the product of two matrices, by torch."""

    SIDE = 2048
    NUM_OPERATIONS = 2 * SIDE**3

    def __init__(self, dtype: str) -> None:
        left, right = torch.ones(2, self.SIDE, self.SIDE, dtype=DTYPES[dtype])
        self._factors = left, right

    def step(self) -> float:
        with torch.inference_mode():
            began = time.perf_counter()
            torch.mm(*self._factors)
            return time.perf_counter() - began


def engines_of(model: str) -> list[str]:
    """Those that run this module, in the order of `TITLES`."""
    return [name for name in TITLES if MODELS[model].can_be_masked or not name.endswith(MASKED)]


def build(engine: str, model: str, dtype: str) -> Engine:
    """A warmed cell.

    Raises:
        PreheatError: the engine does not run this module; the message says why.
    """
    return Distant(model, dtype) if engine == "ipex" else Local(engine, model, dtype)


def serve(model: str, dtype: str, lines: IO[str], answers: IO[str]) -> None:
    """The other end of `Distant`."""

    def say(answer: Mapping[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    share_cpu(1)
    keep_freed_memory()
    try:
        cell = Local("ipex", model, dtype)
    except PreheatError as error:
        say({"failed": str(error)})
        return
    say({"compile_seconds": cell.compile_seconds, "error": cell.error})
    for _ in lines:
        say({"seconds": cell.step()})


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer
    serve(sys.argv[1], sys.argv[2], sys.stdin, answers)
