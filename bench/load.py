"""Load from real clients on a real TorchServe, against the bare diffusers pipeline in a loop on the
same machine.

    python -m bench.load [--profile tiny|small|sdxl] ...

Both generate the same sizes with the same steps through the same compiler on the same number of
threads, and both encode every picture; what is left between them is the road. The clients live on
this machine too, so on a CPU one core is left to them. Machines drift: the two are compared in
turn, bare, served, bare, served, bare, and each served rate is held against the mean of its
neighbours. Before that a server gets as much traffic unmeasured, for Java compiles its code while
it runs, as the pipeline does.
"""

from __future__ import annotations

import base64
import datetime
import json
import os
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import numpy as np
import typer
import yaml
from PIL import Image
from rich.console import Console

from bench import command, load_report, sizes
from bench.bare_spec import Spec
from bench.clients import Payload, Protocol, Traffic, closed_loop, open_loop
from bench.machine import machine, versions
from bench.processes import CACHE, BareProcess, run_module
from bench.profiles import PROFILES, RESULTS, STATE, Profile, model_yaml
from bench.traffic import GUIDANCE_SCALE, PROMPTS, READY_SECONDS
from preheat.errors import PreheatError
from preheat.protocol import images
from preheat.torchserve import front, server
from preheat.torchserve.archive import build_archive
from preheat.torchserve.client import Client

NUM_MIXED = 48
NUM_ROUNDS = 3
NUM_PROFILED = 12
"""Batches of each kind whose stages are measured."""
SCRAPE_SECONDS = 5
"""How long the metrics of the last request may take through TorchServe's log."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class Run:
    """One load. `share` is that of the throughput which the same server has shown in its busiest
    closed loop.
    """

    loop: Literal["closed", "open"]
    traffic: Literal["mixed", "uniform"]
    protocol: Protocol = "rest"
    num_clients: int = 0
    share: float = 0.0

    @property
    def name(self) -> str:
        how = (
            f"{self.num_clients} clients" if self.loop == "closed" else f"open at {self.share:.0%}"
        )
        return f"{self.traffic}, {self.protocol}, {how}"


def runs(batch: int) -> dict[str, list[Run]]:
    """By server: its batch size, and the loads in their order. Open loops come after the closed
    ones that they refer to.
    """
    full = 2 * batch  # while one batch is generated, the next one is there
    batching = [
        Run("closed", "uniform", num_clients=full),
        *(Run("closed", "mixed", num_clients=clients) for clients in (1, batch, full, 2 * full)),
        Run("closed", "mixed", "grpc", num_clients=full),
        *(Run("open", "mixed", share=share) for share in (0.5, 0.8)),
        Run("open", "mixed", "grpc", share=0.8),
    ]
    single = [
        Run("closed", "uniform", num_clients=2),
        *(Run("closed", "mixed", num_clients=clients) for clients in (1, full)),
        Run("open", "mixed", share=0.8),
    ]
    return {"batching": batching, "no batching": single}


@dataclass(frozen=True, slots=True)
class Load:
    """What the clients ask for, by the traffic's name, and for how many seconds at a time."""

    requests: Mapping[str, Sequence[Payload]]
    seconds: float


def served_yaml(profile: Profile, batch: int, *, backend: str, max_delay: int) -> dict[str, Any]:
    """The model YAML of a server that batches up to `batch` requests, in graphs for 1, 2, 4, ...
    rows.
    """
    data = model_yaml(profile, "buckets", backend=backend)
    data |= {"batchSize": batch, "maxBatchDelay": max_delay if batch > 1 else 0}
    data["pt2"]["shapes"]["batch_sizes"] = warmed_sizes(batch)
    return data


def warmed_sizes(batch: int) -> list[int]:
    """The powers of two below `batch`, and `batch`."""
    return sorted(
        {1 << power for power in range(batch.bit_length()) if 1 << power < batch} | {batch}
    )


def payloads(requests: Sequence[tuple[int, int]], profile: Profile) -> list[Payload]:
    return [
        {
            "prompt": PROMPTS[index % len(PROMPTS)],
            "height": height,
            "width": width,
            "seed": index,
            "num_inference_steps": profile.num_steps,
            "guidance_scale": GUIDANCE_SCALE,
        }
        for index, (height, width) in enumerate(requests)
    ]


def run_stages(
    profile: Profile,
    model: Path,
    sizes: Sequence[tuple[int, int]],
    batch: int,
    threads: Mapping[str, str],
) -> dict[str, Any]:
    """Milliseconds per request that each stage of the handler takes, for texts and for images, in
    full batches.

    Nothing is compiled, for that is the model's own time.
    """
    config = served_yaml(profile, batch, backend="eager", max_delay=0)
    config["pipeline"] |= {"path": str(model), "tasks": ["text-to-image", "image-to-image"]}
    texts = payloads(sizes, profile)
    pictures = [noise(height, width) for height, width in sizes]
    kinds = {
        "text to image": texts,
        "image to image": [
            {**text, "image": image} for text, image in zip(texts, pictures, strict=True)
        ],
    }
    spec = {
        "yaml": config,
        "model_dir": str(model.parent),
        "batch": batch,
        "batches": NUM_PROFILED,
        "kinds": kinds,
    }
    return run_module("bench.stages", json.dumps(spec), threads)


