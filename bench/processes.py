"""Modules of this bench that run beside the server, in processes of their own, which give their
memory back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from bench.bare_spec import Spec
from bench.profiles import STATE
from preheat.errors import PreheatError
from preheat.torchserve import server

CACHE = STATE / "cache" / "inductor"


def run_module(module: str, spec: str, threads: Mapping[str, str]) -> dict[str, Any]:
    """What a module prints when it is given `spec`.

    Raises:
        PreheatError: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=spec,
        check=False,
        capture_output=True,
        text=True,
        env=_environment(threads),
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise PreheatError(f"{module} failed: {said[-1]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


class LineProcess:
    """A module of this bench that answers each line with one, both JSON, until it is closed.

    Args:
        python: of the environment that it lives in.
        environment: its variables go over this process's.

    Raises:
        PreheatError: it failed, at once or at a later line; the message is its last one.
    """

    def __init__(
        self, module: str, first: str, environment: Mapping[str, str], python: str = sys.executable
    ) -> None:
        self._module = module
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # close() closes it
        self._process = subprocess.Popen(
            [python, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=_environment(environment),
        )
        try:
            self.first: Any = self.ask(first)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, question: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # that it has ended shows in its answer
            print(question, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            status = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or [f"exit status {status}"]
            raise PreheatError(f"{self._module} failed: {said[-1]}")
        return json.loads(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()


class BareProcess(LineProcess):
    """`bench.bare` in a process of its own, warm.

    Raises:
        PreheatError: it failed.
    """

    def __init__(self, spec: Spec, threads: Mapping[str, str]) -> None:
        super().__init__("bench.bare", spec.to_json(), threads)
        self.warmed: Mapping[str, Any] = self.first

    def rate(self, traffic: str, batch_size: int, seconds: float) -> float:
        """Requests per second in full batches of this size."""
        rate: float = self.ask(
            json.dumps({"traffic": traffic, "batch_size": batch_size, "seconds": seconds})
        )
        return rate


def _environment(threads: Mapping[str, str]) -> dict[str, str]:
    """Of a process beside the server: this repository's code, and what the server's worker has."""
    search = os.pathsep.join(
        [str(server.ROOT), str(server.ROOT / "handler"), os.environ.get("PYTHONPATH", "")]
    )
    env = {
        **os.environ,
        "PYTHONPATH": search.rstrip(os.pathsep),
        "TORCHINDUCTOR_CACHE_DIR": str(CACHE.resolve()),
    }
    env |= threads
    env.setdefault("GOMP_SPINCOUNT", "1000")  # as the server's worker has it
    return env
