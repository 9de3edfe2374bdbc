"""Which road every target takes (`pt2.compile.backend: auto`): written down by the worker that
chose, beside the code that was compiled, and read by all others and at every later start. So it is
one engine throughout, whatever a clock says.

It names roads and holds no code; where the folder travels in a bundle, that is signed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from preheat.files import write_whole

logger = logging.getLogger(__name__)

_LONGEST = 100_000
_REPORT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Choice:
    """A target's road by name; `why` is what left nothing but eager."""

    road: str
    why: str = ""


class ChoiceFile:
    """One file in a folder of compiled code.

    Args:
        folder: ours alone to write, or a process's own that travels in a bundle.
        context: all that the choice depends on, such as a fingerprint and a number of threads.
    """

    def __init__(self, folder: Path, context: str) -> None:
        digest = hashlib.sha256(context.encode()).hexdigest()[:32]
        self.path = folder / f"preheat-roads-{digest}.json"

    def read(self) -> dict[str, Choice]:
        """By target; empty where nothing was chosen, or what is there cannot be read."""
        try:
            with self.path.open("rb") as file:
                document: Any = json.loads(file.read(_LONGEST))
            return {str(target): Choice(**each) for target, each in document.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            logger.warning("%s tells of no choice: %s; choosing anew", self.path, error)
            return {}

    def write(self, choices: Mapping[str, Choice]) -> None:
        """Whole or not at all; what cannot be written costs a warning, and every start chooses."""
        document = {target: asdict(choice) for target, choice in choices.items()}
        try:
            write_whole(self.path, json.dumps(document).encode(), "preheat-roads-")
        except OSError as error:
            logger.warning("cannot write down what was chosen in %s: %s", self.path, error)

    @contextmanager
    def locked(self, timeout: float, report: Callable[[str], None]) -> Iterator[bool]:
        """Choose in here, one process at a time; False where another still does after `timeout`
        seconds, or the folder has no locks: then nothing may be written.
        """
        lock, began = FileLock(self.path.with_suffix(".lock"), mode=0o600), time.monotonic()
        held = False
        try:
            while not held:
                left = timeout - (time.monotonic() - began)
                try:
                    lock.acquire(timeout=max(0.0, min(_REPORT_SECONDS, left)))
                    held = type(lock) is FileLock  # its stand-in outlives a killed holder
                    break
                except Timeout:
                    spent = time.monotonic() - began
                    report(f"waiting for the worker that chooses the roads: {spent:.0f} s")
                    if left <= 0:
                        break
                except (OSError, NotImplementedError) as error:
                    logger.warning("nobody can be kept from choosing too: %s", error)
                    break
            yield held
        finally:
            lock.release()
