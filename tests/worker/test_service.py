"""The whole worker without TorchServe: every family, tiny pipelines of the real classes, the
`eager` backend of Dynamo.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo import config as dynamo_config

from preheat.buckets import Bucket
from preheat.compilation.warmup_plan import WarmupPlan, warmup_plan
from preheat.compilation.watch import CompileWatch
from preheat.config.model import ModelConfig
from preheat.errors import ConfigError, ModelError, RequestError, WarmupError
from preheat.models import tiny
from preheat.models.diffusion.job import Answer, Job
from preheat.models.diffusion.pipeline import FAMILIES
from preheat.models.diffusion.variants import Variant, own
from preheat.protocol import responses
from preheat.protocol.call import Call
from preheat.status import StatusFile
from preheat.worker import worker
from preheat.worker.worker import Worker

TWO = [[64, 64], [96, 32]]
TEXT_ONLY = {"tasks": ["text-to-image"]}
FAMILY_NAMES = ("sdxl", "sd15", "sd3", "flux")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder a family, with its tiny pipeline under `model`, as an archive lies unpacked."""
    root = tmp_path_factory.mktemp("models")
    for family in FAMILY_NAMES:
        tiny.build(family, root / family / "model")
    return root


def start(
    folder: Path,
    *,
    compile: bool = True,
    leave_out: Any = (),
    status: Path | None = None,
    **keys: Any,
) -> Worker[Any, Any]:
    shapes = {"buckets": [[64, 64]], "batch_sizes": [1, 2]} | keys.pop("shapes", {})
    pt2 = {"compile": {"enable": compile, "backend": "eager"}, "shapes": shapes} | keys.pop(
        "pt2", {}
    )
    pipeline = {"defaults": {"num_inference_steps": 2}} | keys.pop("pipeline", {})
    config = ModelConfig.parse({"batchSize": 2, "pt2": pt2, "pipeline": pipeline} | keys)
    file = StatusFile(str(status) if status else None, "tiny")
    with pytest.MonkeyPatch.context() as patch:
        if leave_out:
            patch.setattr(worker, "warmup_plan", partial(_forgetful_plan, leave_out))
        return Worker[Any, Any](config, folder, torch.device("cpu"), status=file)


def _forgetful_plan(leave_out: Any, *facts: Any, **known: Any) -> WarmupPlan:
    """What is verified is not what was warmed: verification must find it."""
    plan = warmup_plan(*facts, **known)
    kept = [each for each in own(plan.warm) if replace(each, painted=None) not in leave_out]
    return replace(plan, warm=kept)


def ask(service: Worker[Any, Any], *bodies: dict[str, Any]) -> list[Answer]:
    answers = service.run([service.parse({"body": {"prompt": "a cat"} | body}) for body in bodies])
    for answer in answers:
        answer.raise_if_failed()
    return answers


def response_to(service: Worker[Any, Any], job: Job) -> responses.Response:
    (response,) = service.runner.postprocess(service.run([job]))
    return response


def pixels(answer: Answer) -> Any:
    return np.asarray(answer.pictures[0]).astype(int)


def flash_enabled() -> bool:
    return bool(torch.backends.cuda.flash_sdp_enabled())  # type: ignore[no-untyped-call]


def b64(mode: str, size: tuple[int, int]) -> str:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


IMAGE, MASK = b64("RGB", (40, 30)), b64("L", (40, 30))
ASKED: list[dict[str, Any]] = [
    {"height": 60, "width": 50, "seed": 1},
    {"height": 90, "width": 20, "seed": 2, "guidance_scale": 0.0},
    {"image": IMAGE, "seed": 3, "strength": 0.5},
    {"image": IMAGE, "mask_image": MASK, "seed": 4, "strength": 1.0},
]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_each_family_serves_every_task_hot_and_equal_to_eager(
    watch: CompileWatch, models: Path, family: str
) -> None:
    service = start(models / family, shapes={"buckets": TWO})
    answers = ask(service, *ASKED)
    sizes = [picture.size for answer in answers for picture in answer.pictures]
    assert sizes == [(50, 60), (20, 90), (40, 30), (40, 30)]
    assert {answer.engine for answer in answers} == {"compiled"}
    for body in ASKED:
        _watch_previews(service, body | {"num_images": 3, "num_inference_steps": 4})
    state = service.current_state()
    assert (state.compiles_since_ready, state.incidents, state.eager_fallbacks) == (0, 0, 0)
    assert state.compiles_at_boot > 0 and {row.engine for row in state.buckets} == {"compiled"}
    torch.compiler.set_stance("default")
    for compiled, eager in zip(
        answers,
        ask(start(models / family, compile=False, shapes={"buckets": TWO}), *ASKED),
        strict=True,
    ):
        assert np.abs(pixels(compiled) - pixels(eager)).max() <= 1


