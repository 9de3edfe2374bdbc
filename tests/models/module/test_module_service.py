"""The whole worker with a module and without TorchServe: tiny models of the real classes, cheap
backends of Dynamo.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import random
import shutil
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image
from torch._dynamo.utils import counters
from ts.torch_handler import base_handler

from config.test_pt2_forms import FORMS
from preheat import status as worker_status
from preheat.compilation.backends.inductor import TorchCompile
from preheat.compilation.watch import CompileWatch
from preheat.config.family import Manifest
from preheat.config.model import ModelConfig
from preheat.errors import ConfigError, ModelError, RequestError
from preheat.models import tiny
from preheat.models.module import tensors
from preheat.models.module.job import Answer
from preheat.models.module.model import ModuleModel
from preheat.models.module.runner import ModuleRunner
from preheat.status import StatusFile
from preheat.user_code import imported_from
from preheat.worker.worker import Worker

EXAMPLE = Path(__file__).parents[3] / "examples" / "attention_op.py"
BERT: dict[str, Any] = {
    "path": ".",
    "inputs": {
        "input_ids": {
            "dtype": "int64",
            "shape": ["batch", "sequence"],
            "buckets": {"sequence": [16, 32]},
        },
        "attention_mask": {"dtype": "int64", "shape": ["batch", "sequence"], "default": 1},
    },
    "outputs": {"last_hidden_state": {"crop": {1: "sequence"}}},
}
RESNET: dict[str, Any] = {
    "path": ".",
    "class": "AutoModelForImageClassification",
    "inputs": {
        "pixel_values": {
            "shape": ["batch", 3, "height", "width"],
            "buckets": {"height": [32, 48], "width": [32]},
            "pad": "edge",
        }
    },
}
MODEL_FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x).relu()
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("modules")
    for name in ("bert", "resnet"):
        tiny.build(name, root / name / "model")
    shutil.copy(EXAMPLE, root / "bert")
    return root


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What torch-model-archiver makes of a model file and a state dict."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "plain_net.py").write_text(MODEL_FILE)
    state = {"layer.weight": torch.arange(12.0).reshape(3, 4), "layer.bias": torch.zeros(3)}
    torch.save(state, folder / "weights.pt")
    return folder


MANIFEST: Manifest = {"model": {"modelFile": "plain_net.py", "serializedFile": "weights.pt"}}


def start(
    folder: Path,
    module: dict[str, Any],
    *,
    backend: str = "eager",
    enable: bool = True,
    imports: Any = (),
    **pt2: Any,
) -> Worker[Any, Any]:
    torch.compiler.set_stance("default")
    pt2["import"] = list(imports)
    data = {
        "compile": {"enable": enable, "backend": backend},
        "shapes": {"batch_sizes": [1, 2]},
    } | pt2
    config = ModelConfig.parse({"batchSize": 4, "pt2": data, "module": module})
    return Worker[Any, Any](config, folder, torch.device("cpu"), status=StatusFile(None, "m"))


def alone_of(service: Worker[Any, Any], answer: Answer) -> Answer:
    """The same request's answer without padding, eagerly."""
    assert isinstance(service.runner, ModuleRunner)
    return service.runner.alone(answer.job)


def ask(service: Worker[Any, Any], *bodies: object) -> list[Answer]:
    answers: list[Answer] = service.run([service.parse({"body": body}) for body in bodies])
    for answer in answers:
        answer.raise_if_failed()
    return answers


def ids(length: int) -> dict[str, Any]:
    return {"inputs": {"input_ids": [5 + index % 80 for index in range(length)]}}


def noise(height: int, width: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.random.default_rng(0).random((3, height, width), dtype=np.float32))
    return file.getvalue()


