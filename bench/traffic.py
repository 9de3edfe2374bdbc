"""The same traffic against a real TorchServe for each strategy, and eager: what each costs, before
and after READY.

    python -m bench.traffic [--profile tiny|small|sdxl] [--csv sizes.csv] ...

Every strategy gets a server of its own with an empty compile cache of its own. They get READY one
after the other and then stand side by side: each request goes to every one of them, one at a time,
before the next request does, and all of it again in the next round. Whatever disturbs the machine
meanwhile disturbs all alike. No request is left out of the count: the first after READY matters as
much as the rest. Pictures are held against those of diffusers alone, with the same seeds.

Two traffics: sizes that users make, and the buckets' own, where nothing is computed in vain.
"""

from __future__ import annotations

import datetime
import io
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
import yaml
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from bench import command, report, sizes
from bench.machine import machine, versions
from bench.processes import run_module
from bench.profiles import (
    LOAD,
    PROFILES,
    RESULTS,
    STATE,
    STRATEGIES,
    Profile,
    model_yaml,
)
from bench.report import Answer, Measured
from bench.rounds import turns
from bench.sizes import Size, TrafficError
from preheat.config.diffusion import PipelineConfig
from preheat.config.model import ModelConfig
from preheat.device import DTYPES
from preheat.errors import PreheatError, ServerError
from preheat.planning.cost import Curve
from preheat.planning.demand import PICTURE, Demand
from preheat.planning.plan import Choice, Wanted, plan
from preheat.torchserve import server
from preheat.torchserve.archive import build_archive
from preheat.torchserve.client import Client, Reply

READY_SECONDS = 1800
WASTE = 0.15
"""Share of the computed pixels that planned buckets may compute in vain."""
GUIDANCE_SCALE = 5.0
USERS, BUCKETS = "user-made sizes", "bucket sizes"
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


@dataclass(frozen=True, slots=True)
class Contender:
    """A strategy in a dtype: a row of the result, a server of its own."""

    strategy: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{STRATEGIES[self.strategy]} ({self.dtype})"

    @property
    def folder(self) -> Path:
        return STATE / "run" / f"bench-{self.strategy}-{self.dtype}"


@dataclass(frozen=True, slots=True)
class Served:
    """A server that is READY, and the YAML of its `pt2`."""

    client: Client
    ready_seconds: float
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """One traffic: its requests, and of the first ones what diffusers alone paints, (height, width,
    3) of uint8.
    """

    sizes: Sequence[Size]
    requests: Sequence[Mapping[str, Any]]
    pictures: Sequence[NDArray[Any]]


@contextmanager
def serving(
    profile: Profile, contender: Contender, config: Mapping[str, Any], model: Path, until: float
) -> Iterator[Served]:
    """The pipeline in `model`, served with the YAML `config`.

    `until` is a time of time.monotonic() to be READY at.

    Raises:
        ServerError: it did not get READY, in that time.
    """
    run_dir = contender.folder
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    left = server.recall(run_dir)
    if left is not None:
        left.stop()  # of an earlier run that was killed
    with tempfile.TemporaryDirectory(prefix="bench-", dir=run_dir.parent) as folder:
        path = Path(folder, f"{profile.name}.yaml")
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
                yield Served(client, ready_seconds, config["pt2"])
        finally:
            running.stop()


def in_rounds(
    served: Mapping[str, Served], asked: Asked, num_rounds: int, until: float
) -> dict[str, list[list[Answer]]]:
    """The answers of every server by round, in the requests' order. A request is sent when the one
    before has been answered, and nothing is sent after `until`, of time.monotonic().
    """
    answers: dict[str, list[list[Answer]]] = {name: [] for name in served}
    for index in range(num_rounds):
        for each in answers.values():
            each.append([])
        for number, request in enumerate(asked.requests):
            if time.monotonic() > until:
                return answers
            for name in turns(list(served), number + index):
                picture = None
                if index == 0 and number < len(asked.pictures):
                    picture = asked.pictures[number]
                answers[name][-1].append(ask(served[name], request, picture))
    return answers


def ask(served: Served, request: Mapping[str, Any], expected: NDArray[Any] | None) -> Answer:
    """One answer; a server that does not give one has failed this request."""
    try:
        reply = served.client.predict(request)
    except httpx.HTTPError:
        return Answer(0.0, 0)
    size = (int(request["height"]), int(request["width"]))
    if reply.status != 200:
        return Answer(reply.milliseconds, reply.status, size=size)
    bucket = reply.headers["x-preheat-bucket"]
    height, _, width = bucket.partition("x")
    computed = int(height) * int(width)
    padding = float(reply.headers["x-preheat-padding"])
    if served.config["shapes"].get("fit") == "mask":
        # there the header is of what was painted, and masked cells are computed all the same
        padding = max(0.0, 1 - size[0] * size[1] / computed)
    return Answer(
        reply.milliseconds,
        reply.status,
        computed,
        padding,
        reply.headers["x-preheat-engine"],
        size,
        bucket,
        None if expected is None else report.decibels(_pixels(reply), expected),
    )


