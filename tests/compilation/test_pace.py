"""Time in admission: estimates, and batches through the real engine on a clock of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from models.diffusion.fakes import FakePipeline
from models.diffusion.test_engine import make_request
from preheat.buckets import Bucket
from preheat.compilation.pace import Budget, Load, Pace, Timing, interpolated
from preheat.compilation.warmup_plan import served_sizes
from preheat.config.diffusion import PipelineConfig
from preheat.config.model import ModelConfig
from preheat.errors import DeadlinePassed, PutOff, RequestError
from preheat.models.batching import Execution
from preheat.models.diffusion.admission import check_cost, check_time
from preheat.models.diffusion.job import Job
from preheat.models.diffusion.pipeline import AfterStep, Batch, Generated
from preheat.models.diffusion.runner import DiffusionRunner
from preheat.protocol import responses

SDXL = yaml.safe_load((Path(__file__).parents[2] / "model-config" / "sdxl.yaml").read_text())
PICTURE_STEPS = 9.0  # a second: SDXL at one megapixel with guidance on an A100
FIXED = 0.3


class Machine(FakePipeline):
    """A painter whose time passes on a clock of its own: `speed` 1 is the machine that sdxl.yaml is
    written for.
    """

    grid = 32

    def __init__(
        self,
        speed: float = 1.0,
        timeout: float = SDXL["responseTimeout"],
        **shapes: Any,
    ) -> None:
        self.now, self.speed, self.pictures = 0.0, speed, 0
        self.budget = Budget(timeout, lambda: self.now)
        read = ModelConfig.parse(SDXL)
        self.config = read.with_shapes(read.pt2.shapes.model_copy(update=shapes))
        self.fail = False
        size = self.config.batchSize
        execution = Execution(
            served_sizes(self.config.pt2.shapes, size), torch.device("cpu"), budget=self.budget
        )
        self.runner = DiffusionRunner(execution, self, self.config)
        for bucket in self.config.pt2.shapes.buckets:
            for rows in range(1, size + 1):
                timing = Timing(FIXED * rows / speed, self._step(bucket, rows))
                self.budget.pace.measured(Load(bucket.volume, 2 * rows, rows, 1), timing)

    def _step(self, bucket: Bucket, rows: int) -> float:
        return rows * bucket.volume / 1024**2 / PICTURE_STEPS / self.speed

    def generate(self, batch: Batch, after_step: AfterStep) -> Generated:
        rows = len(batch.rows)
        self.now += FIXED * rows / self.speed + batch.num_inference_steps * self._step(
            batch.bucket, rows
        )
        self.pictures += rows
        if self.fail:
            raise ArithmeticError("late")
        return Generated(np.zeros((rows, batch.bucket.height, batch.bucket.width, 3), np.uint8))

    def job(self, **wishes: Any) -> Job:
        """An admitted request.

        Raises:
            RequestError: it costs too much.
        """
        limits = self.config.section(PipelineConfig).limits
        request = make_request(
            **({"height": 1024, "width": 1024, "response_format": "b64_json"} | wishes)
        )
        job = self.runner.planner.prepare(request)
        check_cost(
            request,
            job.plan.bucket,
            steps=request.num_run_steps,
            least_area=1024**2,
            max_cost=limits.max_cost,
        )
        seconds = self.runner.batches.seconds([job], generous=True)
        check_time(request, job.plan.bucket, seconds, self.budget.timeout or 0)
        return job


WISHES = st.fixed_dictionaries(
    {
        "num_inference_steps": st.integers(1, 100),
        "num_images": st.integers(1, 4),
        "guidance_scale": st.sampled_from([5.0, 6.0, 7.0]),
        "width": st.sampled_from([1024, 896]),
    }
)


def admitted(machine: Machine, wishes: list[dict[str, Any]]) -> list[Job]:
    jobs = []
    for number, wish in enumerate(wishes):
        try:
            jobs.append(machine.job(prompt=str(number), **wish))
        except RequestError as error:
            assert "pixel-steps" in error.message or "responseTimeout" in error.message
    return jobs


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(WISHES, min_size=1, max_size=12), st.sampled_from([1.0, 0.5, 0.2]))
def test_no_batch_outlasts_the_response_timeout_and_nobody_is_put_off_twice(
    wishes: list[dict[str, Any]], speed: float
) -> None:
    machine = Machine(speed)
    # when it arrives, in the order of arrival
    queue = [(0.0, job) for job in admitted(machine, wishes)]
    put_off: dict[str, int] = {}
    while queue:
        queue.sort(key=lambda each: each[0])
        machine.now = max(machine.now, queue[0][0])
        ready = [each for each in queue if each[0] <= machine.now][: machine.config.batchSize]
        queue = [each for each in queue if each not in ready]
        began = machine.now
        answers = machine.runner.inference([job for _, job in ready])
        assert machine.now - began <= SDXL["responseTimeout"]
        for answer in answers:
            if isinstance(answer.error, PutOff):
                name = answer.job.request.prompt
                put_off[name] = put_off.get(name, 0) + 1
                assert put_off[name] == 1 and not answer.pictures
                queue.append((machine.now + answer.error.retry_after, answer.job))
            else:
                assert (
                    answer.error is None and len(answer.pictures) == answer.job.request.num_images
                )
    assert speed < 1.0 or not put_off, "the YAML fits the machine it is written for"


def test_what_has_no_time_left_is_put_off_before_it_begins_and_comes_first_the_next_time() -> None:
    machine = Machine(0.2)
    # 40 picture-steps are 22 s here, 120 s hold 90 s of what was measured
    jobs = [
        machine.job(prompt=name, num_inference_steps=60, guidance_scale=5.0 + n)
        for n, name in enumerate("abc")
    ]
    first = machine.runner.inference(jobs)
    assert [type(answer.error) for answer in first] == [type(None), type(None), PutOff]
    assert machine.pictures == 2
    response = responses.from_error(first[2].error or PutOff(0))
    assert response.code == 503 and int(response.headers["retry-after"]) >= 1
    again = machine.runner.inference(
        [*jobs[:2], replace(jobs[2], request=replace(jobs[2].request, seed=99))]
    )
    assert [type(answer.error) for answer in again] == [type(None), PutOff, type(None)]


def test_a_late_failure_is_bounded_by_the_same_time() -> None:
    machine = Machine(0.2)
    jobs = [machine.job(prompt=name, num_inference_steps=40) for name in "abc"]
    machine.fail = True
    answers = machine.runner.inference(jobs)
    assert machine.now <= SDXL["responseTimeout"]
    assert PutOff in {type(answer.error) for answer in answers}


def test_a_deadline_is_looked_at_before_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(batch_sizes=(1,))
    monkeypatch.setattr("preheat.models.batching.time.time", lambda: machine.now)
    first, second = (machine.job(prompt=name, num_inference_steps=30) for name in "ab")
    answers = machine.runner.inference([first, replace(second, deadline=1.0)])
    assert [type(answer.error) for answer in answers] == [type(None), DeadlinePassed]
    assert machine.pictures == 1


def test_a_request_that_cannot_end_in_time_by_itself_is_told_so() -> None:
    machine = Machine(0.05)
    with pytest.raises(
        RequestError, match=r"60 steps take 13\d s here, and an answer has 120 \(responseTimeout\)"
    ):
        machine.job(num_inference_steps=60)
    machine.job(num_inference_steps=50)


def test_a_slow_spell_neither_refuses_what_fits_nor_lasts() -> None:
    machine, load = Machine(), Load(1024**2, 2, 1, 30)
    quiet = machine.budget.pace.seconds(load)
    for _ in range(200):
        machine.budget.pace.saw(load, 10 * quiet)
    assert machine.budget.pace.seconds(load) > 9 * quiet
    assert machine.budget.pace.seconds(load, generous=True) == pytest.approx(quiet * 4 / 3)
    for _ in range(1000):
        machine.budget.pace.saw(load, 0.0)
    assert machine.budget.pace.seconds(load) == pytest.approx(quiet / 2)


@given(st.dictionaries(st.integers(1, 100), st.floats(0.1, 10), min_size=1), st.integers(1, 200))
def test_between_two_measurements_an_estimate_lies_between_them(
    points: dict[int, float], at: int
) -> None:
    value = interpolated(points, at)
    if at in points:
        assert value == points[at]
    elif min(points) < at < max(points):
        assert min(points.values()) - 1e-9 <= value <= max(points.values()) + 1e-9
    else:
        assert value > 0


def test_without_a_measurement_nothing_is_refused() -> None:
    assert Pace().seconds(Load(1, 1, 1, 100)) == 0.0
    assert Budget(1.0).fits(0.0)


def test_a_request_of_many_runs_that_has_begun_is_finished() -> None:
    """Admitted with the time that it takes, and not asked for a third more in its middle."""
    machine = Machine(speed=0.0487, timeout=120, batch_sizes=(1,))  # four runs of 29 s
    (answer,) = machine.runner.inference([machine.job(num_inference_steps=10, num_images=4)])
    assert answer.error is None and machine.pictures == 4 and machine.now <= 120


def test_whoever_obeys_retry_after_finds_the_promise_kept() -> None:
    clock = [0.0]
    budget = Budget(60, lambda: clock[0])
    budget.begin()
    waits = [budget.put_off(who, 50) for who in range(200)]
    budget.end()
    for who, wait in enumerate(waits):
        clock[0] = wait
        budget.begin()
        assert budget.turn(who) <= who and budget.promising, wait
        budget.end()


def test_sizes_that_were_not_measured_share_one_drift() -> None:
    """They are clients' own, and there is no end of them."""
    pace = Pace()
    pace.measured(Load(100, 1, 1, 1), Timing(0.0, 1.0))
    for area in range(200, 400):
        pace.saw(Load(area, 1, 1, 1), 100.0)
    assert pace.per_step(100, 1) == 1.0
    assert pace.seconds(Load(1000, 1, 1, 1)) > 10.0