def test_asked_sizes_are_those_of_clients_refused_ones_too(models: Path) -> None:
    with start(models / "sd15", compile=False) as service:
        body: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 1}
        calls = [
            Call({"body": body | {"height": height, "width": 50}}, {}) for height in (60, 60, 90)
        ]
        answers = service.postprocess(service.inference(service.preprocess(calls)))
        assert [answer.code for answer in answers] == [200, 200, 400]
        asked: Any = service.description()["asked_sizes"]
        assert asked["sizes"] == [[90, 50, 1], [60, 50, 2]]
        assert "asked_sizes" not in service.document(), "the status file is written at every batch"


def test_torchserves_own_yaml_is_served_eagerly_and_every_row_says_why(
    watch: CompileWatch, models: Path
) -> None:
    pt2 = {"compile": {"enable": True, "backend": "nonsense"}, "shapes": {"buckets": [[64, 64]]}}
    config = ModelConfig.parse({"pt2": pt2})
    service = Worker[Any, Any](
        config, models / "sd15", torch.device("cpu"), status=StatusFile(None, "own")
    )
    (answer,) = ask(service, {"num_inference_steps": 1})
    state = service.current_state()
    assert (answer.engine, state.eager_fallbacks) == ("eager", 1)
    assert {row.engine for row in state.buckets} == {"eager"}
    assert all(
        "'nonsense' is not a backend that TorchServe supports" in row.reason
        for row in state.buckets
    )
    assert any("'nonsense'" in warning for warning in state.warnings)
    with pytest.raises(WarmupError, match="nonsense"):
        config = ModelConfig.parse({"pt2": {**pt2, "on_failure": "fail"}})
        Worker[Any, Any](
            config, models / "sd15", torch.device("cpu"), status=StatusFile(None, "own")
        )


def _watch_previews(service: Worker[Any, Any], body: dict[str, Any]) -> None:
    """Ask for a stream with a preview of every step, and see each picture told all of them."""
    job = service.parse({"body": {"prompt": "a", "stream": True, "preview_every": 1} | body})
    size = (job.plan.width // 8, job.plan.height // 8)
    (answer,) = service.run([job])
    answer.raise_if_failed()
    (response,) = service.runner.postprocess([answer])
    told = [json.loads(line) for line in response.body.splitlines()]
    steps = [event for event in told if event["event"] == "step"]
    of = steps[0]["of"]
    assert sorted(event["index"] for event in steps) == sorted([0, 1, 2] * of)
    assert [event["step"] for event in steps if event["index"] == 2][-1] == of
    for event in steps:
        assert Image.open(io.BytesIO(base64.b64decode(event["preview"]))).size == size


def test_every_known_family_is_tried_here() -> None:
    assert len(FAMILIES) == len(FAMILY_NAMES)


def test_the_same_seed_is_the_same_picture_and_another_is_not(
    watch: CompileWatch, models: Path
) -> None:
    service = start(models / "sdxl", pipeline=TEXT_ONLY)
    first, again, other = (pixels(ask(service, {"seed": seed})[0]) for seed in (5, 5, 6))
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize("negative", [None, "", "ugly"])
def test_neighbours_never_change_a_picture(
    watch: CompileWatch, models: Path, negative: str | None
) -> None:
    service = start(models / "sdxl", pipeline=TEXT_ONLY)
    mine = {"seed": 5} | ({} if negative is None else {"negative_prompt": negative})
    alone = pixels(ask(service, mine)[0])
    in_company = ask(
        service, {"seed": 9, "negative_prompt": "blurry"}, {"seed": 8}, mine, {"seed": 7}
    )
    assert np.abs(alone - pixels(in_company[2])).max() <= 1


def test_invariant_pictures_are_the_same_to_the_last_bit_in_any_company(
    watch: CompileWatch, models: Path
) -> None:
    service = start(
        models / "sdxl",
        batchSize=4,
        shapes={"batch_sizes": [1, 4], "invariant": True},
        pipeline=TEXT_ONLY,
    )
    assert {row.batch_size for row in service.state.buckets} == {4}
    mine = {"seed": 5, "height": 50}
    (alone,) = ask(service, mine)
    for company in ([mine, {"seed": 1}], [{"seed": 1}, {"seed": 2}, {"seed": 3}, mine]):
        answers = ask(service, *company)
        mates = [answer for answer in answers if answer.job.request.seed == 5]
        assert [(pixels(mate) == pixels(alone)).all() for mate in mates] == [True]
        assert {answer.exact for answer in answers} == {"bitwise"}


def test_sdxl_is_told_the_size_that_it_paints(watch: CompileWatch, models: Path) -> None:
    service = start(models / "sdxl", compile=False, shapes={"buckets": TWO})
    unet, seen = service.targets["unet"], []
    unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["time_ids"].tolist()),
        with_kwargs=True,
    )
    ask(service, {"height": 80, "width": 30, "guidance_scale": 0.0})
    assert seen == [[[96.0, 32.0, 0.0, 0.0, 96.0, 32.0]]] * 2