def _pixels(reply: Reply) -> NDArray[Any]:
    return np.asarray(Image.open(io.BytesIO(reply.body)).convert("RGB"))


def payloads(requests: Sequence[Size], num_steps: int) -> list[dict[str, Any]]:
    """The requests as JSON; the same seed and prompt for the same place."""
    return [
        {
            "prompt": PROMPTS[index % len(PROMPTS)],
            "height": size.height,
            "width": size.width,
            "seed": index,
            "num_inference_steps": num_steps,
            "guidance_scale": GUIDANCE_SCALE,
        }
        for index, size in enumerate(requests)
    ]


def paint_references(
    profile: Profile, model: Path, traffics: Mapping[str, Sequence[Size]], folder: Path
) -> tuple[dict[str, Asked], float]:
    """The traffics with what diffusers alone paints for them, and the denoiser's share of a plain
    request.

    Raises:
        PreheatError: diffusers could not paint them.
    """
    made = {name: payloads(traffic, profile.num_steps) for name, traffic in traffics.items()}
    compared = {name: requests[: profile.num_compared] for name, requests in made.items()}
    every = [request for requests in compared.values() for request in requests]
    place = {"model": str(model), "on_gpu": profile.on_gpu, "folder": str(folder)}
    spec = json.dumps({**place, "requests": every})
    share = run_module("bench.reference", spec, {})["denoiser_share"]
    pictures = iter([np.load(folder / f"{index}.npy") for index in range(len(every))])
    asked = {
        name: Asked(traffics[name], made[name], [next(pictures) for _ in compared[name]])
        for name in traffics
    }
    return asked, share


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
        typer.Option(help=f"Of {', '.join(STRATEGIES)}; may be repeated. Default: the profile's."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join(DTYPES)}; may be repeated. Default: the profile's."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="How often all requests are sent.")
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="Of pt2.compile; eager tries the bench out in a minute. Strategies that name no "
            "shapes take inductor for auto and openvino."
        ),
    ] = "auto",
    output: Annotated[
        Path, typer.Option(help="Folder for traffic.json and traffic.png.")
    ] = RESULTS,
) -> None:
    """Send the same requests to a real TorchServe for each strategy, in turn, and write down what
    each costs.
    """
    chosen = _profile(
        profile, num_requests=requests, num_distinct=distinct, num_steps=steps, num_rounds=rounds
    )
    contenders = _contenders(chosen, strategy, dtype)
    traffics = {
        USERS: _traffic(chosen, csv, scale=scale, num_requests=requests, seed=seed),
        BUCKETS: bucket_sizes(chosen),
    }
    console = command.console()
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
        "rounds": chosen.num_rounds,
        "backend": backend,
        "seconds": 0.0,
        "traffics": {},
    }
    (STATE / "bench").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="model-", dir=STATE / "bench") as folder:
        console.print(f"making the pipeline of profile {profile} ...")
        model = chosen.build(Path(folder, "pipeline"))
        console.print("painting with diffusers alone ...")
        asked, share = paint_references(chosen, model, traffics, Path(folder))
        document["denoiser_share"] = share
        console.print(f"denoiser: {share:.0%} of an eager request")
        run = Run(chosen, model, backend, begun + chosen.limit_seconds, console)
        document["traffics"] = run.measure(contenders, asked)
        document["seconds"] = round(time.monotonic() - begun, 1)
        report.write(document, output)
    for name, traffic in document["traffics"].items():
        console.print(report.table(document, name))
        for doubt in traffic["doubts"]:
            console.print(f"{name}: {doubt}", markup=False)
    console.print(f"{document['seconds']:.0f} s; traffic.json and traffic.png are in {output}/")
    rows = [
        row for traffic in document["traffics"].values() for row in traffic["strategies"].items()
    ]
    if any("error" in row for _, row in rows):
        raise PreheatError("not every strategy could be measured; traffic.json says why")


