"""The engines of a CPU side by side: two UNets, a CNN and an encoder in float32 and bfloat16.

    python -m bench.cpu [--only unet] [--rounds 40] [--seconds 700]

For each module and dtype every engine is built, and then all make one step in turn, round after
round: what disturbs the machine disturbs all alike. The figures are medians over the rounds; ratios
are to eager of the same round and dtype. A matrix product takes its turn too: what an engine has of
it is its share of the limit. Compilers start without a cache. A cell that cannot be
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from bench import cpu_report
from bench.cpu_engines import (
    IPEX_PYTHON,
    MASKED,
    SLOW,
    Engine,
    Product,
    Steps,
    build,
    engines_of,
)
from bench.cpu_models import MODELS, num_operations
from bench.machine import machine, versions
from bench.report import on_one_line, percentile
from bench.rounds import Spread, doubts, turns
from preheat.compilation.watch import raise_recompile_limits
from preheat.device import keep_freed_memory, share_cpu
from preheat.errors import PreheatError
from preheat.torchserve import server

RESULTS = server.ROOT / "bench" / "results"
PRODUCT = "a matrix product"
NUM_WARM = 5
"""Rounds that are not counted."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def measure(model: str, dtype: str, rounds: int, until: float, say: Console) -> dict[str, Any]:
    """One row of the result, with its cells by engine. After `until`, of time.monotonic(), no slow
    compiler is started.
    """
    torch._dynamo.reset()
    with ExitStack() as stack:
        cells: dict[str, dict[str, Any]] = {}
        engines: dict[str, Engine] = {}
        for name in engines_of(model):
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
        product = Product(dtype)
        took = _rounds({**engines, PRODUCT: product}, rounds)
        for name, engine in engines.items():
            cells[name] = {
                "compile_seconds": round(engine.compile_seconds, 1),
                "error": float(f"{engine.error:.2g}"),
                "milliseconds": took[name],
            }
    ordered = {name: cells[name] for name in engines_of(model)}
    return summarize(ordered, took[PRODUCT], num_operations(model))


def summarize(
    cells: dict[str, dict[str, Any]], product: Sequence[float], operations: int
) -> dict[str, Any]:
    """The cells with their median, spread and ratios, and the fastest of them. Ratios are to eager,
    to the same engine without masks, and to the limit: what `operations` would take if they were
    all as fast as the machine's own matrix product, whose milliseconds by round are `product`.
    """
    timed = {name: cell.pop("milliseconds") for name, cell in cells.items() if "failed" not in cell}
    limits = [took * operations / Product.NUM_OPERATIONS for took in product]
    for name, took in timed.items():
        cell = cells[name]
        cell["median_ms"] = round(statistics.median(took), 3)
        cell["p10_ms"], cell["p90_ms"] = (
            round(percentile(took, percent), 3) for percent in (10, 90)
        )
        cell["times_eager"] = _over(timed["eager"], took)
        cell["share_of_limit"] = _over(limits, took)
        unmasked = name.removesuffix(MASKED)
        if unmasked != name and unmasked in timed:
            cell["over_unmasked"] = _over(took, timed[unmasked])
    medians = {name: cells[name]["median_ms"] for name in timed if not name.endswith(MASKED)}
    winner = min(medians, key=lambda name: medians[name])
    gain = [other / mine for mine, other in zip(timed[winner], timed["eager"], strict=True)]
    quarters = [statistics.median(part) for part in _quarters(gain)]
    return {
        "winner": winner,
        "engines": cells,
        "limit_ms": round(statistics.median(limits), 3),
        "gigaflops_of_a_product": round(Product.NUM_OPERATIONS / statistics.median(product) / 1e6),
        "gigaflop": round(operations / 1e9, 2),
        "doubts": doubts({f"{winner} over eager": Spread.of(quarters)}),
    }


def _over(these: Sequence[float], those: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return round(statistics.median(a / b for a, b in zip(these, those, strict=True)), 3)


def _quarters(values: Sequence[float]) -> list[Sequence[float]]:
    """Of the run: single steps differ more than the machine does."""
    size = -(-len(values) // 4)
    return [values[start : start + size] for start in range(0, len(values), size)]


def _rounds(engines: Mapping[str, Steps], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every engine's steps, a step each in every round; who begins changes."""
    took: dict[str, list[float]] = {name: [] for name in engines}
    for index in range(NUM_WARM + rounds):
        for name in turns(list(engines), index):
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
                row["dtypes"][dtype] = measure(model, dtype, rounds, until, say)
    output.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"\[\n[^][{}]*\]", on_one_line, json.dumps(document, indent=1))
    (output / "cpu.json").write_text(text + "\n", encoding="utf-8")
    cpu_report.draw(document, output / "cpu.png")
    Console(width=160).print(cpu_report.table(document))
    for title, dtype, row in cpu_report.rows(document):
        say.print(f"{title}, {dtype}: {cpu_report.limit(row)}", markup=False)
        for doubt in row["doubts"]:
            say.print(f"{title}, {dtype}: {doubt}", markup=False)


if __name__ == "__main__":
    sys.exit(app())
