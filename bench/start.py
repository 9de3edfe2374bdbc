"""How long a server takes from the start of its process to READY and to the first image, by what it
finds to load.

    python -m bench.start [--profile tiny|small|sdxl] [--only cold --only restart ...]

One run, in this order; every server is a real TorchServe with a folder of temporary files of its
own: eager    the same YAML with `compile: {enable: false}` cold     everything is compiled restart
the Inductor folder of `cold` is still there four     four workers at once on an empty shared cache:
one compiles, three wait and load second   one more worker, later, on an empty disk: it finds the
bundle that `four` published aot      everything was compiled when the archive was built (not
counted here; see build_seconds)
"""

from __future__ import annotations

import datetime
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
import yaml
from rich.table import Table

from bench import command, report
from bench.machine import machine, versions
from bench.profiles import PROFILES, RESULTS, STATE, Profile, model_yaml
from preheat.errors import PreheatError
from preheat.torchserve import server
from preheat.torchserve.archive import build_archive
from preheat.torchserve.client import Client, Reply

READY_SECONDS = 3600
NUM_TOGETHER = 4
NUM_FIRST = 10
"""Requests after READY whose p99 is told: nothing warms up in them any more, or it shows here."""
TITLES = {
    "eager": "eager",
    "cold": "cold compile",
    "restart": "restart, local cache",
    "four": "4 workers at once, shared cache",
    "second": "second worker, shared cache",
    "aot": "AOT archive",
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Bench:
    """The servers of one run. `folder` holds what they leave for each other: Inductor's folder and
    the shared cache.

    Args:
        num_threads: of each worker, the same in every scenario: compiled code is for a number of
            threads, and four workers have to get along with the cores.
    """

    def __init__(
        self, profile: Profile, model: Path, folder: Path, *, backend: str, num_threads: int
    ) -> None:
        self._profile, self._model, self._folder, self._backend = profile, model, folder, backend
        self._environment = {"OMP_NUM_THREADS": str(num_threads)}

    def measure(self, scenario: str) -> dict[str, Any]:
        """One row of the result.

        Raises:
            PreheatError: the archive could not be built, or the server did not get READY.
            httpx.HTTPError: the server stopped answering.
        """
        with tempfile.TemporaryDirectory(prefix=f"{scenario}-", dir=self._folder) as name:
            work = Path(name)
            begun = time.monotonic()
            archive = self._archive(scenario, work)
            build_seconds = time.monotonic() - begun
            kept = (
                self._folder / "inductor" if scenario in ("cold", "restart") else work / "inductor"
            )
            kept.mkdir(exist_ok=True)
            environment = self._environment | {"TRITON_CACHE_DIR": str(kept / "triton")}
            return self._serve(archive, kept, environment) | {
                "build_seconds": round(build_seconds, 1)
            }

    def config(self, scenario: str) -> dict[str, Any]:
        """The model YAML, as data."""
        config = model_yaml(self._profile, "buckets", backend=self._backend)
        pt2 = config["pt2"]
        pt2["compile"]["enable"] = scenario != "eager"
        if scenario in ("four", "second"):
            pt2["cache"] = {"shared": str(self._folder / "shared"), "key": "bench"}
        workers = NUM_TOGETHER if scenario == "four" else 1
        timeout = 2 * READY_SECONDS  # the others wait for half of it at most
        return config | {
            "minWorkers": workers,
            "maxWorkers": workers,
            "startupTimeout": timeout,
            "maxRetryTimeoutInSec": timeout + 1,
        }

    def _archive(self, scenario: str, work: Path) -> Path:
        path = work / f"{self._profile.name}.yaml"
        path.write_text(yaml.safe_dump(self.config(scenario), sort_keys=False))
        return build_archive(
            path,
            self._model,
            output=work,
            archive_format="no-archive",
            external=True,
            aot=scenario == "aot",
        )

    def _serve(self, archive: Path, kept: Path, environment: Mapping[str, str]) -> dict[str, Any]:
        run_dir = STATE / "run" / "bench-start"
        left = server.recall(run_dir)
        if left is not None:
            left.stop()  # of an earlier run that was killed
        begun = time.monotonic()
        running = server.start(
            [archive], run_dir, ports=server.Ports.free(), cache=kept, env=environment
        )
        try:
            running.wait_ready(READY_SECONDS)
            ready_seconds = time.monotonic() - begun
            bucket = self._profile.buckets[0]
            asked = {
                "prompt": "a lighthouse",
                "height": bucket.height,
                "width": bucket.width,
                "num_inference_steps": self._profile.num_steps,
            }
            with Client.to(running, timeout=1000) as client:
                replies = [_ask(client, asked, 1)]
                first_seconds = time.monotonic() - begun
                replies += [_ask(client, asked, seed) for seed in range(2, NUM_FIRST + 1)]
                state = client.state()
            log = (running.logs / "model_log.log").read_text(encoding="utf-8", errors="replace")
        finally:
            running.stop()
        return {
            "ready_seconds": round(ready_seconds, 1),
            "first_image_seconds": round(first_seconds, 1),
            "first_request_ms": round(replies[0].milliseconds, 1),
            "first_ten_p99_ms": round(
                report.percentile([reply.milliseconds for reply in replies], 99), 1
            ),
            "engine": replies[0].headers["x-preheat-engine"],
            "initialize_seconds": state["ready_seconds"],
            "compiles_at_boot": state["compiles_at_boot"],
            "warmed": {word: log.count(f", cache {word})") for word in ("hit", "partial", "miss")},
            "cache_of_one_worker": [row["cache"] for row in state["buckets"]],
            "workers": {
                "published": log.count("published the compile cache"),
                "loaded": log.count("loaded the compile cache"),
            },
        }


def _ask(client: Client, asked: Mapping[str, Any], seed: int) -> Reply:
    reply = client.predict({**asked, "seed": seed})
    if reply.status != 200:
        raise PreheatError(f"request {seed} was answered with {reply.status}")
    return reply


@app.command()
def bench(
    profile: Annotated[
        str, typer.Option(help=f"{', '.join(PROFILES)}; sdxl needs a CUDA GPU.")
    ] = "tiny",
    buckets: Annotated[int, typer.Option(help="How many of the profile's buckets are warmed.")] = 2,
    only: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(TITLES)}; may be repeated.")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Of pt2.compile; eager tries the bench out in minutes.")
    ] = "auto",
    output: Annotated[Path, typer.Option(help="Folder for start.json and start.png.")] = RESULTS,
) -> None:
    """Start the same server with nothing, a local, a shared and a shipped cache, and write down how
    long each takes.
    """
    if profile not in PROFILES:
        raise PreheatError(f"unknown profile {profile!r}: one of {', '.join(PROFILES)}")
    unknown = sorted(set(only or ()) - set(TITLES))
    if unknown:
        raise PreheatError(f"unknown scenario {unknown[0]!r}: one of {', '.join(TITLES)}")
    chosen = replace(PROFILES[profile], buckets=PROFILES[profile].buckets[: max(1, buckets)])
    num_threads = max(1, len(os.sched_getaffinity(0)) // NUM_TOGETHER)
    console, begun = (
        command.console(),
        time.monotonic(),
    )
    document: dict[str, Any] = {
        "profile": profile,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "on_gpu": chosen.on_gpu,
        "versions": versions(),
        "buckets": [[bucket.height, bucket.width] for bucket in chosen.buckets],
        "threads_per_worker": num_threads,
        "backend": backend,
        "steps": chosen.num_steps,
        "seconds": 0.0,
        "starts": {},
    }
    (STATE / "bench").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="start-", dir=STATE / "bench") as name:
        folder = Path(name)
        console.print(f"making the pipeline of profile {profile} ...")
        model = chosen.build(folder / "pipeline")
        runs = Bench(chosen, model, folder, backend=backend, num_threads=num_threads)
        for scenario in TITLES:
            if only and scenario not in only:
                continue
            console.print(f"{scenario}: starting ...")
            document["starts"][scenario] = row = _row(runs, scenario)
            console.print(f"{scenario}: {_line(row)}", markup=False)
            document["seconds"] = round(time.monotonic() - begun, 1)
            document["ratios"] = ratios(document["starts"])
            write(document, output)
    console.print(table(document))
    for sentence, value in document["ratios"].items():
        console.print(f"{sentence}: {value}")
    if any("error" in row for row in document["starts"].values()):
        raise PreheatError("not every start could be measured; start.json says why")


