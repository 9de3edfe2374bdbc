"""`preheat doctor`: what would go wrong in production, why, and what mends it."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from preheat.errors import ArchiveError, ConfigError, PreheatError

if TYPE_CHECKING:
    from preheat.config.model import ModelConfig
    from preheat.preflight.facts import Context, Seen
    from preheat.preflight.findings import Finding

NOTHING, BLOCKS, COULD_NOT_LOOK = 0, 1, 2


def doctor(
    config: Annotated[
        Path,
        typer.Argument(help="The model YAML, or an archive (.mar or folder).", exists=True),
    ],
    model: Annotated[
        str | None,
        typer.Argument(help="Model folder, hub id or tiny:sdxl. Default: the YAML's path."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(exists=True, help="Prompts that are asked for, one a line: are they read?"),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(exists=True, help="A worker's state as JSON, whose measured seconds count."),
    ] = None,
    properties: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="The server's config.properties. Default: $TS_CONFIG_FILE, else that of archive/.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say before production what would go wrong in it, why, and what mends it.

    The model is loaded in a process of its own and its smallest bucket traced; nothing is compiled.
    Exit 0: nothing blocks; 1: something does; 2: could not look.
    """
    from rich.console import Console

    try:
        with Console(stderr=True).status("looking"):
            report = examine(config, model, prompts, state, properties)
    except (PreheatError, OSError) as error:
        print(f"preheat: could not look: {error}", file=sys.stderr)
        raise typer.Exit(COULD_NOT_LOOK) from None
    if as_json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        _show(report, Console(soft_wrap=True))
    blocks = any(finding.blocks for finding in report.findings)
    raise typer.Exit(BLOCKS if blocks else NOTHING)


@dataclass(frozen=True)
class Report:
    """What was found, and how far was looked."""

    findings: Sequence[Finding]
    model: str | None
    """The model that was loaded; None: none."""
    checks: int
    """How many were made."""


def examine(
    config: Path,
    model: str | None = None,
    prompts: Path | None = None,
    state: Path | None = None,
    properties: Path | None = None,
) -> Report:
    """Look, and judge.

    Raises:
        PreheatError: something is in the way of looking.
    """
    from preheat.cli.aside import ask, staged
    from preheat.cli.planner import read_state
    from preheat.preflight.facts import Seen
    from preheat.torchserve.archive import is_archive

    measured = read_state(state) if state is not None else None
    server = _properties(properties)
    with tempfile.TemporaryDirectory(prefix="preheat-doctor-") as temp:
        folder = Path(temp)
        try:
            loaded, yaml_file, place = (
                _opened(config, folder) if is_archive(config) else staged(config, model, folder)
            )
        except (ConfigError, ArchiveError) as error:
            return Report([_refused(error)], None, 1)
        looked_at = [yaml_file, yaml_file.parent] if yaml_file is not None else []
        given = [prompts.absolute()] if prompts is not None and yaml_file is not None else []
        seen = Seen.model_validate_json(ask("look", *looked_at, *given))
    return judge(loaded, seen, place=place, server=server, state=measured)


def judge(
    config: ModelConfig,
    seen: Seen,
    *,
    place: str | None,
    server: Mapping[str, str],
    state: Mapping[str, Any] | None = None,
) -> Report:
    """What the checks find, of this environment."""
    from preheat.preflight import checks  # noqa: F401  its import registers them
    from preheat.preflight.facts import Context
    from preheat.preflight.findings import CHECKS, diagnose

    context: Context = Context(
        config=config,
        machine=seen.machine,
        model=seen.model,
        weight_bytes=_weight_bytes(place),
        server=server,
        environ=os.environ,
        state=state,
    )
    named = (place or "of a factory") if seen.model is not None else None
    return Report(diagnose(context), named, len(CHECKS))


def _opened(archive: Path, folder: Path) -> tuple[ModelConfig, Path | None, str | None]:
    """Of an archive: its YAML, where that lies in it, and the archive's root."""
    from preheat.config.model import ModelConfig
    from preheat.torchserve.archive import MANIFEST

    root = archive
    if archive.is_file():
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
        root = folder
    manifest = json.loads((root / MANIFEST).read_bytes())
    name = manifest.get("model", {}).get("configFile")
    if name is None:
        raise ArchiveError(f"{archive} has no model YAML (--config-file)")
    loaded = ModelConfig.load(root / name).in_archive(manifest)
    return loaded, root / name, str(root)


def _properties(file: Path | None) -> dict[str, str]:
    from preheat.torchserve.server import ROOT, read_properties

    named = os.environ.get("TS_CONFIG_FILE")
    file = file or (Path(named) if named else ROOT / "archive" / "config.properties")
    return read_properties(file) if file.exists() else {}


def _weight_bytes(place: str | None) -> int:
    folder = Path(place) if place is not None else None
    if folder is None or not folder.is_dir():
        return 0
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def _refused(error: ConfigError | ArchiveError) -> Finding:
    from preheat.preflight.checks import remedy_for
    from preheat.preflight.findings import Finding

    path = error.path if isinstance(error, ConfigError) else ""
    return Finding(str(error), "no worker would get READY", remedy_for(path), check="load")


def _show(report: Report, console: Any) -> None:
    from rich.padding import Padding
    from rich.text import Text

    for finding in report.findings:
        mark, style = ("blocks", "red") if finding.blocks else ("costs", "yellow")
        console.print(Text.assemble((f"{mark}  ", style), (finding.what, "bold")))
        console.print(Padding(Text(f"why   {finding.why}\nmend  {finding.remedy}"), (0, 0, 1, 8)))
    looked = f"{report.checks} checks" + ("" if report.model else ", without a model")
    if not report.findings:
        console.print(f"nothing found ({looked})", style="green")
    else:
        num = sum(finding.blocks for finding in report.findings)
        console.print(f"{len(report.findings)} findings, {num} block ({looked})")
