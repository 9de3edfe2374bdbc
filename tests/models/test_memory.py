"""What has not fitted into memory is tried again, unless it was so in warm-up."""

from __future__ import annotations

from typing import Any

import pytest

from compilation.test_pace import Clockwork, Machine
from preheat.models.batching import Chunk, RunReport
from preheat.models.diffusion.job import Answer
from preheat.models.memory import Unfit

SIZES = (1, 2, 4)
MINUTES = 60.0


class Full(Clockwork):
    """A machine whose memory holds `room` rows."""

    room = 4
    runs: list[int]

    def run_chunk(self, chunk: Chunk[Answer], size: int) -> RunReport:
        self.runs.append(size)
        if size > self.room:
            raise MemoryError
        return super().run_chunk(chunk, size)


def full_machine() -> tuple[Machine, Full]:
    machine = Machine(runner=Full, batch_sizes=SIZES)
    assert isinstance(machine.runner, Full)
    return machine, machine.runner


def sizes_run(machine: Machine, runner: Full, **options: Any) -> list[int]:
    """Of four pictures that are generated together."""
    runner.runs = []
    answers = runner.batches.run(
        [machine.job(prompt=name, num_inference_steps=4) for name in "abcd"], **options
    )
    assert all(len(answer.pictures) == 1 for answer in answers)
    return runner.runs


def test_after_a_shortage_has_passed_batches_are_as_large_as_before() -> None:
    machine, runner = full_machine()
    runner.room = 1
    assert sizes_run(machine, runner) == [4, 2, 1, 1, 1, 1]
    assert runner.batches.unfit.sizes() == {"1024x1024, guidance": 2}
    runner.room = 4
    assert sizes_run(machine, runner) == [1, 1, 1, 1]
    (wait,) = runner.batches.unfit.waits().values()
    machine.now += wait
    assert not runner.batches.unfit.sizes()
    assert sizes_run(machine, runner) == [4]
    runner.room = 2
    assert sizes_run(machine, runner) == [4, 2, 2]
    assert runner.batches.unfit.waits() == {
        "1024x1024, guidance": pytest.approx(10 * MINUTES, abs=10)
    }


def test_what_was_never_warmed_is_never_tried() -> None:
    machine, runner = full_machine()
    runner.room = 2
    assert sizes_run(machine, runner, retry=False)[0] == 4
    runner.room, machine.now = 4, 1e9
    assert sizes_run(machine, runner) == [2, 2]
    assert (
        runner.batches.unfit.sizes() == {"1024x1024, guidance": 4}
        and not runner.batches.unfit.waits()
    )


def test_each_try_in_vain_is_followed_by_one_twice_as_late() -> None:
    now = [0.0]
    unfit, waits = Unfit(lambda: now[0]), []
    for _ in range(12):
        unfit.failed("kind", 4, lasting=False)
        unfit.failed("kind", 2, lasting=False)
        assert unfit.fitting("kind", SIZES) == [1]
        assert unfit.fitting("other kind", SIZES) == SIZES
        (wait,) = unfit.waits().values()
        waits.append(wait / MINUTES)
        now[0] += wait
        assert unfit.fitting("kind", SIZES) == SIZES
    assert waits == [10, 20, 40, 80, 160, 320, 640, 1280, 1440, 1440, 1440, 1440]
    unfit.fitted("kind", 1)
    unfit.failed("kind", 2, lasting=False)
    assert unfit.waits() == {"kind": 86400}, "a smaller run shows nothing"
    now[0] += 86400
    unfit.fitted("kind", 2)
    unfit.failed("kind", 2, lasting=False)
    assert unfit.waits() == {"kind": 600}


def test_of_many_kinds_the_latest_are_remembered() -> None:
    unfit = Unfit(lambda: 0.0)
    for number in range(1000):
        unfit.failed(str(number), 2, lasting=False)
    assert len(unfit.sizes()) == 256 and "999" in unfit.sizes()


def test_a_shortage_while_serving_passes_whatever_failed_in_warm_up() -> None:
    now = [0.0]
    unfit = Unfit(lambda: now[0])
    unfit.failed("kind", 8, lasting=True)
    unfit.failed("kind", 2, lasting=False)
    assert unfit.fitting("kind", (*SIZES, 8)) == [1]
    assert (unfit.sizes(), unfit.waits()) == ({"kind": 2}, {"kind": 600})
    now[0] = 600.0
    assert (unfit.sizes(), unfit.waits()) == ({"kind": 8}, {})
    unfit.fitted("kind", 8)
    assert unfit.fitting("kind", (*SIZES, 8)) == [*SIZES], "what was never warmed is never tried"


def test_no_number_of_clients_sizes_makes_forget_what_failed_in_warm_up() -> None:
    unfit = Unfit(lambda: 0.0)
    unfit.failed("warmed", 4, lasting=True)
    for number in range(1000):
        unfit.failed(str(number), 2, lasting=False)
    assert unfit.fitting("warmed", SIZES) == [1, 2] and unfit.sizes()["warmed"] == 4


def test_figures_are_read_while_another_run_fails() -> None:
    """As the status file's thread does: between any two kinds the worker's may go on."""

    class Meanwhile(float):
        def __lt__(self, other: float) -> bool:
            unfit.failed(f"another {len(unfit.sizes())}", 2, lasting=False)
            return float(self) < other

    clock: list[float] = []
    unfit = Unfit(lambda: clock.pop() if clock else 0.0)
    for kind in "ab":
        unfit.failed(kind, 2, lasting=False)
    for figures in (unfit.sizes, unfit.waits):
        clock.append(Meanwhile(0.0))
        assert {"a", "b"} <= figures().keys()
    assert len(unfit.sizes()) > 2, "they did fail meanwhile"
