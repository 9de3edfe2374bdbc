"""A real TorchServe on an archive that was compiled when it was built: no compiler runs, and the
pictures are eager's.

The pipeline is one that an older diffusers wrote, in bfloat16 on two threads.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from preheat.config.model import ModelConfig
from preheat.status import StatusFile
from preheat.torchserve.archive import build_archive
from preheat.worker.worker import Worker
from served import Served, serving

BUCKETS = [[64, 128], [96, 64]]
CONFIG: dict[str, Any] = {
    "minWorkers": 1,
    "maxWorkers": 1,
    "batchSize": 4,
    "startupTimeout": 600,
    "maxRetryTimeoutInSec": 1200,
    "pt2": {
        "compile": {"enable": True, "backend": "inductor", "dynamic": False},
        "targets": ["unet", "vae.decoder"],
        "shapes": {"buckets": BUCKETS, "batch_sizes": "dynamic"},
        "on_failure": "fail",
    },
    "pipeline": {"dtype": "bfloat16", "defaults": {"num_inference_steps": 3}},
}


@pytest.fixture(scope="module")
def archive(old_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aot")
    config = folder / "ahead.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    return build_archive(
        config, old_sdxl, output=folder / "archives", archive_format="no-archive", aot=True
    )


@pytest.fixture(scope="module")
def ahead(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Served where no C++ compiler is to be found, from a compile cache that nobody has filled."""
    work = tmp_path_factory.mktemp("ahead")
    with serving(
        archive, work, cache=work / "cache", env={"CXX": "no-such-compiler", "OMP_NUM_THREADS": "2"}
    ) as warm:
        yield warm


def test_one_package_a_bucket_and_none_with_weights(archive: Path) -> None:
    index = json.loads((archive / "aot" / "index.json").read_text())
    packages = [(entry["buckets"], entry["target"]) for entry in index["packages"]]
    assert packages == [
        ([bucket], target) for bucket in ("64x128", "96x64") for target in ("unet", "vae.decoder")
    ]
    ranges = {entry["target"]: entry["ranges"].get("0", {}) for entry in index["packages"]}
    assert ranges == {"unet": {"0": [1, 8]}, "vae.decoder": {}}, (
        "the decoder is given one picture at a time"
    )
    assert yaml.safe_load((archive / "ahead.yaml").read_text())["pt2"]["export"] == {
        "aot_compile": True
    }


def test_every_row_is_ahead_of_time_and_nothing_was_compiled(ahead: Served) -> None:
    state = ahead.state()
    rows = {(row["height"], row["width"], row["batch_size"]) for row in state["buckets"]}
    assert rows == {(height, width, size) for height, width in BUCKETS for size in (1, 2, 4)}
    ran = {(row["engine"], row["target"], row["reason"]) for row in state["buckets"]}
    assert ran == {("aot", "unet", ""), ("aot", "vae.decoder", "")}
    assert state["state"] == "hot" and state["compiles_at_boot"] == 0


def test_pictures_equal_eager_ones_in_every_bucket_and_batch_size(
    ahead: Served, old_sdxl: Path
) -> None:
    data = {**CONFIG, "pt2": {**CONFIG["pt2"], "compile": {"enable": False}}}
    config = ModelConfig.parse(data)
    eager = Worker[Any, Any](
        config, old_sdxl.parent, torch.device("cpu"), status=StatusFile(None, "eager")
    )
    for height, width in BUCKETS:
        for num_images in (1, 2, 3, 4):
            for scale in (0.0, 5.0):
                request = {
                    "prompt": "a cat",
                    "height": height - 3,
                    "width": width - 5,
                    "seed": num_images,
                    "num_images": num_images,
                    "guidance_scale": scale,
                    "response_format": "b64_json",
                }
                document = ahead.client.predict(request).json()
                assert document["engine"] == "aot" and document["bucket"] == [height, width]
                (answer,) = eager.run([eager.parse({"body": request})])
                answer.raise_if_failed()
                for entry, picture in zip(document["data"], answer.pictures, strict=True):
                    generated = np.asarray(
                        Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))
                    ).astype(int)
                    difference = np.abs(generated - np.asarray(picture).astype(int))
                    assert difference.mean() < 4  # roundings of bfloat16
    state = ahead.state()
    assert state["compiles_since_ready"] == state["incidents"] == state["eager_fallbacks"] == 0


def test_headers_name_the_engine(ahead: Served) -> None:
    assert (
        ahead.client.predict({"prompt": "a", "height": 64, "width": 64}).headers["x-preheat-engine"]
        == "aot"
    )


def test_an_archive_from_another_machine_is_compiled_and_says_why(
    archive: Path, old_sdxl: Path
) -> None:
    """The archive's own YAML and folder with one fact of the fingerprint changed; compiled by
    Dynamo's `eager` backend.
    """
    data = yaml.safe_load((archive / "ahead.yaml").read_text())
    data["pt2"]["compile"]["backend"] = "eager"
    data["pt2"]["shapes"]["buckets"] = BUCKETS[:1]
    config = ModelConfig.parse(data)
    torch.compiler.reset()
    service = Worker[Any, Any](
        config, archive, torch.device("cpu"), status=StatusFile(None, "other")
    )
    torch.compiler.set_stance("default")
    assert {row.engine for row in service.state.buckets} == {"compiled"}
    assert all("built for fingerprint" in row.reason for row in service.state.buckets)