def noise(height: int, width: int) -> str:
    """A PNG in base64 that compresses as badly as any."""
    pixels = np.random.default_rng(height * width).integers(
        0, 256, (height, width, 3), dtype=np.uint8
    )
    return base64.b64encode(images.encode(Image.fromarray(pixels), "png")).decode()


@contextmanager
def serving(
    profile: Profile,
    config: Mapping[str, Any],
    model: Path,
    threads: Mapping[str, str],
    *,
    gateway: bool = False,
) -> Iterator[tuple[server.TorchServe, float]]:
    """A server of that YAML, warm, and the seconds it took to be so; with a gateway, if wanted."""
    run_dir = STATE / "run" / "bench-load"
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    left = server.recall(run_dir)
    if left is not None:
        left.stop()  # of an earlier run that was killed
    with tempfile.TemporaryDirectory(prefix="bench-", dir=STATE / "bench") as folder:
        path = Path(folder, f"{profile.name}.yaml")
        path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
        archive = build_archive(
            path, model, output=Path(folder), archive_format="no-archive", external=True
        )
        begun = time.monotonic()
        ports = server.Ports.free(gateway=gateway)
        running = server.start([archive], run_dir, ports=ports, cache=CACHE, env=threads)
        try:
            running.wait_ready(READY_SECONDS)
            seconds = time.monotonic() - begun
            if gateway:
                running = front.start(running)
            yield running, seconds
        finally:
            running.stop()


def measure(
    running: server.TorchServe, run: Run, requests: Sequence[Payload], rate: float, seconds: float
) -> dict[str, Any]:
    """One load's row of the result."""
    before = scrape(running)
    if run.loop == "closed":
        traffic = closed_loop(running, requests, run.protocol, run.num_clients, seconds)
    else:
        traffic = open_loop(running, requests, run.protocol, rate, seconds, seed=0)
    after = scraped_after(running, traffic, before)
    counted = {name: after[name] - before.get(name, 0.0) for name in after}
    return {
        "name": run.name,
        **asdict(run),
        "rate": round(rate, 3) if run.loop == "open" else None,
        **load_report.summary(traffic, counted, saturated=run.loop == "closed"),
    }


def compare(
    bare: BareProcess, running: server.TorchServe, load: Load, traffic: str, batch: int
) -> dict[str, Any]:
    """Bare and served in turn, in batches of this size; twice as many clients, so that the next
    batch is there in time.
    """
    requests = load.requests[traffic]
    rates = {"bare": [bare.rate(traffic, batch, load.seconds)], "served": []}
    for _ in range(NUM_ROUNDS):
        seen = closed_loop(running, requests, "rest", 2 * batch, load.seconds)
        rates["served"].append(seen.num_good / seen.seconds)
        rates["bare"].append(bare.rate(traffic, batch, load.seconds))
    return {
        "traffic": traffic,
        "batch": batch,
        **load_report.compared(rates["bare"], rates["served"]),
    }


def scrape(running: server.TorchServe) -> dict[str, float]:
    """Every Preheat metric on the metrics port, summed over its labels."""
    totals: dict[str, float] = defaultdict(float)
    with urllib.request.urlopen(f"{running.metrics}/metrics", timeout=60) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith("preheat_"):
                name, value = line.split("{")[0].split(" ")[0], line.rsplit(" ", 1)[1]
                totals[name] += float(value)
    return dict(totals)


def scraped_after(
    running: server.TorchServe, traffic: Traffic, before: Mapping[str, float]
) -> dict[str, float]:
    """The metrics once they have caught up with the answers, which TorchServe sends first."""
    name, until = "preheat_requests_total", time.monotonic() + SCRAPE_SECONDS
    while True:
        after = scrape(running)
        if (
            after.get(name, 0.0) - before.get(name, 0.0) >= traffic.num_good
            or time.monotonic() > until
        ):
            return after
        time.sleep(0.05)