def test_a_variant_left_out_of_warm_up_does_not_stay_hidden(
    watch: CompileWatch, models: Path
) -> None:
    forgotten = [
        Variant(Bucket(64, 64), 2, True, task)
        for task in ("text-to-image", "image-to-image", "inpainting")
    ]
    service = start(models / "sdxl", leave_out=forgotten, shapes={"buckets": TWO})
    engines = {(row.bucket.height, row.batch_size): row.engine for row in service.state.buckets}
    assert engines == {
        (64, 2): "eager",
        (64, 1): "compiled",
        (96, 2): "compiled",
        (96, 1): "compiled",
    }
    answers = ask(service, {"seed": 1}, {"seed": 2})
    assert [answer.engine for answer in answers] == ["eager", "eager"]
    assert (
        service.current_state().eager_fallbacks == 2
        and service.current_state().compiles_since_ready == 0
    )
    torch.compiler.set_stance("default")
    with pytest.raises(WarmupError):
        start(models / "sdxl", leave_out=forgotten, pt2={"on_failure": "fail"})


def test_an_unforeseen_change_is_an_incident_that_never_compiles(
    watch: CompileWatch, models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = start(models / "sdxl", pipeline=TEXT_ONLY, shapes={"invariant": True})
    torch.set_default_dtype(torch.float64)
    try:
        (answer,) = ask(service, {"prompt": "my secret", "seed": 1})
    finally:
        torch.set_default_dtype(torch.float32)
    state = service.current_state()
    # not what the same request gets from compiled code
    assert (answer.engine, answer.exact) == ("eager", "rounding")
    assert (state.incidents, state.eager_fallbacks, state.compiles_since_ready) == (1, 1, 0)
    assert "unwarmed call: unet" in caplog.text and "secret" not in caplog.text


def test_oversize_on_purpose_is_no_incident(watch: CompileWatch, models: Path) -> None:
    service = start(models / "sdxl", shapes={"oversize": "eager"}, pipeline=TEXT_ONLY)
    (answer,) = ask(service, {"height": 100, "width": 100})
    state = service.current_state()
    assert answer.engine == "eager" and answer.pictures[0].size == (100, 100)
    assert (state.planned_eager, state.incidents, state.eager_fallbacks) == (1, 0, 0)


def test_the_dynamic_strategy_needs_only_one_bucket_to_learn_from(
    watch: CompileWatch, models: Path
) -> None:
    service = start(
        models / "sdxl", shapes={"strategy": "dynamic", "batch_sizes": [1]}, pipeline=TEXT_ONLY
    )
    answers = ask(
        service,
        *({"height": height, "width": width} for height, width in [(64, 64), (30, 40), (17, 64)]),
    )
    assert {answer.engine for answer in answers} == {
        "compiled"
    } and service.current_state().incidents == 0


def test_the_fingerprint_is_the_models_and_not_its_folders(
    watch: CompileWatch, models: Path, tmp_path: Path
) -> None:
    shutil.copytree(models / "sdxl", tmp_path / "copy")
    one, same = (
        start(folder, compile=False).state.fingerprint
        for folder in (models / "sdxl", tmp_path / "copy")
    )
    other = start(models / "sdxl", compile=False, shapes={"buckets": TWO}).state.fingerprint
    assert one == same != other


def test_a_request_of_many_pictures_is_one_request_in_every_counter(
    watch: CompileWatch, models: Path
) -> None:
    forgotten = [Variant(Bucket(64, 64), size, True, "text-to-image") for size in (1, 2)]
    service = start(models / "sdxl", leave_out=forgotten, pipeline=TEXT_ONLY)
    ask(service, {"num_images": 3, "response_format": "b64_json"})
    assert (service.current_state().requests, service.current_state().eager_fallbacks) == (1, 1)


def test_a_bucket_that_no_request_could_ask_for_is_refused(
    watch: CompileWatch, models: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"pt2.shapes.buckets\[0\]: 64x64 is over pipeline.limits"
    ):
        start(models / "sdxl", pipeline={"limits": {"max_side": 56}})


def test_two_targets_are_compiled_side_by_side(watch: CompileWatch, models: Path) -> None:
    service = start(
        models / "sdxl",
        pt2={"targets": ["unet", "vae.decoder", "vae.encoder"]},
        shapes={"buckets": TWO},
    )
    assert {row.target for row in service.state.buckets} == {
        "unet",
        "vae.decoder",
        "vae.encoder",
    }
    assert {answer.engine for answer in ask(service, *ASKED)} == {"compiled"}
    assert service.current_state().incidents == 0


def test_regional_compiling_serves_the_same_pictures_from_fewer_compiles(
    watch: CompileWatch, models: Path
) -> None:
    regional = start(models / "flux", pt2={"scope": "regional"}, shapes={"buckets": TWO})
    pictures = ask(regional, *ASKED)
    assert {answer.engine for answer in pictures} == {
        "compiled"
    } and regional.current_state().incidents == 0
    torch.compiler.set_stance("default")
    for compiled, eager in zip(
        pictures,
        ask(start(models / "flux", compile=False, shapes={"buckets": TWO}), *ASKED),
        strict=True,
    ):
        assert np.abs(pixels(compiled) - pixels(eager)).max() <= 1


@pytest.mark.parametrize("strategy", ["dynamic", "fixed", "exact"])
def test_the_other_strategies_give_the_asked_size_too(
    watch: CompileWatch, models: Path, strategy: str
) -> None:
    buckets = [[64, 64]] if strategy == "fixed" else [[64, 64], [96, 32], [32, 96]]
    service = start(
        models / "sdxl",
        shapes={"strategy": strategy, "buckets": buckets, "batch_sizes": [1]},
        pipeline=TEXT_ONLY,
    )
    sizes = [(60, 50), (33, 61), (20, 20)]
    answers = ask(service, *({"height": height, "width": width} for height, width in sizes))
    assert [answer.pictures[0].size for answer in answers] == [
        (width, height) for height, width in sizes
    ]
    state = service.current_state()
    if strategy == "exact":
        assert state.compiles_since_ready > 0, "plain torch.compile compiles inside requests"
    else:
        assert state.compiles_since_ready == 0 and {answer.engine for answer in answers} == {
            "compiled"
        }


def test_the_status_file_follows_warm_up(watch: CompileWatch, models: Path, tmp_path: Path) -> None:
    start(models / "sdxl", status=tmp_path, shapes={"buckets": TWO}, compile=False)
    (file,) = tmp_path.iterdir()
    status = json.loads(file.read_text())
    assert status["state"] == "hot" and status["done"] == status["total"] == 6
    assert [row["bucket"] for row in status["buckets"]] == ["64x64", "96x32"]


def test_a_model_that_cannot_be_served_says_why(
    watch: CompileWatch, models: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"pt2.shapes.buckets\[0\]\[1\]: 40 is not a multiple of 16, which flux"
    ):
        start(models / "flux", shapes={"buckets": [[64, 40]]})
    with pytest.raises(ModelError, match="no module 'transformer'"):
        start(models / "sdxl", pt2={"targets": ["transformer"]})
    with pytest.raises(ConfigError, match=r"pipeline\.path: the archive holds no model"):
        start(tmp_path)
    with pytest.raises(ConfigError, match=r"pipeline\.scheduler: .*no scheduler 'Nonsense'"):
        start(models / "sdxl", pipeline={"scheduler": "Nonsense"})
    with pytest.raises(ModelError, match=r"^pipeline\.fused_lora: /models/nope: "):
        start(models / "sdxl", pipeline={"fused_lora": "/models/nope"})


def test_the_fingerprint_does_not_depend_on_where_the_model_lies(
    watch: CompileWatch, models: Path, tmp_path: Path
) -> None:
    elsewhere = shutil.copytree(models / "sdxl", tmp_path / "elsewhere")
    here, there = (
        start(folder, compile=False).state.fingerprint for folder in (models / "sdxl", elsewhere)
    )
    assert here == there != start(models / "sd15", compile=False).state.fingerprint


def test_pickled_weights_are_refused(watch: CompileWatch, tmp_path: Path) -> None:
    folder = tiny.build("sdxl", tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ModelError):
        start(tmp_path)


def test_flux_has_no_negative_prompt(watch: CompileWatch, models: Path) -> None:
    with pytest.raises(RequestError, match="negative_prompt"):
        start(models / "flux", compile=False).parse(
            {"body": {"prompt": "a", "negative_prompt": "b"}}
        )


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "UniPCMultistepScheduler", "EulerAncestralDiscreteScheduler"]
)
def test_each_scheduler_is_warmed_as_it_serves(
    watch: CompileWatch, models: Path, name: str
) -> None:
    service = start(
        models / "sdxl", pipeline={"scheduler": name} | TEXT_ONLY, shapes={"batch_sizes": [1]}
    )
    for steps in range(1, 7):
        ask(service, {"num_inference_steps": steps})
    assert service.current_state().incidents == service.current_state().compiles_since_ready == 0


