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
LOOPBACK = "127.0.0.1"
MANAGEMENT = f"http://{LOOPBACK}:8081"

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
GatewayPort = Annotated[int, Port(help="The gateway: pictures, health, OpenAI's API.")]
WithGateway = Annotated[
    bool, typer.Option("--gateway/--no-gateway", help="Put the gateway in front, or not.")
]
ServerName = Annotated[
    str | None, typer.Option("--name", help="The server's name. Default: the YAML's or archive's.")
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        help="TorchServe's key_file.json, where the management API wants a token. Default: that of "
        "the server started here."
    ),
]
KeysFile = Annotated[
    Path | None,
    typer.Option(
        help="API keys (preheat key). Default: none, and this machine alone.", dir_okay=False
    ),
]
IsOpen = Annotated[bool, typer.Option("--open", help="Without keys, serve other machines too.")]
AccessLog = Annotated[
    Path | None, typer.Option(help="The gateway writes a JSON line here for each request.")
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
    version: Annotated[
        str,
        typer.Option(help="Of several archives of one name, each with an --output of its own."),
    ] = "1.0",
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
            version=version,
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
    gateway_port: GatewayPort = 8000,
    gateway: WithGateway = True,
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
        gateway=gateway_port if gateway else None,
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
    _say_trouble(asked)
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
    _say_trouble(asked)
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
            help="A model YAML, or what `preheat archive` wrote: a .mar or a no-archive folder, or "
            "a folder of such.",
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
    gateway_port: GatewayPort = 8000,
    gateway: WithGateway = True,
    gateway_host: Annotated[str, typer.Option(help="Address the gateway listens on.")] = LOOPBACK,
    keys: KeysFile = None,
    is_open: IsOpen = False,
    access_log: AccessLog = None,
    grpc_host: Annotated[str, typer.Option(help="Address for gRPC predictions.")] = LOOPBACK,
    properties: Annotated[
        Path | None,
        typer.Option(
            help="A config.properties; addresses, ports and places are Preheat's all the same.",
            exists=True,
        ),
    ] = None,
    foreground: Annotated[
        bool,
        typer.Option(
            "--foreground",
            help="Stay, until SIGTERM or until TorchServe ends: for containers.",
        ),
    ] = False,
) -> None:
    """Start TorchServe on loopback in the background, and the gateway in front of it; the weights
    are served from where they lie.

    `preheat ready --wait 1800` waits until it is warm, `preheat stop` ends it.
    """
    from preheat.torchserve import front, server
    from preheat.torchserve.archive import archives_in, build_archive

    archives = archives_in(config)
    if not archives and config.is_dir():
        raise PreheatError(f"{config} holds no archive, nor is it one")
    if archives and model is not None:
        raise PreheatError(
            f"{config} is an archive, which holds its model or names it: leave out --model (make: "
            "MODEL=)"
        )
    stem = config.name.removesuffix(".mar") if archives else config.stem
    name = _checked(name or stem)
    run_dir = STATE / "run" / name
    ports = server.Ports(
        inference=inference_port,
        management=management_port,
        metrics=metrics_port,
        grpc_inference=grpc_port,
        grpc_management=grpc_management_port,
        gateway=gateway_port if gateway else None,
    )
    server.check_free(run_dir, ports, gateway_host)
    if not archives:
        place, out = place_of_model(config, model), run_dir / "archives"
        archives = [
            build_archive(config, place, output=out, archive_format="no-archive", external=True)
        ]
    running = server.start(
        archives,
        run_dir,
        ports=ports,
        cache=STATE / "cache" / "inductor",
        base=properties or server.DEMO_PROPERTIES,
        properties={"grpc_inference_address": grpc_host},
        foreground=foreground,
        gateway_host=gateway_host,
    )
    try:
        if gateway:
            files = {"--keys": keys, "--access-log": access_log}
            options = [f"{name}={path}" for name, path in files.items() if path is not None]
            running = front.start(running, gateway_host, [*options, *(["--open"] * is_open)])
        _say_started(running, config)
        if foreground:
            front.stay(running)
    except BaseException:  # a signal, too: who started them ends them
        end(running, front.GRACE if foreground else 0)
        raise


def end(running: TorchServe, drain: float) -> None:
    """Stop what was started; on a second signal meanwhile without waiting for what is under way."""
    try:
        running.stop(drain=drain)
    except (KeyboardInterrupt, SystemExit):
        running.stop(seconds=5)
        raise


def _say_started(running: TorchServe, config: Path) -> None:
    name, urls = running.run_dir.name, [running.inference, *([running.front] * bool(running.front))]
    print(f"{name} serves {config} and is warming up (pid {running.pid}, logs in {running.logs})")
    for model in running.models:
        print(f"REST        {' and '.join(f'{url}/predictions/{model}' for url in urls)}")
    if running.front:
        everywhere = running.gateway_host in ("0.0.0.0", "::")
        print(f"OpenAI      {running.front}/v1")
        print(f"page        {running.front}/{', at each of its addresses' if everywhere else ''}")
    print(f"gRPC        {running.grpc}")
    print(f"management  {running.management}")
    print(f"metrics     {running.metrics}/metrics", flush=True)


