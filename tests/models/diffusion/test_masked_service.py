"""`fit: mask` through the whole worker: every picture is the one that diffusers alone paints."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image

from bench.plain_diffusers import Plain
from preheat.compilation.watch import CompileWatch
from preheat.config.model import ModelConfig
from preheat.errors import ConfigError
from preheat.models import tiny
from preheat.models.diffusion.job import Answer
from preheat.models.diffusion.masking import parts
from preheat.models.diffusion.own_sizes import OwnSizes
from preheat.models.diffusion.pipeline import Batch, DiffusionPipeline
from preheat.models.diffusion.runner import DiffusionRunner
from preheat.protocol import responses
from preheat.status import StatusFile
from preheat.worker.worker import Worker

GRID = {"sdxl": 8, "sd15": 8, "sd3": 16, "flux": 16}
"""Pixels that two levels can halve, or that a token has."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in GRID:
        tiny.build(family, root / family / "model")
    return root


def start(folder: Path, **keys: Any) -> Worker[Any, Any]:
    shapes = {"buckets": [[64, 64], [96, 48]], "batch_sizes": [1, 4], "fit": "mask"}
    pt2 = {
        "compile": {"enable": True, "backend": keys.pop("backend", "eager")},
        "shapes": shapes | keys.pop("shapes", {}),
    } | keys.pop("pt2", {})
    pipeline = {"path": "model", "defaults": {"num_inference_steps": 2}} | keys.pop("pipeline", {})
    config = ModelConfig.parse({"batchSize": 4, "pt2": pt2, "pipeline": pipeline} | keys)
    cpu, status = torch.device("cpu"), StatusFile(None, "tiny")
    worker = Worker[Any, Any](config, folder, cpu, status=status)
    assert isinstance(worker.runner, DiffusionRunner)
    worker.runner.planner.own_sizes = OwnSizes()  # which one is quicker here is chance
    return worker


@pytest.fixture
def closed() -> Iterator[list[Worker[Any, Any]]]:
    """Those in here are closed in the end."""
    workers: list[Worker[Any, Any]] = []
    yield workers
    for worker in workers:
        worker.close()


def ask(service: Worker[Any, Any], *requests: dict[str, Any]) -> list[Answer]:
    answers = service.run([service.parse({"body": dict(request)}) for request in requests])
    for answer in answers:
        answer.raise_if_failed()
    return answers


def off(answer: Answer, expected: Any) -> int:
    """By how many of 255 the picture is off."""
    return int(np.abs(np.asarray(answer.pictures[0]).astype(int) - expected).max())


def image(mode: str, height: int, width: int, seed: int) -> str:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


STRANGERS: list[dict[str, Any]] = [
    {"prompt": "a cat", "height": 64, "width": 64, "seed": 1},
    {"prompt": "a dog", "height": 41, "width": 30, "seed": 2},
    {"prompt": "a house by the sea", "height": 16, "width": 50, "seed": 3},
    {"prompt": "", "height": 33, "width": 64, "seed": 4},
]
BY_TASK = {
    "text-to-image": STRANGERS,
    "image-to-image": [
        one | {"image": image("RGB", one["height"], one["width"], one["seed"]), "strength": 0.7}
        for one in STRANGERS
    ],
    "inpainting": [
        one
        | {
            "image": image("RGB", one["height"], one["width"], one["seed"]),
            "mask_image": image("L", one["height"], one["width"], one["seed"] + 10),
            "strength": 1.0,
        }
        for one in STRANGERS
    ],
}


@pytest.mark.parametrize("family", GRID)
def test_strangers_of_all_sizes_share_runs_and_get_their_own_pictures(
    family: str, folders: Path, watch: CompileWatch, closed: list[Worker[Any, Any]]
) -> None:
    service = start(
        folders / family,
        shapes={"buckets": [[64, 64]], "batch_sizes": [4]},
        pt2={} if family == "sdxl" else {"compile": {"enable": False}},
    )
    closed.append(service)
    assert service.state.padding["exact"] == "rounding"
    assert 0 < float(service.state.padding["max_error"]) < 1e-5
    plain = Plain(folders / family / "model", GRID[family])
    events = watch.num_events
    for requests in BY_TASK.values():
        for more in ({"guidance_scale": 4.0}, {"guidance_scale": 0.0}):
            asked = [one | more | {"num_inference_steps": 3} for one in requests]
            answers = ask(service, *asked)
            expected = "compiled" if family == "sdxl" else "eager"
            assert {answer.engine for answer in answers} == {expected}
            for answer, request in zip(answers, asked, strict=True):
                assert off(answer, plain.picture(request)) <= 1
    assert watch.num_events == events
    assert service.state.incidents == service.state.compiles_since_ready == 0


