"""The `preheat` command. Everything heavy is imported inside a command, since `preheat ready` is a
probe.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import sys
import time
from contextlib import suppress
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from preheat.cli.doctor import doctor
from preheat.cli.init import init
from preheat.cli.profiler import profile
from preheat.errors import ConfigError, PreheatError
from preheat.status import STATUS_DIR_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from preheat.planning.demand import Demand
    from preheat.status import Status
    from preheat.torchserve.server import TorchServe

STATE = Path(".preheat")
"""Below the current folder: archives, compile cache, and a folder per server under `run`."""
MANAGEMENT = "http://127.0.0.1:8081"

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
    Path, typer.Argument(help="The model YAML; its stem becomes the model's name.", exists=True)
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Pipeline or transformers folder, or a hub id (org/name), or tiny:sdxl (sd15, sd3, "
        "flux, bert, resnet): one with random weights, made on the spot. Default: the YAML's path."
    ),
]
Name = Annotated[str | None, typer.Option(help="The server's name, where several run here.")]
OneModel = Annotated[
    str | None, typer.Option(help="Ask about this model alone. Default: about all.")
]
ManagementUrl = Annotated[
    str | None,
    typer.Option(
        help=f"URL of the management API. Default: the server started here, or {MANAGEMENT}."
    ),
]
Port = partial(typer.Option, min=1, max=65_535)
InferencePort = Annotated[int, Port(help="REST predictions.")]
ManagementPort = Annotated[int, Port(help="REST management.")]
MetricsPort = Annotated[int, Port(help="Prometheus metrics.")]
GrpcPort = Annotated[int, Port(help="gRPC predictions.")]
GrpcManagementPort = Annotated[int, Port(help="gRPC management.")]
ServerName = Annotated[
    str | None, typer.Option("--name", help="The server's name. Default: the YAML's or archive's.")
]
TokenFile = Annotated[
    Path | None,
    typer.Option(help="TorchServe's key_file.json, where the management API wants a token."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        import preheat

        print(f"preheat {preheat.__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """What stands before the commands."""


@app.command()
def archive(
    config: Config,
    model: Model = None,
    output: Annotated[Path, typer.Option(help="Folder the archive is written to.")] = STATE
    / "archives",
    archive_format: Annotated[
        Format,
        typer.Option(
            "--format",
            help=(
                "zip-store or default (deflated): a .mar; no-archive: a folder, which is served in "
                "place."
            ),
        ),
    ] = Format.zip_store,
    external: Annotated[
        bool,
        typer.Option(
            "--external", help="Leave the weights where they are; the archive names the place."
        ),
    ] = False,
    aot: Annotated[
        bool,
        typer.Option(
            "--aot",
            help="Compile now, for machines like this one, so that workers compile nothing.",
        ),
    ] = False,
) -> None:
    """Package a model and its YAML into an archive for TorchServe."""
    from preheat.torchserve.archive import build_archive

    _refuse_archive(config)
    place = place_of_model(config, model)
    print(
        build_archive(
            config,
            place,
            output=output,
            archive_format=archive_format.value,
            external=external,
            aot=aot,
        )
    )


@app.command()
def check(
    config: Config,
    model: Model = None,
    name: ServerName = None,
    inference_port: InferencePort = 8080,
    management_port: ManagementPort = 8081,
    metrics_port: MetricsPort = 8082,
    grpc_port: GrpcPort = 7070,
    grpc_management_port: GrpcManagementPort = 7071,
) -> None:
    """Verify what `serve` would, and start nothing: exit 1 with the reason if it would refuse.

    The YAML and the model first, then whether the server's name and ports are free here.
    """
    from preheat.cli.check import summary
    from preheat.config.places import TINY_PREFIX
    from preheat.torchserve import server
    from preheat.torchserve.archive import packaged_place, verify

    _refuse_archive(config)
    loaded, place = verify(config), _named(config, model)
    if place is None or not place.startswith(TINY_PREFIX):
        packaged_place(loaded, place, external=True)
    for warning in loaded.warnings:
        typer.secho(warning, fg=typer.colors.YELLOW)
    ports = server.Ports(
        inference=inference_port,
        management=management_port,
        metrics=metrics_port,
        grpc_inference=grpc_port,
        grpc_management=grpc_management_port,
    )
    server.check_free(STATE / "run" / _checked(name or config.stem), ports)
    print(f"{config.stem} can be served: {summary(loaded, place)}")


app.command()(doctor)
app.command()(profile)
app.command()(init)


@app.command()
def ready(
    model: OneModel = None,
    min_workers: Annotated[
        int | None,
        typer.Option(
            min=0, help="Want at least so many workers; minWorkers of the YAML counts anyway."
        ),
    ] = None,
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds to wait, showing how warm-up goes.")
    ] = 0,
    management: ManagementUrl = None,
    name: Name = None,
    token_file: TokenFile = None,
) -> None:
    """Exit 0 when every worker is warm, 1 otherwise, and say what is missing.

    Unlike /ping it does not say yes before initialize() has returned. Made to be a Kubernetes exec
    probe.
    """
    from preheat.torchserve import readiness

    asked = _Asked.of(management, name, model, token_file)
    place = (asked.url, asked.models, min_workers, asked.token)
    verdict = readiness.check(*place, statuses=asked.statuses())
    if wait and not verdict.ready and asked.known:
        _wait(_recall(asked.known), min_workers, wait)
        verdict = readiness.check(*place, statuses=asked.statuses())
    elif wait and not verdict.ready:
        verdict = readiness.wait(*place, seconds=wait, statuses=asked.statuses, report=_say_waiting)
    for line in verdict.missing:
        print(line)
    if verdict.ready:
        _print_engines([status for status in asked.statuses() if status.alive])
        print("ready")
    raise typer.Exit(0 if verdict.ready else 1)


@app.command()
def status(
    model: OneModel = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object; with --watch, one a line.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it anew every second, until Ctrl-C.")
    ] = False,
    management: ManagementUrl = None,
    name: Name = None,
    token_file: TokenFile = None,
) -> None:
    """Show each model's workers, queue and restarts, and what serves its buckets.

    Asks the management API's list and the workers' status files, so it waits for no worker; what a
    batch under way has done shows at its end. Exit 1 where the server does not answer.
    """
    from preheat.cli.status import show
    from preheat.torchserve import overview, readiness

    asked = _Asked.of(management, name, model, token_file)
    server = readiness.Management(asked.url, asked.token)
    with suppress(KeyboardInterrupt):
        while True:
            try:
                views = overview.look(server, asked.models, asked.statuses())
            except readiness.ERRORS as error:
                if not watch:
                    _fail(server.explain(error))
                print(server.explain(error), file=sys.stderr)
            else:
                if as_json:
                    document = {"models": [dataclasses.asdict(view) for view in views]}
                    print(json.dumps(document), flush=True)
                else:
                    show(views, anew=watch)
            if not watch:
                return
            time.sleep(1)


@app.command()
def serve(
    config: Annotated[
        Path,
        typer.Argument(
            help="A model YAML, or what `preheat archive` wrote: a .mar or a no-archive folder.",
            exists=True,
        ),
    ],
    model: Model = None,
    name: ServerName = None,
    inference_port: InferencePort = 8080,
    management_port: ManagementPort = 8081,
    metrics_port: MetricsPort = 8082,
    grpc_port: GrpcPort = 7070,
    grpc_management_port: GrpcManagementPort = 7071,
) -> None:
    """Start TorchServe on loopback in the background; the weights are served from where they lie.

    `preheat ready --wait 1800` waits until it is warm, `preheat stop` ends it.
    """
    from preheat.torchserve import server
    from preheat.torchserve.archive import build_archive, is_archive

    archived = is_archive(config)
    if archived and model is not None:
        raise PreheatError(
            f"{config} is an archive, which holds its model or names it: leave out --model (make: "
            "MODEL=)"
        )
    model_name = config.name.removesuffix(".mar") if archived else config.stem
    name = _checked(name or model_name)
    run_dir = STATE / "run" / name
    ports = server.Ports(
        inference=inference_port,
        management=management_port,
        metrics=metrics_port,
        grpc_inference=grpc_port,
        grpc_management=grpc_management_port,
    )
    server.check_free(run_dir, ports)
    if archived:
        built = config
    else:
        place = place_of_model(config, model)
        built = build_archive(
            config, place, output=run_dir / "archives", archive_format="no-archive", external=True
        )
    running = server.start([built], run_dir, ports=ports, cache=STATE / "cache" / "inductor")
    print(f"{name} serves {config} and is warming up (pid {running.pid}, logs in {running.logs})")
    print(f"REST        {running.inference}/predictions/{model_name}")
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
    backend: Annotated[str, typer.Option(help="pt2.compile.backend; auto chooses.")] = "auto",
) -> None:
    """Build, archive, warm and ask a tiny model, and stop it again."""
    from preheat.cli import demo

    if model not in demo.MODELS:
        *others, last = demo.MODELS
        raise PreheatError(f"no demo of {model!r}: {', '.join(others)} or {last}")
    demo.run(model, STATE, out, backend)


@app.command()
def plan(
    csv: Annotated[
        Path | None,
        typer.Option(
            help="Sizes that were asked for: columns height,width[,count] in pixels, or a module's "
            "dimension, such as sequence[,count]. Default: what the workers here have counted."
        ),
    ] = None,
    max_buckets: Annotated[int, typer.Option(min=1, max=32, help="So many, or fewer.")] = 5,
    max_waste: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="The fewest buckets that compute no larger share in vain, as 0.15."
        ),
    ] = None,
    cover: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of the requests that needs a bucket, as 0.95."),
    ] = 1.0,
    must: Annotated[
        list[str] | None,
        typer.Option(help="A bucket that is in any case, as 1024x1024; may be repeated."),
    ] = None,
    grid: Annotated[
        int,
        typer.Option(
            min=1,
            help="What sizes are rounded up to; 16 for Flux and SD3; under fit: mask 32 for SDXL, "
            "64 for SD 1.5.",
        ),
    ] = 8,
    cost: Annotated[
        list[Path] | None,
        typer.Option(
            help="A worker's state as JSON: its seconds are the cost, its asked sizes the log "
            "where there is no other. May be repeated, for other strategies' seconds."
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Denoising steps a request, for measured seconds.")
    ] = 30,
    seconds: Annotated[float, typer.Option(min=1, help="To search and prove.")] = 45,
    picture: Annotated[
        Path | None, typer.Option(help="Draw it here: a .png, .svg or .pdf.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    model: OneModel = None,
    name: Name = None,
) -> None:
    """Choose the buckets that waste least for the sizes that were asked for, and prove it.

    Without --csv and --cost: from what the workers of a server started here have counted and
    measured. Exit 1 where there is no such plan.
    """
    from rich.console import Console

    from preheat.cli import plan_picture, planner
    from preheat.planning.demand import read_csv
    from preheat.planning.plan import Wanted

    states: list[Mapping[str, Any]] = [planner.read_state(path) for path in cost or ()]
    if csv is not None:
        demand = read_csv(csv)
    elif states:
        asked = [state.get("asked_sizes", {}) for state in states]
        demand = planner.from_workers(asked, ", ".join(map(str, cost or ())))
    else:
        demand, states = _counted(name, model)
    wanted = Wanted(
        max_buckets,
        tuple(dict.fromkeys(planner.parse_bucket(text, demand.names) for text in must or ())),
        1 - cover,
        grid,
        seconds,
    )
    report = planner.make(
        demand, planner.measurements(states), wanted, max_waste=max_waste, steps=steps
    )
    if picture is not None:
        plan_picture.draw(report, picture)
    if as_json:
        print(json.dumps(planner.document(report)))
    else:
        planner.show(report, Console(soft_wrap=True, width=None if sys.stdout.isatty() else 110))


@app.command()
def schema() -> None:
    """Print the JSON schema of a model YAML, for editors: completion, and misspelt keys underlined.

    A YAML names it in its first line: # yaml-language-server: $schema=preheat.json
    """
    from preheat.config import reference

    print(json.dumps(reference.schema(), indent=2))


def main() -> None:
    """The entry point: errors that Preheat raises on purpose are one line, not a traceback."""
    # unwinds, so that the demo's server is stopped
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except PreheatError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    print(f"preheat: {message}", file=sys.stderr)
    sys.exit(1)


def _checked(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise PreheatError(
            f"{name!r} is no name for a server: use letters, digits, '-', '_' and '.'"
        )
    return name


def _refuse_archive(config: Path) -> None:
    from preheat.torchserve.archive import is_archive

    if is_archive(config):
        raise PreheatError(
            f"{config} is an archive already, not a model YAML; to try it: preheat serve {config}"
        )


def place_of_model(config: Path, model: str | None) -> str | None:
    """The model to package or serve, where a tiny one is the folder that it has been made in."""
    from preheat.cli.demo import tiny_model
    from preheat.config.places import TINY_PREFIX

    named = _named(config, model)
    if named is None or not named.startswith(TINY_PREFIX):
        return named
    print(f"{named}: a small model with random weights, to try things with", file=sys.stderr)
    return str(tiny_model(named.removeprefix(TINY_PREFIX), STATE / "models"))


def _named(config: Path, model: str | None) -> str | None:
    """The model to package: a folder that is one, a hub id, or `tiny:` and a family; as given, else
    as the YAML says. None where a factory makes it.
    """
    from preheat.config.model import ModelConfig
    from preheat.config.places import folder_or_hub_id, tiny_name

    family = ModelConfig.load(config).family
    if family.made_by is not None:
        return model
    given = model or (family.path if family.path != "." else None)
    if given is None:
        raise PreheatError(
            f"{config} does not say where its model lies: give --model (make: MODEL=) or write "
            f"{family.name}.path, either way a folder or a hub id; tiny:{family.tiny[0]} is a "
            "small one with random weights"
        )
    try:
        if tiny_name(given, family) is not None:
            return given
        place = folder_or_hub_id(given, Path() if model else config.parent, family)
    except ConfigError as error:
        if model is None:
            raise
        raise PreheatError(f"--model: {error.message}") from None
    if isinstance(place, str):
        print(f"{place}: no folder here, so it is taken for a hub id", file=sys.stderr)
    return str(place)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """Which server a command asks, and where its workers write."""

    url: str
    models: str | Sequence[str] | None
    token: str | None
    known: dict[str, Any] | None
    """What `server.json` says, if it was started here."""
    folder: Path | None

    @classmethod
    def of(
        cls, management: str | None, name: str | None, model: str | None, token_file: Path | None
    ) -> _Asked:
        from preheat.torchserve import readiness

        known = None if management else _recorded(name, required=name is not None)
        started = known or {}
        try:
            token = readiness.read_token(token_file) if token_file else None
        except (OSError, ValueError) as error:
            _fail(f"no token: {error}")
        folder = started.get("status_dir") or os.environ.get(STATUS_DIR_VARIABLE)
        return cls(
            url=management or started.get("management", MANAGEMENT),
            models=model or started.get("models"),
            token=token,
            known=known,
            folder=Path(folder) if folder else None,
        )

    def statuses(self) -> list[Status]:
        """What the workers of these models wrote, if it is known where."""
        from preheat.status import read_statuses

        wanted = [self.models] if isinstance(self.models, str) else self.models
        written = read_statuses(self.folder) if self.folder else []
        return [each for each in written if wanted is None or each.model in wanted]


def _counted(name: str | None, model: str | None) -> tuple[Demand, list[Mapping[str, Any]]]:
    """What the workers of one model here have been asked for, and their states."""
    from preheat.cli import planner
    from preheat.status import read_sizes

    asked = _Asked.of(None, name, model, None)
    if asked.folder is None:
        raise PreheatError(
            "no server was started here, and none writes to $PREHEAT_STATUS_DIR: give a log of "
            "sizes (--csv, make: CSV=)"
        )
    sizes = read_sizes(asked.folder)
    wanted = [asked.models] if isinstance(asked.models, str) else asked.models
    models = [each for each in sizes if wanted is None or each in wanted]
    if len(models) > 1:
        raise PreheatError(f"several models were asked ({', '.join(models)}): say --model")
    documents = sizes[models[0]] if models else []
    states = [
        status.served
        for status in asked.statuses()
        if status.model in models and status.served and status.alive
    ]
    return planner.from_workers(documents, str(asked.folder)), states


def _recorded(name: str | None, *, required: bool) -> dict[str, Any] | None:
    """What `server.json` says of the server `name`, or of the only one that was started here and
    not stopped.
    """
    folder = STATE / "run"
    files = (
        [folder / _checked(name) / "server.json"] if name else sorted(folder.glob("*/server.json"))
    )
    files = [file for file in files if file.exists()]
    if len(files) > 1:
        names = ", ".join(file.parent.name for file in files)
        raise PreheatError(
            f"several servers were started here ({names}): say which by --name (make: NAME=)"
        )
    if not files:
        if required:
            raise PreheatError(f"no server {name + ' ' if name else ''}was started here")
        return None
    recorded: dict[str, Any] = json.loads(files[0].read_bytes())
    return {**recorded, "run_dir": str(files[0].parent)}


def _recall(recorded: dict[str, Any]) -> TorchServe:
    from preheat.torchserve import server

    running = server.recall(Path(recorded["run_dir"]))
    if running is None:
        raise PreheatError(f"{recorded['run_dir']}: the server is gone")
    return running


def _wait(running: TorchServe, min_workers: int | None, seconds: float) -> None:
    """Wait with progress bars, as long as the server lives and no worker says that it failed."""
    from preheat.cli.progress import WarmupBars

    with WarmupBars() as progress:
        running.wait_ready(seconds, min_workers, watch=progress.update)


def _say_waiting(missing: Sequence[str]) -> None:
    print(f"waiting: {'; '.join(missing)}", file=sys.stderr, flush=True)


def _print_engines(statuses: Sequence[Status]) -> None:
    """What serves each bucket, with a warning where that is eager code though compiling was asked
    for.
    """
    from preheat.torchserve import readiness

    lines, warnings = readiness.describe_engines(statuses)
    for line in lines:
        print(line)
    for line in warnings:
        typer.secho(line, fg=typer.colors.YELLOW)
