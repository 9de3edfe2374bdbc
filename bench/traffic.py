"""The same traffic against a real TorchServe once per strategy, and eager: what each costs, before
and after READY.

    python -m bench.traffic [--profile tiny|small|sdxl] [--csv sizes.csv] ...

Every strategy gets a server of its own with an empty compile cache of its own, and the same
requests in the same order, one at a time. No request is left out of the count: the first after
READY matters as much as the rest.
"""

from __future__ import annotations

import datetime
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
import yaml
from rich.console import Console

from bench import report, sizes
from bench.machine import machine, versions
from bench.profiles import LOAD, PROFILES, STRATEGIES, Profile, model_yaml
from bench.report import Answer, Measured
from bench.sizes import Size, TrafficError
from preheat.config.diffusion import PipelineConfig
from preheat.config.model import ModelConfig
from preheat.errors import PreheatError, ServerError
from preheat.planning.cost import Curve
from preheat.planning.demand import PICTURE, Demand
from preheat.planning.plan import Choice, Wanted, plan
from preheat.torchserve import server
from preheat.torchserve.archive import build_archive
from preheat.torchserve.client import Client, Reply

STATE = server.ROOT / ".preheat"
RESULTS = server.ROOT / "bench" / "results"
READY_SECONDS = 1800
WASTE = 0.15
"""Share of the computed pixels that planned buckets may compute in vain."""
PROMPTS = (
    "a lighthouse above a stormy sea",
    "portrait of an old fisherman, oil on canvas",
    "a bowl of lemons",
    (
        "product photo of a red leather handbag on white, soft light, a little shadow, "
        "seen from the front"
    ),
    "a city at night after the rain, neon, reflections, wide angle",
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def measure(
    name: str,
    config: Mapping[str, Any],
    model: Path,
    requests: Sequence[Size],
    run_dir: Path,
    *,
    num_steps: int,
    until: float = float("inf"),
) -> Measured:
    """Serve the pipeline in `model` with the YAML `config`, under `name`, and send it the requests.

    `until` is a time of time.monotonic() after which nothing is sent any more.

    Raises:
        ServerError: it did not get READY, in that time.
        httpx.HTTPError: the server stopped answering.
    """
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    left = server.recall(run_dir)
    if left is not None:
        left.stop()  # of an earlier run that was killed
    with tempfile.TemporaryDirectory(prefix="bench-", dir=run_dir.parent) as folder:
        path = Path(folder, f"{name}.yaml")
        path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
        archive = build_archive(
            path, model, output=Path(folder), archive_format="no-archive", external=True
        )
        caches = {"TRITON_CACHE_DIR": str(Path(folder, "triton"))}
        begun = time.monotonic()
        running = server.start(
            [archive],
            run_dir,
            ports=server.Ports.free(),
            cache=Path(folder, "inductor"),
            env=caches,
        )
        try:
            running.wait_ready(min(READY_SECONDS, max(1.0, until - time.monotonic())))
            ready_seconds = time.monotonic() - begun
            with Client.to(running, timeout=1000) as client:
                begun = time.monotonic()
                answers = send(client, requests, num_steps=num_steps, until=until)
                traffic_seconds = time.monotonic() - begun
                return Measured(
                    ready_seconds,
                    traffic_seconds,
                    answers,
                    client.state(),
                    len(requests),
                    config["pt2"],
                )
        finally:
            running.stop()


def send(client: Client, requests: Sequence[Size], *, num_steps: int, until: float) -> list[Answer]:
    """The answers, in order; each request is sent when the one before has been answered."""
    answers = []
    for index, size in enumerate(requests):
        if time.monotonic() > until:
            break
        payload = {
            "prompt": PROMPTS[index % len(PROMPTS)],
            "height": size.height,
            "width": size.width,
            "seed": index,
            "num_inference_steps": num_steps,
        }
        answers.append(_answer(client.predict(payload)))
    return answers


def _answer(reply: Reply) -> Answer:
    if reply.status != 200:
        return Answer(reply.milliseconds, reply.status)
    height, _, width = reply.headers["x-preheat-bucket"].partition("x")
    padding, engine = float(reply.headers["x-preheat-padding"]), reply.headers["x-preheat-engine"]
    return Answer(reply.milliseconds, reply.status, int(height) * int(width), padding, engine)


@app.command()
def bench(
    profile: Annotated[
        str, typer.Option(help=f"{', '.join(PROFILES)}; sdxl needs a CUDA GPU.")
    ] = "tiny",
    csv: Annotated[
        Path | None,
        typer.Option(help="Replay this log of sizes (columns height,width[,count]) in pixels."),
    ] = None,
    scale: Annotated[
        float,
        typer.Option(
            help=(
                "Multiply the log's sides: 0.25 brings a log of 1024-class sizes to the profile "
                "tiny."
            )
        ),
    ] = 1.0,
    requests: Annotated[
        int | None,
        typer.Option(help="How many. Default: the profile's number; of a log, all of it."),
    ] = None,
    distinct: Annotated[
        int | None, typer.Option(help="How many different sizes are generated.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps per request.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sizes and their order.")] = 0,
    strategy: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join(STRATEGIES)}; may be repeated. Default: all."),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Of torch.compile; eager tries the bench out in a minute.")
    ] = "inductor",
    output: Annotated[
        Path, typer.Option(help="Folder for traffic.json and traffic.png.")
    ] = RESULTS,
) -> None:
    """Send the same requests to a real TorchServe once per strategy, and write down what each
    costs.
    """
    chosen = _profile(profile, requests=requests, distinct=distinct, steps=steps)
    strategies = _strategies(strategy)
    traffic = _traffic(chosen, csv, scale=scale, num_requests=requests, seed=seed)
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    planned = plan_buckets(traffic, chosen.max_planned) if "planned" in strategies else None
    if planned is not None:
        console.print(
            f"planned: {', '.join(map(str, planned.buckets))}; {planned.usage.waste:.1%} of the "
            f"cells in vain, at most {planned.gap:.2%} from the best"
        )
    begun = time.monotonic()
    document: dict[str, Any] = {
        "profile": profile,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "on_gpu": chosen.on_gpu,
        "versions": versions(),
        "seed": seed,
        "load": LOAD,
        "steps": chosen.num_steps,
        "backend": backend,
        "requests": {
            "source": csv.name if csv else "generated",
            **sizes.describe(traffic, chosen.buckets),
        },
        "seconds": 0.0,
        "strategies": {},
    }
    (STATE / "bench").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="model-", dir=STATE / "bench") as folder:
        console.print(f"making the pipeline of profile {profile} ...")
        model = chosen.build(Path(folder, "pipeline"))
        measurements: dict[str, Measured] = {}
        for name in strategies:
            console.print(f"{name}: starting a server, cold ...")
            config = model_yaml(
                chosen, name, backend=backend, planned=planned.buckets if planned else ()
            )
            try:
                measurements[name] = measure(
                    chosen.name,
                    config,
                    model,
                    traffic,
                    STATE / "run" / "bench-traffic",
                    num_steps=chosen.num_steps,
                    until=begun + chosen.limit_seconds,
                )
                row = report.summary(measurements[name], measurements.get("eager"))
            # the others' rows are worth having all the same
            except (ServerError, httpx.HTTPError) as error:
                row = {"error": f"{type(error).__name__}: {error}"}
            console.print(f"{name}: {_line(row)}", markup=False)
            document["strategies"][name] = row
            document["seconds"] = round(time.monotonic() - begun, 1)
            report.write(document, output)
    console.print(report.table(document))
    console.print(f"{document['seconds']:.0f} s; traffic.json and traffic.png are in {output}/")
    if any("error" in row for row in document["strategies"].values()):
        raise PreheatError("not every strategy could be measured; traffic.json says why")


