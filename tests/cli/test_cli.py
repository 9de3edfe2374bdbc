"""What the command makes of its arguments before a server starts; nothing is built and nothing is
served.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import preheat
from preheat.cli import app, demo
from preheat.config.model import ModelConfig
from preheat.errors import ConfigError, PreheatError
from preheat.preflight.graphs import num_graphs
from preheat.torchserve import front, overview, readiness, server
from preheat.torchserve.archive import MANIFEST, is_archive

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(autouse=True)
def listening(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The ports that somebody listens on: none, whatever else runs on this machine."""
    ports: set[int] = set()
    monkeypatch.setattr(server, "_can_bind", lambda port, host: port not in ports)
    return ports


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tiny models that were made."""
    made: list[str] = []

    def build(family: str, folder: Path) -> Path:
        made.append(family)
        folder.mkdir(parents=True)
        return folder

    monkeypatch.setattr(demo, "build_tiny", build)
    return made


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        (tmp_path / "lighthouse.yaml").write_text(text)
        return tmp_path / "lighthouse.yaml"

    return write


@pytest.mark.parametrize("name", ["tiny-sdxl", "bert", "resnet"])
def test_what_is_shipped_to_try_needs_no_model_under_any_name(
    name: str, built: list[str], tmp_path: Path
) -> None:
    copy = tmp_path / "lighthouse.yaml"
    copy.write_text((ROOT / "model-config" / f"{name}.yaml").read_text())
    first, again = app.place_of_model(copy, None), app.place_of_model(copy, None)
    assert first == again and built == [name.removeprefix("tiny-")], (
        "made once, for the next serve too"
    )


def test_a_tiny_model_is_made_anew_where_it_would_be_another(
    built: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = demo.tiny_model("sdxl", here)
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"another {name}")
    assert demo.tiny_model("sdxl", here) != first and built == ["sdxl", "sdxl"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pipeline: {path: .}", "--model.*pipeline.path.*tiny:sdxl"),
        ("minWorkers: 1", "--model.*pipeline.path.*tiny:sdxl"),
        ("module: {path: ., inputs: {x: {shape: [batch, 4]}}}", "--model.*module.path.*tiny:bert"),
    ],
)
def test_a_yaml_without_a_model_names_both_ways(
    config: Callable[[str], Path], text: str, words: str
) -> None:
    with pytest.raises(PreheatError, match=words):
        app.place_of_model(config(text), None)


def test_a_folder_that_is_not_there_is_refused_before_a_server_starts(
    config: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "start", lambda *_, **__: pytest.fail("a server was started"))
    inside = config("pipeline: {path: /models/nope}")
    with pytest.raises(ConfigError, match=r"^pipeline.path: no such folder: /models/nope$"):
        app.serve(inside)
    for wrong in ("/models/nope", "./nope", "../nope", "~/nope nope"):
        with pytest.raises(PreheatError, match=r"^--model: no such folder: .*nope$"):
            app.serve(inside, model=wrong)
        with pytest.raises(PreheatError, match=r"^--model: no such folder: .*nope$"):
            app.archive(inside, model=wrong)


def test_a_path_is_seen_from_the_yaml_and_a_model_from_where_one_is(
    config: Callable[[str], Path], here: Path
) -> None:
    beside = config("pipeline: {path: ./sdxl}")
    for folder in (beside.parent / "sdxl", here / "mine"):
        folder.mkdir()
        (folder / "model_index.json").write_text("{}")
    assert app.place_of_model(beside, None) == str(beside.parent / "sdxl")
    assert (
        app.place_of_model(beside, "mine")
        == app.place_of_model(beside, "./mine")
        == str(here / "mine")
    )


def test_a_hub_id_is_passed_on_and_said(
    config: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.place_of_model(config("pipeline: {path: org/sdxl}"), None) == "org/sdxl"
    assert "org/sdxl: no folder here, so it is taken for a hub id" in capsys.readouterr().err


def test_an_archive_is_served_and_not_read_as_a_yaml(
    tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[Path]] = []

    def start(archives: list[Path], run_dir: Path, **__: object) -> server.TorchServe:
        started.append(archives)
        return server.TorchServe(run_dir, server.Ports(), 1, 0.0, ("fox",), here)

    monkeypatch.setattr(server, "start", start)
    monkeypatch.setattr(front, "start", lambda running, *_: running)
    mar, folder = tmp_path / "fox.mar", tmp_path / "owl"
    with zipfile.ZipFile(mar, "w") as archive:
        archive.writestr(str(MANIFEST), "{}")
    (folder / MANIFEST).parent.mkdir(parents=True)
    (folder / MANIFEST).write_text("{}")
    for path in (mar, folder):
        assert is_archive(path)
        app.serve(path)
        with pytest.raises(PreheatError, match="leave out --model"):
            app.serve(path, model="tiny:sdxl")
        with pytest.raises(PreheatError, match=f"archive already.*preheat serve {path}"):
            app.archive(path)
    app.serve(tmp_path, name="both")
    assert started == [[mar], [folder], [mar, folder]]
    said = capsys.readouterr().out
    assert (
        f"fox serves {mar}" in said
        and "/predictions/fox\n" in said
        and f"both serves {tmp_path}" in said
    )


def test_the_version_is_told() -> None:
    assert CliRunner().invoke(app.app, ["--version"]).output == f"preheat {preheat.__version__}\n"


# The mistakes of which a newcomer learnt only from a server that was started with them.
MISTAKES = {
    "a backend": (
        "pipeline: {path: 'tiny:sdxl'}\npt2: {compile: {enable: true, backend: openvno}}",
        "'openvno' is no backend of torch.compile; did you mean openvino?",
    ),
    "a folder": (
        "pipeline: {path: /models/nope}",
        "pipeline.path: no such folder: /models/nope",
    ),
    "a folder beside the YAML": ("pipeline: {path: ./nope}", "pipeline.path: no such folder: "),
    "a key that stands twice": (
        "pipeline: {path: 'tiny:sdxl'}\npt2: {shapes: {}}\npt2: {}",
        "pt2: stands twice, in lines 2 and 3",
    ),
    "code that is not there": (
        "module: {factory: 'net:make', inputs: {x: {shape: [batch, 4]}}}",
        "module.factory: ",
    ),
    "a plug-in that is not there": (
        "pipeline: {path: 'tiny:sdxl'}\npt2: {import: [op.py]}",
        "op.py does not exist",
    ),
    "a mode": (
        "pipeline: {path: 'tiny:sdxl'}\npt2: {compile: {enable: true, mode: max-autotun}}",
        "pt2.compile.mode: Inductor has no mode 'max-autotun'; did you mean max-autotune?",
    ),
    "a scheduler": (
        "pipeline: {path: 'tiny:sdxl', scheduler: EulerDiscreet}",
        "pipeline.scheduler: diffusers has no scheduler 'EulerDiscreet'; did you mean Euler",
    ),
    "a LoRA": (
        "pipeline: {path: 'tiny:sdxl', fused_lora: /models/nope}",
        "pipeline.fused_lora: no such folder: /models/nope",
    ),
    "a LoRA beside the YAML": (
        "pipeline: {path: 'tiny:sdxl', fused_lora: ./lora}",
        "pipeline.fused_lora: './lora' is relative",
    ),
    "a limit under every bucket": (
        "pt2: {shapes: {buckets: [[64, 64]]}}\npipeline: {path: ., limits: {max_side: 56}}",
        "pt2.shapes.buckets[0]: 64x64 is over pipeline.limits (max_side 56",
    ),
    "a tiny model": ("pipeline: {path: 'tiny:bert'}", "there is no tiny pipeline 'bert'; known: "),
}
DOUBTS = {
    "batches that nothing fills": (
        "module: {path: 'tiny:bert'}\nbatchSize: 2\npt2: {shapes: {batch_sizes: [1, 4]}}",
        "pt2.shapes.batch_sizes: nothing fills runs of 4, since batches are of 2 requests at most",
    ),
    "float16 under OpenVINO": (
        "pt2: {compile: {enable: true, backend: openvino}}\npipeline: {dtype: float16, path: x}",
        "pipeline.dtype: under openvino float16 often differs from eager by more than is let",
    ),
    "batches that are split": (
        "batchSize: 4\npipeline: {path: 'tiny:sdxl'}\npt2: {shapes: {batch_sizes: [1, 2]}}",
        "pt2.shapes.batch_sizes: a batch of 4 requests (batchSize) is split into runs of 2",
    ),
}


@pytest.mark.parametrize("command", ["check", "serve"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_before_anything_starts(
    mistake: str,
    command: str,
    config: Callable[[str], Path],
    built: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "start", lambda *_, **__: pytest.fail("a server was started"))
    text, message = MISTAKES[mistake]
    with pytest.raises(PreheatError) as refused:
        getattr(app, command)(config(text))
    assert message in str(refused.value)


@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_place_that_is_taken_is_refused_before_anything_is_made(
    command: str,
    config: Callable[[str], Path],
    built: list[str],
    listening: set[int],
    monkeypatch: pytest.MonkeyPatch,
    here: Path,
) -> None:
    monkeypatch.setattr(server, "start", lambda *_, **__: pytest.fail("a server was started"))
    call, good = getattr(app, command), config("pipeline: {path: 'tiny:sdxl'}")
    running = server.TorchServe(here, server.Ports(), 7, 0.0, ("fox",), here)
    monkeypatch.setattr(server, "find", lambda run_dir: running if run_dir.name == "fox" else None)
    listening |= {8082, 9001}
    with pytest.raises(PreheatError, match=r"^port 9001, 8082 on 127.0.0.1 is taken; choose"):
        call(good, inference_port=9001)
    with pytest.raises(PreheatError, match=r"^a server named fox runs already \(pid 7\)"):
        call(good, name="fox", metrics_port=9002)
    with pytest.raises(PreheatError, match=r"^port 9003 is asked for twice"):
        call(good, metrics_port=9003, grpc_port=9003)
    with pytest.raises(PreheatError, match="is no name for a server"):
        call(good, name="../fox")
    wrong = CliRunner().invoke(app.app, [command, str(good), "--grpc-port", "99999"])
    assert wrong.exit_code == 2 and "65535" in wrong.output
    assert built == []


@pytest.mark.parametrize("doubt", DOUBTS)
def test_what_loads_and_is_hardly_meant_is_said_before_anything_starts(
    doubt: str, config: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text, message = DOUBTS[doubt]
    app.check(config(text))
    said = capsys.readouterr().out
    assert message in said and "lighthouse can be served" in said


def test_a_model_that_is_given_is_checked_and_none_is_made(
    config: Callable[[str], Path], built: list[str], capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    empty = config("pipeline: {}")
    app.check(empty, model="tiny:sdxl")
    assert built == []
    assert capsys.readouterr().out == (
        "lighthouse can be served: pipeline tiny:sdxl, eager, nothing is compiled\n"
    )
    pickled = here / "pickled"
    pickled.mkdir()
    (pickled / "model_index.json").write_text("{}")
    (pickled / "unet.bin").write_text("")
    with pytest.raises(PreheatError, match="pickled weights can run code"):
        app.check(empty, model="./pickled")
    with pytest.raises(PreheatError, match="archive already"):
        (here / "x.mar").write_text("")
        app.check(here / "x.mar")


TWO = "buckets: [[64, 64], [64, 96]]"
MASKED = f"targets: [unet, vae.decoder], shapes: {{{TWO}, fit: mask"


@pytest.mark.parametrize(
    ("pt2", "more", "graphs"),
    [
        (f"shapes: {{{TWO}, batch_sizes: [1, 2, 4]}}", "", 12),
        (f"shapes: {{{TWO}, batch_sizes: [1, 2, 4]}}", "guidance: 'on'", 6),
        (f"shapes: {{{TWO}, batch_sizes: [1, 2, 4], invariant: true}}", "guidance: 'off'", 2),
        (f"shapes: {{{TWO}, batch_sizes: dynamic}}", "", 4),
        (f"shapes: {{{TWO}, batch_sizes: dynamic}}", "guidance: 'on'", 2),
        (f"targets: [unet, vae.decoder], shapes: {{{TWO}}}", "guidance: 'off'", 4),
        ("targets: [vae.decoder]", "", 1),
        (f"{MASKED}}}", "guidance: 'off'", 8),
        (f"{MASKED}, mask_only: true, vae_buckets: [[64, 96]]}}", "guidance: 'off'", 3),
        ("shapes: {strategy: exact}", "", None),
    ],
)
def test_the_number_of_graphs_follows_from_the_yaml(
    pt2: str, more: str, graphs: int | None
) -> None:
    text = f"batchSize: 4\npt2: {{compile: {{enable: true}}, {pt2}}}\npipeline: {{{more}}}"
    assert num_graphs(ModelConfig.parse(yaml.safe_load(text))) == graphs


@pytest.mark.parametrize("command", ["ready", "status"])
def test_a_gateway_that_has_ended_for_good_is_told_of(command: str, here: Path) -> None:
    recorded = here / ".preheat" / "run" / "fox" / "server.json"
    recorded.parent.mkdir(parents=True)
    document = {"management": "http://127.0.0.1:9", "models": ["fox"], "status_dir": str(here)}
    for pid, ended in ((os.getpid(), False), (2**22 + 1, True)):  # the kernel gives none so large
        recorded.write_text(json.dumps({**document, "gateway": [pid, 0.0]}))
        said = CliRunner().invoke(app.app, [command]).output
        assert ("the gateway has ended" in said) is ended


def test_the_token_of_a_server_that_was_started_here_is_its_own(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[str | None] = []

    def token(*options: str) -> str | None:
        result = CliRunner().invoke(app.app, ["status", "--json", *options])
        assert json.loads(result.output) == {"models": []}
        return tokens.pop()

    monkeypatch.setattr(readiness, "Management", lambda url, token: tokens.append(token))
    monkeypatch.setattr(overview, "look", lambda *_: [])
    run_dir = here / ".preheat" / "run" / "fox"
    run_dir.mkdir(parents=True)
    (run_dir / "server.json").write_text(json.dumps({"management": "http://127.0.0.1:9"}))
    assert token() is None
    for key_file, key in ((run_dir / "key_file.json", "own"), (here / "other.json", "other")):
        key_file.write_text(json.dumps({"management": {"key": key}}))
    assert token("--name", "fox") == "own"
    assert token("--name", "fox", "--token-file", str(here / "other.json")) == "other"
    assert token("--management", "http://127.0.0.1:9") is None
