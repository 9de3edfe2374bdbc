"""The blocks of README.md and docs/, run in order as they stand, with other ports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from preheat.torchserve import server
from served import ONE_THREAD, blocks

PORTS = {
    "INFERENCE_PORT": 8080,
    "MANAGEMENT_PORT": 8081,
    "METRICS_PORT": 8082,
    "GRPC_PORT": 7070,
    "GRPC_MANAGEMENT_PORT": 7071,
    "GATEWAY_PORT": 8000,
}
DOCUMENTS = ("README.md", "docs/requests.md", "docs/operations.md")
"""Those with blocks of `sh`, in this order: the first starts the server that the second asks and
stops.
"""
LINKED = (
    *(".venv", "Makefile", "archive", "constraints.txt", "examples", "handler", "model-config"),
    "pyproject.toml",
)


class Shell:
    """A checkout of links with a state folder of its own, and the documents' ports moved to free
    ones.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in LINKED:
            (folder / name).symlink_to(server.ROOT / name)
        (folder / ".preheat").mkdir()
        (server.ROOT / ".preheat" / "cache").mkdir(parents=True, exist_ok=True)
        (folder / ".preheat" / "cache").symlink_to(server.ROOT / ".preheat" / "cache")
        stand_in = folder / "bin" / "grpcurl"
        stand_in.parent.mkdir()
        stand_in.write_text(
            f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent / "grpcurl.py"} "$@"\n'
        )
        stand_in.chmod(0o755)
        free = server.Ports.free(gateway=True)
        numbers = [
            free.inference,
            free.management,
            free.metrics,
            free.grpc_inference,
            free.grpc_management,
            free.gateway,
        ]
        self.ports = {str(old): str(new) for old, new in zip(PORTS.values(), numbers, strict=True)}
        variables = " ".join(f"{name}={self.ports[str(port)]}" for name, port in PORTS.items())
        path = (
            os.environ["PATH"]
            if shutil.which("grpcurl")
            else f"{stand_in.parent}:{os.environ['PATH']}"
        )
        self.env = {
            **os.environ,
            **ONE_THREAD,
            "MAKEFLAGS": variables,
            "PATH": path,
            "PYTHONPATH": str(server.ROOT / "handler"),
        }

    def run(self, block: str) -> str:
        for old, new in self.ports.items():
            block = block.replace(f":{old}", f":{new}")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            check=False,
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path)
    yield shell
    for run_dir in (tmp_path / ".preheat" / "run").glob("*"):
        running = server.find(run_dir)
        if running:
            running.stop()


def test_every_document_with_blocks_to_run_is_run() -> None:
    found = {f"docs/{path.name}" for path in (server.ROOT / "docs").glob("*.md")} | {"README.md"}
    assert {document for document in found if blocks("sh", document)} == set(DOCUMENTS)


def test_the_blocks_work_as_pasted(shell: Shell) -> None:
    pasted = [block for document in DOCUMENTS for block in blocks("sh", document)]
    assert pasted[1].strip() == "make test"  # this is make test
    del pasted[1]
    outputs = {block: shell.run(block) for block in pasted}
    pictures = ["shapes", "purple", "shapes-grpc", "shapes-grpcurl"]
    for name in pictures:
        assert Image.open(shell.folder / f"{name}.png").size == (109, 187), name
    assert Image.open(shell.folder / "plain.png").size == (128, 128)
    rest, _, stub, grpcurl = ((shell.folder / f"{name}.png").read_bytes() for name in pictures)
    assert rest == stub == grpcurl
    assert "x-preheat-bucket: 192x128" in (shell.folder / "headers.txt").read_text()
    lines = (shell.folder / "events.ndjson").read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert (
        events[0] == "queued" and events[-2:] == ["image", "done"] and set(events[1:-2]) == {"step"}
    )
    (state,) = [output for block, output in outputs.items() if "customized=true" in block]
    assert '"state": "hot"' in state
    assert (shell.folder / ".preheat" / "archives" / "tiny-sdxl.mar").is_file()
    left = list((shell.folder / ".preheat" / "run").glob("*/server.json"))
    assert not left, "make stop and the demo left nothing"
    check_demo(shell.folder / "out")


def check_demo(out: Path) -> None:
    summary = json.loads((out / "summary.json").read_text())
    assert len({(entry["height"], entry["width"]) for entry in summary["requests"]}) >= 6
    assert {entry["protocol"] for entry in summary["requests"]} == {"REST", "gRPC"}
    for entry in summary["requests"]:
        assert Image.open(out / entry["file"]).size == (entry["width"], entry["height"])
        assert entry["engine"] == "openvino" and len(entry["bucket"]) == 2
        assert entry["milliseconds"] > 0