def add_bounds(
    contenders: Sequence[Contender],
    users: Mapping[str, dict[str, Any]],
    own: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write into each row of the user-made sizes what it could be at best, by the rows of the
    buckets' own sizes; planned buckets have none there, and are as fast as those made by hand.
    """
    for contender in contenders:
        strategy = "buckets" if contender.strategy == "planned" else contender.strategy
        eager = users.get(Contender("eager", contender.dtype).name, {})
        same = own.get(Contender(strategy, contender.dtype).name, {})
        row = users[contender.name]
        row["x_eager_bound"] = report.bound(row, eager, same)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the bench; nothing is sent after `until`, of time.monotonic()."""

    profile: Profile
    model: Path
    backend: str
    until: float
    console: Console

    def measure(
        self, contenders: Sequence[Contender], asked: Mapping[str, Asked]
    ) -> dict[str, dict[str, Any]]:
        """Each traffic's part of the result."""
        with ExitStack() as stack:
            served: dict[Contender, Served] = {}
            errors: dict[str, Any] = {}
            for contender in contenders:
                self.console.print(f"{contender.name}: starting a server, cold ...")
                try:
                    opened = stack.enter_context(self._serving(contender, asked[USERS].sizes))
                # the others' rows are worth having all the same
                except (ServerError, httpx.HTTPError) as error:
                    errors[contender.name] = {"error": f"{type(error).__name__}: {error}"}
                    self.console.print(f"{contender.name}: {error}", markup=False)
                    continue
                served[contender] = opened
                self.console.print(f"{contender.name}: READY after {opened.ready_seconds:.0f} s")
            found = {name: self._traffic(name, one, served, errors) for name, one in asked.items()}
            add_bounds(list(served), *(found[name]["strategies"] for name in (USERS, BUCKETS)))
            return found

    def _serving(self, contender: Contender, sizes: Sequence[Size]) -> Any:
        planned = None
        if contender.strategy == "planned":
            planned = plan_buckets(sizes, self.profile.max_planned)
            self.console.print(
                f"planned: {', '.join(map(str, planned.buckets))}; {planned.usage.waste:.1%} of "
                f"the cells in vain, at most {planned.gap:.2%} from the best"
            )
        config = model_yaml(
            self.profile,
            contender.strategy,
            backend=self.backend,
            planned=planned.buckets if planned else (),
            dtype=contender.dtype,
        )
        return serving(self.profile, contender, config, self.model, self.until)

    def _traffic(
        self,
        name: str,
        asked: Asked,
        served: Mapping[Contender, Served],
        errors: Mapping[str, Any],
    ) -> dict[str, Any]:
        # planned buckets are planned for what users ask, and need not cover the others
        taking = {
            one: at for one, at in served.items() if name == USERS or one.strategy != "planned"
        }
        by_name = {one.name: at for one, at in taking.items()}
        self.console.print(f"{name}: {self.profile.num_rounds} rounds ...")
        answers = in_rounds(by_name, asked, self.profile.num_rounds, self.until)
        runs = {
            one: Measured(
                at.ready_seconds,
                answers[one.name],
                at.client.state(),
                self.profile.num_rounds * len(asked.requests),
                at.config,
                one.dtype,
            )
            for one, at in taking.items()
        }
        eager = {one.dtype: run for one, run in runs.items() if one.strategy == "eager"}
        first = eager.get(self.profile.dtype)
        rows = {
            one.name: report.summary(run, eager.get(one.dtype), first) for one, run in runs.items()
        }
        return {
            "requests": sizes.describe(asked.sizes, self.profile.buckets),
            "strategies": {**rows, **errors},
            "doubts": report.doubtful({one.name: run for one, run in runs.items()}, eager),
        }


def _profile(name: str, **numbers: int | None) -> Profile:
    """The profile with those numbers that were named."""
    if name not in PROFILES:
        raise TrafficError(f"unknown profile {name!r}: one of {', '.join(PROFILES)}")
    named = {key: number for key, number in numbers.items() if number is not None}
    return replace(PROFILES[name], **named)  # type: ignore[arg-type]  # all of them are numbers


def _contenders(
    profile: Profile, strategies: list[str] | None, dtypes: list[str] | None
) -> list[Contender]:
    """Those chosen, in the order in which they start."""
    chosen, kinds = strategies or profile.strategies, dtypes or profile.dtypes
    for what, given, known in (("strategy", chosen, STRATEGIES), ("dtype", kinds, DTYPES)):
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise TrafficError(f"unknown {what} {unknown[0]!r}: one of {', '.join(known)}")
    return [Contender(name, dtype) for dtype in kinds for name in STRATEGIES if name in chosen]


def bucket_sizes(profile: Profile) -> list[Size]:
    """As many requests, of the buckets' own sizes in turn."""
    own = [Size(bucket.height, bucket.width, "bucket") for bucket in profile.buckets]
    return [own[index % len(own)] for index in range(profile.num_requests)]


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


def main() -> None:
    command.run(app)


if __name__ == "__main__":
    main()
