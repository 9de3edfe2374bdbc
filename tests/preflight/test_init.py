"""`preheat init`: the YAML that it writes is one that `preheat doctor` finds nothing in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from preheat.buckets import Bucket
from preheat.cli import app, aside
from preheat.cli.doctor import judge
from preheat.compilation.watch import CompileWatch
from preheat.config.diffusion import PipelineConfig
from preheat.config.model import ModelConfig
from preheat.config.module import ModuleConfig
from preheat.errors import ModelError, PreheatError
from preheat.models import tiny
from preheat.preflight import draft as drafts
from preheat.preflight.facts import Machine, Model, Seen
from preheat.preflight.rehearse import rehearse
from preheat.torchserve.server import ROOT, read_properties

CPU = Machine(torch="2.13.0", cuda=False, bfloat16=True, memory_bytes=2**36)
OPENVINO = CPU.model_copy(update={"packages": frozenset({"openvino"})})
GPU = CPU.model_copy(update={"cuda": True, "gpus": (2**36,), "bfloat16": False})
OLD = CPU.model_copy(update={"bfloat16": False})


def state(bucket: str, seconds_per_step: float = 0.02) -> dict[str, Any]:
    """Of a worker that has started."""
    row = {"bucket": bucket, "batch_size": 1, "warm_seconds": 40.0}
    row["seconds_per_step"] = seconds_per_step
    return {"ready_seconds": 55.0, "buckets": [row]}


class Wrote:
    """Runs the command where the model's processes would answer this."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        monkeypatch.chdir(folder)
        self.folder, self.monkeypatch = folder, monkeypatch
        self.rehearsed: ModelConfig | None = None

    def __call__(
        self, model: object, machine: Machine, seen: Mapping[str, Any], *options: object
    ) -> ModelConfig:
        def ask(module: str, *arguments: Any) -> bytes:
            if module == "look":
                return Seen(machine=machine).model_dump_json().encode()
            self.rehearsed = ModelConfig.load(arguments[0])
            return json.dumps(seen).encode()

        self.monkeypatch.setattr(aside, "ask", ask)
        file = self.folder / "made.yaml"
        file.unlink(missing_ok=True)
        done = run(model, "--output", file, *options)
        assert done.exit_code == 0, done.output
        config = ModelConfig.load(file)
        server = read_properties(ROOT / "archive" / "config.properties")
        looked = Seen(machine=machine, model=Model())
        for measured in (None, seen):
            report = judge(config, looked, place=None, server=server, state=measured)
            assert report.findings == []
        return config


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app.app, ["init", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def wrote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Wrote:
    return Wrote(monkeypatch, tmp_path)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in ("sd15", "sd3", "bert", "resnet"):
        tiny.build(name, root / name)
    return root


@pytest.mark.parametrize(
    ("machine", "dtype", "batch"),
    [(CPU, "bfloat16", 1), (OLD, "float32", 1), (GPU, "bfloat16", 4)],
    ids=["cpu", "old cpu", "gpu"],
)
def test_a_pipelines_yaml_suits_the_machine(
    wrote: Wrote, models: Path, machine: Machine, dtype: str, batch: int
) -> None:
    config = wrote(models / "sd15", machine, state("256x256"))
    own = config.section(PipelineConfig)
    assert (config.pt2.compile.kwargs["backend"], own.dtype) == ("auto", dtype)
    assert config.batchSize == batch and own.path == str(models / "sd15")
    assert [str(each) for each in config.pt2.shapes.buckets] == ["256x256"], "the model's own"
    assert own.limits.max_cost and own.limits.max_side == 256


def test_slow_pictures_get_a_longer_answer_time_and_a_limit_that_fits_it(
    wrote: Wrote, models: Path
) -> None:
    config = wrote(models / "sd15", OPENVINO, state("256x256", seconds_per_step=5.0))
    limit = config.section(PipelineConfig).limits.max_cost
    assert config.responseTimeout == 450 and limit is not None
    assert limit / 256**2 == pytest.approx(60, rel=0.05), "30 steps, and as many again"


def test_buckets_come_from_a_log_on_the_models_grid(wrote: Wrote, models: Path) -> None:
    log = wrote.folder / "sizes.csv"
    log.write_text("height,width,count\n120,72,5\n250,250,9\n64,248,3\n")
    asked = wrote(models / "sd3", CPU, state("128x80"), "--csv", log, "--max-buckets", 2)
    sizes = [(each.height, each.width) for each in asked.pt2.shapes.buckets]
    assert len(sizes) == 2 and all(side % 16 == 0 for size in sizes for side in size)
    assert wrote.rehearsed is not None and wrote.rehearsed.pt2.shapes == asked.pt2.shapes


def test_an_encoder_is_given_its_inputs_its_lengths_and_what_is_cut(
    wrote: Wrote, models: Path
) -> None:
    own = wrote(models / "bert", CPU, state("sequence=32")).section(ModuleConfig)
    assert own.auto_class == "BertModel" and own.choices == {"sequence": (32, 64, 128, 256, 512)}
    assert list(own.inputs) == ["input_ids", "attention_mask", "token_type_ids"]
    assert own.outputs["last_hidden_state"].crop == {1: "sequence"}
    log = wrote.folder / "lengths.csv"
    log.write_text("sequence\n" + "20\n" * 9 + "90\n")
    planned = wrote(models / "bert", CPU, state("sequence=24"), "--csv", log)
    assert planned.section(ModuleConfig).choices == {"sequence": (24, 96)}


def test_a_classifier_of_pictures(wrote: Wrote, models: Path) -> None:
    own = wrote(models / "resnet", CPU, state("height=224 width=224")).section(ModuleConfig)
    assert own.auto_class == "ResNetForImageClassification" and list(own.outputs) == ["logits"]
    assert own.choices == {"height": (224,), "width": (224,)}


def test_what_it_cannot_write_a_yaml_for_is_said(wrote: Wrote, models: Path) -> None:
    with pytest.raises(PreheatError, match="there is no tiny:fox; known: sdxl, sd15"):
        wrote("tiny:fox", CPU, {})
    with pytest.raises(PreheatError, match="no such folder"):
        wrote("org/name", CPU, {})
    (wrote.folder / "empty").mkdir()
    with pytest.raises(ModelError, match="neither a diffusers nor a transformers folder"):
        wrote(wrote.folder / "empty", CPU, {})
    config = {"architectures": ["T5Model"], "vocab_size": 9, "is_encoder_decoder": True}
    (wrote.folder / "empty" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no inputs are known of T5Model"):
        wrote(wrote.folder / "empty", CPU, {})
    (wrote.folder / "there.yaml").touch()
    with pytest.raises(PreheatError, match="is there already"):
        run(models / "bert", "--output", wrote.folder / "there.yaml")


def test_a_rehearsal_warms_the_draft_as_a_worker_does(
    watch: CompileWatch, models: Path, tmp_path: Path
) -> None:
    machine = CPU.model_copy(update={"bfloat16": False})
    folder, buckets = models / "bert", [Bucket(sequence=16)]
    draft = drafts.drafted(str(folder), folder, machine, buckets, on_gpu=False)
    config = drafts.parsed(draft.text().replace("backend: auto", "backend: eager"), tmp_path)
    shown: Any = rehearse(config, tmp_path)
    assert shown["state"] == "hot" and shown["ready_seconds"] > 0
    assert {row["bucket"] for row in shown["buckets"]} == {"sequence=16"}
    assert all(row["seconds_per_step"] > 0 for row in shown["buckets"])
    assert torch.get_default_dtype() is torch.float32
