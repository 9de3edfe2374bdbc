"""What diffusers decides about a picture reaches its reader: blackened pictures, cut prompts, a
scheduler's own steps.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from PIL import Image

import old_folders
from models.diffusion.test_engine import make_request
from preheat.buckets import Bucket
from preheat.config.diffusion import PipelineConfig, Task
from preheat.config.model import ModelConfig
from preheat.errors import ModelError, RequestError
from preheat.models import tiny
from preheat.models.diffusion.pipeline import AfterStep, Batch, DiffusionPipeline, Row
from preheat.models.diffusion.prompts import Reader
from preheat.protocol.responses import Response
from preheat.status import StatusFile
from preheat.worker.metrics import Metrics
from preheat.worker.worker import Worker

CPU = torch.device("cpu")
Built = Callable[[str], Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A tiny pipeline's archive by its family; `black` and `clean` are SD 1.5 with a safety
    checker.
    """
    root, makers = tmp_path_factory.mktemp("said"), {"black": True, "clean": False}

    def folder(name: str) -> Path:
        model = root / name / "model"
        if not model.exists():
            (
                old_folders.sd15(model, flagged=makers[name])
                if name in makers
                else tiny.build(name, model)
            )
        return root / name

    return folder


class Desk:
    """A service that compiles nothing, and what it answers."""

    def __init__(self, archive: Path, **limits: Any) -> None:
        self.counted: dict[str, float] = {}
        # a lone picture has a filler beside it
        shapes = {"buckets": [[64, 64]], "batch_sizes": [2]}
        data = {
            "batchSize": 4,
            "pt2": {"compile": {"enable": False}, "shapes": shapes},
            "pipeline": {"defaults": {"num_inference_steps": 2}, "limits": limits},
        }
        config = ModelConfig.parse(data)
        self.service = Worker[Any, Any](
            config, archive, CPU, status=StatusFile(None, "tiny"), metrics=Metrics(self._count)
        )

    def _count(
        self, kind: str, name: str, value: float, unit: str, dimensions: Mapping[str, str]
    ) -> None:
        self.counted[name] = self.counted.get(name, 0) + value

    def ask(self, **body: Any) -> Response:
        job = self.service.parse({"body": {"prompt": "a cat", "seed": 1} | body})
        (response,) = self.service.runner.postprocess(self.service.run([job]))
        return response


def test_a_picture_that_the_safety_checker_blackens_is_said_to_be(built: Built) -> None:
    desk = Desk(built("black"))
    image = desk.ask()
    assert image.headers["x-preheat-flagged"] == "true"
    several = json.loads(desk.ask(num_images=3, response_format="b64_json").body)
    assert [picture["flagged"] for picture in several["data"]] == [True] * 3
    lines = [json.loads(line) for line in desk.ask(stream=True).body.splitlines()]
    assert [event["flagged"] for event in lines if event["event"] == "image"] == [True]
    assert desk.counted["preheat_flagged_total"] == 5, "warm-up and fillers are not counted"


def test_a_picture_that_was_checked_and_kept_says_so_and_one_that_nobody_checked_says_nothing(
    built: Built,
) -> None:
    desk = Desk(built("clean"))
    assert desk.ask().headers["x-preheat-flagged"] == "false"
    assert desk.counted["preheat_flagged_total"] == 0
    unchecked = Desk(built("sd15")).ask(response_format="b64_json")
    assert "x-preheat-flagged" not in unchecked.headers and b"flagged" not in unchecked.body


LONG = "x " * 100
"""A hundred tokens of a tiny CLIP tokenizer: each letter, at a word's end, is one."""


def words(number: int) -> str:
    return LONG[: 2 * number]