@pytest.mark.parametrize("batch_sizes", [[1, 2], "dynamic"])
def test_a_masked_encoder_is_hot_and_padding_changes_nothing(
    watch: CompileWatch, models: Path, batch_sizes: Any
) -> None:
    service = start(models / "bert", BERT, shapes={"batch_sizes": batch_sizes})
    state = service.current_state()
    assert (
        state.state == "hot"
        and state.padding["exact"] == "rounding"
        and float(state.padding["max_error"]) < 1e-4
    )
    assert {(row.bucket["sequence"], row.engine) for row in state.buckets} == {
        (16, "compiled"),
        (32, "compiled"),
    }
    rng = random.Random(0)
    for _ in range(20):
        lengths = [rng.randint(1, 32) for _ in range(rng.randint(1, 4))]
        answers = ask(service, *map(ids, lengths))
        assert {answer.engine for answer in answers} == {"compiled"}
        for length, answer in zip(lengths, answers, strict=True):
            alone = alone_of(service, answer)
            assert answer.outputs["last_hidden_state"].shape == (1, length, 32)
            torch.testing.assert_close(answer.outputs, alone.outputs, atol=1e-4, rtol=0)
    after = service.current_state()
    assert (after.compiles_since_ready, after.incidents, after.eager_fallbacks) == (0, 0, 0)


def num_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("batch_sizes", [[1, 2], "dynamic"])
def test_one_graph_serves_every_length_between_the_buckets(
    watch: CompileWatch, models: Path, batch_sizes: Any
) -> None:
    module = copy.deepcopy(BERT)
    module["inputs"]["input_ids"]["buckets"] = {"sequence": [4, 40]}
    shapes, graphs = {"strategy": "dynamic", "batch_sizes": batch_sizes}, num_graphs()
    service = start(models / "bert", module, shapes=shapes)
    state = service.current_state()
    assert (state.state, state.padding["exact"]) == ("hot", "rounding")
    assert {row.engine for row in state.buckets} == {"compiled"}
    assert num_graphs() - graphs == 2, "a lone row's, and that of more"
    for length in range(1, 41):
        lengths = [length, *range(1, length, 13)][: 1 + length % 4]
        answers = ask(service, *map(ids, lengths))
        assert {answer.engine for answer in answers} == {"compiled"}
        assert answers[0].bucket == f"sequence={max(4, length)}", "as large as its largest row"
        for own, answer in zip(lengths, answers, strict=True):
            alone = alone_of(service, answer)
            assert answer.outputs["last_hidden_state"].shape == (1, own, 32)
            torch.testing.assert_close(answer.outputs, alone.outputs, atol=1e-4, rtol=0)
    with pytest.raises(RequestError, match="40"):
        ask(service, ids(41))
    after = service.current_state()
    assert (after.compiles_since_ready, after.incidents, after.eager_fallbacks) == (0, 0, 0)


def test_lengths_share_no_run_where_padding_changes_answers(
    watch: CompileWatch, models: Path
) -> None:
    module = copy.deepcopy(RESNET)
    module["inputs"]["pixel_values"]["buckets"] = {"height": [32, 64]}
    module["inputs"]["pixel_values"]["shape"] = ["batch", 3, "height", 32]
    service = start(
        models / "resnet", module, shapes={"strategy": "dynamic", "batch_sizes": [1, 2]}
    )
    assert service.state.padding["exact"] == "padded"
    jobs = [service.parse({"body": noise(height, 32)}) for height in (33, 50, 33)]
    answers: list[Answer] = service.run(jobs)
    assert [answer.bucket for answer in answers] == ["height=33", "height=50", "height=33"]
    assert {answer.exact for answer in answers} == {"rounding"}
    for answer in answers:
        torch.testing.assert_close(
            answer.outputs, alone_of(service, answer).outputs, atol=1e-4, rtol=0
        )