def _row(runs: Bench, scenario: str) -> dict[str, Any]:
    try:
        return runs.measure(scenario)
    # the others' rows are worth having all the same
    except (PreheatError, httpx.HTTPError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def ratios(starts: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The claims of the README, from this very run; those whose two rows are there."""
    claims = {
        "cold over second worker": ("cold", "second"),
        "cold over restart": ("cold", "restart"),
        "cold over aot": ("cold", "aot"),
        "aot over eager": ("aot", "eager"),
        "four over cold": ("four", "cold"),
    }
    found = {}
    for name, (over, under) in claims.items():
        pair = [starts.get(scenario, {}).get("ready_seconds") for scenario in (over, under)]
        if pair[0] and pair[1]:
            found[name] = round(pair[0] / pair[1], 2)
    return found


def write(document: Mapping[str, Any], folder: Path) -> None:
    """`start.json` and, once something was measured, `start.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "start.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if any("ready_seconds" in row for row in document["starts"].values()):
        draw(document, folder / "start.png")


def table(document: Mapping[str, Any]) -> Table:
    """The result for a terminal."""
    made = Table(title=f"{document['profile']}: {report.headline(document)}")
    made.add_column("start", no_wrap=True)
    for heading in ("READY s", "image s", "initialize s", "request ms", "p99 of 10"):
        made.add_column(heading, justify="right", no_wrap=True)
    for heading in ("engine", "hit/part/miss"):
        made.add_column(heading, justify="right", no_wrap=True)
    for scenario, row in document["starts"].items():
        if "ready_seconds" not in row:
            made.add_row(TITLES[scenario], "failed")
            continue
        keys = (
            "ready_seconds",
            "first_image_seconds",
            "initialize_seconds",
            "first_request_ms",
            "first_ten_p99_ms",
            "engine",
        )
        warmed = "/".join(str(count) for count in row["warmed"].values())
        made.add_row(TITLES[scenario], *(str(row[key]) for key in keys), warmed)
    return made


def draw(document: Mapping[str, Any], path: Path) -> None:
    """A bar a start: seconds to READY and, in red, from there to the first image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = {name: row for name, row in document["starts"].items() if "ready_seconds" in row}
    figure = Figure(figsize=(10, 1.4 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    titles = [TITLES[name] for name in rows]
    ready = [row["ready_seconds"] for row in rows.values()]
    first = [row["first_image_seconds"] - row["ready_seconds"] for row in rows.values()]
    axes.barh(titles, ready, 0.6, color=report.BLUE, label="to READY")
    bars = axes.barh(titles, first, 0.6, left=ready, color=report.RED, label="to the first image")
    axes.bar_label(
        bars, [f"{row['first_image_seconds']:g} s" for row in rows.values()], padding=4, fontsize=9
    )
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("seconds from the start of the process")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    sizes = ", ".join(f"{height}x{width}" for height, width in document["buckets"])
    figure.suptitle(
        f"{document['profile']}, buckets {sizes}\n{report.headline(document)}", fontsize=10
    )
    FigureCanvasAgg(figure).print_png(str(path))


def _line(row: Mapping[str, Any]) -> str:
    if "ready_seconds" not in row:
        return str(row["error"]).splitlines()[0]
    warmed = (
        ", ".join(f"{count} {word}" for word, count in row["warmed"].items() if count)
        or "nothing compiled"
    )
    return (
        f"READY after {row['ready_seconds']} s, first image after {row['first_image_seconds']} s "
        f"({warmed})"
    )


def main() -> None:
    command.run(app)


if __name__ == "__main__":
    main()
