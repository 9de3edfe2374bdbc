"""A new family plugs in by a section of the YAML and a line of the registry: no file of the worker,
the handler, the cache or the command knows it. It is also the smallest model to try a worker with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from weakref import WeakSet

import pytest
import torch
from torch import nn

from preheat.buckets import Bucket
from preheat.compilation.pace import Timing
from preheat.compilation.variants import Variant
from preheat.compilation.watch import CompileWatch
from preheat.config.family import FamilyConfig
from preheat.config.model import ModelConfig
from preheat.errors import AnswerTooLarge, ConfigError, RequestError
from preheat.models import registry
from preheat.models.base import LoadedModel, ModelRunner
from preheat.models.batching import BaseJob, Chunk, Execution, Outcome, RunReport
from preheat.protocol.call import Call
from preheat.protocol.responses import Response, json_response
from preheat.status import StatusFile
from preheat.worker.metrics import Metrics
from preheat.worker.worker import Worker

CPU = torch.device("cpu")

# The family: what follows to `class TestConfig` is all of it.


class DoubleConfig(FamilyConfig):
    """`double: {}`"""

    name: ClassVar[str] = "double"


class Double(nn.Module):
    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return 2 * numbers


@dataclass(frozen=True, slots=True)
class Job(BaseJob):
    number: float
    send: Callable[[Response], None] | None = None


@dataclass(slots=True)
class Doubled(Outcome):
    job: Job
    number: float = 0.0


class DoubleRunner(ModelRunner[Job, Doubled]):
    def __init__(self, execution: Execution, module: Double) -> None:
        super().__init__(execution, [Bucket()])
        self._module = module

    def run_variant(self, variant: Variant) -> Timing:
        _, seconds = self.batches.timed([Job(1.0)] * variant.batch_size)
        return Timing(0.0, seconds)

    def example(self, bucket: Bucket, steps: int | None = None) -> Job:
        return Job(1.0)

    def preprocess(self, call: Call) -> Job:
        number = call.row.get("body")
        if not isinstance(number, float):
            raise RequestError("must be a number", "body")
        return Job(number, call.send, deadline=call.deadline)

    def result(self, job: Job) -> Doubled:
        return Doubled(job)

    def run_chunk(self, chunk: Chunk[Doubled], size: int) -> RunReport:
        rows = [answer.job.number for answer, _ in chunk]
        batch = torch.tensor(rows + rows[:1] * (size - len(rows)))
        doubled, run = self.execution.run(
            lambda: self._module(batch), num_rows=size, num_real_rows=len(rows)
        )
        for (answer, _), number in zip(chunk, doubled.tolist(), strict=False):
            answer.number = number
            if answer.job.send is not None:
                answer.job.send(Response(200, b"half way"))
        return run

    def postprocess(self, results: Sequence[Doubled]) -> list[Response]:
        return [json_response(200, {"doubled": each.number}) for each in results]


class DoubleModel(LoadedModel[Job, Doubled]):
    fields, sizes = ("body",), (Bucket(),)

    def __init__(self, config: ModelConfig) -> None:
        self.config, self.module = config, Double()

    @classmethod
    def load(cls, config: ModelConfig, *_: object) -> DoubleModel:
        return cls(config)

    def targets(self) -> Mapping[str, nn.Module]:
        return {"double": self.module}

    def fingerprint_facts(self) -> Mapping[str, object]:
        return {}

    def runner(self, execution: Execution) -> DoubleRunner:
        return DoubleRunner(execution, self.module)


class TestConfig(ModelConfig):
    __test__ = False

    double: DoubleConfig | None = None


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FAMILIES, "double", f"{__name__}:DoubleModel")


def start(most: int = 2, metrics: Metrics | None = None) -> Worker[Job, Doubled]:
    compiled = {"enable": True, "backend": "aot_eager", "dynamic": False}
    pt2 = {"compile": compiled, "shapes": {"batch_sizes": [most - 1, most]}}
    config = TestConfig.parse({"batchSize": most, "pt2": pt2, "double": {}})
    return Worker(config, Path("/nowhere"), CPU, status=StatusFile(None, "d"), metrics=metrics)


def test_a_new_family_is_compiled_warmed_proven_batched_and_streamed(
    watch: CompileWatch,
) -> None:
    samples: list[tuple[str, float]] = []
    metrics = Metrics(lambda kind, name, value, *_: samples.append((name, value)))
    with start(metrics=metrics) as worker:
        state = worker.current_state()
        assert (state.state, state.compiles_at_boot > 0) == ("hot", True)
        assert [(row.batch_size, row.engine) for row in state.buckets] == [
            (2, "compiled"),
            (1, "compiled"),
        ]
        samples.clear()
        parts: list[Response] = []
        calls = [Call({"body": 3.0}), Call({"body": "x"}), Call({"body": 5.0}, send=parts.append)]
        pending = worker.inference(worker.preprocess(calls))
        assert [each.result and each.result.engine for each in pending] == [
            "compiled",
            None,
            "compiled",
        ]
        answered = worker.postprocess(pending)
        assert [response.code for response in answered] == [200, 400, 200]
        assert [json.loads(answered[index].body)["doubled"] for index in (0, 2)] == [6.0, 10.0]
        assert [part.body for part in parts] == [b"half way"]
        assert ("preheat_rows_painted_total", 2) in samples, "one run for both"
        assert worker.current_state().compiles_since_ready == 0


def test_two_workers_of_a_process_do_not_disturb_each_other(
    watch: CompileWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    # without the workers of other tests, which nobody has closed
    monkeypatch.setattr(Worker, "alive", WeakSet())
    first, second = start(), start()
    for worker in (first, second):
        (result,) = worker.run([worker.parse({"body": 4.0})])
        assert (result.number, result.engine) == (8.0, "compiled")
        assert worker.current_state().compiles_since_ready == 0
    first.close()
    (result,) = second.run([second.parse({"body": 4.0})])
    assert (result.engine, second.current_state().incidents) == ("compiled", 0)
    unseen, reference = torch.compile(Double(), backend="eager"), torch.ones(7)
    with pytest.raises(RuntimeError, match="fail_on_recompile"):
        unseen(reference)
    seen = second.current_state().compiles_since_ready
    second.close()
    unseen(reference)
    assert second.current_state().compiles_since_ready == seen, "nobody listens any more"


def test_a_worker_that_fails_beside_one_that_serves_leaves_it_hot(
    watch: CompileWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "alive", WeakSet())
    run_variant, unseen = DoubleRunner.run_variant, torch.compile(Double(), backend="eager")

    def failing(runner: DoubleRunner, variant: Variant) -> Timing:
        run_variant(runner, variant)
        unseen(torch.ones(5))
        raise ArithmeticError("no model")

    with start() as first:
        monkeypatch.setattr(DoubleRunner, "run_variant", failing)
        before = watch.num_events
        with pytest.raises(ArithmeticError):
            start()
        assert watch.num_events > before, "it did compile"
        assert first.current_state().compiles_since_ready == 0
        with pytest.raises(RuntimeError, match="fail_on_recompile"):
            unseen(torch.ones(5, 5))
        (result,) = first.run([first.parse({"body": 4.0})])
        assert (result.engine, first.current_state().incidents) == ("compiled", 0)


def test_what_cannot_be_sent_is_a_failure_though_it_was_served(
    watch: CompileWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples: list[tuple[str, float, Mapping[str, str]]] = []
    metrics = Metrics(lambda kind, name, value, unit, labels: samples.append((name, value, labels)))

    def too_large(runner: DoubleRunner, results: Sequence[Doubled]) -> list[Response]:
        results[-1].error = AnswerTooLarge("no")
        return [Response(200, b"")] * len(results)

    with start(metrics=metrics) as worker:
        monkeypatch.setattr(DoubleRunner, "postprocess", too_large)
        pending = worker.inference(worker.preprocess([Call({"body": 3.0}), Call({"body": 5.0})]))
        assert [each.served_in for each in pending] == ["fixed", "fixed"]
        worker.postprocess(pending)
        assert [each.served_in for each in pending] == ["fixed", None]
        failed = [sample for sample in samples if sample[0] == "preheat_failed_total"]
        assert failed == [("preheat_failed_total", 1, {"Code": "413"})]
        samples.clear()
        worker.postprocess(pending[1:])
        assert "preheat_failed_total" not in {name for name, *_ in samples}, "it has failed before"


def test_a_yaml_has_one_family() -> None:
    assert TestConfig.parse({"double": {}}).family == DoubleConfig()
    assert TestConfig.parse({}).family.name == "pipeline"
    with pytest.raises(ConfigError, match="double: stands beside module"):
        TestConfig.parse({"module": {}, "double": {}})