@app.command()
def bench(
    profile: Annotated[
        str, typer.Option(help=f"{', '.join(PROFILES)}; sdxl needs a CUDA GPU.")
    ] = "tiny",
    seconds: Annotated[float, typer.Option(help="Of each load.")] = 10,
    batch: Annotated[int, typer.Option(min=2, help="Most requests of a batch.")] = 4,
    steps: Annotated[int | None, typer.Option(help="Denoising steps per request.")] = None,
    buckets: Annotated[
        int | None, typer.Option(min=1, help="How many of the profile's buckets; the first ones.")
    ] = None,
    max_delay: Annotated[
        int, typer.Option(help="Milliseconds that a batch waits to be full.")
    ] = 20,
    backend: Annotated[
        str, typer.Option(help="Of pt2.compile; eager tries the bench out in a minute.")
    ] = "auto",
    output: Annotated[Path, typer.Option(help="Folder for load.json and load.png.")] = RESULTS,
) -> None:
    """Load a real TorchServe in closed and open loops, and hold it against the bare pipeline."""
    if profile not in PROFILES:
        raise PreheatError(f"unknown profile {profile!r}: one of {', '.join(PROFILES)}")
    chosen = PROFILES[profile]
    chosen = replace(chosen, num_steps=steps or chosen.num_steps, buckets=chosen.buckets[:buckets])
    traffics = mix(chosen)
    num_threads = max(1, len(os.sched_getaffinity(0)) - 1)
    threads = {} if chosen.on_gpu else {"OMP_NUM_THREADS": str(num_threads)}
    console = command.console()
    begun = time.monotonic()
    document: dict[str, Any] = {
        "profile": profile,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "on_gpu": chosen.on_gpu,
        "versions": versions(),
        "steps": chosen.num_steps,
        "backend": backend,
        "batch": batch,
        "max_delay_ms": max_delay,
        "seconds_per_load": seconds,
        "buckets": [[bucket.height, bucket.width] for bucket in chosen.buckets],
        "mixed_sizes": [f"{height}x{width}" for height, width in traffics["mixed"]],
        "seconds": 0.0,
        "bare": {},
        "stages_ms": {},
        "served": {},
        "compared": [],
    }
    (STATE / "bench").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="model-", dir=STATE / "bench") as folder:
        console.print(f"making the pipeline of profile {profile} ...")
        model = chosen.build(Path(folder, "pipeline"))
        document["stages_ms"] = run_stages(chosen, model, traffics["mixed"], batch, threads)
        console.print("bare pipeline: compiling ...")
        spec = bare_spec(chosen, model, traffics, batch=batch, backend=backend)
        load = Load({name: payloads(wanted, chosen) for name, wanted in traffics.items()}, seconds)
        with closing(BareProcess(spec, threads)) as bare:
            document["bare"] = bare.warmed
            for name, loads in runs(batch).items():
                console.print(f"{name}: starting a server ...")
                size = batch if name == "batching" else 1
                config = served_yaml(chosen, size, backend=backend, max_delay=max_delay)
                with serving(chosen, config, model, threads) as (running, ready_seconds):
                    closed_loop(running, load.requests["mixed"], "rest", 2 * size, seconds)
                    for traffic in traffics:
                        document["compared"].append(compare(bare, running, load, traffic, size))
                        console.print(
                            f"  {load_report.compared_line(document['compared'][-1])}", markup=False
                        )
                    rows = load_all(running, loads, load, console)
                    with Client.to(running) as client:
                        state = client.state()
                document["served"][name] = {
                    "ready_seconds": round(ready_seconds, 1),
                    **{
                        key: state[key]
                        for key in ("compiles_since_ready", "incidents", "eager_fallbacks")
                    },
                    "loads": rows,
                }
                document["seconds"] = round(time.monotonic() - begun, 1)
                load_report.write(document, output)
    console.print(load_report.table(document))
    console.print(load_report.stages_table(document))
    console.print(load_report.denoiser_share(document))
    console.print(load_report.verdict(document), markup=False)
    console.print(f"{document['seconds']:.0f} s; load.json and load.png are in {output}/")


def load_all(
    running: server.TorchServe,
    loads: Sequence[Run],
    load: Load,
    console: Console,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for run in loads:
        busiest = max(
            (row["requests_per_second"] for row in rows if row["traffic"] == run.traffic),
            default=0.0,
        )
        rows.append(
            measure(running, run, load.requests[run.traffic], run.share * busiest, load.seconds)
        )
        console.print(f"  {load_report.line(rows[-1])}", markup=False)
    return rows


def mix(profile: Profile) -> dict[str, list[tuple[int, int]]]:
    """Sizes (height, width) in pixels: `mixed` as bench.traffic has them, and `uniform`, the first
    bucket's own.
    """
    mixed = sizes.generate(
        profile.buckets, num_requests=NUM_MIXED, num_distinct=NUM_MIXED // 2, seed=0
    )
    first = profile.buckets[0]
    return {
        "uniform": [(first.height, first.width)] * 16,
        "mixed": [(one.height, one.width) for one in mixed],
    }


def bare_spec(
    profile: Profile,
    model: Path,
    traffics: Mapping[str, Sequence[tuple[int, int]]],
    *,
    batch: int,
    backend: str,
) -> Spec:
    return Spec(
        model=str(model),
        dtype=profile.dtype,
        on_gpu=profile.on_gpu,
        backend=backend,
        buckets=[(bucket.height, bucket.width) for bucket in profile.buckets],
        batch_sizes=[1, batch],
        num_steps=profile.num_steps,
        guidance_scale=GUIDANCE_SCALE,
        prompts=PROMPTS,
        traffics=traffics,
    )


def main() -> None:
    command.run(app, httpx.HTTPError)


if __name__ == "__main__":
    main()
