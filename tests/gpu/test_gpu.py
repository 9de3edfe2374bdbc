"""What only a CUDA device can show: CUDA graphs, bfloat16 kernels, and batches on a GPU. In this
process, without TorchServe.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

import old_folders
from preheat.compilation.watch import CompileWatch
from preheat.config.model import ModelConfig
from preheat.device import pick_device
from preheat.models import tiny
from preheat.models.diffusion.job import Answer
from preheat.status import StatusFile
from preheat.worker.worker import Worker

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no CUDA device here"
)

BUCKETS = [[128, 128], [192, 64]]
# Sizes, guidance and steps that no warm-up names, in both buckets.
ASKED: list[dict[str, Any]] = [
    {"height": 100, "width": 90, "seed": 1},
    {"height": 150, "width": 60, "seed": 2, "num_inference_steps": 5},
    {"height": 17, "width": 128, "seed": 3, "guidance_scale": 0.0},
    {"height": 192, "width": 64, "seed": 4, "guidance_scale": 7.5},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny SDXL under `model`, as an archive lies unpacked."""
    folder = tmp_path_factory.mktemp("gpu")
    tiny.build("sdxl", folder / "model")
    return folder


def start(
    folder: Path,
    *,
    compile: dict[str, Any] | None = None,
    dtype: str = "float32",
    batch_sizes: Any = (1, 2),
    tasks: Sequence[str] = ("text-to-image",),
    targets: Sequence[str] = ("unet",),
) -> Worker[Any, Any]:
    shapes = {"buckets": BUCKETS, "batch_sizes": list(batch_sizes)}
    pipeline = {"dtype": dtype, "tasks": list(tasks), "defaults": {"num_inference_steps": 3}}
    pt2 = {"compile": {"enable": True} | (compile or {}), "shapes": shapes, "on_failure": "fail"}
    pt2["targets"] = list(targets)
    config = ModelConfig.parse({"batchSize": 4, "pt2": pt2, "pipeline": pipeline})
    return Worker[Any, Any](config, folder, pick_device(0), status=StatusFile(None, "gpu"))


def ask(service: Worker[Any, Any], *bodies: dict[str, Any]) -> list[Answer]:
    answers = service.run([service.parse({"body": {"prompt": "a cat"} | body}) for body in bodies])
    for answer in answers:
        answer.raise_if_failed()
    return answers


def pixels(answer: Answer) -> Any:
    return np.asarray(answer.pictures[0]).astype(int)


def picture() -> str:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def assert_hot(service: Worker[Any, Any]) -> None:
    state = service.current_state()
    assert state.state == "hot" and state.compiles_at_boot > 0, state
    assert (state.compiles_since_ready, state.incidents, state.eager_fallbacks) == (0, 0, 0), state
    assert {row.engine for row in state.buckets} == {"compiled"}, state.buckets


def counted() -> str:
    """What Dynamo and Inductor counted, for whoever reads a failure on a machine that is gone by
    then.
    """
    return "\n".join(
        f"{name}: {dict(counters[name])}"
        for name in ("stats", "graph_break", "inductor", "cudagraphs")
    )


def test_cuda_graphs_are_recorded_in_warm_up_and_only_replayed_afterwards(
    watch: CompileWatch, model: Path
) -> None:
    counters.clear()
    service = start(model, compile={"mode": "reduce-overhead"})
    recorded = watch.events["cudagraph_recording"]
    # else Inductor skipped the graphs, and nothing is shown here
    assert recorded >= len(BUCKETS), counted()
    assert counters["inductor"]["cudagraph_skips"] == 0, counted()
    for body in ASKED * 3:
        (answer,) = ask(service, body)
        assert answer.engine == "compiled"
    assert {answer.engine for answer in ask(service, *ASKED, *ASKED)} == {"compiled"}
    assert watch.events["cudagraph_recording"] == recorded, (watch.events, counted())
    assert_hot(service)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_image_tasks_and_a_compiled_decoder_replay_their_graphs_too(
    watch: CompileWatch, tmp_path: Path, dtype: str
) -> None:
    """A VAE whose weights moved between two requests, as diffusers' upcasts move them, would be
    recorded in requests.
    """
    old_folders.sdxl(tmp_path / "model")
    service = start(
        tmp_path,
        compile={"mode": "reduce-overhead"},
        dtype=dtype,
        tasks=("text-to-image", "image-to-image"),
        targets=("unet", "vae.decoder"),
    )
    recorded = watch.events["cudagraph_recording"]
    assert recorded >= 2 * len(BUCKETS)  # the denoiser's and the decoder's
    source = {"image": picture(), "strength": 0.7}
    for body in [*ASKED, *(body | source for body in ASKED)] * 2:
        (answer,) = ask(service, body)
        assert answer.engine == "compiled"
    assert watch.events["cudagraph_recording"] == recorded
    assert {row.target for row in service.state.buckets} == {"unet", "vae.decoder"}
    assert_hot(service)


def test_a_replayed_graph_paints_what_eager_paints(
    watch: CompileWatch, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replays write into the same memory: an output that is not copied in time would show the next
    step's.
    """
    # its roundings are not what is compared here
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    compiled = [
        pixels(answer) for answer in ask(start(model, compile={"mode": "reduce-overhead"}), *ASKED)
    ]
    torch.compiler.set_stance("default")
    eager = [pixels(answer) for answer in ask(start(model, compile={"backend": "eager"}), *ASKED)]
    for mine, theirs in zip(compiled, eager, strict=True):
        difference = np.abs(mine - theirs)
        assert difference.max() <= 2, (
            f"{difference.max()} of 255, in {(difference > 2).mean():.1%} of the pixels"
        )


def test_the_same_seed_is_the_same_picture_whoever_shares_the_batch(
    watch: CompileWatch, model: Path
) -> None:
    service = start(model, batch_sizes=[4])
    mine: dict[str, Any] = {"height": 100, "width": 90, "seed": 5}
    others: list[dict[str, Any]] = [
        {"height": 128, "width": 128, "seed": seed, "prompt": f"a dog {seed}"} for seed in (7, 8, 9)
    ]
    alone = pixels(ask(service, mine)[0])
    for place in range(4):
        company = [*others[:place], mine, *others[place:]]
        assert np.abs(alone - pixels(ask(service, *company)[place])).max() <= 1
    assert (alone != pixels(ask(service, mine | {"seed": 6})[0])).any()
    assert_hot(service)


def test_bfloat16_is_hot(watch: CompileWatch, model: Path) -> None:
    service = start(model, dtype="bfloat16", batch_sizes=[1, 2, 4])
    answers = ask(service, *ASKED, *ASKED)
    assert [picture.size for answer in answers[:4] for picture in answer.pictures] == [
        (body["width"], body["height"]) for body in ASKED
    ]
    assert {answer.engine for answer in answers} == {"compiled"}
    assert_hot(service)
    assert service.current_state().peak_memory_bytes > 0