def test_padding_paints_another_picture(
    folders: Path, watch: CompileWatch, closed: list[Worker[Any, Any]]
) -> None:
    """So the test above can fail."""
    service = start(folders / "sdxl", shapes={"fit": "pad", "batch_sizes": [4]})
    closed.append(service)
    request = STRANGERS[1] | {"guidance_scale": 4.0, "num_inference_steps": 2}
    (answer,) = ask(service, request)
    assert off(answer, Plain(folders / "sdxl" / "model", 16).picture(request)) > 20


def with_scheduler(folder: Path, copy: Path, **config: Any) -> Path:
    """A copy of the folder, whose scheduler has these settings."""
    shutil.copytree(folder / "model", copy / "model")
    settings = copy / "model" / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **config}))
    return copy


DRAWING: list[tuple[str, str, dict[str, Any]]] = [
    ("sdxl", "DDPMScheduler", {}),
    ("sdxl", "EulerAncestralDiscreteScheduler", {}),
    ("sdxl", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("sd3", "FlowMatchLCMScheduler", {}),
    ("sd3", "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ("flux", "FlowMatchLCMScheduler", {}),
]
"""Schedulers whose steps draw noise."""


@pytest.mark.parametrize(("family", "scheduler", "config"), DRAWING)
def test_noise_that_a_scheduler_draws_in_its_steps_has_the_size_of_the_picture(
    family: str,
    scheduler: str,
    config: dict[str, Any],
    folders: Path,
    tmp_path: Path,
    watch: CompileWatch,
    closed: list[Worker[Any, Any]],
) -> None:
    folder = with_scheduler(folders / family, tmp_path, **config)
    service = start(
        folder,
        pt2={"compile": {"enable": False}},
        shapes={"buckets": [[64, 64]], "batch_sizes": [4]},
        pipeline={"scheduler": scheduler, "tasks": ["text-to-image"]},
    )
    closed.append(service)
    plain = Plain(folder / "model", GRID[family], getattr(diffusers, scheduler))
    asked = [one | {"guidance_scale": 4.0, "num_inference_steps": 4} for one in STRANGERS]
    for answer, request in zip(ask(service, *asked), asked, strict=True):
        assert off(answer, plain.picture(request)) <= 1


@pytest.mark.parametrize(("family", "scheduler", "config"), DRAWING[2:])
def test_a_seed_has_one_picture_though_its_steps_draw(
    family: str,
    scheduler: str,
    config: dict[str, Any],
    folders: Path,
    tmp_path: Path,
    watch: CompileWatch,
    closed: list[Worker[Any, Any]],
) -> None:
    service = start(
        with_scheduler(folders / family, tmp_path, **config),
        pt2={"compile": {"enable": False}},
        shapes={"fit": "pad", "batch_sizes": [1]},
        pipeline={"scheduler": scheduler, "tasks": ["text-to-image"]},
    )
    closed.append(service)
    first, other, again = ask(
        service, STRANGERS[1], STRANGERS[1] | {"seed": 9, "prompt": "a cat"}, STRANGERS[1]
    )
    assert first.pictures == again.pictures != other.pictures


def shared_runs(
    service: Worker[Any, Any], monkeypatch: pytest.MonkeyPatch, *requests: dict[str, Any]
) -> tuple[list[Answer], list[list[str]]]:
    """The answers, and what the rows of each run painted."""
    runs: list[list[str]] = []
    generate = DiffusionPipeline.generate

    def seen(self: DiffusionPipeline, batch: Batch, *others: Any) -> Any:
        runs.append([str(row.size) for row in batch.rows])
        return generate(self, batch, *others)

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionPipeline, "generate", seen)
        return ask(service, *requests), runs


def test_a_flux_whose_steps_are_the_same_at_every_size_shares_runs_among_all(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    watch: CompileWatch,
    closed: list[Worker[Any, Any]],
) -> None:
    """schnell: its pipeline counts tokens all the same."""
    folder = with_scheduler(folders / "flux", tmp_path, use_dynamic_shifting=False)
    service = start(
        folder,
        pt2={"compile": {"enable": False}},
        shapes={"buckets": [[64, 64]], "batch_sizes": [4]},
    )
    closed.append(service)
    plain = Plain(folder / "model", GRID["flux"])
    for requests in BY_TASK.values():
        answers, runs = shared_runs(service, monkeypatch, *requests)
        assert runs == [["64x64", "48x32", "16x64", "48x64"]]
        for answer, request in zip(answers, requests, strict=True):
            asked = {"guidance_scale": 5.0, "num_inference_steps": 2} | request
            assert off(answer, plain.picture(asked)) <= 1


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_who_borrows_a_seat_in_a_larger_bucket_gets_the_same_picture(
    family: str,
    folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    watch: CompileWatch,
    closed: list[Worker[Any, Any]],
) -> None:
    service = start(
        folders / family, pt2={"compile": {"enable": False}}, shapes={"batch_sizes": [4]}
    )
    closed.append(service)
    plain = Plain(folders / family / "model", GRID[family])
    sizes = [(41, 30), (96, 48), (90, 30)]
    for task in BY_TASK:
        asked = [
            {"guidance_scale": 4.0, "num_inference_steps": 2, "prompt": "a cat", "seed": seed}
            | {"height": height, "width": width}
            | (
                {"image": image("RGB", height, width, seed), "strength": 1.0}
                if task != "text-to-image"
                else {}
            )
            | ({"mask_image": image("L", height, width, 9)} if task == "inpainting" else {})
            for seed, (height, width) in enumerate(sizes)
        ]
        answers, runs = shared_runs(service, monkeypatch, *asked)
        assert [run[:3] for run in runs] == [["96x48", "96x32", "48x32"]]
        assert {answer.bucket for answer in answers} == {"96x48"}
        for answer, request in zip(answers, asked, strict=True):
            assert off(answer, plain.picture(request)) <= 1


def test_pictures_of_as_many_tokens_share_the_steps_that_depend_on_them(
    folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    watch: CompileWatch,
    closed: list[Worker[Any, Any]],
) -> None:
    service = start(
        folders / "flux",
        pt2={"compile": {"enable": False}},
        shapes={"buckets": [[64, 64]], "batch_sizes": [2]},
        pipeline={"tasks": ["text-to-image"]},
    )
    closed.append(service)
    plain = Plain(folders / "flux" / "model", GRID["flux"])
    steps = {"guidance_scale": 5.0, "num_inference_steps": 3}
    requests = [
        one | size | steps
        for one, size in zip(
            STRANGERS, ({"height": 32, "width": 64}, {"height": 60, "width": 30}), strict=False
        )
    ]
    answers, runs = shared_runs(service, monkeypatch, *requests)
    assert runs == [["32x64", "64x32"]]
    for answer, request in zip(answers, requests, strict=True):
        assert off(answer, plain.picture(request)) <= 1


def test_a_picture_says_what_was_painted(
    folders: Path, watch: CompileWatch, closed: list[Worker[Any, Any]]
) -> None:
    service = start(
        folders / "sdxl",
        pt2={"compile": {"enable": False}},
        pipeline={"tasks": ["text-to-image"]},
    )
    closed.append(service)
    headers = []
    for size in ((41, 30), (64, 64)):
        job = service.parse({"body": {"prompt": "a cat", "height": size[0], "width": size[1]}})
        (response,) = service.runner.postprocess(service.run([job]))
        assert isinstance(response, responses.Response)
        headers.append(response.headers)
    assert headers[0]["x-preheat-bucket"] == "64x64"
    assert headers[0]["x-preheat-painted"] == "48x32"
    assert "x-preheat-painted" not in headers[1]


VAE: dict[str, Any] = {"pt2": {"targets": ["vae.decoder", "vae.encoder"]}}


def seats(service: Worker[Any, Any], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """From now on: the part of the VAE, its canvas, and the size it is told, of every call."""
    met: list[tuple[str, ...]] = []
    for name, cell in (("vae.decoder", 8), ("vae.encoder", 1)):
        serve = service.routers[name]._mode

        def seen(args: Any, kwargs: Any, name: str, cell: int, serve: Any) -> Any:
            height, width = (side * cell for side in args[0].shape[-2:])
            told = kwargs["sizes"].tolist() if "sizes" in kwargs else []
            met.append((name, f"{height}x{width}", *(f"{8 * h}x{8 * w}" for h, w in told)))
            return serve(args, kwargs)

        noted = partial(seen, name=name, cell=cell, serve=serve)
        monkeypatch.setattr(service.routers[name], "_mode", noted)
    return met


def test_the_vae_works_in_the_smallest_of_its_own_buckets(
    folders: Path,
    watch: CompileWatch,
    monkeypatch: pytest.MonkeyPatch,
    closed: list[Worker[Any, Any]],
) -> None:
    """Compiled, one picture at a time, the same whether its batch is masked or not."""
    service = start(
        folders / "sdxl",
        shapes={"buckets": [[64, 64]], "batch_sizes": [4], "vae_buckets": [[80, 64], [48, 32]]},
        **VAE,
    )
    closed.append(service)
    assert 0 < float(service.state.padding["max_error"]) < 2e-5
    plain = Plain(folders / "sdxl" / "model", GRID["sdxl"])
    met, events = seats(service, monkeypatch), watch.num_events
    steps = {"guidance_scale": 4.0, "num_inference_steps": 3}
    for requests in BY_TASK.values():
        for asked in ([one | steps for one in requests], [requests[0] | steps]):
            answers = ask(service, *asked)
            assert {answer.engine for answer in answers} == {"compiled"}
            for answer, request in zip(answers, asked, strict=True):
                assert off(answer, plain.picture(request)) <= 1
    assert watch.num_events == events
    assert service.state.incidents == service.current_state().compiles_since_ready == 0
    assert set(met) == {
        (part, *seat)
        for part in ("vae.decoder", "vae.encoder")
        for seat in [
            ("80x64", "64x64"),
            ("80x64", "16x64"),
            ("80x64", "48x64"),
            ("48x32",),
        ]
    }


@pytest.mark.parametrize(
    ("keys", "path"),
    [
        ({"shapes": {"buckets": [[64, 56]]}}, "pt2.shapes.buckets[0][1]"),
        ({"shapes": {"vae_buckets": [[64, 64]]}}, "pt2.shapes.vae_buckets"),
        (VAE | {"shapes": {"vae_buckets": [[64, 96]]}}, "pt2.shapes.vae_buckets"),
        (
            VAE | {"shapes": {"vae_buckets": [[96, 64], [104, 72]]}},
            "pt2.shapes.vae_buckets[1]",
        ),
        (VAE | {"shapes": {"fit": "pad", "vae_buckets": [[96, 64]]}}, "pt2.shapes.vae_buckets"),
        ({"shapes": {"fit": "pad", "mask_only": True}}, "pt2.shapes.mask_only"),
        ({"shapes": {"strategy": "fixed", "buckets": [[64, 64]]}}, "pt2.shapes.fit"),
    ],
)
def test_what_cannot_be_exact_is_refused(keys: dict[str, Any], path: str, folders: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        start(folders / "sdxl", **keys)
    assert refused.value.path == path


@pytest.mark.parametrize("fit", ["pad", "mask"])
def test_a_bucket_past_the_positions_of_an_sd3_is_refused_by_its_side(
    fit: str, folders: Path
) -> None:
    buckets = [[64, 64], [64, 1552]]
    with pytest.raises(ConfigError, match="1552 is more than 1536 pixels") as refused:
        start(folders / "sd3", shapes={"buckets": buckets, "fit": fit})
    assert refused.value.path == "pt2.shapes.buckets[1][1]"


def test_a_scheduler_that_looks_at_the_whole_canvas_is_refused(
    folders: Path, tmp_path: Path
) -> None:
    folder = with_scheduler(folders / "sdxl", tmp_path, thresholding=True)
    with pytest.raises(ConfigError, match="DDIMScheduler with thresholding"):
        start(folder, pipeline={"scheduler": "DDIMScheduler"})


def test_a_network_that_masks_do_not_make_exact_stops_the_load(folders: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.SelfAttention, "__call__", AttnProcessor2_0.__call__)
        patch.setattr(parts.MaskedGroupNorm, "forward", torch.nn.GroupNorm.forward)
        with pytest.raises(ConfigError, match="mask is not exact with this model"):
            start(folders / "sd15")
