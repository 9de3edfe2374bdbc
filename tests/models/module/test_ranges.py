"""What whole numbers a module takes: told by its config, or the YAML, or it is not served."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from models.module.test_module_service import BERT, ask, models, start  # noqa: F401  a fixture
from preheat.compilation.backends import openvino
from preheat.compilation.signatures import DynamicDims
from preheat.compilation.watch import CompileWatch
from preheat.config.model import ModelConfig
from preheat.errors import ConfigError, RequestError
from preheat.models.module import ranges
from preheat.models.module.model import ModuleModel
from preheat.status import StatusFile
from preheat.worker.worker import Worker

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 40,
}
HALVES = dict.fromkeys(("encoder_layers", "decoder_layers"), 1) | dict.fromkeys(
    ("encoder_attention_heads", "decoder_attention_heads"), 2
)


def make(family: str, **settings: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**settings)
    return getattr(transformers, f"{family}Model")(config).eval()


def bart() -> Any:
    widths = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    return make("Bart", vocab_size=50, max_position_embeddings=40, **widths, **HALVES)


def roberta() -> Any:
    return make("Roberta", **SMALL, type_vocab_size=1)


NAMES = (
    "input_ids",
    "decoder_input_ids",
    "token_type_ids",
    "position_ids",
    "attention_mask",
    "labels",
)


def config_of(**inputs: Any) -> Any:
    shaped = {
        name: {"dtype": "int64", "shape": ["batch", 4]} | more for name, more in inputs.items()
    }
    return ModelConfig.parse({"module": {"inputs": shaped}}).module


@pytest.mark.parametrize(
    ("module", "spans", "longest"),
    [
        (make("Bert", **SMALL), {"input_ids": 49, "token_type_ids": 1, "position_ids": 39}, 40),
        (roberta(), {"input_ids": 49, "token_type_ids": 0, "position_ids": 39}, 38),
        (bart(), {"input_ids": 49, "decoder_input_ids": 49, "position_ids": 39}, 40),
        (
            make("T5", vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
            {"input_ids": 49},
            None,
        ),
        (nn.Linear(2, 2), {}, None),
    ],
    ids=["bert", "roberta", "bart", "t5", "no transformer"],
)
def test_a_transformers_config_tells_the_ranges(
    module: Any, spans: dict[str, int], longest: int | None
) -> None:
    own = ModelConfig.parse({"module": {}}).module
    assert own is not None
    found = ranges.ranges(NAMES, module, own)
    assert found.items() >= {name: (0, most) for name, most in spans.items()}.items()
    assert found["attention_mask"] == (0, 1) and "labels" not in found
    assert ranges.lengths(NAMES, module).get("input_ids") == ((-1, longest) if longest else None)


@pytest.mark.parametrize(
    "module", [make("Bert", **SMALL), roberta(), bart()], ids=["bert", "roberta", "bart"]
)
def test_the_longest_sequence_is_what_the_module_really_takes(module: Any) -> None:
    (_, longest) = ranges.lengths(NAMES, module)["input_ids"]
    module(input_ids=torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        module(input_ids=torch.full((1, longest + 1), 5))


@pytest.mark.parametrize(
    ("inputs", "path", "words"),
    [
        (
            {"labels": {"range": [-100, 49]}, "input_ids": {"range": [0, 50]}},
            "input_ids.range",
            r"within \[0, 49\]",
        ),
        ({"token_type_ids": {"range": [-1, 1]}}, "token_type_ids.range", r"within \[0, 1\]"),
        ({"input_ids": {"pad": -1}}, "input_ids.pad", r"-1 is outside .*\[0, 49\]"),
        ({"labels": {"range": [0, 3], "pad": -100}}, "labels.pad", "-100 is outside"),
        ({"attention_mask": {"default": 2}}, "attention_mask.default", "2 is outside"),
        ({"decoder_input_ids": {}}, None, ""),
    ],
)
def test_what_a_yaml_says_has_to_lie_within_the_modules_own(
    inputs: dict[str, Any], path: str | None, words: str
) -> None:
    module = make("Bert", **SMALL)
    if path is None:
        assert ranges.ranges(tuple(inputs), module, config_of(**inputs))
        return
    with pytest.raises(ConfigError, match=words) as caught:
        ranges.ranges(tuple(inputs), module, config_of(**inputs))
    assert caught.value.path == f"module.inputs.{path}"
    # nobody tells of this one
    with pytest.raises(ConfigError, match="is missing; say the least") as caught:
        ranges.ranges(("input_ids",), nn.Linear(2, 2), config_of(input_ids={}))
    assert caught.value.path == "module.inputs.input_ids.range"


def test_a_bucket_without_positions_is_refused_at_start() -> None:
    ids = {
        "input_ids": {
            "dtype": "int64",
            "shape": ["batch", "n"],
            "buckets": {"n": [8, 39]},
            "pad": 1,
        }
    }
    config = ModelConfig.parse({"module": {"inputs": ids}})
    with pytest.raises(
        ConfigError, match=r"module.inputs.input_ids: 39 is more .* positions for, 38"
    ):
        ModuleModel(roberta(), None, config)


def test_a_sequence_without_positions_is_refused_though_larger_ones_are_served_eagerly(
    watch: CompileWatch,
    models: Path,  # noqa: F811
) -> None:
    service = start(models / "bert", BERT, enable=False, shapes={"oversize": "eager"})
    module: Any = service.targets["model"]
    most = module.config.max_position_embeddings
    (answer,) = ask(service, [5] * most)
    assert answer.engine == "eager" and answer.bucket == "none"
    with pytest.raises(
        RequestError, match=f"input_ids is {most + 1} long, .* positions for {most}"
    ):
        service.parse({"body": [5] * (most + 1)})


NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(4, 64)

    def forward(self, index, x):
        return self.table(index.long()).sum(-1) + x

def make():
    return Net()
"""


