"""Processes by identity: a pid together with its time of birth, so that a number used again is not
mistaken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import psutil


def alive(pid: int, created: float) -> psutil.Process | None:
    """The process `pid` that was born at `created` (seconds since the epoch), if it still runs."""
    try:
        process = psutil.Process(pid)
        return process if abs(process.create_time() - created) < 1 and not _gone(process) else None
    except psutil.NoSuchProcess:
        return None


def with_environment(name: str, value: str) -> Iterator[psutil.Process]:
    """Every process that was started with the environment variable `name` set to `value`."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value:
                yield process
        except (psutil.Error, OSError):
            continue  # somebody else's, or gone


def family(process: psutil.Process) -> list[psutil.Process]:
    """The process and everything it started that still runs."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def end(
    heads: Sequence[psutil.Process], processes: Iterable[psutil.Process], seconds: float
) -> None:
    """Ask `heads` to end in order, then whoever of `processes` is left, then kill; return when all
    are gone.

    Each of the first two gets `seconds`.
    """
    left = list(processes)
    if heads:
        _send(psutil.Process.terminate, heads)
        left = _wait(left, seconds)
    _send(psutil.Process.terminate, left)
    left = _wait(left, seconds)
    _send(psutil.Process.kill, left)
    _wait(left, seconds)


def _send(signal: Callable[[psutil.Process], None], processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        try:
            signal(process)
        except psutil.NoSuchProcess:
            continue


def _wait(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that still run after `seconds`."""
    deadline = time.monotonic() + seconds
    while (
        left := [process for process in processes if not _gone(process)]
    ) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _gone(process: psutil.Process) -> bool:
    # An orphan that has ended stays a zombie where process 1 does not reap, as in many containers.
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
