"""What dies is started again, three times."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from preheat.gateway.keeper import RESTARTS, Keeper

COUNT = "import sys; open(sys.argv[1], 'a').write('x'); sys.exit(3)"
SLEEP = "import time; print('up', flush=True); time.sleep(600)"


def test_what_dies_again_and_again_is_given_up_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    count = tmp_path / "count"
    keeper = Keeper([sys.executable, "-c", COUNT, str(count)], pause=0)
    assert keeper.run() == 1
    assert len(count.read_text()) == 1 + RESTARTS
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 + RESTARTS and all("status 3" in line for line in said)
    assert "started again, 3 times at most" in said[0] and said[-1].endswith("it is given up")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_is_told_to_end_ends_what_it_keeps_and_starts_nothing(number: int) -> None:
    command = [sys.executable, "-m", "preheat.gateway.keeper", sys.executable, "-c", SLEEP]
    handler = Path(__file__).parents[2] / "handler"
    env = {**os.environ, "PYTHONPATH": str(handler)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as keeper:
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == b"up\n"
        keeper.send_signal(number)
        assert keeper.wait(30) == 0
        assert keeper.stdout.read() == b"", "it was started again"
