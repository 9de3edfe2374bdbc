"""`preheat plan`: from asked sizes to buckets, as a table, YAML, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from preheat.buckets import Bucket
from preheat.errors import LogError, PreheatError
from preheat.planning import strategies
from preheat.planning.cost import Curve, Measured, measured
from preheat.planning.demand import Demand, counted
from preheat.planning.plan import Choice, Wanted, plan
from preheat.planning.strategies import Rates, Row

MOST = 8
"""Numbers of buckets in the table, at least."""
_KNEE = 0.03
"""A bucket more that saves a smaller share of the cost is past the knee."""
MIB = 2**20


@dataclass(frozen=True)
class Report:
    """A plan with all that is said about it."""

    demand: Demand
    choices: Sequence[Choice]
    chosen: Choice
    rates: Rates | None
    """None for a module of which nothing was measured: what is documented is a pipeline's."""
    rows: Sequence[Row]
    unit: str
    """Of the cost: cells or seconds."""
    multiple: int
    fit_error: float
    """Of the measured seconds, how far the curve is off at most."""

    @property
    def knee(self) -> int:
        """The number of buckets after which another saves little."""
        for fewer, more in zip(self.choices, self.choices[1:], strict=False):
            if more.cost > (1 - _KNEE) * fewer.cost:
                return len(fewer.buckets)
        return len(self.choices[-1].buckets)


def make(
    demand: Demand,
    states: Sequence[Measured],
    wanted: Wanted,
    *,
    max_waste: float | None,
    steps: int,
) -> Report:
    """The plan: with `max_waste` the fewest buckets, up to `wanted.max_buckets`, that waste no
    more; else as many as those.

    Raises:
        PreheatError: there is no such plan.
    """
    cost, unit = _cost(states)
    most = max(MOST, wanted.max_buckets)
    focus = 0 if max_waste is not None else wanted.max_buckets
    looked_at = replace(wanted, max_buckets=most, focus=focus)
    choices: list[Choice] = []
    with Console(stderr=True).status("planning") as spinner:
        for choice in plan(demand, cost, looked_at):
            choices.append(choice)
            spinner.update(f"planning: {len(choice.buckets)} of {most} buckets are done")
    allowed = [each for each in choices if len(each.buckets) <= wanted.max_buckets]
    if not allowed:
        raise PreheatError(f"{wanted.max_buckets} buckets cannot cover enough: allow more")
    chosen = allowed[-1]
    if max_waste is not None:
        within = [each for each in allowed if each.usage.waste <= max_waste]
        if not within:
            raise PreheatError(
                f"{len(chosen.buckets)} buckets still waste {chosen.usage.waste:.1%}, which is "
                f"more than {max_waste:.1%}: allow more buckets, or leave some sizes (--cover)"
            )
        chosen = within[0]
    rates, rows = None, []
    if demand.is_picture or unit == "seconds":
        rates = Rates.of(states, steps if demand.is_picture else 1)
        rows = strategies.compare(demand, chosen, rates, wanted.multiple)
    return Report(demand, choices, chosen, rates, rows, unit, wanted.multiple, cost.worst_error)


def parse_bucket(text: str, names: Sequence[str]) -> Bucket:
    """A must-have bucket: 1024x768, or one number where a dimension is bucketed.

    Raises:
        PreheatError: it is none.
    """
    parts = text.lower().split("x")
    sizes = [int(part) for part in parts if part.isascii() and part.isdigit() and int(part)]
    if len(sizes) != len(parts) or len(sizes) != len(names):
        form = "HEIGHTxWIDTH, such as 1024x768" if len(names) == 2 else "a number, such as 128"
        raise PreheatError(f"--must {text}: a bucket here is {form}")
    return Bucket(*sizes) if len(names) == 2 else Bucket(**{names[0]: sizes[0]})


def read_state(path: Path) -> dict[str, Any]:
    """A worker's state: of the management API's `?customized=true`, or of `preheat status --json`,
    as they answer.

    Raises:
        PreheatError: it cannot be read, or is something else.
    """
    try:
        document = json.loads(path.read_bytes())
        if isinstance(document, list):
            document = document[0]["customizedMetadata"]
        if isinstance(document, str):
            document = json.loads(document)
        if "models" in document:
            document = document["models"][0]["workers"][0]
        state: dict[str, Any] = document.get("preheat", document)
        if not isinstance(state.get("buckets"), list):
            raise TypeError("no list of buckets")
    except OSError as error:
        raise PreheatError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise PreheatError(f"{path} holds no state of a worker: {error}") from error
    return state


def measurements(states: Sequence[Mapping[str, Any]]) -> list[Measured]:
    """What these workers have measured, of each strategy the first that has seconds."""
    found: dict[str, Measured] = {}
    for state in states:
        one = measured(state)
        if one.seconds or one.eager_seconds:
            found.setdefault(one.strategy, one)
    return list(found.values())


def from_workers(documents: Sequence[Mapping[str, Any]], where: str) -> Demand:
    """The sizes that workers have counted.

    Raises:
        LogError: there are none.
    """
    demand = counted(documents)
    if demand is None:
        raise LogError(f"{where}: no sizes were asked for yet; give a log (--csv, make: CSV=)")
    return demand


