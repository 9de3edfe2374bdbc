"""Warm-up as rich progress bars: one per worker and, below it, one per bucket, fed by the workers'
status files.
"""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from typing_extensions import Self

from preheat.status import Status

MARKS = {"hot": "[green]hot[/]", "failed": "[red]failed[/]"}


class WarmupBars:
    """A context manager; give `update` to `TorchServe.wait_ready` as its `watch`."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._tasks: dict[tuple[int, str], TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, statuses: list[Status]) -> None:
        """Show what the workers that still run have written."""
        running = [status for status in statuses if status.alive]
        for status in running:
            title = f"{status.model} worker {status.pid}"
            self._show(
                status.pid,
                "",
                title,
                status.done,
                status.total,
                MARKS.get(status.state, status.state),
            )
            whose = f"{status.pid} " if len(running) > 1 else ""
            for bucket, done, total, seconds in status.buckets:
                detail = f"{seconds:.1f} s" if seconds else ""
                self._show(status.pid, bucket, f"  {whose}{bucket}", done, total, detail)

    def _show(self, pid: int, bucket: str, title: str, done: int, total: int, detail: str) -> None:
        if (pid, bucket) not in self._tasks:
            self._tasks[pid, bucket] = self._progress.add_task(
                title, total=total or None, detail=detail
            )
        task = self._tasks[pid, bucket]
        self._progress.update(
            task, description=title, completed=done, total=total or None, detail=detail
        )
