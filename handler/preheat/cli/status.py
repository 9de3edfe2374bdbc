"""What `preheat status` shows: a server from outside, as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from preheat.status import padding_warning
from preheat.torchserve.overview import BucketView, ModelView, WorkerView
from preheat.torchserve.readiness import READY


def show(models: Sequence[ModelView], *, anew: bool) -> None:
    """A line, the workers and the buckets of each model; `anew`: on an empty screen."""
    console = Console()
    if anew:
        console.clear()
    for model in models:
        console.print(*_model(model), sep="\n")


def _model(model: ModelView) -> Iterator[RenderableType]:
    queue = "" if model.queue is None else f", {model.queue} waiting"
    yield Text(
        f"{model.model} {model.version}: {model.ready} of {model.wanted} workers READY{queue}, "
        f"{model.restarts} restarts" + (f" (preheat {model.preheat})" if model.preheat else ""),
        style="green" if model.ready >= model.wanted else "yellow",
    )
    if model.failure:
        yield Text(f"the last worker failed: {model.failure}", style="red")
    workers = _table("worker", "pid", "state", "up", "requests", "compiles", "incidents", "eager")
    for worker in model.workers:
        counts = (
            worker.requests,
            worker.compiles_since_ready,
            worker.incidents,
            worker.eager_fallbacks,
        )
        style = None if worker.state == READY else "yellow"
        cells = (worker.id, worker.pid, worker.state, _duration(worker.uptime_seconds), *counts)
        workers.add_row(*("-" if cell is None else str(cell) for cell in cells), style=style)
    yield workers
    for who, worker in _distinct(model.workers):
        yield _buckets(worker.buckets, who)
        warning = padding_warning(worker.padding)
        if warning is not None:
            yield Text(warning, style="yellow")


def _distinct(workers: Sequence[WorkerView]) -> Iterator[tuple[str, WorkerView]]:
    """The first of the workers that are served alike, and whose it is where there are several."""
    kinds: dict[tuple[tuple[str, ...], ...], list[WorkerView]] = {}
    for worker in workers:
        if worker.buckets:
            rows = tuple((b.bucket, b.target, b.engine, b.reason) for b in worker.buckets)
            kinds.setdefault(rows, []).append(worker)
    for alike in kinds.values():
        yield f"worker {', '.join(w.id for w in alike)}" if len(kinds) > 1 else "", alike[0]


def _buckets(rows: Sequence[BucketView], who: str) -> Table:
    table = _table("bucket", "batch", "target", "engine", "s/step", "reason")
    table.title = who or None
    for row in rows:
        seconds = f"{row.seconds_per_step:.3g}" if row.seconds_per_step else "-"
        cells = (row.bucket, str(row.batch_size), row.target, row.engine, seconds, row.reason)
        table.add_row(*cells, style="yellow" if row.reason else None)
    return table


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), title_justify="left")
    for heading in headings:
        table.add_column(heading, no_wrap=heading != "reason", overflow="fold")
    return table


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
