"""The engines `openvino` and `ipex` in a real TorchServe: named in state and headers, silent after
READY, and eager's pictures.

One server with `ipex_enable=true`, and one engine in it: IPEX needs torch 2.8 and so an environment
of its own, and from that torch's exports of a UNet OpenVINO 2026.4 converts nothing
(`aten.slice.Tensor`), so there it is left out.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image

from preheat.config.model import ModelConfig
from preheat.models import tiny
from preheat.status import StatusFile
from preheat.torchserve import server
from preheat.torchserve.archive import build_archive
from preheat.torchserve.client import Client
from preheat.worker.worker import Worker
from served import Served, started

BUCKETS = [[64, 128], [96, 64]]
NEEDED = {"openvino": "openvino", "ipex": "intel_extension_for_pytorch"}
HERE = "ipex" if find_spec(NEEDED["ipex"]) else "openvino"
COMPILE: dict[str, dict[str, Any]] = {
    "openvino": {"enable": True, "backend": "openvino"},
    "ipex": {"enable": False},
}

CNN: dict[str, Any] = yaml.safe_load((server.ROOT / "model-config" / "resnet.yaml").read_text())
CNN["module"]["inputs"]["pixel_values"]["buckets"] = {"height": [32, 48], "width": [32]}


def config(engine: str, dtype: str = "float32") -> dict[str, Any]:
    return {
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": 4,
        "startupTimeout": 300,
        "maxRetryTimeoutInSec": 600,
        "pt2": {
            "compile": COMPILE.get(engine, {"enable": False}),
            "targets": ["unet", "vae.decoder"],
            "shapes": {"buckets": BUCKETS, "batch_sizes": "dynamic"},
            "on_failure": "fail",
        },
        "pipeline": {"dtype": dtype, "defaults": {"num_inference_steps": 3}},
    }


@pytest.fixture(scope="module")
def running(
    tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[server.TorchServe]:
    work, archives = tmp_path_factory.mktemp("roads"), []
    for engine in (name for name, package in NEEDED.items() if name == HERE and find_spec(package)):
        for dtype in ("float32", "bfloat16"):
            path = work / f"{engine}-{dtype}.yaml"
            path.write_text(yaml.safe_dump(config(engine, dtype)))
            archives.append(
                build_archive(
                    path, tiny_sdxl, output=work, archive_format="no-archive", external=True
                )
            )
        tiny.build("resnet", work / "resnet")
        path = work / f"{engine}-resnet.yaml"
        path.write_text(yaml.safe_dump(CNN | {"pt2": {**CNN["pt2"], "compile": COMPILE[engine]}}))
        archives.append(
            build_archive(
                path, work / "resnet", output=work, archive_format="no-archive", external=True
            )
        )
    if not archives:
        pytest.skip("needs the extra openvino, or IPEX in its own environment: make test-ipex")
    with started(archives, work, cache=work / "cache", properties={"ipex_enable": "true"}) as warm:
        yield warm


@pytest.fixture(params=NEEDED)
def engine(request: pytest.FixtureRequest) -> str:
    engine = str(request.param)
    if engine != HERE:
        pytest.skip(
            "runs in make test-ipex"
            if engine == "ipex"
            else "OpenVINO cannot convert what torch 2.8 exports"
        )
    if find_spec(NEEDED[engine]) is None:
        pytest.skip(f"needs {NEEDED[engine]}")
    return engine


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def road(running: server.TorchServe, engine: str, dtype: str) -> Iterator[Served]:
    with Client.to(running, f"{engine}-{dtype}") as client:
        yield Served(running, client)


@pytest.fixture(scope="module")
def eager(tiny_sdxl: Path) -> Iterator[Mapping[str, Worker[Any, Any]]]:
    """The same pipeline in each dtype, eager, in this process: torch 2.8 draws other noise in
    bfloat16 than in float32.
    """
    with ExitStack() as stack:
        yield {
            dtype: stack.enter_context(
                Worker[Any, Any](
                    ModelConfig.parse(config("eager", dtype)),
                    tiny_sdxl.parent,
                    torch.device("cpu"),
                    status=StatusFile(None, "eager"),
                )
            )
            for dtype in ("float32", "bfloat16")
        }


def test_every_row_names_the_engine_and_nothing_was_compiled(road: Served, engine: str) -> None:
    state = road.state()
    rows = {
        (row["height"], row["width"], row["batch_size"], row["target"]) for row in state["buckets"]
    }
    assert rows == {
        (*bucket, size, target)
        for bucket in BUCKETS
        for size in (1, 2, 4)
        for target in ("unet", "vae.decoder")
    } | (
        {(*bucket, 3, target) for bucket in BUCKETS for target in ("unet", "vae.decoder")}
        if engine == "openvino"
        else set()
    )
    assert {(row["engine"], row["reason"]) for row in state["buckets"]} == {(engine, "")}
    assert state["state"] == "hot" and state["compiles_at_boot"] == 0


def test_pictures_equal_eager_ones(
    road: Served, engine: str, dtype: str, eager: Mapping[str, Worker[Any, Any]]
) -> None:
    for height, width in BUCKETS:
        for num_images, scale in ((1, 0.0), (1, 5.0), (3, 0.0), (4, 5.0)):
            request = {
                "prompt": "a cat",
                "height": height - 3,
                "width": width - 5,
                "seed": num_images,
                "num_images": num_images,
                "guidance_scale": scale,
                "response_format": "b64_json",
            }
            reply = road.client.predict(request)
            document = reply.json()
            assert document["engine"] == engine and document["bucket"] == [height, width]
            (answer,) = eager[dtype].run([eager[dtype].parse({"body": request})])
            answer.raise_if_failed()
            for entry, picture in zip(document["data"], answer.pictures, strict=True):
                generated = np.asarray(
                    Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))
                ).astype(int)
                error = np.abs(generated - np.asarray(picture).astype(int))
                assert error.max() <= 1 if dtype == "float32" else error.mean() < 4
    state = road.state()
    assert state["compiles_since_ready"] == state["incidents"] == state["eager_fallbacks"] == 0


def test_headers_and_metrics_name_the_engine(road: Served, engine: str) -> None:
    reply = road.client.predict({"prompt": "a", "height": 64, "width": 64})
    assert reply.headers["x-preheat-engine"] == engine
    assert road.metric("preheat_requests_total", Engine=engine) >= 1


def test_a_convolutional_network_is_served_by_it(
    running: server.TorchServe, engine: str, tmp_path: Path
) -> None:
    """Of a bucket's own sizes, since a network without a mask sees its padding."""
    model = transformers.AutoModelForImageClassification.from_pretrained(
        tiny.build("resnet", tmp_path / "resnet")
    ).eval()
    dice = np.random.default_rng(0)
    with Client.to(running, f"{engine}-resnet") as client, torch.inference_mode():
        for height in (32, 48, 32, 48):
            pixels = dice.standard_normal((3, height, 32), dtype=np.float32)
            document = client.predict({"inputs": {"pixel_values": pixels.tolist()}}).json()
            assert document["engine"] == engine
            expected = model(torch.from_numpy(pixels)[None]).logits
            np.testing.assert_allclose(document["outputs"]["logits"], expected.numpy(), atol=1e-4)
        state = client.state()
    assert {row["engine"] for row in state["buckets"]} == {engine} and state["state"] == "hot"
    assert state["compiles_since_ready"] == state["incidents"] == state["eager_fallbacks"] == 0