def _profile(
    name: str, *, requests: int | None, distinct: int | None, steps: int | None
) -> Profile:
    if name not in PROFILES:
        raise TrafficError(f"unknown profile {name!r}: one of {', '.join(PROFILES)}")
    profile = PROFILES[name]
    return replace(
        profile,
        num_requests=profile.num_requests if requests is None else requests,
        num_distinct=profile.num_distinct if distinct is None else distinct,
        num_steps=profile.num_steps if steps is None else steps,
    )


def _strategies(chosen: list[str] | None) -> list[str]:
    """Those chosen, in the order in which they run."""
    unknown = sorted(set(chosen or ()) - set(STRATEGIES))
    if unknown:
        raise TrafficError(f"unknown strategy {unknown[0]!r}: one of {', '.join(STRATEGIES)}")
    return [name for name in STRATEGIES if not chosen or name in chosen]


def _traffic(
    profile: Profile, csv: Path | None, *, scale: float, num_requests: int | None, seed: int
) -> list[Size]:
    limits = ModelConfig.parse(model_yaml(profile, "buckets")).section(PipelineConfig).limits
    if not 1 <= profile.num_steps <= limits.max_steps:
        raise TrafficError(f"steps must be 1 to {limits.max_steps}, got {profile.num_steps}")
    if csv is None:
        return sizes.generate(
            profile.buckets,
            num_requests=profile.num_requests,
            num_distinct=profile.num_distinct,
            seed=seed,
        )
    logged = sizes.read_log(
        csv, least=limits.min_side, most=limits.max_side, scale=scale, seed=seed
    )
    return logged if num_requests is None else sizes.sample(logged, num_requests, seed)


def plan_buckets(traffic: Sequence[Size], most: int) -> Choice:
    """The fewest buckets for these sizes that compute at most `WASTE` in vain; `most` where that
    takes more.
    """
    demand = Demand(PICTURE, Counter((size.height, size.width) for size in traffic))
    choices = []
    for choice in plan(demand, Curve(), Wanted(most)):
        choices.append(choice)
        if choice.usage.waste <= WASTE:
            break
    return choices[-1]


def _line(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return str(row["error"]).splitlines()[0]
    compiles = f"compiles {row['compiles_at_boot']} at boot, {row['compiles_since_ready']} after"
    times = (
        f"p50 {row['p50_ms']} ms, p99 {row['p99_ms']} ms" if "p50_ms" in row else "nothing answered"
    )
    return f"READY after {row['ready_seconds']} s, {compiles}, {times}"


def main() -> None:
    # unwinds, so that the server is stopped
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except PreheatError as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
