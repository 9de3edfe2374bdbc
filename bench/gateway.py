"""What the gateway costs, and how near its queue comes to what no host could make better.

    python -m bench.gateway [--profile tiny|small|sdxl] ...

One warm TorchServe, asked directly and through the gateway: by eight clients who want the sizes of
several buckets, by as many who all want the first bucket's, and by one alone. Beside it the bare
pipeline in a loop that sorts the mixed sizes beforehand; and the simulation of the gateway's own
queue (bench.queueing) with the times that the bare pipeline's runs take, which is the same policy,
batch size and clients in front of a host that costs nothing. All take turns, round after round, and
ratios are made within a round.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.box import SIMPLE
from rich.table import Table

from bench import command, load
from bench.clients import Payload, Traffic, closed_loop
from bench.machine import machine, versions
from bench.processes import BareProcess
from bench.profiles import PROFILES, RESULTS, STATE, Profile
from bench.queueing import Seconds, Simulated, simulate
from bench.rounds import Spread, doubts, turns
from preheat.buckets import Bucket, smallest_covering
from preheat.errors import PreheatError
from preheat.gateway.queue import Limits
from preheat.torchserve.server import TorchServe

NUM_CLIENTS = 8
PASSES = 4
"""Of the mixed traffic that are simulated."""
TARGETS = {"of_simulation": 0.95, "of_direct": 0.97}
MOST_MS = 5.0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class Round:
    """Requests a second, or milliseconds that one client waits for the median answer."""

    bare: float
    """Mixed sizes, sorted beforehand."""
    simulated: float
    direct: float
    """Mixed sizes, without a gateway."""
    gateway: float
    direct_uniform: float
    gateway_uniform: float
    direct_ms: float
    gateway_ms: float

    @property
    def ratios(self) -> dict[str, float]:
        return {
            "of_simulation": self.gateway / self.simulated,
            "of_bare": self.gateway / self.bare,
            "direct_of_bare": self.direct / self.bare,
            "of_direct": self.gateway_uniform / self.direct_uniform,
        }


TITLES = {
    "of_simulation": "mixed sizes, through the gateway: of the simulation",
    "of_bare": "mixed sizes, through the gateway: of the loop that sorts beforehand",
    "direct_of_bare": "mixed sizes, without it: of the loop that sorts beforehand",
    "of_direct": "one bucket, through the gateway: of without it",
}


def run_seconds(rates: Mapping[tuple[str, int], float]) -> Seconds:
    """What a run takes, from requests a second by bucket and rows a run; one of other rows is
    filled up to the next that is known.
    """

    def seconds(group: Hashable, rows: int) -> float:
        ran = min(size for known, size in rates if known == group and size >= rows)
        return ran / rates[str(group), ran]

    return seconds


def groups(sizes: Sequence[tuple[int, int]], buckets: Sequence[Bucket]) -> list[str]:
    """The bucket of each request.

    Raises:
        ValueError: no bucket covers one.
    """
    found = [smallest_covering(buckets, Bucket(*size)) for size in sizes]
    if None in found:
        raise ValueError("a size that no bucket covers")
    return [str(bucket) for bucket in found]


@dataclass(frozen=True, slots=True)
class Bench:
    """Everything that takes its turn."""

    bare: BareProcess
    running: TorchServe
    requests: Mapping[str, Sequence[Payload]]
    profile: Profile
    batch: int
    settle: float
    seconds: float

    def round(self, index: int) -> Round:
        """One turn of each."""
        gateway = self.running.front
        assert gateway is not None
        measures: dict[str, Callable[[], float]] = {
            "bare": lambda: self.bare.rate("mixed", self.batch, self.seconds),
            "simulated": lambda: self.simulate().per_second,
            "direct": lambda: self._rate("mixed", None),
            "gateway": lambda: self._rate("mixed", gateway),
            "direct_uniform": lambda: self._rate("uniform", None),
            "gateway_uniform": lambda: self._rate("uniform", gateway),
            "direct_ms": lambda: self._wait(None),
            "gateway_ms": lambda: self._wait(gateway),
        }
        found = {name: measures[name]() for name in turns(list(measures), index)}
        return Round(**found)

    def simulate(self) -> Simulated:
        """The gateway's policy with the times that the bare pipeline takes now."""
        buckets, sizes = self.profile.buckets, load.warmed_sizes(self.batch)
        each = self.seconds / len(buckets) / len(sizes)
        rates = {
            (str(bucket), size): self.bare.rate(str(bucket), size, each)
            for bucket in buckets
            for size in sizes
        }
        asked = [(int(one["height"]), int(one["width"])) for one in self.requests["mixed"]]
        return simulate(
            groups(asked, buckets) * PASSES,
            num_clients=NUM_CLIENTS,
            limits=Limits(1, self.batch, self.settle),
            seconds=run_seconds(rates),
        )

    def _rate(self, traffic: str, url: str | None) -> float:
        seen = self._ask(traffic, NUM_CLIENTS, url)
        return seen.num_good / seen.seconds

    def _wait(self, url: str | None) -> float:
        seen = self._ask("uniform", 1, url).seen
        return statistics.median(one.milliseconds for one in seen)

    def _ask(self, traffic: str, num_clients: int, url: str | None) -> Traffic:
        requests = self.requests[traffic]
        seen = closed_loop(self.running, requests, "rest", num_clients, self.seconds, url=url)
        if failed := sum(not one.good for one in seen.seen):
            raise PreheatError(f"{failed} of {len(seen.seen)} requests failed ({traffic}, {url})")
        return seen


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians and spreads over the rounds, and what they say of the targets."""
    spreads = {name: Spread.of([one.ratios[name] for one in rounds]) for name in rounds[0].ratios}
    added = statistics.median(one.gateway_ms - one.direct_ms for one in rounds)
    reached = {
        name: spread.median >= TARGETS[name]
        for name, spread in spreads.items()
        if spread is not None and name in TARGETS
    }
    return {
        "rounds": [asdict(one) for one in rounds],
        "ratios": {name: spread.to_json() for name, spread in spreads.items() if spread},
        "added_ms": round(added, 2),
        "reached": {**reached, "added_ms": added < MOST_MS},
        "doubts": doubts(spreads),
    }


def table(document: Mapping[str, Any]) -> Table:
    """For a terminal of 120 columns."""
    shown = Table(
        title=f"{document['profile']}: {NUM_CLIENTS} clients, batches of {document['batch']}, "
        f"{len(document['rounds'])} rounds",
        box=SIMPLE,
    )
    for heading in ("", "median", "from", "to"):
        shown.add_column(heading, justify="left" if not heading else "right")
    for field in fields(Round):
        values = [one[field.name] for one in document["rounds"]]
        unit = "ms, one client" if field.name.endswith("_ms") else "requests/s"
        cells = (statistics.median(values), min(values), max(values))
        name = field.name.removesuffix("_ms").replace("_", ", ")
        shown.add_row(f"{name} ({unit})", *(f"{value:.2f}" for value in cells))
    shown.add_section()
    for name, ratio in document["ratios"].items():
        cells = (ratio["median"], ratio["low"], ratio["high"])
        shown.add_row(TITLES[name], *(f"{value:.1%}" for value in cells))
    return shown


def verdict(document: Mapping[str, Any]) -> str:
    """A line: what was to be reached, and whether it was."""
    ratios, reached = document["ratios"], document["reached"]
    said = [
        f"{ratios[name]['median']:.1%} {what} ({least:.0%} {_word(reached[name])})"
        for (name, least), what in zip(
            TARGETS.items(), ("of the simulation", "of the throughput without it"), strict=True
        )
    ]
    said.append(f"{document['added_ms']} ms added (under {MOST_MS:g} {_word(reached['added_ms'])})")
    return "; ".join(said)


def _word(reached: bool) -> str:
    return "reached" if reached else "missed"


@app.command()
def bench(
    profile: Annotated[
        str, typer.Option(help=f"{', '.join(PROFILES)}; sdxl needs a CUDA GPU.")
    ] = "tiny",
    seconds: Annotated[float, typer.Option(help="Of each turn.")] = 10,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Most requests of a batch.")] = 4,
    steps: Annotated[int | None, typer.Option(help="Denoising steps per request.")] = None,
    max_delay: Annotated[
        int, typer.Option(help="Milliseconds that a batch waits to be full.")
    ] = 20,
    backend: Annotated[
        str, typer.Option(help="Of torch.compile; eager tries the bench out.")
    ] = "openvino",
    output: Annotated[Path, typer.Option(help="Folder for gateway.json.")] = RESULTS,
) -> None:
    """Ask a TorchServe directly and through the gateway, and hold that against the simulation."""
    if profile not in PROFILES:
        raise PreheatError(f"unknown profile {profile!r}: one of {', '.join(PROFILES)}")
    chosen = replace(PROFILES[profile], num_steps=steps or PROFILES[profile].num_steps)
    cores = max(1, len(os.sched_getaffinity(0)) - 1)  # one is the clients' and the gateway's
    threads = {} if chosen.on_gpu else {"OMP_NUM_THREADS": str(cores)}
    console = command.console()
    own = {str(each): [(each.height, each.width)] * batch for each in chosen.buckets}
    traffics = {**load.mix(chosen), **own}
    (STATE / "bench").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="model-", dir=STATE / "bench") as folder:
        model = chosen.build(Path(folder, "pipeline"))
        spec = load.bare_spec(chosen, model, traffics, batch=batch, backend=backend)
        spec = replace(spec, batch_sizes=load.warmed_sizes(batch))
        console.print("bare pipeline: compiling ...")
        config = load.served_yaml(chosen, batch, backend=backend, max_delay=max_delay)
        with closing(BareProcess(spec, threads)) as bare:
            console.print("starting a server ...")
            with load.serving(chosen, config, model, threads, gateway=True) as (running, _):
                requests = {
                    name: load.payloads(traffics[name], chosen) for name in ("mixed", "uniform")
                }
                own_bench = Bench(bare, running, requests, chosen, batch, max_delay / 1000, seconds)
                # Java compiles its code while it runs
                closed_loop(
                    running, requests["mixed"], "rest", NUM_CLIENTS, seconds, url=running.front
                )
                measured = []
                for index in range(rounds):
                    measured.append(own_bench.round(index))
                    ratios = (f"{name} {each:.3f}" for name, each in measured[-1].ratios.items())
                    console.print(f"round {index + 1}: {', '.join(ratios)}")
    document = {
        "profile": profile,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "backend": backend,
        "batch": batch,
        "steps": chosen.num_steps,
        "max_delay_ms": max_delay,
        "seconds_per_turn": seconds,
        **summary(measured),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "gateway.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    console.print(table(document))
    for doubt in document["doubts"]:
        console.print(doubt, markup=False)
    console.print(verdict(document), markup=False)


def main() -> None:
    command.run(app, httpx.HTTPError)


if __name__ == "__main__":
    main()
