"""Time in admission: estimates, and batches through the real engine on a clock of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from models.diffusion.fakes import FakePipeline
from models.diffusion.test_engine import make_request
from preheat.compilation.pace import PATIENCE, Budget, Load, Pace, Timing, interpolated
from preheat.compilation.warmup_plan import served_sizes
from preheat.config.diffusion import PipelineConfig
from preheat.config.model import ModelConfig
from preheat.errors import DeadlinePassed, PutOff, RequestError
from preheat.models.batching import Chunk, Execution, RunReport
from preheat.models.diffusion.admission import check_cost, check_time
from preheat.models.diffusion.job import Answer, Job
from preheat.models.diffusion.pipeline import AfterStep, Batch, Generated
from preheat.models.diffusion.runner import DiffusionRunner
from preheat.protocol import responses
from preheat.protocol.events import EventStream

SDXL = yaml.safe_load((Path(__file__).parents[2] / "model-config" / "sdxl.yaml").read_text())
CONFIG = ModelConfig.parse(SDXL)
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
        runner: type[DiffusionRunner] = DiffusionRunner,
        **shapes: Any,
    ) -> None:
        self.now, self.speed, self.pictures = 0.0, speed, 0
        self.config = CONFIG.with_shapes(CONFIG.pt2.shapes.model_copy(update=shapes))
        size = self.config.batchSize
        self.budget = Budget(timeout, size, lambda: self.now)
        self.fail = False
        execution = Execution(
            served_sizes(self.config.pt2.shapes, size), torch.device("cpu"), budget=self.budget
        )
        self.runner = runner(execution, self, self.config)
        for bucket in self.config.pt2.shapes.buckets:
            for rows in range(1, size + 1):
                timing = Timing(FIXED * rows / speed, self.step(bucket.volume, rows))
                self.budget.pace.measured(Load(bucket.volume, 2 * rows, rows, 1), timing)

    def step(self, area: int, rows: int) -> float:
        """Seconds, area in pixels."""
        return rows * area / 1024**2 / PICTURE_STEPS / self.speed

    def generate(self, batch: Batch, after_step: AfterStep) -> Generated:
        rows = len(batch.rows)
        self.now += FIXED * rows / self.speed + batch.num_inference_steps * self.step(
            batch.bucket.volume, rows
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


class Clockwork(DiffusionRunner):
    """Generates nothing, only its machine's time passes: `lag` of what was measured. The runner
    takes milliseconds for a megapixel, too slow for thousands of batches.
    """

    lag = 1.0

    def run_chunk(self, chunk: Chunk[Answer], size: int) -> RunReport:
        machine, load = self._pipeline, chunk[0][0].job.load(size)
        assert isinstance(machine, Machine)
        steps = load.steps * machine.step(load.area, size)
        machine.now += self.lag * (FIXED * size / machine.speed + steps)
        for answer, _ in chunk:
            answer.pictures.append(BLANK)
        return RunReport(size, len(chunk), "eager", 0.0, unwarmed=False, fallback=False)


BLANK = Image.new("1", (1, 1))


def wish(dice: Random) -> dict[str, Any]:
    return {
        "num_inference_steps": dice.randint(1, 100),
        "num_images": dice.randint(1, 4),
        "guidance_scale": dice.choice([5.0, 6.0]),
        "width": dice.choice([1024, 896]),
    }


@dataclass(slots=True)
class Client:
    """Sends a request until it is served: at `comes` (seconds), and when it is put off `late`
    seconds after it may. Until `sure_until` it must be served.
    """

    job: Job
    comes: float
    late: float
    sure_until: float = 0.0


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.integers(1, 24),
    st.sampled_from([100.0, 1.0, 0.5, 0.3, 0.2]),
    st.sampled_from(["dynamic", (1,), (1, 2, 4), (4,)]),
    st.integers(0, 2**32),
)
def test_whoever_was_put_off_with_a_retry_after_is_served_the_next_time(
    clients: int, speed: float, sizes: Any, seed: int
) -> None:
    """Whoever it meets, if it reaches the worker in time. And no batch outlasts the response
    timeout.
    """
    machine = Machine(speed, runner=Clockwork, batch_sizes=sizes)
    runner = machine.runner
    assert isinstance(runner, Clockwork)
    dice = Random(seed)
    waiting = [
        Client(job, dice.uniform(0, 30), dice.choice([0, dice.uniform(0, 600)]))
        for number in range(clients)
        for job in admitted(machine, str(number), dice)
    ]
    while waiting:
        waiting.sort(key=lambda client: client.comes)
        machine.now = max(machine.now, waiting[0].comes)
        here = [client for client in waiting if client.comes <= machine.now]
        batch = here[: machine.config.batchSize]
        # no slower than was measured, nor so fast that the estimate follows it by more than a third
        runner.lag = dice.uniform(0.75, 1.0)
        began = machine.now
        answers = runner.inference([client.job for client in batch])
        assert machine.now - began <= SDXL["responseTimeout"]
        for client, answer in zip(batch, answers, strict=True):
            if isinstance(answer.error, PutOff):
                assert began >= client.sure_until and not answer.pictures
                wait = answer.error.retry_after
                client.comes = machine.now + (wait or 1) + client.late
                patience = PATIENCE * SDXL["responseTimeout"]
                client.sure_until = machine.now + wait + patience if wait else 0.0
            else:
                assert answer.error is None
                assert len(answer.pictures) == client.job.request.num_images
                waiting.remove(client)


def admitted(machine: Machine, prompt: str, dice: Random) -> list[Job]:
    try:
        return [machine.job(prompt=prompt, **wish(dice))]
    except RequestError as error:
        assert "pixel-steps" in error.message or "responseTimeout" in error.message
        return []


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_the_shipped_yaml_fits_the_machine_that_it_is_written_for(seed: int) -> None:
    machine, dice = Machine(runner=Clockwork), Random(seed)
    size = machine.config.batchSize
    jobs = [job for number in range(4 * size) for job in admitted(machine, str(number), dice)]
    assert not any(answer.error for answer in machine.runner.inference(jobs[:size]))


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
    machine.now += 1
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


def test_of_equal_requests_each_has_its_turn() -> None:
    machine = Machine(0.2)
    twins = [machine.job(num_inference_steps=60) for _ in range(4)]
    first = machine.runner.inference(twins)
    errors = [answer.error for answer in first[2:]]
    assert [type(answer.error) for answer in first[:2]] == [type(None)] * 2
    assert [isinstance(each, PutOff) and each.retry_after for each in errors] == [1, 1]
    machine.now += 1
    assert not any(answer.error for answer in machine.runner.inference(twins[2:]))
    assert not machine.budget.promising


def test_turns_that_can_meet_in_one_call_fit_into_it() -> None:
    now = [0.0]
    budget = Budget(60, 3, lambda: now[0])
    assert [budget.promise_turn(who, seconds) for who, seconds in ((1, 30), (2, 7.5))] == [1, 1]
    assert budget.promise_turn(3, 15) == 121, "with the two before it it would be 70 s"
    assert {budget.promise_turn(who, 7.5) for who in range(4, 50)} == {1}, "three are 60 s"
    now[0] = 121.0
    assert budget.take_turn(3) and not budget.take_turn(3)


def test_a_turn_begins_when_its_owner_was_told_to_come_and_is_kept_for_two_calls() -> None:
    now = [0.0]
    budget = Budget(60, 3, lambda: now[0])
    waits = [budget.promise_turn(who, 60) for who in range(10)]
    assert waits == [1, 121, 241, 361, 481, 601, None, None, None, None]
    assert not budget.take_turn(0)
    now[0] = 120.9
    assert budget.take_turn(0) and not budget.take_turn(1)
    now[0] = 241.0
    budget.begin()
    assert not budget.take_turn(1) and budget.take_turn(2)


def test_who_comes_too_early_is_told_of_the_turn_that_it_has_and_others_get_theirs() -> None:
    now = [0.0]
    budget, waits = Budget(60, 3, lambda: now[0]), list[int | None]()
    assert budget.promise_turn(1, 60) == 1
    for seconds in range(100):
        now[0] = float(seconds)
        budget.begin()
        waits.append(budget.promise_turn(2, 60))
        budget.end()
    assert waits == [121 - seconds for seconds in range(100)]
    budget.begin()
    twins = [budget.promise_turn(2, 60) for _ in range(2)]
    assert twins == [22, 142], "equal requests of one call have a turn each"
    assert budget.promise_turn(3, 60) == 262
    budget.end()


def test_who_comes_after_its_turn_is_served_before_who_has_none() -> None:
    machine = Machine(0.2)
    *others, owner = (machine.job(prompt=name, num_inference_steps=60) for name in "abc")
    put_off = machine.runner.inference([*others, owner])[2].error
    assert isinstance(put_off, PutOff) and put_off.retry_after is not None
    machine.now += put_off.retry_after + PATIENCE * SDXL["responseTimeout"]
    again = machine.runner.inference([*others, owner])
    assert [type(answer.error) for answer in again] == [type(None), PutOff, type(None)]


def test_who_comes_after_its_turn_takes_nothing_that_was_promised() -> None:
    machine = Machine(0.2)
    jobs = [machine.job(prompt=name, num_inference_steps=60) for name in "abcdef"]
    machine.runner.inference(jobs[:3])  # c has a turn, which expires
    machine.now += 1 + PATIENCE * SDXL["responseTimeout"]
    machine.runner.inference([jobs[0], jobs[1], jobs[3], jobs[4]])  # d and e have turns
    machine.now += 1
    answers = machine.runner.inference([jobs[5], jobs[2], jobs[3], jobs[4]])
    assert [type(answer.error) for answer in answers] == [PutOff, PutOff, type(None), type(None)]
    assert machine.budget.promising


def test_of_those_whose_turn_has_expired_the_latest_1000_are_remembered() -> None:
    now = [0.0]
    budget = Budget(60, 3, lambda: now[0])
    for who in range(1100):
        budget.begin()
        assert budget.promise_turn(who, 60) == 1
        budget.end()
        now[0] += 1000.0
    budget.begin()
    assert [budget.take_precedence(who) for who in (99, 100, 100, 1099)] == [
        False,
        True,
        False,
        True,
    ]
    assert not budget.take_turn(1099), "no time is kept for it"
    for who in range(11):
        budget.promise_turn(2000 + who, 60)
    assert budget.promise_turn(1099, 60, late=True) is None and budget.take_precedence(1099)


def test_who_is_promised_no_turn_is_not_told_when_to_come() -> None:
    error = PutOff()
    assert "retry-after" not in responses.from_error(error).headers and "later" in str(error)
    error.retry_after = 7
    response = responses.from_error(error)
    assert (response.code, response.headers["retry-after"]) == (503, "7")
    assert b"after 7 s" in response.body


def test_when_to_come_again_is_said_where_there_are_no_headers_too() -> None:
    error = PutOff()
    assert "retry_after" not in error.body()
    error.retry_after = 7
    assert json.loads(responses.from_error(error).body)["retry_after"] == 7
    machine = Machine(0.2)
    jobs = [machine.job(prompt=name, num_inference_steps=60, stream=True) for name in "abc"]
    jobs[2] = replace(jobs[2], events=EventStream(None, {}))
    answers = machine.runner.inference(jobs)
    (response,) = machine.runner.postprocess(answers[2:])
    last = json.loads(response.body.splitlines()[-1])
    assert (last["type"], last["retry_after"]) == ("PutOff", 1)


def test_sizes_that_were_not_measured_share_one_drift() -> None:
    """They are clients' own, and there is no end of them."""
    pace = Pace()
    pace.measured(Load(100, 1, 1, 1), Timing(0.0, 1.0))
    for area in range(200, 400):
        pace.saw(Load(area, 1, 1, 1), 100.0)
    assert pace.per_step(100, 1) == 1.0
    assert pace.seconds(Load(1000, 1, 1, 1)) > 10.0
