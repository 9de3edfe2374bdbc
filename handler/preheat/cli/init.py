"""`preheat init`: from a model folder to a YAML that `preheat doctor` finds nothing in."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from preheat.errors import PreheatError

if TYPE_CHECKING:
    from preheat.buckets import Bucket
    from preheat.preflight.draft import Draft


def init(
    model: Annotated[str, typer.Argument(help="Model folder, or tiny:sdxl and its like.")],
    csv: Annotated[
        Path | None,
        typer.Option(exists=True, help="Sizes that are asked for, as preheat plan reads them."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The YAML to write. Default: <model>.yaml here.")
    ] = None,
    max_buckets: Annotated[int, typer.Option(min=1, max=32, help="With --csv.")] = 5,
) -> None:
    """Write a commented YAML for a model folder: family, dtype and engine for this machine, buckets
    from a log or the model's own, limits and timeouts from a start that is measured.

    A worker is started with the smallest bucket, in a process of its own, which compiles it.
    """
    from rich.console import Console

    name = Path(model.replace(":", "-")).name
    file = output or Path(f"{name}.yaml")
    if file.exists():
        raise PreheatError(f"{file} is there already: give another name (--output)")
    with Console(stderr=True).status("starting a worker with the smallest bucket"):
        text, state = written(model, csv, max_buckets, file.stem)
    file.write_text(text, encoding="utf-8")
    print(f"{file}: {state}; next: preheat doctor {file}")


def written(model: str, csv: Path | None, max_buckets: int, name: str) -> tuple[str, str]:
    """The YAML's text, and what was measured.

    Raises:
        PreheatError: there is no such model, or it cannot be served.
    """
    from preheat.cli.aside import ask
    from preheat.config.places import TINY_PREFIX
    from preheat.preflight import draft as drafts
    from preheat.preflight.facts import Context, Seen

    machine = Seen.model_validate_json(ask("look")).machine
    folder = _folder(model)
    place = model if model.startswith(TINY_PREFIX) else str(folder)
    on_gpu = bool(machine.gpus)
    planned = _planned(csv, drafts.multiple(folder), max_buckets) if csv is not None else ()
    draft = drafts.drafted(place, folder, machine, planned, on_gpu=on_gpu)
    with tempfile.TemporaryDirectory(prefix="preheat-init-") as temp:
        state = _rehearsed(draft, Path(temp, f"{name}.yaml"))
        if draft.family == "pipeline" and not draft.buckets:
            draft = _with_own(draft, state)
        config = drafts.parsed(draft.text(), Path(temp))
    context = Context(config=config, machine=machine, state=state)
    rehearsed = 1 if draft.family == "pipeline" else len(draft.buckets)
    times = drafts.times(draft, config, context, rehearsed)
    return draft.with_times(times).text(), times.source


def _folder(model: str) -> Path:
    from preheat.cli.app import STATE
    from preheat.cli.demo import tiny_model
    from preheat.config.model import ModelConfig
    from preheat.config.places import TINY_PREFIX

    if not model.startswith(TINY_PREFIX):
        folder = Path(os.path.abspath(os.path.expanduser(model)))
        if not folder.is_dir():
            raise PreheatError(f"no such folder: {folder}; a hub id has to be downloaded first")
        return folder
    name = model.removeprefix(TINY_PREFIX)
    known = [each for family in ModelConfig.families().values() for each in family.tiny]
    if name not in known:
        raise PreheatError(f"there is no {model}; known: {', '.join(known)}")
    return tiny_model(name, STATE / "models")


def _planned(csv: Path, multiple: int, max_buckets: int) -> Sequence[Bucket]:
    from preheat.cli import planner
    from preheat.planning.demand import read_csv
    from preheat.planning.plan import Wanted

    wanted = Wanted(max_buckets, (), 0.0, multiple, 45)
    report = planner.make(read_csv(csv), (), wanted, max_waste=None, steps=30)
    return report.chosen.buckets


def _rehearsed(draft: Draft, yaml_file: Path) -> Mapping[str, Any]:
    """The state of a worker that was started with it."""
    from preheat.cli.aside import ask, staged

    yaml_file.write_text(draft.text(), encoding="utf-8")
    folder = yaml_file.parent / "root"
    folder.mkdir()
    _, root_yaml, _ = staged(yaml_file, None, folder)
    state: Mapping[str, Any] = json.loads(ask("rehearse", root_yaml, folder))
    return state


def _with_own(draft: Draft, state: Mapping[str, Any]) -> Draft:
    """With the buckets that the model itself has chosen."""
    from preheat.buckets import Bucket

    names = dict.fromkeys(str(row["bucket"]) for row in state["buckets"])
    return replace(draft, buckets=[Bucket(*map(int, name.split("x"))) for name in names])
