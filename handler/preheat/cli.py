"""The `preheat` command. Everything heavy is imported inside a command, since `preheat ready` is a probe."""

from __future__ import annotations

import json
import re
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from preheat.errors import PreheatError

if TYPE_CHECKING:
    from preheat.server import TorchServe

STATE = Path(".preheat")
"""Below the current folder: archives, compile cache, and a folder per server under `run`."""
MANAGEMENT = "http://127.0.0.1:8081"

DEMO_MODULES = ("bert", "resnet")
"""Configs in `model-config` whose model is made on the spot where none is given, beside the tiny pipelines."""

app = typer.Typer(
    help="Package, serve and watch models that are hot before the first request.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Format(str, Enum):
    """How an archive lies on disk."""

    zip_store = "zip-store"
    default = "default"
    no_archive = "no-archive"


Config = Annotated[
    Path, typer.Argument(help="The model YAML; its stem becomes the model's name.", exists=True, dir_okay=False)
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Pipeline or transformers folder, or a hub id. Default: the YAML's path; "
        "for tiny-sdxl, -sd15, -sd3, -flux, bert and resnet a model made on the spot."
    ),
]
Name = Annotated[str | None, typer.Option(help="The server's name, where several run here.")]


@app.command()
def archive(
    config: Config,
    model: Model = None,
    output: Annotated[Path, typer.Option(help="Folder the archive is written to.")] = STATE / "archives",
    archive_format: Annotated[
        Format,
        typer.Option(
            "--format", help="zip-store or default (deflated): a .mar; no-archive: a folder, which is served in place."
        ),
    ] = Format.zip_store,
    external: Annotated[
        bool, typer.Option("--external", help="Leave the weights where they are; the archive names the place.")
    ] = False,
    aot: Annotated[
        bool, typer.Option("--aot", help="Compile now, for machines like this one, so that workers compile nothing.")
    ] = False,
) -> None:
    """Package a model and its YAML into an archive for TorchServe."""
    from preheat.archiving import build_archive

    place = _model(config, model)
    print(build_archive(config, place, output=output, archive_format=archive_format.value, external=external, aot=aot))


@app.command()
def ready(
    model: Annotated[str | None, typer.Option(help="Ask about this model alone. Default: about all.")] = None,
    min_workers: Annotated[
        int | None, typer.Option(min=0, help="Want at least so many workers; minWorkers of the YAML counts anyway.")
    ] = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait, showing how warm-up goes.")] = 0,
    management: Annotated[
        str | None, typer.Option(help=f"URL of the management API. Default: the server started here, or {MANAGEMENT}.")
    ] = None,
    name: Name = None,
    token_file: Annotated[
        Path | None, typer.Option(help="TorchServe's key_file.json, where the management API wants a token.")
    ] = None,
) -> None:
    """Exit 0 when every worker is warm, 1 otherwise, and say what is missing.

    Unlike /ping it does not say yes before initialize() has returned. Made to be a Kubernetes exec probe.
    """
    from preheat import readiness

    known = None if management else _recorded(name, required=name is not None)
    url = management or (known or {}).get("management", MANAGEMENT)
    models = model or (known or {}).get("models")
    try:
        token = readiness.read_token(token_file) if token_file else None
    except (OSError, ValueError) as error:
        _fail(f"no token: {error}")
    verdict = readiness.check(url, models, min_workers, token)
    if wait and not verdict.ready and known:
        _wait(_recall(known), min_workers, wait)
        verdict = readiness.check(url, models, min_workers, token)
    elif wait and not verdict.ready:
        verdict = readiness.wait(url, models, min_workers, token, seconds=wait)
    for line in verdict.missing:
        print(line)
    if verdict.ready:
        print("ready")
    raise typer.Exit(0 if verdict.ready else 1)


