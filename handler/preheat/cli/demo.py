"""The demos: a small trained SDXL, or a BERT or a ResNet of random weights, is archived, served,
warmed and asked for odd sizes over REST and gRPC.

The SDXL's leaves `*.png`, `contact-sheet.png` and `summary.json`, the others' `answers.json`; none
a process of its own.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from preheat.cli import demo_pictures, demo_tensors
from preheat.cli.progress import WarmupBars
from preheat.config.model import ModelConfig
from preheat.errors import PreheatError
from preheat.torchserve import server
from preheat.torchserve.archive import PACKAGE, build_archive
from preheat.torchserve.client import Client

MODELS = {"sdxl": "shapes.yaml", "bert": "bert.yaml", "resnet": "resnet.yaml"}
"""What there is a demo of, and the YAML that it is served by."""
SHAPES = server.ROOT / "examples" / "shapes" / "model"


def run(
    model: str, state: Path, out: Path, backend: str = "auto", console: Console | None = None
) -> None:
    """Run the demo of `model` with its working files in `state` and its results in `out`, compiled
    by `backend` (`pt2.compile.backend`).

    Raises:
        PreheatError: there is no such backend, the server did not become ready, or an answer is
            not what was asked for.
    """
    console = console or Console()
    config = with_backend(server.ROOT / "model-config" / MODELS[model], backend, state)
    with (
        serving(model, config, state, console) as (running, seconds),
        Client.to(running) as client,
    ):
        asked = demo_pictures.ask(client) if model == "sdxl" else demo_tensors.ask(client, model)
        answers, served = list(asked), client.state()
    out.mkdir(parents=True, exist_ok=True)
    console.print(engines(served["roads"]))
    if model == "sdxl":
        demo_pictures.save(answers, seconds, out, console)
    else:
        demo_tensors.save(answers, served["padding"], out, console)
    console.print("The server is stopped.")


def with_backend(config: Path, backend: str, state: Path) -> Path:
    """A copy of the YAML that names another backend; the YAML itself where it names this one.

    Raises:
        PreheatError: there is no such backend.
    """
    if not backend.isidentifier():
        raise PreheatError(f"{backend!r} is no name of a backend")
    text = config.read_text()
    if re.search(rf"backend: {backend}\b", text):
        return config
    copy = state / "configs" / backend / config.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(re.sub(r"backend: auto\b", f"backend: {backend}", text))
    ModelConfig.load(copy, ours=True)
    return copy


def engines(roads: Mapping[str, Any]) -> Table:
    """What was measured of every target's engines at this start, on the largest bucket."""
    table = Table(title="milliseconds a call on the largest bucket")
    for heading in ("target", "engine", "ms", "eager's ms", "of eager's time", "serves"):
        table.add_column(heading, justify="right" if "ms" in heading or "of" in heading else "left")
    for target, known in roads.items():
        for road, row in known["roads"].items():
            if "ratio" not in row:  # not to be had, or not what eager computes
                table.add_row(target, road, "", "", "", row["reason"])
                continue
            times = (f"{row[key]:.1f}" for key in ("milliseconds", "eager_milliseconds"))
            serves = "yes" if known["chosen"] in ("", road) else row["reason"]
            table.add_row(target, road, *times, f"{row['ratio']:.2f}", serves)
    return table


@contextmanager
def serving(
    family: str, config: Path, state: Path, console: Console
) -> Iterator[tuple[server.TorchServe, float]]:
    """A server of the demo's model of this family, warm, and the seconds that took.

    Raises:
        PreheatError: the server did not become ready.
    """
    begun, run_dir = time.monotonic(), state / "run" / f"demo-{family}"
    left = server.recall(run_dir)
    if left is not None:
        left.stop()  # an earlier demo that was killed before it could do so itself
    console.print(f"Packing a small {family} ...")
    model = SHAPES if family == "sdxl" else tiny_model(family, state / "models")
    archive = build_archive(config, model, output=state / "archives")
    console.print("Starting TorchServe; its worker compiles and warms every bucket:")
    running = server.start(
        [archive], run_dir, ports=server.Ports.free(), cache=state / "cache" / "inductor"
    )
    try:
        with WarmupBars(console) as progress:
            running.wait_ready(1800, watch=progress.update)
        seconds = time.monotonic() - begun
        console.print(f"READY after {seconds:.1f} s: REST {running.inference}, gRPC {running.grpc}")
        yield running, seconds
    finally:
        running.stop()


def tiny_model(family: str, models: Path) -> Path:
    """`build_tiny` into a folder of `models` whose name changes with what would be made, and only
    where it is not there.

    Raises:
        PreheatError: it failed.
    """
    made_by = [metadata.version(name) for name in ("torch", "diffusers", "transformers")]
    sources = sorted(PACKAGE.glob("models/**/tiny.py"))
    source = b"".join(path.read_bytes() for path in sources)
    digest = hashlib.sha256(source + repr(made_by).encode()).hexdigest()[:12]
    folder = models / f"tiny-{family}-{digest}"
    # which appears whole, by a rename
    return folder if folder.is_dir() else build_tiny(family, folder)


def build_tiny(family: str, folder: Path) -> Path:
    """`tiny.build` in a process of its own, which spares this one torch, and the terminal what
    loading it prints.

    Raises:
        PreheatError: it failed.
    """
    code = (
        "import sys, pathlib; from preheat.models import tiny; tiny.build(sys.argv[1], "
        "pathlib.Path(sys.argv[2]))"
    )
    search = os.pathsep.join(
        filter(None, [str(server.ROOT / "handler"), os.environ.get("PYTHONPATH")])
    )
    done = subprocess.run(
        [sys.executable, "-c", code, family, str(folder)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": search},
    )
    if done.returncode:
        raise PreheatError(f"no tiny {family} could be made: {done.stderr.strip()}")
    return folder