def test_a_fused_lora_is_warmed_and_costs_nothing_afterwards(
    watch: CompileWatch, models: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    pipe = StableDiffusionXLPipeline.from_pretrained(models / "sdxl" / "model")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    settings = TEXT_ONLY | {"fused_lora": str(tmp_path)}
    service = start(models / "sdxl", pipeline=settings, shapes={"batch_sizes": [1]})
    fused = pixels(ask(service, {"seed": 1})[0])
    assert service.current_state().incidents == service.current_state().compiles_since_ready == 0
    assert {row.engine for row in service.state.buckets} == {"compiled"}
    torch.compiler.set_stance("default")
    eager = pixels(ask(start(models / "sdxl", pipeline=settings, compile=False), {"seed": 1})[0])
    without = pixels(ask(start(models / "sdxl", pipeline=TEXT_ONLY, compile=False), {"seed": 1})[0])
    assert np.abs(fused - eager).max() <= 1 and np.abs(fused - without).max() > 1


def test_compile_traces_land_in_a_folder_that_stays_bounded(
    watch: CompileWatch, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamo_config, "debug_dir_root", "elsewhere")
    folder = tmp_path / "preheat-traces"
    stale = folder / "run_old" / "stale.py"
    stale.parent.mkdir(parents=True)
    foreign = tmp_path / "foreign.txt"
    foreign.write_bytes(b"x" * 1000)
    stale.write_bytes(b"x" * 1000)
    os.utime(stale, (0, 0))
    debug = {"trace_dir": str(tmp_path), "trace_bytes": 999, "recompiles": True}
    start(models / "sdxl", pipeline=TEXT_ONLY, pt2={"debug": debug}, shapes={"batch_sizes": [1]})
    assert not stale.exists() and foreign.exists() and dynamo_config.debug_dir_root == str(folder)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 999


def test_attention_is_restricted_in_warm_up_and_in_serving(
    watch: CompileWatch, models: Path
) -> None:
    service = start(models / "sdxl", pt2={"attention": "math"}, pipeline=TEXT_ONLY)
    seen: list[bool] = []
    unet = service.targets["unet"]
    unet.register_forward_pre_hook(lambda *_: seen.append(flash_enabled()))
    ask(service, {"seed": 1})
    assert seen and not any(seen) and flash_enabled()
    assert service.current_state().incidents == 0


def test_what_costs_too_much_is_refused_and_warm_up_is_not(
    watch: CompileWatch, models: Path
) -> None:
    limits = {"limits": {"max_cost": 64 * 64 * 2 - 1}}
    service = start(models / "sdxl", compile=False, pipeline=limits)
    with pytest.raises(RequestError) as caught:
        service.parse({"body": {"prompt": "a", "num_inference_steps": 2}})
    assert caught.value.field == "num_inference_steps"
    ask(service, {"num_inference_steps": 1})


def test_responses_carry_what_was_done(watch: CompileWatch, models: Path) -> None:
    service = start(models / "sdxl", compile=False)
    job = service.parse(
        {"body": {"prompt": "a", "height": 48, "width": 64, "seed": 3, "output_format": "webp"}}
    )
    response = response_to(service, job)
    assert response.code == 200 and response.headers == {
        "content-type": "image/webp",
        "x-preheat-bucket": "64x64",
        "x-preheat-engine": "eager",
        "x-preheat-seed": "3",
        "x-preheat-padding": "0.2500",
        "x-preheat-exact": "rounding",
    }
    assert Image.open(io.BytesIO(response.body)).size == (64, 48)
    job = service.parse(
        {"body": {"prompt": "a", "num_images": 3, "seed": 2**63 - 1, "response_format": "b64_json"}}
    )
    document = json.loads(response_to(service, job).body)
    assert [entry["seed"] for entry in document["data"]] == [2**63 - 1, 0, 1]
    assert (
        document["bucket"] == [64, 64]
        and len({entry["b64_json"] for entry in document["data"]}) == 3
    )