@app.command()
def serve(
    config: Config,
    model: Model = None,
    name: Annotated[str | None, typer.Option(help="The server's name. Default: the YAML's stem.")] = None,
    inference_port: Annotated[int, typer.Option(help="REST predictions.")] = 8080,
    management_port: Annotated[int, typer.Option(help="REST management.")] = 8081,
    metrics_port: Annotated[int, typer.Option(help="Prometheus metrics.")] = 8082,
    grpc_port: Annotated[int, typer.Option(help="gRPC predictions.")] = 7070,
    grpc_management_port: Annotated[int, typer.Option(help="gRPC management.")] = 7071,
) -> None:
    """Start TorchServe on loopback in the background; the weights are served from where they lie.

    `preheat ready --wait 1800` waits until it is warm, `preheat stop` ends it.
    """
    from preheat import server
    from preheat.archiving import build_archive

    name = _checked(name or config.stem)
    run_dir = STATE / "run" / name
    if server.find(run_dir):
        raise PreheatError(f"a server named {name} runs already: stop it, or give this one another name")
    built = build_archive(
        config, _model(config, model), output=run_dir / "archives", archive_format="no-archive", external=True
    )
    ports = server.Ports(
        inference=inference_port,
        management=management_port,
        metrics=metrics_port,
        grpc_inference=grpc_port,
        grpc_management=grpc_management_port,
    )
    running = server.start([built], run_dir, ports=ports, cache=STATE / "cache" / "inductor")
    print(f"{name} is warming up (pid {running.pid}, logs in {running.logs})")
    print(f"REST        {running.inference}/predictions/{config.stem}")
    print(f"gRPC        {running.grpc}")
    print(f"management  {running.management}")
    print(f"metrics     {running.metrics}/metrics")


@app.command()
def stop(name: Name = None) -> None:
    """Stop a server that `preheat serve` started here, and no other."""
    known = _recorded(name, required=True)
    assert known is not None
    running = _recall(known)
    running.stop()
    print(f"stopped {running.run_dir.name}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures or answers.")] = Path("out"),
    model: Annotated[str, typer.Option(help="sdxl, bert or resnet.")] = "sdxl",
) -> None:
    """Build, archive, warm and ask a tiny model, and stop it again."""
    from preheat import demo, module_demo

    if model not in ("sdxl", *DEMO_MODULES):
        raise PreheatError(f"no demo of {model!r}: sdxl, {' or '.join(DEMO_MODULES)}")
    if model == "sdxl":
        demo.run(STATE, out)
    else:
        module_demo.run(model, STATE, out)


@app.command()
def schema() -> None:
    """Print the JSON schema of a model YAML, for editors: completion, and misspelt keys underlined.

    A YAML names it in its first line: # yaml-language-server: $schema=preheat.json
    """
    from preheat import reference

    print(json.dumps(reference.schema(), indent=2))


def main() -> None:
    """The entry point: errors that Preheat raises on purpose are one line, not a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that the demo's server is stopped
    try:
        app()
    except PreheatError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    print(f"preheat: {message}", file=sys.stderr)
    sys.exit(1)


def _checked(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise PreheatError(f"{name!r} is no name for a server: use letters, digits, '-', '_' and '.'")
    return name


def _model(config: Path, model: str | None) -> str | None:
    """The model to package: as given, as the YAML says, or a tiny one made now; None where a factory makes it."""
    if model is not None:
        return model
    from preheat.config import ModelConfig

    loaded = ModelConfig.load(config)
    if loaded.module is not None and loaded.module.factory is not None:
        return None
    path = loaded.pipeline.path if loaded.module is None else loaded.module.path
    if path not in (".", None):
        return path
    family = config.stem if config.stem in DEMO_MODULES else config.stem.removeprefix("tiny-")
    if family == config.stem and family not in DEMO_MODULES:
        raise PreheatError(
            f"{config} does not say where its model lies: give --model (make: MODEL=), a folder or hub id"
        )
    from preheat.demo import build_tiny

    if family in DEMO_MODULES:
        print(f"no model is given: a tiny {family} with random weights is made", file=sys.stderr)
    return str(build_tiny(family, STATE / "models" / config.stem))


def _recorded(name: str | None, *, required: bool) -> dict[str, Any] | None:
    """What `server.json` says of the server `name`, or of the only one that was started here and not stopped."""
    folder = STATE / "run"
    files = [folder / _checked(name) / "server.json"] if name else sorted(folder.glob("*/server.json"))
    files = [file for file in files if file.exists()]
    if len(files) > 1:
        names = ", ".join(file.parent.name for file in files)
        raise PreheatError(f"several servers were started here ({names}): say which by --name (make: NAME=)")
    if not files:
        if required:
            raise PreheatError(f"no server {name + ' ' if name else ''}was started here")
        return None
    recorded: dict[str, Any] = json.loads(files[0].read_bytes())
    return {**recorded, "run_dir": str(files[0].parent)}


def _recall(recorded: dict[str, Any]) -> TorchServe:
    from preheat import server

    running = server.recall(Path(recorded["run_dir"]))
    if running is None:
        raise PreheatError(f"{recorded['run_dir']}: the server is gone")
    return running


def _wait(running: TorchServe, min_workers: int | None, seconds: float) -> None:
    """Wait with progress bars, as long as the server lives and no worker says that it failed."""
    from preheat.progress import WarmupProgress

    with WarmupProgress() as progress:
        running.wait_ready(seconds, min_workers, watch=progress.update)
