"""README.md and docs/*.md: links that lead somewhere, quotable lines, examples that run."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from preheat.compilation.watch import CompileWatch
from preheat.config.model import ModelConfig
from preheat.status import StatusFile
from preheat.torchserve import client
from preheat.worker.worker import Worker
from served import blocks

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_WORDS, MAX_COLUMNS = 1000, 100
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def each_document(function: Any) -> Any:
    return pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)(function)


def anchors(document: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    text = FENCE.sub("", document.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_document
def test_files_that_are_named_exist(document: Path) -> None:
    folders = "model-config|archive|examples|tests|bench|docs|handler"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", document.read_text()):
        assert (ROOT / path).exists(), path


@each_document
def test_lines_are_short_but_for_tables_and_addresses(document: Path) -> None:
    for number, line in enumerate(document.read_text().splitlines(), start=1):
        if not line.startswith("|") and "https://" not in line:
            assert len(line) <= MAX_COLUMNS, f"{document.name}:{number}"


@each_document
def test_yaml_blocks_load(document: Path) -> None:
    for text in blocks("yaml", str(document.relative_to(ROOT))):
        assert ModelConfig.parse(yaml.safe_load(text)).pt2.compile.enable


@each_document
def test_what_examples_import_exists(document: Path) -> None:
    imports = re.compile(r"^from (preheat[\w.]*) import (.+)$", re.MULTILINE)
    for module, names in imports.findall(document.read_text()):
        found = importlib.import_module(module)
        assert all(hasattr(found, name.strip()) for name in names.split(",")), module


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.split()) <= MAX_WORDS
    for document in DOCUMENTS[1:]:
        assert f"(docs/{document.name})" in readme


def test_the_readme_begins_with_the_commands_that_ci_runs() -> None:
    first, second, *_ = blocks("sh", "README.md")
    assert (first, second) == ("make demo\n", "make test\n")


FACTS = ("facts", "ran", "flagged")
"""What dicts of facts are called where headers are made of them."""


def answer_headers() -> Iterator[str]:
    """The names of the facts of which `preheat_headers` makes headers, where it is called."""
    for path in (ROOT / "handler").rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and "preheat_headers(" in ast.unparse(
                function
            ):
                for node in ast.walk(function):
                    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in FACTS:
                        yield from re.findall(r"'([a-z]+)': ", ast.unparse(node.value))


def test_every_header_and_metric_is_documented() -> None:
    text = "".join(document.read_text() for document in DOCUMENTS)
    source = "".join(path.read_text() for path in (ROOT / "handler").rglob("*.py"))
    declared = yaml.safe_load((ROOT / "archive" / "metrics.yaml").read_text())["model_metrics"]
    metrics = {metric["name"] for kind in declared.values() for metric in kind}
    metrics -= {"HandlerTime", "PredictionTime"}  # TorchServe's own
    headers = set(re.findall(r"""["'](x-preheat-[a-z-]+)["']""", source)) | {
        f"x-preheat-{name}" for name in answer_headers()
    }
    assert len(headers) >= 7 and len(metrics) >= 15
    missing = sorted(name for name in headers | metrics if name not in text)
    assert not missing, "docs/requests.md has the headers, docs/operations.md the metrics"


@pytest.fixture
def tones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The archive of docs/modules.md's own module."""
    (source,) = [block for block in blocks("python", "docs/modules.md") if "class Tones" in block]
    (tmp_path / "tones.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("tones", None)


def test_the_masked_cnn_answers_padded_inputs_exactly(tones: Path, watch: CompileWatch) -> None:
    texts = blocks("yaml", "docs/modules.md")
    (document,) = [yaml.safe_load(text) for text in texts if "tones:make" in text]
    document["pt2"]["compile"]["backend"] = "aot_eager"
    document["module"]["inputs"]["samples"]["buckets"] = {"length": [32, 64]}
    config = ModelConfig.parse(document)
    service = Worker[Any, Any](config, tones, torch.device("cpu"), status=StatusFile(None, "tones"))
    assert service.state.state == "hot" and service.state.padding["exact"] == "rounding"
    samples = torch.linspace(-1, 1, 41)
    (answer,) = service.run([service.parse({"body": {"samples": samples.tolist()}})])
    (response,) = service.runner.postprocess([answer])
    assert response.code == 200 and response.headers["x-preheat-exact"] == "rounding"
    with torch.no_grad():
        module = importlib.import_module("tones").make()
        expected = module(samples[None], torch.ones(1, 41))["logits"]
    torch.testing.assert_close(answer.outputs["logits"].reshape(1, -1), expected)


def test_the_proto_for_clients_is_torchserves_wire_for_wire() -> None:
    own = fields((ROOT / "examples" / "inference.proto").read_text())
    import ts

    with zipfile.ZipFile(Path(ts.__file__).parent / "frontend" / "model-server.jar") as jar:
        theirs = fields(jar.read("proto/inference.proto").decode())
    assert len(own) == 7 and own <= theirs
    built = {(f.name, f.number) for message in client.messages() for f in message.DESCRIPTOR.fields}
    assert built <= {(name, int(number)) for _, name, number in own if number.isdigit()}


def fields(proto: str) -> set[tuple[str, str, str]]:
    """(type, name, number) of fields, ("rpc", name, signature) of calls, ("package", name, "")."""
    text = re.sub(r"//.*", "", proto)
    found = {
        (kind.replace(" ", ""), name, number)
        for kind, name, number in re.findall(r"([\w.<>, ]+?) +(\w+) *= *(\d+);", text)
    }
    calls = re.findall(r"rpc (\w+)(\([^{]+\))", text)
    found |= {("rpc", name, " ".join(signature.split())) for name, signature in calls}
    return found | {("package", name, "") for name in re.findall(r"package ([\w.]+);", text)}
