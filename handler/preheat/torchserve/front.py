"""The gateway before a server: a process of its own, which is started again if it dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import httpx

from preheat.errors import ServerError
from preheat.status import STATUS_DIR_VARIABLE
from preheat.torchserve.server import HOST, Birth, TorchServe, remember, url_of

LOG = "gateway.log"
GRACE = 120
"""Seconds that answers under way have, once a server in the foreground is told to end."""
_COMMAND = "from preheat.cli.app import main; main()"


def start(
    server: TorchServe, host: str = HOST, options: Sequence[str] = (), *, seconds: float = 60
) -> TorchServe:
    """Start the gateway of a server that `server.start` started, on the port that its `ports` name,
    and return when it answers; the server as it is recorded from now on.

    Args:
        options: more of `preheat gateway`'s.

    Raises:
        ServerError: it ended, or does not listen within `seconds`; the server runs on.
    """
    port, log_file = server.ports.gateway, log_of(server)
    assert port is not None
    gateway = [sys.executable, "-c", _COMMAND, "gateway", "--name", server.run_dir.name]
    # what ends the server's processes knows them by this folder in their environment
    env = {**os.environ, STATUS_DIR_VARIABLE: str(server.status_dir)}
    with open(log_file, "ab") as log:
        keeper = subprocess.Popen(
            [
                *(sys.executable, "-m", "preheat.gateway.keeper"),
                *(*gateway, "--host", host, "--port", str(port), *options),
            ],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal is for whoever stops it in order
        )
    running = replace(server, gateway=Birth.of(keeper.pid), gateway_host=host)
    remember(running)
    deadline = time.monotonic() + seconds
    while not _answers(url_of(host, port)):
        if keeper.poll() is not None or time.monotonic() > deadline:
            said = log_file.read_text(errors="replace")[-4000:]
            raise ServerError(f"the gateway ended or hung while starting:\n{said}")
        time.sleep(0.05)
    return running


def stay(server: TorchServe) -> NoReturn:
    """Wait for TorchServe, or the gateway, to end.

    Raises:
        ServerError: it has.
    """
    while server.alive:
        if (said := trouble(server)) is not None:
            raise ServerError(said)
        time.sleep(0.5)
    raise ServerError("TorchServe has ended")


def log_of(server: TorchServe) -> Path:
    return server.logs / LOG


def trouble(server: TorchServe) -> str | None:
    """A line where the server's gateway has ended for good; None where it runs, or none was
    started.
    """
    if server.gateway is None or server.gateway.process is not None:
        return None
    return f"the gateway has ended, and is not started again; see {log_of(server)}"


def _answers(url: str) -> bool:
    """Whether a gateway does, and not somebody else who listens there."""
    try:
        said = httpx.get(f"{url}/v2", timeout=1, trust_env=False).json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return False
    return isinstance(said, dict) and said.get("name") == "preheat"
