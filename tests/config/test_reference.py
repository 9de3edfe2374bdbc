"""docs/configuration.md and the JSON schema, against the classes and the YAMLs that ship."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

from preheat.cli.app import app
from preheat.config import reference
from preheat.config.model import ModelConfig
from preheat.config.pt2_forms import CompileConfig
from preheat.errors import ConfigError

ROOT = Path(__file__).parents[2]
YAMLS = sorted((ROOT / "model-config").glob("*.yaml"))
VALIDATOR = jsonschema.Draft202012Validator(reference.schema())


def sections(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield section
    for field in section.model_fields.values():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and not get_args(kind) and issubclass(kind, BaseModel):
                yield from sections(kind)


def faults(text: str) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(yaml.safe_load(text))]


def test_the_committed_page_is_what_the_classes_say() -> None:
    committed = (ROOT / "docs" / "configuration.md").read_text()
    assert committed == reference.page(), "write it anew: make reference"


def test_every_key_says_what_it_means() -> None:
    found = list(sections(ModelConfig))
    assert len(found) >= 14 and CompileConfig in found
    fields = {f"{s.__name__}.{name}": f for s in found for name, f in s.model_fields.items()}
    missing = [name for name, field in fields.items() if not field.description]
    assert not missing, "a docstring under each: unit and meaning"


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(reference.schema())
    assert all(field["description"] for field in reference.COMPILE["properties"].values())


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_the_shipped_yamls_are_valid(path: Path) -> None:
    assert faults(path.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "minWorker: 1",
        "pt2: {shapes: {bukets: [[64, 64]]}}",
        "pt2: {shapes: {buckets: [[65, 64]]}}",
        "pt2: {shapes: {buckets: [[64]]}}",
        "pt2: {shapes: {batch_sizes: dynamik}}",
        "pt2: {compile: {backend: inductor}}",
        "pipeline: {guidance: sometimes}",
        "pipeline: {limits: {max_step: 3}}",
        "module: {inputs: {x: {shapes: [batch]}}}",
        "module: {inputs: {x: {shape: [batch, 0]}}}",
        "batchSize: '4'",
    ],
)
def test_what_does_not_load_is_underlined_by_the_editor_too(text: str) -> None:
    assert faults(text)
    with pytest.raises(ConfigError):
        ModelConfig.parse(yaml.safe_load(text))


@pytest.mark.parametrize(
    "text",
    [
        "pt2: inductor",
        "pt2: {backend: inductor, mode: max-autotune}",
        "pt2: {compile: {enable: true, backend: openvino, options: {config: {}}}}",
        "pipeline: {guidance: off}",
        "module: {inputs: {x: {shape: [batch, n], buckets: {n: [4]}, pad: edge}}}",
        (
            "module: {inputs: {x: {shape: [batch, n], buckets: {n: [4]}}}, outputs: {y: {crop: {1: "
            "n}}}}"
        ),
    ],
)
def test_what_loads_is_not(text: str) -> None:
    assert faults(text) == []
    ModelConfig.parse(yaml.safe_load(text))


def test_the_command_prints_the_schema() -> None:
    done = CliRunner().invoke(app, ["schema"])
    assert done.exit_code == 0
    assert json.loads(done.output) == json.loads(json.dumps(reference.schema()))