def test_a_cut_prompt_says_in_every_answer_how_much_of_it_was_dropped(
    built: Built, caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk(built("sdxl"))
    with caplog.at_level(logging.DEBUG):
        answer = desk.ask(prompt=LONG, negative_prompt=words(80), response_format="b64_json")
        events = [json.loads(line) for line in desk.ask(prompt=LONG, stream=True).body.splitlines()]
    assert answer.headers["x-preheat-prompt-dropped"] == "25"  # 77 tokens with begin and end
    assert answer.headers["x-preheat-negative-prompt-dropped"] == "5"
    document = json.loads(answer.body)
    assert (document["prompt_dropped"], document["negative_prompt_dropped"]) == (25, 5)
    assert events[-1] == {"event": "done", "prompt_dropped": 25}
    assert LONG[:20] not in caplog.text
    whole = desk.ask(prompt=words(75))
    assert not [name for name in whole.headers if "dropped" in name]


def test_what_is_cut_off_changes_nothing(built: Built) -> None:
    desk = Desk(built("sdxl"))
    assert (
        desk.ask(prompt=LONG).body
        == desk.ask(prompt=words(75)).body
        != desk.ask(prompt=words(74)).body
    )


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_long_prompt_can_be_refused_by_its_field(built: Built, field: str) -> None:
    desk = Desk(built("sd15"), long_prompts="reject")
    with pytest.raises(RequestError, match="last 25 tokens") as caught:
        desk.ask(**{field: LONG})
    assert caught.value.field == field and caught.value.code == 400
    assert desk.ask(prompt=words(75)).code == 200


@pytest.mark.parametrize(
    ("family", "read"), [("sd15", 75), ("sdxl", 75), ("sd3", 254), ("flux", 510)]
)
def test_dropped_is_what_no_encoder_of_a_family_reads(built: Built, family: str, read: int) -> None:
    pipeline = DiffusionPipeline.load(built(family) / "model", PipelineConfig(), CPU)
    for length in (0, read, read + 1, read + 40):
        assert pipeline.prompts.num_dropped("x" * length, "prompt") == max(0, length - read)


def test_a_tokenizer_that_panics_refuses_its_request_and_nobody_elses() -> None:
    from tokenizers import NormalizedString

    class Panicking:
        model_max_length = 77

        def __call__(self, text: str, *, truncation: bool, verbose: bool) -> Any:
            # what filter gives may not raise: Rust panics
            NormalizedString(text).filter(lambda _: 1 / 0)

    with pytest.raises(RequestError) as caught:
        Reader([(Panicking(), 77)]).num_dropped("a cat", "negative_prompt")
    assert caught.value.field == "negative_prompt"


# --- schedulers

SCHEDULERS = sorted(
    {one.name for one in KarrasDiffusionSchedulers} | {"LCMScheduler", "TCDScheduler"}
)


def _batch(task: Task, seed: int) -> Batch:
    image = None if task == "text-to-image" else Image.new("RGB", (64, 64), "red")
    return Batch([Row("a", None, seed, image)], task, Bucket(64, 64), 6, 1.0, 0.5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy's, from diffusers' own code
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_seed_is_all_the_noise_there_is_and_steps_are_counted_as_they_run(
    built: Built, name: str
) -> None:
    """Schedulers that the pipelines take are served right, or refused in one line that names the
    key.
    """
    try:
        pipeline = DiffusionPipeline.load(
            built("sdxl") / "model", PipelineConfig(scheduler=name), CPU
        )
    except ModelError as error:
        assert str(error).startswith(f"pipeline.scheduler: {name}") and "\n" not in str(error)
        assert name in {"DPMSolverSDEScheduler", "LMSDiscreteScheduler", "EDMEulerScheduler"}, (
            "others need nothing"
        )
        return
    calls: list[int] = []
    pipeline.target("unet").register_forward_hook(lambda *_: calls.append(1))
    for task in ("text-to-image", "image-to-image"):
        calls.clear()
        seen: list[tuple[int, int]] = []
        torch.manual_seed(1)
        first = pipeline.generate(_batch(task, 5), _noting(seen)).pixels
        request = make_request(
            num_inference_steps=6, strength=0.5, image=None if task == "text-to-image" else b"i"
        )
        assert pipeline.num_calls(request) == len(calls)
        of = request.num_run_steps
        assert seen == [(number, of) for number in range(1, of + 1)]
        torch.manual_seed(2)
        assert np.array_equal(pipeline.generate(_batch(task, 5)).pixels, first), (
            "noise from elsewhere"
        )


def _noting(seen: list[tuple[int, int]]) -> AfterStep:
    return lambda step, of, _: seen.append((step, of))


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("strength", [0.35, 0.6, 1.0])
def test_transformers_count_their_image_to_image_steps_as_they_run(
    built: Built, family: str, strength: float
) -> None:
    pipeline = DiffusionPipeline.load(built(family) / "model", PipelineConfig(), CPU)
    calls: list[int] = []
    pipeline.target("transformer").register_forward_hook(lambda *_: calls.append(1))
    image = Image.new("RGB", (64, 64), "red")
    pipeline.generate(
        Batch([Row("a", None, 1, image)], "image-to-image", Bucket(64, 64), 10, 1.0, strength)
    )
    assert pipeline.num_calls(
        make_request(num_inference_steps=10, strength=strength, image=b"i")
    ) == len(calls)


@pytest.mark.parametrize("name", ["DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"])
def test_schedulers_with_a_seed_of_their_own_are_refused(built: Built, name: str) -> None:
    with pytest.raises(ModelError, match=f"pipeline.scheduler: {name} draws"):
        DiffusionPipeline.load(built("sdxl") / "model", PipelineConfig(scheduler=name), CPU)


def test_more_steps_than_a_scheduler_can_do_are_refused_and_cost_nobody_else(built: Built) -> None:
    pipeline = DiffusionPipeline.load(
        built("sdxl") / "model", PipelineConfig(scheduler="LCMScheduler"), CPU
    )
    with pytest.raises(RequestError) as caught:
        pipeline.num_calls(make_request(num_inference_steps=60))
    assert caught.value.field == "num_inference_steps" and "LCMScheduler" in caught.value.message


def test_the_cost_is_that_of_the_schedulers_steps(built: Built) -> None:
    desk = Desk(built("sd15"), max_cost=64 * 64 * 5)  # PNDM takes one more than is asked for
    assert desk.ask(num_inference_steps=4).code == 200
    with pytest.raises(RequestError) as caught:
        desk.ask(num_inference_steps=5)
    assert caught.value.field == "num_inference_steps" and "6 steps" in caught.value.message
