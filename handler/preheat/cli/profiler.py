"""`preheat profile`: where the time of a request goes, and what compiling can gain."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from preheat.errors import PreheatError

if TYPE_CHECKING:
    from rich.console import Console

    from preheat.preflight.profile import Profile


def profile(
    config: Annotated[Path, typer.Argument(help="The model YAML.", exists=True, dir_okay=False)],
    model: Annotated[
        str | None,
        typer.Argument(help="Model folder, hub id or tiny:sdxl. Default: the YAML's path."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps. Default: the YAML's.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Keep the Chrome trace of the largest bucket here (.json).")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw it here: a .png, .svg or .pdf.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say where the time of a request goes, eager, and what compiling which target gains at most.

    One request of each bucket's size, in a process of its own; nothing is compiled.
    """
    from rich.console import Console

    from preheat.cli import profile_picture

    with Console(stderr=True).status("running requests eagerly"):
        found = measured(config, model, steps, trace)
    if picture is not None:
        profile_picture.draw(found, picture)
    if as_json:
        print(json.dumps(document(found)))
    else:
        _show(found, Console(soft_wrap=True, width=None if sys.stdout.isatty() else 110))


def measured(
    config: Path, model: str | None = None, steps: int | None = None, trace: Path | None = None
) -> Profile:
    """The profile.

    Raises:
        PreheatError: there is no model, or it cannot be served.
    """
    from preheat.cli.aside import ask, staged
    from preheat.preflight.profile import Profile

    with tempfile.TemporaryDirectory(prefix="preheat-profile-") as temp:
        loaded, yaml_file, _ = staged(config, model, Path(temp))
        if yaml_file is None:
            raise PreheatError(
                f"{config} does not say where its model lies: give it (make: MODEL=) or write "
                f"{loaded.family.name}.path"
            )
        traces = [trace.absolute()] if trace is not None else []
        return Profile.model_validate_json(
            ask("measure", yaml_file, yaml_file.parent, steps or 0, *traces)
        )


def document(found: Profile) -> dict[str, Any]:
    """As JSON, with what follows from it."""
    shares = {each.bucket: each.shares for each in found.buckets}
    gains = {name: found.most_gain(name) for name in found.targets}
    return found.model_dump(mode="json") | {
        "shares": shares,
        "most_gain": gains,
        "yaml": found.advice(),
    }


def _show(found: Profile, console: Console) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    def table(*headings: str) -> Table:
        made = Table(box=SIMPLE, padding=(0, 1, 0, 0))
        for index, heading in enumerate(headings):
            made.add_column(heading, justify="right" if index else "left", no_wrap=True)
        return made

    names = list(dict.fromkeys(name for each in found.buckets for name in each.seconds))
    names.sort(key=found.share, reverse=True)
    steps = f", {found.steps} steps" if found.steps else ""
    console.print(f"one request of each bucket, eager {found.dtype} on {found.device}{steps}")
    parts = table("bucket", "ms", *names)
    for each in found.buckets:
        cells = (f"{each.shares.get(name, 0.0):.1%}" for name in names)
        parts.add_row(each.bucket, f"{1000 * each.wall_seconds:.3g}", *cells)
    console.print(parts)
    gains = table("target", "share", "a request is at most")
    for name in sorted(found.targets, key=found.share, reverse=True):
        gain = f"{found.most_gain(name):.2f} times as fast"
        gains.add_row(name, f"{found.share(name):.1%}", gain)
    console.print(gains)
    operators = table("operator (largest bucket)", "calls", "share")
    for operator in found.operators:
        operators.add_row(operator.name, str(operator.calls), f"{operator.share:.1%}")
    console.print(operators)
    console.print(f"\n{found.advice()}", markup=False, highlight=False, end="")
