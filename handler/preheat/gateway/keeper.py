"""Keeps a command running: `python -m preheat.gateway.keeper command ...`. What dies is started
again, three times; then this says so and ends.

Standard library only: it lies beside the gateway all its life.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

logger = logging.getLogger(__name__)
RESTARTS = 3
PAUSE = 1.0
"""Seconds before each."""


class Keeper:
    """Runs `command` until `end` is called, or it has died once too often."""

    def __init__(
        self, command: Sequence[str], *, restarts: int = RESTARTS, pause: float = PAUSE
    ) -> None:
        self._command, self._restarts, self._pause = command, restarts, pause
        self._running: subprocess.Popen[bytes] | None = None
        self._ending = False

    def run(self) -> int:
        """The exit status: 0 where it was told to end."""
        for left in range(self._restarts, -1, -1):
            self._running = subprocess.Popen(self._command)
            if self._ending:  # the signal came while it was started
                self._running.terminate()
            status = self._running.wait()
            if self._ending:
                return 0
            again = f"it is started again, {left} times at most" if left else "it is given up"
            logger.error("the gateway ended with status %s; %s", status, again)
            if left:
                time.sleep(self._pause)
        return 1

    def end(self) -> None:
        self._ending = True
        if self._running is not None and self._running.poll() is None:
            self._running.terminate()


def main() -> None:
    logging.basicConfig(format="%(asctime)s %(message)s")
    keeper = Keeper(sys.argv[1:])

    def told(_: int, __: FrameType | None) -> None:
        keeper.end()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, told)
    sys.exit(keeper.run())


if __name__ == "__main__":
    main()
