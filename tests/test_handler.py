"""TorchServe's entry point before a model is loaded: what it makes of the YAML and of the device it was given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from ts.context import Context

from preheat.errors import ConfigError
from preheat_handler import PreheatHandler


def load(folder: Path, text: str, gpu: int | None = None) -> None:
    """As ts/service.py does: TorchServe reads the YAML, and says where it lies."""
    (folder / "model.yaml").write_text(text)
    manifest = {"model": {"configFile": "model.yaml"}}
    read = yaml.safe_load(text)
    PreheatHandler().initialize(Context("m", str(folder), manifest, 1, gpu, "0.12.0", model_yaml_config=read))


REFUSED = [
    ("pipeline: {}\npt2: {shapes: {}}\npt2: {}", None, "pt2: stands twice, in lines 2 and 3"),
    ("module: {}\npt2: {compile: {enable: true, backend: openvno}}", None, "did you mean openvino?"),
    ("module: {}\ndeviceType: gpu", None, "deviceType: gpu, and TorchServe gave this worker none"),
    ("pt2: {compile: {}}", None, "pt2.compile.enable: is missing"),
    ("3", None, "a model YAML is a mapping of keys to values, got 3"),
    pytest.param(
        "pipeline: {}",
        0,
        "deviceType: TorchServe gave this worker GPU 0, which torch",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU here"),
    ),
]


@pytest.mark.parametrize(("text", "gpu", "message"), REFUSED)
def test_a_load_that_is_refused_says_why_to_whoever_waits(
    text: str, gpu: int | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREHEAT_STATUS_DIR", str(tmp_path / "status"))
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, gpu)
    assert message in str(caught.value)
    (status,) = (json.loads(file.read_text()) for file in (tmp_path / "status").glob("*.json"))
    assert status["state"] == "failed" and message in status["message"]


def test_torchserves_own_yaml_keeps_its_last_word(tmp_path: Path) -> None:
    """Of keys that stand twice the last one counts there; this one is then refused for what it says."""
    with pytest.raises(ConfigError, match="batchSize: must be greater than 0, got 0"):
        load(tmp_path, "batchSize: 1\nbatchSize: 0")
