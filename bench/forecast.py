"""Whether `preheat profile` foretells what a request takes once it is compiled and served.

    python -m bench.forecast [--profile tiny|small] [--backend openvino|inductor|eager] ...

The forecast is the eager profile's seconds by part, those of the denoiser times what bench.cpu has
measured of this backend on the same denoiser (bench/results/cpu.json). It is held against one
client's median request of exactly a bucket's size, alone in its batch, on a warm TorchServe.
Profile and server take turns, round after round.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
import yaml

from bench import command, load
from bench.machine import machine, versions
from bench.profiles import PROFILES, RESULTS, STATE
from bench.profiles import Profile as Benched
from bench.rounds import Spread, doubts
from preheat.buckets import Bucket
from preheat.cli.aside import ask, staged
from preheat.errors import PreheatError
from preheat.preflight.profile import Profile
from preheat.torchserve.client import Client
from preheat.torchserve.server import TorchServe

CPU = RESULTS / "cpu.json"
DENOISERS = {"tiny": "unet", "small": "small"}
"""In cpu.json, by the profile that serves it."""
EAGER = "channels_last"
"""What eager code runs as on a CPU."""
MOST_OFF = 0.15

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def step_ratio(measured: Mapping[str, Any], profile: str, dtype: str, backend: str) -> float:
    """What the backend's step takes of eager's, as bench.cpu has measured it.

    Raises:
        PreheatError: it has not.
    """
    if backend == "eager":
        return 1.0
    try:
        engines = measured["models"][DENOISERS[profile]]["dtypes"][dtype]["engines"]
        return float(engines[backend]["median_ms"] / engines[EAGER]["median_ms"])
    except KeyError as missing:
        raise PreheatError(
            f"{CPU} has no {backend} of {profile} in {dtype} (no {missing}): give --ratio, or "
            "run make bench-cpu"
        ) from None


def off(forecast: Mapping[str, float], served: Mapping[str, float]) -> dict[str, float]:
    """How far the forecast is from what was served, as a share of that, by bucket."""
    return {name: forecast[name] / served[name] - 1 for name in served}


def summary(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Of every round's `off`."""
    spreads = {name: Spread.of([1 + each[name] for each in rounds]) for name in rounds[0]}
    medians = {name: spread.median - 1 for name, spread in spreads.items() if spread is not None}
    worst = max(medians.values(), key=abs)
    return {
        "off": {name: round(value, 3) for name, value in medians.items()},
        "worst": round(worst, 3),
        "reached": abs(worst) <= MOST_OFF,
        "doubts": doubts(spreads),
    }


def served_seconds(
    running: TorchServe, profile: Benched, buckets: Sequence[Bucket], number: int
) -> dict[str, float]:
    """The median request of exactly each bucket's size."""
    found = {}
    with Client.to(running) as client:
        for bucket in buckets:
            (payload,) = load.payloads([(bucket.height, bucket.width)], profile)
            taken = []
            for _ in range(number + 1):
                begun = time.perf_counter()
                reply = client.predict(payload)
                taken.append(time.perf_counter() - begun)
                if reply.status != 200:
                    raise PreheatError(f"{bucket}: {reply.body[:300]!r}")
            found[str(bucket)] = statistics.median(taken[1:])
    return found


@app.command()
def bench(
    profile: Annotated[str, typer.Option(help=", ".join(DENOISERS))] = "tiny",
    backend: Annotated[str, typer.Option(help="Of torch.compile.")] = "openvino",
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    requests: Annotated[int, typer.Option(min=1, help="Of each bucket and round.")] = 15,
    steps: Annotated[int | None, typer.Option(help="Denoising steps per request.")] = None,
    ratio: Annotated[
        float | None,
        typer.Option(help="Of the backend's step to eager's. Default: bench/results/cpu.json's."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for forecast.json.")] = RESULTS,
) -> None:
    """Hold the forecast of `preheat profile` against served requests."""
    if profile not in DENOISERS:
        raise PreheatError(f"unknown profile {profile!r}: one of {', '.join(DENOISERS)}")
    chosen = replace(PROFILES[profile], num_steps=steps or PROFILES[profile].num_steps)
    if ratio is None:
        ratio = step_ratio(json.loads(CPU.read_bytes()), profile, chosen.dtype, backend)
    console = command.console()
    console.print(f"a step with {backend} takes {ratio:.2f} of an eager one")
    config = load.served_yaml(chosen, 1, backend=backend, max_delay=0)
    told, every = [], []
    (STATE / "bench").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="model-", dir=STATE / "bench") as folder:
        model = chosen.build(Path(folder, "pipeline"))
        file = Path(folder, f"{chosen.name}.yaml")
        file.write_text(yaml.safe_dump(config))
        Path(folder, "staged").mkdir()
        _, looked_at, _ = staged(file, str(model), Path(folder, "staged"))
        assert looked_at is not None
        with load.serving(chosen, config, model, {}) as (running, _):
            for index in range(rounds):
                seen = Profile.model_validate_json(
                    ask("measure", looked_at, looked_at.parent, chosen.num_steps)
                )
                served = served_seconds(running, chosen, chosen.buckets, requests)
                forecast = {
                    each.bucket: seen.predicted(each, {"unet": ratio}) for each in seen.buckets
                }
                told.append(
                    {
                        name: {
                            "eager": round(each.wall_seconds, 4),
                            "forecast": round(forecast[name], 4),
                            "served": round(served[name], 4),
                        }
                        for each in seen.buckets
                        for name in [each.bucket]
                    }
                )
                every.append(off(forecast, served))
                shown = (f"{name} {share:+.1%}" for name, share in every[-1].items())
                console.print(f"round {index + 1}: {', '.join(shown)}")
    found = summary(every)
    document = {
        "profile": profile,
        "machine": machine(),
        "versions": versions(),
        "backend": backend,
        "step_ratio": round(ratio, 3),
        "steps": chosen.num_steps,
        "rounds": told,
        **found,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "forecast.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for doubt in found["doubts"]:
        console.print(doubt, markup=False)
    console.print(
        f"the forecast is off by {found['worst']:+.1%} at most; {MOST_OFF:.0%} "
        f"{'kept' if found['reached'] else 'missed'}"
    )


def main() -> None:
    command.run(app, httpx.HTTPError)


if __name__ == "__main__":
    main()
