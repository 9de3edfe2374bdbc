"""Which folder a path means: what a new user writes, and what a stock archiver leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preheat.config.diffusion import PipelineConfig
from preheat.config.family import FamilyConfig
from preheat.config.module import ModuleConfig
from preheat.config.places import folder_or_hub_id, is_hub_id, model_place, tiny_name
from preheat.errors import ConfigError
from preheat.models.diffusion.tiny import PIPELINES
from preheat.models.module.tiny import MODULES

PIPELINE, MODULE = PipelineConfig(), ModuleConfig()
FAMILIES: tuple[FamilyConfig, ...] = (PIPELINE, MODULE)
INDEXES = sorted(family.weights_index for family in FAMILIES)
NAMES = ("model", "sdxl", "bert", "preheat")


def put(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}")
    return folder


@given(
    at_root=st.sets(st.sampled_from(INDEXES)),
    inside=st.dictionaries(st.sampled_from(NAMES), st.sets(st.sampled_from(INDEXES))),
    family=st.sampled_from(FAMILIES),
)
def test_the_archives_model_is_its_root_else_model_else_the_only_one(
    at_root: set[str], inside: dict[str, set[str]], family: FamilyConfig
) -> None:
    index = family.weights_index
    candidates = sorted(name for name, files in inside.items() if index in files)
    with tempfile.TemporaryDirectory() as name:
        archive = put(
            Path(name),
            *at_root,
            *(f"{folder}/{file}" for folder in inside for file in inside[folder]),
        )
        if index in at_root:
            assert model_place(".", archive, family) == archive
        elif "model" in candidates:
            assert model_place(".", archive, family) == archive / "model"
        elif len(candidates) == 1:
            assert model_place(".", archive, family) == archive / candidates[0]
        else:
            with pytest.raises(ConfigError) as raised:
                model_place(".", archive, family)
            assert raised.value.path == f"{family.name}.path"
            assert all(candidate in raised.value.message for candidate in candidates or [index])


def test_a_flattened_pipeline_is_not_mistaken_for_its_parts(tmp_path: Path) -> None:
    put(tmp_path, "model_index.json", "unet/config.json", "vae/config.json", "preheat/errors.py")
    assert model_place(".", tmp_path, PIPELINE) == tmp_path
    with pytest.raises(ConfigError, match="unet or vae"):
        model_place(".", tmp_path, MODULE)


@pytest.mark.parametrize(
    "path", ["/nowhere/sdxl", "./sdxl", "../sdxl", "~/no such folder", "a/b/c", "two words"]
)
def test_what_is_written_as_a_folder_is_never_a_hub_id(path: str, tmp_path: Path) -> None:
    assert not is_hub_id(path)
    with pytest.raises(ConfigError, match="no such folder"):
        model_place(path, tmp_path, PIPELINE)


@pytest.mark.parametrize("path", ["gpt2", "stabilityai/stable-diffusion-xl-base-1.0", "org/name_2"])
def test_a_name_is_a_folder_where_there_is_one_and_else_a_hub_id(path: str, tmp_path: Path) -> None:
    assert model_place(path, tmp_path, MODULE) == path
    put(tmp_path, f"{path}/config.json")
    assert model_place(path, tmp_path, MODULE) == tmp_path / path


def test_home_and_relative_folders_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = put(tmp_path / "sdxl", "model_index.json")
    assert folder_or_hub_id("~/sdxl", Path("/"), PIPELINE) == folder
    assert folder_or_hub_id("../sdxl", tmp_path / "elsewhere", PIPELINE) == folder


def test_a_folder_that_is_no_model_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "sdxl").mkdir()
    with pytest.raises(
        ConfigError, match=r"^pipeline.path: .*sdxl is not a diffusers pipeline: .*model_index.json"
    ):
        folder_or_hub_id("sdxl", tmp_path, PIPELINE)


def test_tiny_models_are_those_that_can_be_made() -> None:
    assert PIPELINE.tiny == tuple(PIPELINES)
    assert MODULE.tiny == tuple(MODULES)
    assert (tiny_name("tiny:sd15", PIPELINE), tiny_name("org/name", PIPELINE)) == ("sd15", None)
    with pytest.raises(ConfigError, match="known: tiny:bert, tiny:resnet"):
        tiny_name("tiny:sdxl", MODULE)


def test_a_worker_makes_no_tiny_model(tmp_path: Path) -> None:
    put(tmp_path, "model_index.json")
    with pytest.raises(ConfigError, match=r"tiny:sdxl is made by .*use \. for"):
        model_place("tiny:sdxl", tmp_path, PIPELINE)


LOAD = """
import json, socket, sys
from pathlib import Path
socket.getaddrinfo = lambda *where, **_: sys.exit(f"asked the hub: {where}")
import torch
from preheat.config.model import ModelConfig
from preheat.errors import PreheatError
from preheat.models.registry import load_model
for data in json.loads(sys.argv[1]):
    try:
        load_model(ModelConfig.parse(data), Path(sys.argv[2]), {}, torch.device("cpu"))
    except PreheatError as error:
        print(json.dumps([str(error), error.lasting]))
"""


def test_a_folder_that_cannot_be_loaded_says_so_in_one_line_and_asks_no_hub(tmp_path: Path) -> None:
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    put(tmp_path, "broken/unet/config.json", "broken/config.json")
    (tmp_path / "broken" / "model_index.json").write_text(json.dumps(index))
    module = {"inputs": {"x": {"shape": ["batch", 4]}}}
    data = [
        {"pipeline": {"path": "/nowhere/sdxl"}},
        {"pipeline": {"path": "broken"}},
        {"module": {"path": "broken", **module}},
    ]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(data), str(tmp_path)],
        env={"PYTHONPATH": str(Path(__file__).parents[2] / "handler"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(told) == len(data), done.stdout
    for message, lasting in told:
        assert lasting and "\n" not in message and len(message) < 500
