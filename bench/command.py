"""What the commands of all benches have in common."""

from __future__ import annotations

import signal
import sys

import typer
from rich.console import Console

from preheat.errors import PreheatError


def console() -> Console:
    """Wide enough for the tables where nobody's terminal says how wide it is."""
    return Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)


def run(app: typer.Typer, *more: type[Exception]) -> None:
    """Run the command; a PreheatError, and `more` of what is no fault of the bench, is one line and
    exit status 1.
    """
    refusals: tuple[type[Exception], ...] = (PreheatError, *more)
    # unwinds, so that servers and loops are stopped
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except refusals as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(1)