def document(report: Report) -> dict[str, Any]:
    """All of it as plain data."""
    demand, rates = report.demand, report.rates
    return {
        "requests": demand.num_requests,
        "uncounted": demand.num_uncounted,
        "sizes": len(demand.counts),
        "dimensions": list(demand.names),
        "grid": report.multiple,
        "unit": report.unit,
        "chosen": len(report.chosen.buckets),
        "knee": report.knee,
        "choices": [
            {
                "buckets": [dict(bucket.sizes) for bucket in choice.buckets],
                "cost": choice.cost,
                "gap": choice.gap,
                "waste": choice.usage.waste,
                "left_share": choice.usage.left_share,
                "warm_seconds": rates and rates.warm_up(len(choice.buckets)),
                "memory_bytes": rates and rates.memory(len(choice.buckets)),
            }
            for choice in report.choices
        ],
        "strategies": [
            {
                "strategy": row.strategy,
                "start_seconds": row.start_seconds,
                "request_seconds": row.request_seconds,
                "computed_cells": row.computed_cells,
                "measured": row.measured,
            }
            for row in report.rows
        ],
        "cheapest": [
            {"strategy": name, "from_requests": begin}
            for name, begin in (strategies.cheapest(report.rows) if report.rows else ())
        ],
        "yaml": yaml_text(report),
    }


def yaml_text(report: Report) -> str:
    """The buckets as they stand in a model YAML."""
    buckets = report.chosen.buckets
    if not report.demand.is_picture:
        (name,) = report.demand.names
        sizes = ", ".join(str(bucket[name]) for bucket in reversed(buckets))
        return f"module:\n  inputs:\n    INPUT:\n      buckets: {{{name}: [{sizes}]}}\n"
    pairs = ", ".join(f"[{bucket.height}, {bucket.width}]" for bucket in buckets)
    lines = ["pt2:", "  shapes:", "    strategy: buckets", f"    buckets: [{pairs}]"]
    if report.chosen.usage.left:
        lines.append(
            f"    oversize: eager  # {report.chosen.usage.left_share:.1%} of the requests; or "
            "reject, downscale"
        )
    return "\n".join(lines) + "\n"


def show(report: Report, console: Console) -> None:
    """Tables and YAML for a terminal."""
    demand, chosen = report.demand, report.chosen
    console.print(
        f"{demand.num_requests} requests, {len(demand.counts)} sizes of "
        f"{' x '.join(demand.names)}, rounded up to {report.multiple}"
    )
    if demand.num_uncounted:
        console.print(
            f"{demand.num_uncounted} more requests had sizes that the workers had no room to "
            "remember: the plan knows nothing of them",
            style="yellow",
        )
    console.print(_choices(report))
    proof = "proven best" if chosen.gap < 1e-6 else f"at most {chosen.gap:.2%} from the best"
    console.print(
        f"{len(chosen.buckets)} buckets, {proof}: {', '.join(map(str, chosen.buckets))}. "
        f"{chosen.usage.waste:.1%} of what is computed is padding; the knee is at {report.knee}"
    )
    if report.rates is not None:
        console.print(_matrix(report.rows))
        console.print(_sources(report, report.rates))
        console.print(_break_even(report.rows))
    else:
        console.print("What it costs in seconds, a worker's state would tell (--cost)")
    console.print(f"\n{yaml_text(report)}", markup=False, highlight=False, end="")


def _cost(states: Sequence[Measured]) -> tuple[Curve, str]:
    for state in states:
        curve = state.seconds or state.eager_seconds
        if state.strategy in ("buckets", "fixed") and curve is not None:
            return curve, "seconds"
    return Curve(), "cells"


def _choices(report: Report) -> Table:
    rates = report.rates
    costs = ("warm-up s", "memory") if rates is not None else ()
    table = _table("buckets", "padding", "left", "gap", *costs, "")
    for choice in report.choices:
        num, marks = len(choice.buckets), []
        if num == report.knee:
            marks.append("knee")
        if choice is report.chosen:
            marks.append("this plan")
        cells = [
            str(num),
            f"{choice.usage.waste:.1%}",
            f"{choice.usage.left_share:.1%}",
            f"{choice.gap:.2%}",
        ]
        if rates is not None:
            plus = "" if rates.peak_bytes else "+"
            cells += [f"{rates.warm_up(num):.0f}", f"{plus}{rates.memory(num) / MIB:.0f} MiB"]
        style = "bold" if choice is report.chosen else None
        table.add_row(*cells, ", ".join(marks), style=style)
    return table


def _matrix(rows: Sequence[Row]) -> Table:
    table = _table("strategy", "compiling s", "ms a request", "computed", "measured", "")
    asked = sum(row.computed_cells for row in rows if row.strategy == "eager")
    for row in rows:
        table.add_row(
            row.strategy,
            f"{row.start_seconds:.0f}",
            f"{1000 * row.request_seconds:.3g}",
            f"{row.computed_cells / asked:.0%}",
            "yes" if row.measured else "no",
            row.note,
        )
    return table


def _sources(report: Report, rates: Rates) -> str:
    said = []
    if report.unit == "seconds":
        said.append(
            "the cost is seconds, from a curve through what the worker measured, at most "
            f"{report.fit_error:.1%} beside it"
        )
    else:
        said.append("the cost is cells: no seconds were measured (--cost)")
    if not rates.measured:
        said.append(
            f"seconds and memory are those of {strategies.DOCUMENTED}, four steps; on yours only "
            "their ratios may hold"
        )
    else:
        said.append(
            "rows that were not measured, and the memory of a graph, are in proportion to "
            f"{strategies.DOCUMENTED}"
        )
    if rates.warm_up_measured and rates.from_cache:
        said.append("warm-up is of a start that found compiled code: a cold one takes longer")
    return "; ".join(said)


def _break_even(rows: Sequence[Row]) -> str:
    first, *later = strategies.cheapest(rows)
    parts = [f"{name} from {begin:.0f} requests on" for name, begin in later]
    text = ", ".join([f"cheapest after a cold start: {first[0]}", *parts])
    resamples = any(row.strategy == "fixed" for row in rows)
    return f"{text} (fixed is not compared: it resamples)" if resamples else text


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=bool(heading))
    return table
