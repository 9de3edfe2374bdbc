"""What one failed allocation leaves behind: nothing. In every stage of every task and in every
dtype.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import old_folders
from conftest import NUM_THREADS
from preheat.compilation.backends.inductor import TorchCompile
from preheat.compilation.watch import CompileWatch
from preheat.errors import OutOfMemory
from preheat.models.diffusion.job import Answer
from preheat.models.diffusion.model import DiffusionModel
from preheat.models.diffusion.pipeline import AfterStep, Batch, DiffusionPipeline, Generated
from preheat.protocol import images
from preheat.worker.worker import Worker
from worker.test_service import IMAGE, MASK, ask, start

TASKS: dict[str, dict[str, Any]] = {
    "text-to-image": {},
    "image-to-image": {"image": IMAGE, "strength": 0.7},
    "inpainting": {"image": IMAGE, "mask_image": MASK, "strength": 0.7},
}
STEPS = 3
STAGES = {"encode": "vae.encoder", "step": "unet", "decode": "vae.decoder"}
"""By stage, the target that runs in it; encoding comes first, and not in every task."""
IN_STAGES = [
    (task, stage)
    for task in TASKS
    for stage in STAGES
    if (task, stage) != ("text-to-image", "encode")
]
ERRORS: dict[str, Exception] = {
    "encode": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"
    ),
    "step": MemoryError(),
    "decode": torch.OutOfMemoryError("CUDA out of memory (simulated)"),
}
TOLERANCE = {"float32": 1, "float16": 1, "bfloat16": 8}
"""Of 255: what another batch size changes; one step of bfloat16 is 1 at a grey of 255, and there
are many.
"""


@dataclass(slots=True)
class Faults:
    """A stage that fails half-way in runs of more than `most_rows` rows, and the runs that there
    were: (rows, steps that ended).
    """

    stage: str | None = None
    most_rows: int = 1000
    runs: list[list[int]] = field(default_factory=list)
    calls: int = 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        run, generate = TorchCompile.__call__, DiffusionPipeline.generate

        def failing(code: TorchCompile, *args: Any, **kwargs: Any) -> Any:
            result = run(code, *args, **kwargs)
            rows = self.runs[-1][0]
            if (
                self.stage is not None
                and code.name == f"{STAGES[self.stage]}-compiled"
                and rows > self.most_rows
            ):
                self.calls += 1
                if self.calls >= min(2, rows):
                    self.calls = 0
                    raise ERRORS[self.stage]
            return result

        def counted(pipeline: DiffusionPipeline, batch: Batch, after_step: AfterStep) -> Generated:
            self.runs.append([len(batch.rows), 0])

            def after(*step: Any) -> None:
                self.runs[-1][1] += 1
                after_step(*step)

            return generate(pipeline, batch, after)

        patch.setattr(TorchCompile, "__call__", failing)
        patch.setattr(DiffusionPipeline, "generate", counted)


@dataclass(frozen=True, slots=True)
class Bench:
    service: Worker[Any, Any]
    faults: Faults
    dtype: str
    expected: dict[str, list[NDArray[np.int64]]]


def half_served(folder: Path, dtype: str = "bfloat16", **keys: Any) -> Worker[Any, Any]:
    shapes = {"batch_sizes": [1, 2, 4]} | keys.pop("shapes", {})
    pipeline = {
        "dtype": dtype,
        "guidance": "on",
        "defaults": {"num_inference_steps": STEPS, "guidance_scale": 5.0},
    }
    return start(
        folder,
        batchSize=4,
        shapes=shapes,
        pipeline=pipeline | keys.pop("pipeline", {}),
        pt2={"targets": ["unet", "vae.decoder", "vae.encoder"]},
        **keys,
    )


def bodies(task: str, count: int = 2) -> list[dict[str, Any]]:
    return [TASKS[task] | {"height": 60, "width": 50, "seed": seed} for seed in range(count)]


def pictures(answers: list[Answer]) -> list[NDArray[np.int64]]:
    return [np.asarray(picture).astype(int) for answer in answers for picture in answer.pictures]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("older")
    old_folders.sdxl(root / "model")
    return root


@pytest.fixture(scope="module", params=["float32"] if NUM_THREADS == 1 else ["bfloat16", "float16"])
def bench(request: pytest.FixtureRequest, folder: Path) -> Iterator[Bench]:
    """A hot worker in this dtype, and what it generates without faults."""
    assert torch.get_num_threads() == NUM_THREADS
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults()
        faults.install(patch)
        with half_served(folder, request.param, shapes={"batch_sizes": [1, 2]}) as service:
            expected = {task: pictures(ask(service, *bodies(task))) for task in TASKS}
            yield Bench(service, faults, request.param, expected)
    torch.compiler.reset()


@pytest.fixture
def hot(bench: Bench) -> Iterator[Bench]:
    """With nothing remembered; afterwards every task has to be served as ever."""
    bench.service.runner.batches.unfit.fitted("64x64, guidance", 4)
    yield bench
    bench.faults.stage = None
    for task in TASKS:
        answers = ask(bench.service, *bodies(task, 1))
        assert (
            np.abs(pictures(answers)[0] - bench.expected[task][0]).max() <= TOLERANCE[bench.dtype]
        )
        assert {answer.engine for answer in answers} == {"compiled"}
    state = bench.service.current_state()
    assert (state.incidents, state.eager_fallbacks, state.compiles_since_ready) == (0, 0, 0)


def assert_like(bench: Bench, task: str, answers: list[Answer]) -> None:
    for mine, expected in zip(pictures(answers), bench.expected[task], strict=True):
        assert np.abs(mine - expected).max() <= TOLERANCE[bench.dtype]


@pytest.mark.parametrize(("task", "stage"), IN_STAGES)
def test_what_does_not_fit_is_split_or_a_507_and_never_painted_twice_again(
    hot: Bench, task: str, stage: str
) -> None:
    faults = hot.faults
    faults.stage, faults.most_rows, faults.runs = stage, 1, []
    assert_like(hot, task, ask(hot.service, *bodies(task)))
    assert [rows for rows, _ in faults.runs] == [2, 1, 1]
    assert hot.service.current_state().unfit == {"64x64, guidance": 2}
    faults.runs = []
    assert_like(hot, task, ask(hot.service, *bodies(task)))
    steps = faults.runs[0][1]
    assert faults.runs == [[1, steps], [1, steps]], "row-steps are those of two pictures"
    faults.most_rows = 0
    (answer,) = hot.service.run(
        [hot.service.parse({"body": {"prompt": "a cat"} | bodies(task)[0]})]
    )
    assert (
        isinstance(answer.error, OutOfMemory) and answer.error.code == 507 and not answer.pictures
    )


@pytest.mark.parametrize("task", TASKS)
def test_a_picture_that_cannot_be_encoded_is_that_requests_507(
    hot: Bench, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = images.encode

    def failing(picture: Image.Image, output_format: Any, *options: Any) -> bytes:
        if output_format == "webp":
            raise MemoryError
        return encode(picture, output_format, *options)

    monkeypatch.setattr(images, "encode", failing)
    forms = ["png", "webp"]
    answers = ask(
        hot.service,
        *(body | {"output_format": form} for body, form in zip(bodies(task), forms, strict=True)),
    )
    responses = hot.service.runner.postprocess(answers)
    assert [response.code for response in responses] == [200, 507]
    assert b"OutOfMemory" in responses[1].body and b"webp" in responses[1].body


def test_the_vae_keeps_the_dtype_and_the_weights_that_it_has(hot: Bench) -> None:
    """Whatever the task: CUDA graphs are recorded for the addresses of weights."""
    model = hot.service.model
    assert isinstance(model, DiffusionModel)
    weights = dict(model.pipeline.target("vae").named_parameters())
    before = {name: (weight.dtype, weight.data_ptr()) for name, weight in weights.items()}
    ask(hot.service, *(body for task in TASKS for body in bodies(task, 1)))
    after = dict(model.pipeline.target("vae").named_parameters())
    assert before == {name: (weight.dtype, weight.data_ptr()) for name, weight in after.items()}
    assert {dtype for dtype, _ in before.values()} == {
        torch.bfloat16 if hot.dtype == "bfloat16" else torch.float32
    }


@pytest.mark.parametrize(("batch_sizes", "stage"), [([1, 2, 4], "decode"), ("dynamic", "step")])
def test_a_batch_size_that_does_not_fit_in_warm_up_is_not_served_and_nothing_turns_eager(
    watch: CompileWatch, folder: Path, batch_sizes: Any, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults(stage, 2)
    faults.install(monkeypatch)
    tasks = ["text-to-image", "inpainting"]
    service = half_served(folder, shapes={"batch_sizes": batch_sizes}, pipeline={"tasks": tasks})
    state = service.current_state()
    smallest = 4 if batch_sizes != "dynamic" else 3
    assert state.unfit == {"64x64, guidance": smallest}
    assert {(row.engine, row.reason) for row in state.buckets} == {("compiled", "")}
    faults.runs.clear()
    answers = ask(service, *bodies("text-to-image", 4))
    assert [rows for rows, _ in faults.runs] == [2, 2] and {
        answer.engine for answer in answers
    } == {"compiled"}


def test_where_no_batch_is_smaller_what_eager_can_hold_is_served_eagerly(
    watch: CompileWatch, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults("decode", 0)
    faults.install(monkeypatch)
    service = half_served(folder, pipeline={"tasks": ["text-to-image"]})
    rows = {(row.target, row.engine) for row in service.state.buckets}
    assert rows == {("unet", "compiled"), ("vae.decoder", "eager")}
    (answer,) = ask(service, bodies("text-to-image")[0])
    assert answer.engine == "eager" and answer.is_fallback


@pytest.mark.skipif(NUM_THREADS > 1, reason="it is this process that it starts")
def test_in_half_precision_and_on_two_threads_a_fault_leaves_as_little_behind() -> None:
    """What is above with `bench`, in a process that began with two threads: there a fault inside a
    kernel has another thread to hurt.
    """
    threads = {"PREHEAT_TEST_THREADS": "2", "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", "float16"],
        env=os.environ | threads,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    tests_of_a_dtype = len(IN_STAGES) + len(TASKS) + 1
    assert f"{2 * tests_of_a_dtype} passed" in done.stdout
