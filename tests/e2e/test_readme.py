"""The README's blocks, run in order as they stand, with other ports."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from preheat import server
from preheat.config import ModelConfig
from served import README, blocks

PORTS = {
    "INFERENCE_PORT": 8080,
    "MANAGEMENT_PORT": 8081,
    "METRICS_PORT": 8082,
    "GRPC_PORT": 7070,
    "GRPC_MANAGEMENT_PORT": 7071,
}


class Shell:
    """A checkout of links with a state folder of its own, and the README's ports moved to free ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in (".venv", "Makefile", "archive", "constraints.txt", "handler", "model-config", "pyproject.toml"):
            (folder / name).symlink_to(server.ROOT / name)
        (folder / ".preheat").mkdir()
        (server.ROOT / ".preheat" / "cache").mkdir(parents=True, exist_ok=True)
        (folder / ".preheat" / "cache").symlink_to(server.ROOT / ".preheat" / "cache")
        stand_in = folder / "bin" / "grpcurl"
        stand_in.parent.mkdir()
        stand_in.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent / "grpcurl.py"} "$@"\n')
        stand_in.chmod(0o755)
        free = server.Ports.free()
        numbers = [free.inference, free.management, free.metrics, free.grpc_inference, free.grpc_management]
        self.ports = {str(old): str(new) for old, new in zip(PORTS.values(), numbers, strict=True)}
        variables = " ".join(f"{name}={self.ports[str(port)]}" for name, port in PORTS.items())
        path = os.environ["PATH"] if shutil.which("grpcurl") else f"{stand_in.parent}:{os.environ['PATH']}"
        self.env = {**os.environ, "MAKEFLAGS": variables, "PATH": path, "PYTHONPATH": str(server.ROOT / "handler")}

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


def test_the_blocks_work_as_pasted(shell: Shell) -> None:
    outputs = {block: shell.run(block) for block in blocks("sh") if block.strip() != "make test"}  # this is make test
    for name in ("lighthouse.png", "night.png", "lighthouse-grpc.png"):
        assert Image.open(shell.folder / name).size == (199, 233), name
    assert (shell.folder / "lighthouse.png").read_bytes() == (shell.folder / "lighthouse-grpc.png").read_bytes()
    assert "x-preheat-bucket: 256x256" in (shell.folder / "headers.txt").read_text()
    told = [json.loads(line)["event"] for line in (shell.folder / "events.ndjson").read_text().splitlines()]
    assert told[0] == "queued" and told[-2:] == ["image", "done"] and set(told[1:-2]) == {"step"}
    (state,) = [output for block, output in outputs.items() if "customized=true" in block]
    assert '"state": "hot"' in state
    assert (shell.folder / ".preheat" / "archives" / "tiny-sdxl.mar").is_file()
    assert not list((shell.folder / ".preheat" / "run").glob("*/server.json")), "make stop and the demo left nothing"
    summary = json.loads((shell.folder / "out" / "summary.json").read_text())
    assert len({(entry["height"], entry["width"]) for entry in summary["requests"]}) >= 6
    assert {entry["protocol"] for entry in summary["requests"]} == {"REST", "gRPC"}
    for entry in summary["requests"]:
        assert Image.open(shell.folder / "out" / entry["file"]).size == (entry["width"], entry["height"])
        assert entry["engine"] == "compiled" and len(entry["bucket"]) == 2 and entry["milliseconds"] > 0


def test_the_yaml_is_a_config_that_loads() -> None:
    for text in blocks("yaml"):
        assert ModelConfig.parse(yaml.safe_load(text)).pt2.compile.enable


def test_the_readme_names_only_files_that_exist() -> None:
    for path in re.findall(r"`((?:model-config|archive|examples|tests|bench|docs)/[\w./-]+)`", README):
        assert (server.ROOT / path).exists(), path
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (server.ROOT / path).exists(), path