@app.command()
def gateway(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = LOOPBACK,
    port: GatewayPort = 8000,
    inference: Annotated[
        str | None, typer.Option(help="URL of TorchServe's inference API.")
    ] = None,
    management: ManagementUrl = None,
    metrics: Annotated[str | None, typer.Option(help="URL of TorchServe's metrics.")] = None,
    name: Name = None,
    token_file: TokenFile = None,
    keys: KeysFile = None,
    is_open: IsOpen = False,
    access_log: AccessLog = None,
    max_queued: Annotated[int, typer.Option(min=1, help="Of each model; more get a 429.")] = 100,
    max_queued_per_key: Annotated[int, typer.Option(min=1, help="The same, of one key.")] = 100,
) -> None:
    """Put the gateway in front of a TorchServe, in the foreground: by default the one that was
    started here, else one on TorchServe's own ports.
    """
    from preheat.gateway import serving
    from preheat.gateway.torchserve import Places

    known = None if inference or management else _recorded(name, required=name is not None)
    given = {"inference": inference, "management": management, "metrics": metrics}
    places = Places.of(known or {}, given, token_file, os.environ.get(STATUS_DIR_VARIABLE))
    admits = serving.Admits(
        keys=keys,
        is_open=is_open,
        access_log=access_log,
        max_queued=max_queued,
        max_queued_per_key=max_queued_per_key,
    )
    serving.run(places, host, port, admits)


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="Whose it is, as the access log has it.")],
    keys: Annotated[
        Path, typer.Option(help="The file that it is added to.", dir_okay=False)
    ] = Path("keys.jsonl"),
    requests_per_minute: Annotated[float | None, typer.Option(help="At most; none.")] = None,
    pixel_steps_per_minute: Annotated[
        float | None,
        typer.Option(help="At most; pixels x steps x pictures, 31e6 for 1024x1024 in 30 steps."),
    ] = None,
) -> None:
    """Make an API key for the gateway: printed once, kept as a hash. A line taken out of the file
    withdraws its key at once.
    """
    from preheat.gateway.keys import Quota, create

    quota = Quota(
        requests_per_minute=requests_per_minute, pixel_steps_per_minute=pixel_steps_per_minute
    )
    print(create(keys, name, quota))


@app.command()
def paint(
    prompt: Annotated[str, typer.Argument(help="What to paint.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file: .png, .jpg or .webp.")
    ] = Path("out.png"),
    size: Annotated[str | None, typer.Option(help="Width x height in pixels: 640x360.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to paint over.")] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Where to paint over it: what is white in here.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How far to paint over it, above 0 to 1.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What it should not show.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How closely the prompt is kept.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same one paints the same again.")] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Write previews beside the file while it is painted.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Default: the only one there is.")] = None,
    url: Annotated[
        str | None,
        typer.Option(help="A gateway or TorchServe. Default: the server started here, else :8000."),
    ] = None,
    key: Annotated[
        str | None, typer.Option(envvar="PREHEAT_API_KEY", help="An API key of the gateway.")
    ] = None,
    name: Name = None,
) -> None:
    """Paint a picture, with a bar while it is painted, and print what was said of it."""
    from preheat.cli import paint
    from preheat.torchserve import server

    known = None if url else _recorded(name, required=name is not None)
    if known is not None:
        running = server.recall(Path(known["run_dir"]))
        assert running is not None
        url = running.front or running.inference
        model = model or (running.models[0] if len(running.models) == 1 else None)
    asked = paint.request(
        prompt,
        output,
        size,
        {"image": image, "mask_image": mask},
        {
            "strength": strength,
            "negative_prompt": negative,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "seed": seed,
        },
    )
    door = paint.Door((url or f"http://{LOOPBACK}:8000").rstrip("/"), model, key)
    previews = output.with_name(f"{output.stem}.preview.jpg") if stream else None
    paint.paint(door, asked, output, previews)


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
            "dimension, such as sequence[,count]; or the gateway's access log. Default: what the "
            "workers here have counted."
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
    from preheat.planning.demand import read
    from preheat.planning.plan import Wanted

    states: list[Mapping[str, Any]] = [planner.read_state(path) for path in cost or ()]
    if csv is not None:
        demand = read(csv)
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
        own = Path(started["run_dir"], "key_file.json") if started else None
        key_file = token_file or (own if own is not None and own.exists() else None)
        try:
            token = readiness.read_token(key_file) if key_file else None
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


def _say_trouble(asked: _Asked) -> None:
    """On the terminal, where the gateway of a server that was started here has ended for good."""
    known = asked.known or {}
    kept = known.get("gateway")
    # by its number alone: psutil would be half of what a probe loads
    if kept and not Path("/proc", str(kept[0])).exists():
        log = Path(known["run_dir"], "logs", "gateway.log")
        said = f"the gateway has ended, and is not started again; see {log}"
        typer.secho(said, fg=typer.colors.YELLOW, err=True)


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