def test_warm_up_runs_once_and_its_time_is_what_the_status_file_shows(
    watch: CompileWatch, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second round would take no time, and show none."""
    steps: list[str] = []
    step = StatusFile.step

    def counted(self: StatusFile, bucket: str, seconds: float) -> None:
        steps.append(bucket)
        step(self, bucket, seconds)

    monkeypatch.setattr(StatusFile, "step", counted)
    torch.compiler.set_stance("default")
    pt2 = {"compile": {"enable": True, "backend": "eager"}, "shapes": {"batch_sizes": [1, 2]}}
    config = ModelConfig.parse({"batchSize": 2, "pt2": pt2, "module": BERT})
    status = StatusFile(str(tmp_path), "m")
    service = Worker[Any, Any](config, models / "bert", torch.device("cpu"), status=status)
    (written,) = worker_status.read_statuses(tmp_path)
    assert len(steps) == written.total == 2 * len(written.buckets)
    for bucket, _, _, seconds in written.buckets:
        rows = [row for row in service.state.buckets if str(row.bucket) == bucket]
        assert sum(row.warm_seconds for row in rows) == pytest.approx(
            seconds, abs=0.002 * len(rows)
        )


def test_padding_that_is_not_masked_is_found_out(watch: CompileWatch, models: Path) -> None:
    unmasked = copy.deepcopy(BERT)
    unmasked["inputs"]["attention_mask"]["pad"] = 1
    service = start(models / "bert", unmasked, enable=False)
    padding = service.state.padding
    assert padding["exact"] == "padded" and float(padding["max_error"]) > 1e-3
    answers = ask(service, ids(3), ids(20))
    assert [answer.bucket for answer in answers] == ["sequence=16", "sequence=32"], (
        "nobody changes a neighbour's answer"
    )
    assert {answer.exact for answer in answers} == {"padded"}


def test_lengths_in_one_batch_share_the_smallest_bucket_that_holds_them(
    watch: CompileWatch, models: Path
) -> None:
    service = start(models / "bert", BERT)
    assert [answer.bucket for answer in ask(service, ids(3), ids(20))] == ["sequence=32"] * 2
    assert [answer.bucket for answer in ask(service, ids(3), ids(16))] == ["sequence=16"] * 2
    (answer,) = ask(service, ids(12))
    headers = service.runner.postprocess([answer])[0].headers
    assert headers["x-preheat-padding"] == "0.2500" and headers["x-preheat-exact"] == "rounding"


def test_a_network_without_a_mask_says_that_its_padding_shows(
    watch: CompileWatch, models: Path
) -> None:
    service = start(models / "resnet", RESNET)
    assert service.current_state().padding["exact"] == "padded"
    padded, whole = ask(service, noise(40, 20), noise(32, 32))
    assert (padded.bucket, padded.exact) == ("height=48 width=32", "padded"), (
        "its neighbour does not change its bucket"
    )
    assert (whole.bucket, whole.exact, whole.padding) == ("height=32 width=32", "rounding", 0.0)
    alone = alone_of(service, whole)
    torch.testing.assert_close(whole.outputs, alone.outputs, atol=1e-4, rtol=0)
    image = io.BytesIO()
    Image.effect_noise((20, 40), 50).convert("RGB").save(image, "png")
    (answer,) = ask(service, image.getvalue())
    assert (
        answer.bucket == "height=48 width=32" and service.current_state().compiles_since_ready == 0
    )


def test_answers_come_in_every_form(watch: CompileWatch, models: Path) -> None:
    service = start(models / "bert", BERT, enable=False)
    forms = {}
    for accept in ("application/json", "application/x-npy", "application/safetensors"):
        (answer,) = service.run([service.parse({"body": ids(5)}, {"accept": accept})])
        (response,) = service.runner.postprocess([answer])
        assert response.code == 200 and response.headers["content-type"] == accept
        forms[accept] = response.body
    lists = json.loads(forms["application/json"])
    assert (
        lists["engine"] == "eager"
        and lists["bucket"] == "sequence=16"
        and lists["exact"] == "rounding"
    )
    ours = torch.tensor(lists["outputs"]["last_hidden_state"])
    assert torch.equal(ours, torch.from_numpy(np.load(io.BytesIO(forms["application/x-npy"]))))
    assert torch.equal(
        ours, safetensors.torch.load(forms["application/safetensors"])["last_hidden_state"]
    )


def test_text_goes_through_the_folders_tokenizer(watch: CompileWatch, models: Path) -> None:
    service = start(models / "bert", BERT, enable=False)
    (answer,) = service.run([service.parse({"body": "hello"}, {"content-type": "text/plain"})])
    assert answer.outputs["last_hidden_state"].shape == (1, 7, 32), "five letters and two specials"
    with pytest.raises(RequestError, match="sequence 42, the largest bucket is 32"):
        service.parse({"body": {"text": "a" * 40}})


def test_tokens_outside_the_vocabulary_are_refused(watch: CompileWatch, models: Path) -> None:
    service = start(models / "bert", BERT, enable=False)
    module: Any = service.targets["model"]
    vocabulary = module.get_input_embeddings().num_embeddings
    ask(service, [0, vocabulary - 1])
    for tokens in ([vocabulary], [-1]):
        with pytest.raises(RequestError, match=rf"input_ids .* outside 0\.\.{vocabulary - 1}"):
            service.parse({"body": tokens})


def test_what_no_bucket_holds_is_refused_or_run_as_it_is(watch: CompileWatch, models: Path) -> None:
    with pytest.raises(RequestError) as caught:
        start(models / "bert", BERT, enable=False).parse({"body": ids(33)})
    assert caught.value.field == "input_ids"
    service = start(models / "bert", BERT, shapes={"oversize": "eager"})
    (answer,) = ask(service, ids(40))
    state = service.current_state()
    assert (answer.bucket, answer.engine, answer.padding) == ("none", "eager", 0.0)
    assert (state.planned_eager, state.incidents, state.compiles_since_ready) == (1, 0, 0)


def test_an_output_that_grows_with_padding_must_be_cut(watch: CompileWatch, models: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"module.outputs.last_hidden_state.crop: .*crop: {1: ...} with sequence"
    ):
        start(models / "bert", BERT | {"outputs": {}})
    with pytest.raises(ConfigError, match=r"module.inputs.pixels: .*takes no pixels"):
        start(models / "resnet", RESNET | {"inputs": {"pixels": {"shape": ["batch", 3]}}})


def started(
    folder: Path, answer: str, outputs: dict[str, Any], limits: Any = None, **pt2: Any
) -> Worker[Any, Any]:
    """A module of x, (batch, n), that answers with this expression."""
    name = f"net_{uuid.uuid4().hex}"
    net = "import torch\n\nclass Net(torch.nn.Module):\n    def forward(self, x):\n        return "
    (folder / f"{name}.py").write_text(f"{net}{answer}\n\ndef make():\n    return Net()\n")
    inputs = {"x": {"shape": ["batch", "n"], "buckets": {"n": [8]}}}
    module = {
        "factory": f"{name}:make",
        "inputs": inputs,
        "outputs": outputs,
        "limits": limits or {},
    }
    return start(folder, module, enable=False, **pt2)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("x.T", "first dimension must be the batch"),
        ("x.sum()", "first dimension must be the batch"),
        ("torch.ones(2, 3)", "first dimension must be the batch"),  # by chance as many as the batch
        ("torch.ones(1, 3)", "first dimension must be the batch"),
        ("torch.fft.fft(x)", "is complex64"),
    ],
)
def test_an_output_that_is_not_rows_is_refused_at_start(
    watch: CompileWatch, tmp_path: Path, answer: str, words: str
) -> None:
    for sizes in ([1, 2], [2], "dynamic"):
        with pytest.raises(ConfigError, match=words) as caught:
            started(tmp_path, answer, {}, shapes={"batch_sizes": sizes})
        assert caught.value.path == "module.outputs.output"


def test_rows_that_are_not_the_requests_fail_rather_than_leak(
    watch: CompileWatch, tmp_path: Path
) -> None:
    service = started(tmp_path, "x if x.max() < 100 else x[:1]", {"output": {"crop": {1: "n"}}})
    ask(service, [1.0, 2], [3.0])
    answers = service.run([service.parse({"body": [value]}) for value in (200.0, 201.0)])
    # Alone each of them has a row of its own.
    assert [answer.outputs["output"].tolist() for answer in answers] == [[[200.0]], [[201.0]]]
    service = started(
        tmp_path,
        "x if x.max() < 100 else x[:1]",
        {"output": {"crop": {1: "n"}}},
        shapes={"batch_sizes": [2]},
    )
    for answer in service.run([service.parse({"body": [value]}) for value in (200.0, 201.0)]):
        assert answer.error is not None and not answer.outputs


@pytest.mark.parametrize(
    ("answer", "exact", "max_error"),
    [
        ("x * 0 / x[:, -1:]", "padded", "not finite"),  # NaN, of padding alone
        ("x / x[:, -1:]", "padded", "not finite"),
        ("(x * 0).log()", "rounding", 0.0),  # -inf on both roads
    ],
)
def test_what_is_not_finite_is_not_measured_as_exact(
    watch: CompileWatch, tmp_path: Path, answer: str, exact: str, max_error: object
) -> None:
    padding = started(tmp_path, answer, {"output": {"crop": {1: "n"}}}).state.padding
    assert padding == {"exact": exact, "max_error": max_error, "max_share": max_error}
    json.dumps(padding, allow_nan=False)


def test_a_cut_that_is_wrong_for_odd_sizes_alone_is_found(
    watch: CompileWatch, tmp_path: Path
) -> None:
    cut = {"output": {"crop": {1: "n/2"}}}
    with pytest.raises(ConfigError, match=r"module.outputs.output.crop: .*\(1, 3\).*\(1, 2\)"):
        started(tmp_path, "x[:, 1::2]", cut)
    assert started(tmp_path, "x[:, ::2]", cut).state.padding["exact"] == "rounding"


def test_a_file_of_one_tensor_is_refused_where_a_model_answers_two(
    watch: CompileWatch, tmp_path: Path
) -> None:
    service = started(tmp_path, "{'a': x[:, 0], 'b': x[:, 0]}", {})
    with pytest.raises(RequestError, match="answers a, b") as caught:
        service.parse({"body": [1.0]}, {"accept": "application/x-npy"})
    assert (caught.value.field, caught.value.code) == ("accept", 406)


def test_a_bare_tensor_takes_the_only_declared_name(watch: CompileWatch, tmp_path: Path) -> None:
    (answer,) = ask(started(tmp_path, "x[:, :1]", {"logits": {}}), [1.0, 2.0])
    assert list(answer.outputs) == ["logits"]
    (answer,) = ask(started(tmp_path, "x[:, :1]", {}), [1.0, 2.0])
    assert list(answer.outputs) == ["output"]


def test_padding_that_shows_is_said_as_a_share_of_the_largest_magnitude(
    watch: CompileWatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = started(tmp_path, "x.mean(-1, keepdim=True)", {})
    share = float(service.state.padding["max_share"])
    assert (
        0.1 < share < 1
        and f"padding changes answers by up to {share:.2g} of the largest magnitude" in caplog.text
    )
    caplog.clear()
    assert started(tmp_path, "x.sum(-1, keepdim=True)", {}).state.padding["exact"] == "rounding"
    assert "padding changes" not in caplog.text


@pytest.mark.parametrize(
    ("most", "codes"),
    [(100_000, (200, 200, 200)), (50_000, (406, 200, 200)), (1_000, (413, 413, 413))],
)
def test_an_answer_too_large_for_torchserve_is_refused_before_it_is_encoded(
    watch: CompileWatch, tmp_path: Path, most: int, codes: tuple[int, ...]
) -> None:
    """A larger one than max_response_size would end the worker."""
    limits = {"max_response_bytes": most}
    service = started(tmp_path, "torch.rand(x.shape[0], 4000)", {}, limits=limits)
    for accept, code in zip(
        ("application/json", "application/safetensors", "application/x-npy"), codes, strict=True
    ):
        (answer,) = service.run([service.parse({"body": [1.0]}, {"accept": accept})])
        (response,) = service.runner.postprocess([answer])
        assert response.code == code == (answer.error.code if answer.error else 200)
        if code == 406:
            assert (
                "ask for application/safetensors, 16000 bytes"
                in json.loads(response.body)["message"]
            )
        if code == 200:
            assert len(response.body) <= most


def test_encoding_is_warmed_too(
    watch: CompileWatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    for name in ("dumps", "to_npy", "to_safetensors"):
        encode = getattr(tensors, name)

        def encoding(*args: Any, name: str = name, encode: Any = encode) -> Any:
            called.append(name)
            return encode(*args)

        monkeypatch.setattr(tensors, name, encoding)
    started(tmp_path, "x[:, :1]", {})
    assert set(called) == {"dumps", "to_npy", "to_safetensors"}


def test_a_target_inside_the_module_is_compiled_alone(watch: CompileWatch, models: Path) -> None:
    service = start(models / "bert", BERT, targets=["encoder"])
    assert {row.target for row in service.state.buckets} == {"encoder"}
    assert ask(service, ids(9))[0].engine == "compiled"
    with pytest.raises(ConfigError, match=r"pt2.targets: BertModel has no module 'decoder'"):
        start(models / "bert", BERT, targets=["decoder"])


@pytest.mark.parametrize("family", ["module", "pipeline"])
def test_an_imported_op_leaves_the_graph_whole(
    watch: CompileWatch, models: Path, tmp_path: Path, family: str
) -> None:
    pt2 = {"compile": {"enable": True, "backend": "eager", "fullgraph": True}}
    own: dict[str, Any] = {"module": BERT, "pt2": pt2}
    folder, body = models / "bert", ids(5)
    if family == "pipeline":
        tiny.build("sdxl", tmp_path / "model")
        shutil.copy(EXAMPLE, tmp_path)
        folder, body = tmp_path, {"prompt": "a cat", "seed": 1}
        shapes = {"buckets": [[64, 64]]}
        own = {
            "pipeline": {
                "tasks": ["text-to-image"],
                "guidance": "on",
                "defaults": {"num_inference_steps": 2},
            },
            "pt2": pt2 | {"shapes": shapes},
        }

    def served(**changes: Any) -> tuple[Any, str]:
        torch.compiler.set_stance("default")
        counters["graph_break"].clear()  # those of other tests
        config = ModelConfig.parse(own | {"pt2": own["pt2"] | changes})
        service = Worker[Any, Any](
            config, folder, torch.device("cpu"), status=StatusFile(None, "op")
        )
        with torch.profiler.profile() as profile:
            (answer,) = service.run([service.parse({"body": body})])
        assert answer.engine == "compiled" and not counters["graph_break"]
        ran = any(event.key == "preheat_example::attention" for event in profile.key_averages())
        assert ran == bool(changes)
        pictures = [
            np.asarray(picture).astype(float) / 255 for picture in getattr(answer, "pictures", ())
        ]
        return pictures or [answer.outputs["last_hidden_state"].numpy()], service.state.fingerprint

    (with_op,), print_with = served(**{"import": ["attention_op.py"]})
    (without,), print_without = served()
    assert np.abs(with_op - without).max() <= 1.01 / 255 and print_with != print_without


def test_what_may_not_be_imported_is_refused(
    watch: CompileWatch, models: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"pt2.import\[0\]: the archive holds no file 'other.py'"):
        start(models / "bert", BERT, imports=["other.py"])
    (tmp_path / "json.py").touch()
    with pytest.raises(ConfigError, match="hide the module json"):
        start(tmp_path, BERT, imports=["json.py"])
    (tmp_path / "outside.py").symlink_to(EXAMPLE)
    with pytest.raises(ConfigError, match=r"holds no file 'outside\.py'"):
        start(tmp_path, BERT, imports=["outside.py"])


def test_a_factory_in_the_archive_makes_the_module(watch: CompileWatch, tmp_path: Path) -> None:
    source = MODEL_FILE + "\n\ndef make():\n    return Net()\n\n\ndef none():\n    return 1\n"
    (tmp_path / "made_here.py").write_text(source)
    inputs = {"x": {"shape": ["batch", 4]}}
    service = start(tmp_path, {"factory": "made_here:make", "inputs": inputs})
    (answer,) = ask(service, [1.0, 2, 3, 4])
    assert (answer.bucket, answer.engine, answer.outputs["output"].shape) == (
        "fixed",
        "compiled",
        (1, 3),
    )
    for factory, words in (
        ("made_here:none", "returns a int"),
        ("made_here:gone", "no function"),
        ("a.b:c", "import"),
    ):
        with pytest.raises(ConfigError, match=f"module.factory: .*{words}"):
            start(tmp_path, {"factory": factory, "inputs": inputs})


def test_a_factory_that_is_no_file_of_the_archive_is_refused(
    watch: CompileWatch, tmp_path: Path
) -> None:
    inputs = {"x": {"shape": ["batch", 4]}}
    for name in ("torch.nn:Identity", "sys:exit"):  # installed; built in
        with pytest.raises(ConfigError, match=r"module\.factory: .* is not a file of the archive"):
            start(tmp_path, {"factory": name, "inputs": inputs})


@pytest.mark.parametrize("by_factory", [True, False])
def test_compiled_code_depends_on_every_file_that_the_model_imports(
    watch: CompileWatch, tmp_path: Path, by_factory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two forwards of one class, weights and repr are two programs."""
    seen = []
    for index, forward in enumerate(("relu", "tanh")):
        folder = tmp_path / str(index)
        folder.mkdir()
        monkeypatch.chdir(folder)  # as TorchServe's workers do
        called = MODEL_FILE.replace("self.layer(x).relu()", "steps_of_two.act(self.layer(x))")
        (folder / "net_of_two.py").write_text(
            f"import steps_of_two\n{called}\n\ndef make():\n    return Net()\n"
        )
        (folder / "steps_of_two.py").write_text(f"from torch import {forward} as act\n")
        (folder / "unused_of_two.py").write_text("")
        for name in ("net_of_two", "steps_of_two"):
            sys.modules.pop(name, None)
        config = ModelConfig.parse({"module": {"factory": "net_of_two:make"} if by_factory else {}})
        work = ModuleModel.load(
            config, folder, {"model": {"modelFile": "net_of_two.py"}}, torch.device("cpu")
        )
        seen.append((imported_from(folder), work.fingerprint_facts()))
        sys.path.remove(str(folder.resolve()))
    (first, structure), (second, same) = seen
    assert list(first) == list(second) == ["net_of_two.py", "steps_of_two.py"] and structure == same
    assert [name for name in first if first[name] != second[name]] == ["steps_of_two.py"]


def served_plainly(folder: Path, text: str) -> Worker[Any, Any]:
    torch.compiler.set_stance("default")
    config = ModelConfig.parse(yaml.safe_load(text))
    return Worker[Any, Any](
        config, folder, torch.device("cpu"), status=StatusFile(None, "p"), manifest=MANIFEST
    )


# shapes and targets are no words of TorchServe's. openvino never reaches torch.compile here, with
# which it fails: it is exported for shapes that the YAML names. An export is a library instead of a
# model file.
THEIRS = [
    form
    for form in FORMS
    if not any(word in form for word in ("shapes", "targets", "export", "openvino"))
]


@pytest.mark.parametrize("form", THEIRS)
def test_torchserves_own_forms_choose_as_basehandler_does(
    watch: CompileWatch, plain: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same model file, state dict and YAML through both; compiling itself is another test's
    matter.
    """
    chosen: list[Any] = []

    def compiling(model: Any, **kwargs: Any) -> Any:
        chosen.append(kwargs)
        return model

    monkeypatch.setattr(torch, "compile", compiling)
    monkeypatch.syspath_prepend(str(plain))
    sys.modules.pop("plain_net", None)
    theirs = base_handler.BaseHandler()
    data = yaml.safe_load(form)
    context = SimpleNamespace(
        model_yaml_config=copy.deepcopy(data),
        system_properties={"model_dir": str(plain)},
        manifest=MANIFEST,
    )
    monkeypatch.setattr(base_handler, "IPEX_AVAILABLE", False, raising=False)
    theirs.initialize(context)
    by_them, chosen[:] = list(chosen), []
    sys.modules.pop("plain_net", None)
    service = served_plainly(plain, form)
    assert chosen == by_them and service.state.state == "cold"
    (answer,) = ask(service, [[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
    expected = theirs.inference(torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]]))
    assert torch.equal(answer.outputs["output"], expected), (
        "a request is one call as it is, its batch included"
    )


def test_openvino_without_declared_shapes_is_served_eagerly_and_says_so(
    watch: CompileWatch, plain: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("openvino")
    (answer,) = ask(served_plainly(plain, "pt2: openvino"), [[1.0, 2, 3, 4]])
    assert answer.engine == "eager" and answer.fallback and "has no list of shapes" in caplog.text


@pytest.mark.parametrize(
    "form", ["pt2: aot_eager", "pt2: {compile: {enable: true, backend: eager}}"]
)
def test_plain_yamls_compile_in_the_first_request_and_say_so(
    watch: CompileWatch, plain: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        service = served_plainly(plain, form)
    assert service.state.state == "cold" and "module.inputs is not declared" in caplog.text
    (answer,) = ask(service, {"x": [[1.0, 2, 3, 4]]})
    assert answer.engine == "compiled" and service.current_state().compiles_since_ready > 0


@pytest.mark.parametrize("form", ["pt2: nonsense", "pt2: {compile: {enable: 'true'}}"])
def test_what_torchserve_would_overlook_is_a_warning_and_counts_every_request(
    watch: CompileWatch, plain: Path, form: str
) -> None:
    service = served_plainly(plain, form)
    (answer,) = ask(service, [[1.0, 2.0, 3.0, 4.0]])
    state = service.current_state()
    assert (answer.engine, state.eager_fallbacks) == ("eager", 1)
    assert len(state.warnings) >= 1 and "nothing is compiled" in state.warnings[0]


def test_a_compile_that_fails_in_a_request_falls_back_once_and_loudly(
    watch: CompileWatch,
    plain: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With BaseHandler each request would be a 503 for ever."""

    def failing(code: TorchCompile, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("no lowering")

    monkeypatch.setattr(TorchCompile, "__call__", failing)

    service = served_plainly(plain, "pt2: {compile: {enable: true, backend: eager}}")
    for num_fallbacks in (1, 2):
        (answer,) = ask(service, [[1.0, 2.0, 3.0, 4.0]])
        assert answer.engine == "eager" and service.current_state().eager_fallbacks == num_fallbacks
    assert caplog.text.count("served eagerly from now on: NotImplementedError: no lowering") == 1
    (broken,) = service.run([service.parse({"body": [[1.0, 2.0]]})])
    assert broken.error is not None and broken.error.code == 500


def test_weights_that_are_more_than_tensors_are_refused(
    watch: CompileWatch, plain: Path, tmp_path: Path
) -> None:
    shutil.copy(plain / "plain_net.py", tmp_path)
    cases: list[tuple[Any, str]] = [
        ({"layer.weight": SimpleNamespace()}, "no state dict that can be read safely"),
        ([1], "not a state dict"),
        ({"other": torch.ones(1)}, "not of this module"),
    ]
    for state, words in cases:
        torch.save(state, tmp_path / "weights.pt")
        with pytest.raises(ModelError, match=words):
            served_plainly(tmp_path, "minWorkers: 1")


def test_a_transformers_folder_with_pickled_weights_is_refused(
    models: Path, tmp_path: Path
) -> None:
    shutil.copytree(models / "bert", tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model" / "model.safetensors"
    torch.save(safetensors.torch.load_file(weights), tmp_path / "model" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError):
        start(tmp_path, BERT)
