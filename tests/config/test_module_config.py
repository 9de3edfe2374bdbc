"""The `module` section: what it takes, and that what it refuses is named by its YAML path."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from preheat.config.model import ModelConfig
from preheat.config.module import Cut, ModuleConfig
from preheat.errors import ConfigError

ROOT = Path(__file__).parents[2]
ISSUE = """
module:
  path: .
  inputs:
    pixel_values:   {dtype: float32, shape: [batch, 3, height, width],
                     buckets: {height: [224, 384], width: [224, 384]}, pad: edge}
    input_ids:      {dtype: int64, shape: [batch, sequence],
                     buckets: {sequence: [32, 64, 128, 256, 512]}, pad: 0}
    attention_mask: {dtype: int64, shape: [batch, sequence], pad: 0}
  outputs: {last_hidden_state: {crop: {1: sequence}}}
"""


def parse(text: str) -> ModelConfig:
    return ModelConfig.parse(yaml.safe_load(text))


def test_the_issues_example_is_read_as_it_stands() -> None:
    module = parse(ISSUE).module
    assert module is not None and module.auto_class == "AutoModel"
    assert module.choices == {
        "height": (224, 384),
        "width": (224, 384),
        "sequence": (32, 64, 128, 256, 512),
    }
    assert [spec.takes_images for spec in module.inputs.values()] == [True, False, False]
    assert module.outputs["last_hidden_state"].cuts == {1: Cut("sequence")}


@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_the_shipped_configs_load(name: str) -> None:
    config = ModelConfig.load(ROOT / "model-config" / f"{name}.yaml")
    assert config.section(ModuleConfig).inputs


def test_a_cut_is_rounded_up() -> None:
    cut = Cut.parse("height/32")
    assert cut is not None and [cut.size({"height": n}) for n in (1, 32, 33, 64)] == [1, 1, 2, 2]
    assert [Cut.parse(text) for text in ("height/0", "height/", "/2", "1", "a b")] == [None] * 5


def test_the_config_is_frozen() -> None:
    module = parse(ISSUE).module
    assert module is not None
    with pytest.raises(TypeError):
        module.inputs["more"] = 1  # type: ignore[index]


TWO = "x: {shape: [batch, h, w], buckets: {h: [8, 16], w: [8, 16]}}"
IDS = "input_ids: {dtype: int64, shape: [batch, sequence], buckets: {sequence: [8]}}"
BAD = [
    ("module: {pth: .}", "module.pth", "did you mean path?"),
    ("module: {class: 3}", "module.class", "must be text"),
    ("module: {path: ., factory: 'a:b'}", "module.factory", "one of the two"),
    ("module: {factory: a.b}", "module.factory", "package.module:function"),
    ("{module: {path: .}, pipeline: {path: .}}", "module", "one of the two"),
    ("module: {inputs: [a]}", "module.inputs", "must be a mapping"),
    ("module: {inputs: {x: {dtype: float33, shape: [batch]}}}", "module.inputs.x.dtype",
     "'float32'"),
    ("module: {inputs: {x: {dtype: int64}}}", "module.inputs.x.shape", "is missing"),
    ("module: {inputs: {x: {shape: [batch, n], bucket: {n: [1]}}}}", "module.inputs.x.bucket",
     "did you mean buckets?"),
    ("module: {inputs: {x: {shape: [3, batch]}}}", "module.inputs.x.shape[0]",
     "the first dimension is batch"),
    ("module: {inputs: {x: {shape: [batch, 0]}}}", "module.inputs.x.shape[1]",
     "must be greater than 0"),
    ("module: {inputs: {x: {shape: [batch, 1.5]}}}", "module.inputs.x.shape[1]",
     "a size or the name"),
    ("module: {inputs: {x: {shape: [batch, n]}}}", "module.inputs.x.shape[1]", "n has no sizes"),
    ("module: {inputs: {x: {shape: [batch, n, n], buckets: {n: [1]}}}}", "module.inputs.x.shape[2]",
     "listed twice"),
    ("module: {inputs: {x: {shape: [batch], buckets: {n: [1]}}}}", "module.inputs.x.buckets.n",
     "no dimension"),
    ("module: {inputs: {x: {shape: [batch, n], buckets: {n: [8, 8]}}}}",
     "module.inputs.x.buckets.n[1]", "twice"),
    ("module: {inputs: {x: {shape: [batch, n], buckets: {n: []}}}}", "module.inputs.x.buckets.n",
     "at least one"),
    ("module: {inputs: {x: {shape: [batch, n], buckets: {n: [0]}}}}",
     "module.inputs.x.buckets.n[0]", "greater than 0"),
    (("module: {inputs: {x: {shape: [batch, n], buckets: {n: [8]}}, "
      "y: {shape: [batch, n], buckets: {n: [8]}}}}"),
     "module.inputs.y.buckets.n", "already at module.inputs.x"),
    ("module: {inputs: {x y: {shape: [batch]}}}", "module.inputs.x y", "must be a name"),
    ("module: {inputs: {x: {shape: [batch, 3], pad: mirror}}}", "module.inputs.x.pad",
     "edge or a number"),
    ("module: {inputs: {x: {dtype: int64, shape: [batch, 3], pad: 0.5}}}", "module.inputs.x.pad",
     "0.5 is no int64"),
    ("module: {inputs: {x: {dtype: uint8, shape: [batch, 3], default: 256}}}",
     "module.inputs.x.default", "no uint8"),
    ("module: {inputs: {x: {shape: [batch, 3], range: [1]}}}", "module.inputs.x.range",
     "[least, greatest]"),
    ("module: {inputs: {x: {shape: [batch, 3], range: [2, 1]}}}", "module.inputs.x.range",
     "[least, greatest]"),
    ("module: {inputs: {x: {shape: [batch, 4], normalize: {}}}}", "module.inputs.x", "for images"),
    ("module: {inputs: {x: {shape: [batch, 3, 8, 8], normalize: {std: [1.0]}}}}",
     "module.inputs.x.normalize.std", "3"),
    ("module: {inputs: {x: {dtype: int64, shape: [batch, 3]}}}", "module.inputs.x.range",
     "range: [0, 1]"),
    ("module: {inputs: {x: {dtype: uint8, shape: [batch, 3]}}}", "module.inputs.x.range",
     "range: [0, 1]"),
    ("module: {inputs: {unmasked: {dtype: int8, shape: [batch, 3]}}}",
     "module.inputs.unmasked.range", "is missing"),
    (f"module: {{inputs: {{{IDS}}}, outputs: {{y: {{crop: {{1: width}}}}}}}}",
     "module.outputs.y.crop.1", "sequence"),
    (f"module: {{inputs: {{{IDS}}}, outputs: {{y: {{crop: {{0: sequence}}}}}}}}",
     "module.outputs.y.crop.0", "at least 1"),
    ("{module: {path: .}, pt2: {shapes: {buckets: [[64, 64]]}}}", "pt2.shapes.buckets",
     "module.inputs"),
    ("{module: {path: .}, pt2: {shapes: {strategy: fixed}}}", "pt2.shapes.strategy",
     "for pipelines"),
    ("{module: {path: .}, pt2: {shapes: {strategy: dynamic}}}", "pt2.shapes.strategy",
     "one dimension with buckets"),
    (f"{{module: {{inputs: {{{IDS}}}}}, pt2: {{shapes: {{strategy: dynamic}}}}}}",
     "pt2.shapes.strategy", "least and greatest size"),
    (f"{{module: {{inputs: {{{TWO}}}}}, pt2: {{shapes: {{strategy: dynamic}}}}}}",
     "pt2.shapes.strategy", "with more of them"),
    ("{module: {path: .}, pt2: {shapes: {fit: resize}}}", "pt2.shapes.fit", "for pipelines"),
    ("{module: {path: .}, pt2: {shapes: {oversize: downscale}}}", "pt2.shapes.oversize",
     "reject or eager"),
    ("{module: {path: .}, pt2: {export: {aot_compile: true}}}", "pt2.export.aot_compile",
     "declare module.inputs"),
    ("pt2: {import: [../ops.py]}", "pt2.import[0]", "no Python file of the archive"),
    ("pt2: {import: [/ops.py]}", "pt2.import[0]", "no Python file of the archive"),
    ("pt2: {import: [ops.so]}", "pt2.import[0]", "no Python file of the archive"),
    ("pt2: {import: [a.py, a.py]}", "pt2.import[1]", "listed twice"),
    ("pt2: {imports: [a.py]}", "pt2.imports", "did you mean import?"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "path", "message"), BAD, ids=[path for _, path, _ in BAD])
def test_an_error_names_the_path_and_what_would_be_right(
    text: str, path: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert (caught.value.path, message in caught.value.message) == (path, True), str(caught.value)


def test_a_modules_targets_are_its_own_names() -> None:
    assert parse("{module: {path: .}, pt2: {targets: [encoder.layer.0]}}").pt2.targets == (
        "encoder.layer.0",
    )