def served(folder: Path, inputs: dict[str, Any], backend: str = "eager") -> Worker[Any, Any]:
    name = f"net_{uuid.uuid4().hex}"
    (folder / f"{name}.py").write_text(NET)
    torch.compiler.set_stance("default")
    shapes = {"batch_sizes": [1]} if inputs else {}
    pt2 = {"compile": {"enable": True, "backend": backend}, "shapes": shapes}
    config = ModelConfig.parse(
        {"pt2": pt2, "module": {"factory": f"{name}:make", "inputs": inputs}}
    )
    return Worker[Any, Any](config, folder, torch.device("cpu"), status=StatusFile(None, "n"))


X = {"shape": ["batch", 3], "default": 0.0}


@pytest.mark.parametrize("dtype", ["int64", "float32"])
@pytest.mark.parametrize("wrong", [[0, 4], [-1, 3], [-100, 3]], ids=str)
def test_a_range_that_the_module_does_not_take_is_found_at_start(
    watch: CompileWatch, tmp_path: Path, wrong: list[int], dtype: str
) -> None:
    with pytest.raises(
        ConfigError, match=r"module.inputs.index.range: (4|-1|-100|-99) is not what it takes"
    ):
        served(tmp_path, {"index": {"dtype": dtype, "shape": ["batch", 3], "range": wrong}, "x": X})


def test_floats_that_a_module_makes_indices_of_can_have_a_range(
    watch: CompileWatch, tmp_path: Path
) -> None:
    index = {"dtype": "float32", "shape": ["batch", 3], "range": [0, 3]}
    service = served(tmp_path, {"index": index, "x": X})
    ask(service, {"index": [0.5, 3, 1]})
    with pytest.raises(RequestError, match=r"holds a number outside 0\.\.3") as caught:
        service.parse({"body": {"inputs": {"index": [0.5, 3.5, 1]}}})
    assert caught.value.field == "index"


def test_undeclared_whole_numbers_are_served_eagerly_and_it_is_said(
    watch: CompileWatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = served(tmp_path, {})
    assert "whole numbers for index or x is served eagerly" in caplog.text
    (answer,) = ask(service, {"index": [[0, 1, 3]], "x": [[0.5, 0.5, 0.5]]})
    assert answer.engine == "eager" and service.current_state().planned_eager == 1
    (answer,) = service.run([service.parse({"body": {"index": [[4]], "x": [[0.5]]}})])
    assert answer.error is not None and answer.error.code == 500


def test_openvino_answers_zeros_or_fails_in_its_own_words_where_eager_raises() -> None:
    """Why a request is held against the range on every road, whether the process would survive or
    not.
    """
    pytest.importorskip("openvino")
    table = nn.Embedding(4, 2).eval()
    model = openvino.Model("table", table, ((torch.tensor([[0, 1]]),), {}), DynamicDims(), {})
    try:
        answer = model(torch.tensor([[9, 9]]))
    except RuntimeError as error:  # some of its kernels look
        assert "out of DATA bounds" in str(error)
    else:
        assert torch.equal(answer, torch.zeros(1, 2, 2))
    with pytest.raises(IndexError):
        table(torch.tensor([[9, 9]]))


IN_TWO_THREADS = """
import sys
from pathlib import Path

import torch

torch.set_num_threads(2)
from preheat.errors import RequestError
from models.module.test_ranges import X, served

index = {"dtype": "int64", "shape": ["batch", 4096], "range": [0, 3]}
inputs = {"index": index, "x": {"shape": ["batch", 4096], "default": 0.0}}
service = served(Path(sys.argv[1]), inputs, "inductor")
if sys.argv[2] == "unchecked":
    object.__setattr__(service.model.reader, "ranges", {})
for number in (9, -9):
    row = [0] * 4096
    row[5] = number
    try:
        job = service.parse({"body": {"index": row}})
    except RequestError as error:
        assert error.field == "index", error
        continue
    print("about to run", flush=True)
    service.run([job])
(answer,) = service.run([service.parse({"body": {"index": [3] * 4096}})])
assert answer.engine == "compiled", service.state.buckets
"""


@pytest.mark.parametrize(("how", "status"), [("checked", 0), ("unchecked", -6)])
def test_on_two_threads_an_index_outside_its_table_ends_the_process_that_does_not_check(
    tmp_path: Path, how: str, status: int
) -> None:
    """Inductor's check throws inside an OpenMP region, which no exception can leave: SIGABRT."""
    tests = Path(__file__).parents[2]
    env = {
        **os.environ,
        "PYTHONPATH": f"{tests.parent / 'handler'}:{tests}",
        "OMP_NUM_THREADS": "2",
    }
    done = subprocess.run(
        [sys.executable, "-c", IN_TWO_THREADS, str(tmp_path), how],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr[-2000:]
    assert ("about to run" in done.stdout) == (how == "unchecked")
