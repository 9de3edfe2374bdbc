"""The engines of a CPU side by side: a UNet, a CNN and an encoder in float32 and bfloat16.

    python -m bench.cpu [--only unet] [--rounds 40] [--seconds 700]

For each module and dtype every engine is built, and then all make one step in turn, round after
round: what disturbs the machine disturbs all alike. The figures are medians over the rounds; ratios
are to eager of the same round and dtype. Compilers start without a cache. A cell that cannot be
filled says why.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from bench import cpu_report
from bench.cpu_engines import IPEX_PYTHON, SLOW, TITLES, Engine, build
from bench.cpu_models import MODELS
from bench.machine import machine, versions
from bench.report import on_one_line, percentile
from preheat.compilation.watch import raise_recompile_limits
from preheat.device import keep_freed_memory, share_cpu
from preheat.errors import PreheatError
from preheat.torchserve import server

RESULTS = server.ROOT / "bench" / "results"
NUM_WARM = 5
"""Rounds that are not counted."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def measure(model: str, dtype: str, rounds: int, until: float, say: Console) -> dict[str, Any]:
    """One row of the result: its cells by engine. After `until`, of time.monotonic(), no slow
    compiler is started.
    """
    torch._dynamo.reset()
    with ExitStack() as stack:
        cells: dict[str, dict[str, Any]] = {}
        engines: dict[str, Engine] = {}
        for name in TITLES:
            if name in SLOW and time.monotonic() > until:
                cells[name] = {"failed": "not built: the bench's time was up"}
                continue
            try:
                engines[name] = build(name, model, dtype)
            except (
                PreheatError,
                RuntimeError,
                ValueError,
                TypeError,
                LookupError,
                AssertionError,
                OSError,
            ) as error:
                said = str(error).strip() or type(error).__name__
                cells[name] = {"failed": said.splitlines()[0][:200]}
                say.print(f"{model} {dtype} {name}: {cells[name]['failed']}")
                continue
            stack.callback(engines[name].close)
            say.print(f"{model} {dtype} {name}: {engines[name].compile_seconds:.1f} s")
        for name, milliseconds in _rounds(engines, rounds).items():
            cells[name] = {
                "compile_seconds": round(engines[name].compile_seconds, 1),
                "error": float(f"{engines[name].error:.2g}"),
                "milliseconds": milliseconds,
            }
        return {name: cells[name] for name in TITLES}


def summarize(cells: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The cells with their median, spread and ratio to eager, and the fastest of them."""
    eager = cells["eager"]["milliseconds"]
    for cell in (cell for cell in cells.values() if "milliseconds" in cell):
        took = cell.pop("milliseconds")
        cell["median_ms"] = round(statistics.median(took), 3)
        cell["p10_ms"], cell["p90_ms"] = (
            round(percentile(took, percent), 3) for percent in (10, 90)
        )
        cell["times_eager"] = round(
            statistics.median(other / mine for mine, other in zip(took, eager, strict=True)), 3
        )
    timed = {name: cell["median_ms"] for name, cell in cells.items() if "median_ms" in cell}
    return {"winner": min(timed, key=lambda name: timed[name]), "engines": cells}


def _rounds(engines: Mapping[str, Engine], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every engine's steps, a step each in every round; who begins changes."""
    took: dict[str, list[float]] = {name: [] for name in engines}
    names = list(engines)
    for index in range(NUM_WARM + rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            seconds = engines[name].step()
            if index >= NUM_WARM:
                took[name].append(1000 * seconds)
    return took


@contextmanager
def _empty_caches() -> Iterator[None]:
    """Inductor finds nothing that an earlier run has compiled."""
    with tempfile.TemporaryDirectory(prefix="bench-cpu-") as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        yield


@app.command()
def main(
    rounds: Annotated[int, typer.Option(help="steps of each engine")] = 40,
    only: Annotated[
        list[str] | None, typer.Option(help=f"one of {', '.join(MODELS)}; may be repeated")
    ] = None,
    seconds: Annotated[float, typer.Option(help="after these no slow compiler is started")] = 700,
    output: Annotated[Path, typer.Option(help="folder for cpu.json and cpu.png")] = RESULTS,
) -> None:
    """Measure, write cpu.json and cpu.png, and print the table."""
    say, until = Console(stderr=True), time.monotonic() + seconds
    share_cpu(1)
    keep_freed_memory()
    raise_recompile_limits(100)
    document: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "num_threads": torch.get_num_threads(),
        "ipex_installed": IPEX_PYTHON.exists(),
        "measured": datetime.date.today().isoformat(),
        "rounds": rounds,
        "models": {},
    }
    with _empty_caches():
        for dtype in ("float32", "bfloat16"):
            for model in only or MODELS:
                made = {"title": MODELS[model].title, "call": MODELS[model].call, "dtypes": {}}
                row = document["models"].setdefault(model, made)
                row["dtypes"][dtype] = summarize(measure(model, dtype, rounds, until, say))
    output.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"\[\n[^][{}]*\]", on_one_line, json.dumps(document, indent=1))
    (output / "cpu.json").write_text(text + "\n", encoding="utf-8")
    cpu_report.draw(document, output / "cpu.png")
    Console(width=120).print(cpu_report.table(document))


if __name__ == "__main__":
    sys.exit(app())
