"""Fills an archive's `aot/`: runs every variant as a worker would, and compiles what its targets
were asked.

    python -m preheat.worker.build_packages <name>.yaml <archive's root> <folder to fill>

Made for `archiving`, which runs it on the kind of machine that will serve.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch._logging._internal import set_logs

from preheat.compilation.attention import attention_backend
from preheat.compilation.backends import aot
from preheat.compilation.router import Router, every
from preheat.compilation.variants import Variant
from preheat.config.model import ModelConfig
from preheat.device import any_device, share_cpu
from preheat.errors import AheadError, PreheatError
from preheat.worker.worker import AnyPrepared, load

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Wanted:
    """A package to be made; buckets that a target cannot tell apart share it."""

    target: str
    plan: aot.PackageSpec
    buckets: list[str]


def build(prepared: AnyPrepared, folder: Path) -> None:
    """Write the packages and their index, showing a bar per bucket.

    Raises:
        AheadError: the compiler fails on one, or a worker could not use it.
    """
    every = rehearse(prepared)
    folder.mkdir()
    entries: list[aot.Entry] = []
    with _progress() as progress:
        bars = {
            bucket: progress.add_task(
                bucket, total=sum(bucket == each.buckets[0] for each in every)
            )
            for bucket in dict.fromkeys(each.buckets[0] for each in every)
        }
        for each in every:
            bucket = each.buckets[0]
            progress.update(bars[bucket], description=f"{bucket} {each.target}")
            path = folder / f"{each.target}-{bucket}-{len(entries)}.pt2"
            entries.append(_built(prepared, each, path))
            progress.update(bars[bucket], advance=1, description=bucket)
    aot.write_index(folder, prepared.fingerprint, entries, prepared.trust)


def rehearse(prepared: AnyPrepared) -> list[Wanted]:
    """What to make: every variant is run eagerly, and what the targets were called with is kept."""
    made: dict[tuple[str, str], Wanted] = {}
    variants = prepared.runner.variants(prepared.warmed_sizes)
    for bucket, own in groupby(variants, key=lambda variant: variant.bucket):
        for target, plan in _calls(prepared, own):
            wanted = made.setdefault((target, plan.key), Wanted(target, plan, []))
            wanted.buckets.append(str(bucket))
    return list(made.values())


def _calls(
    prepared: AnyPrepared, variants: Iterable[Variant]
) -> Iterator[tuple[str, aot.PackageSpec]]:
    with every(prepared.routers, partial(Router.observing, keep=True)) as calls:
        for variant in variants:
            prepared.runner.run_variant(variant)
    for name, observed in calls.items():
        for spec in aot.specs(list(observed.examples.values())):
            yield name, spec


def _built(prepared: AnyPrepared, each: Wanted, path: Path) -> aot.Entry:
    """One package, built and tried."""
    module, pt2 = prepared.targets[each.target], prepared.config.pt2
    try:
        with attention_backend(pt2.attention):
            aot.build(module, each.plan, path, pt2.compile.kwargs)
            entry = aot.describe(path, each.target, each.buckets, each.plan)
            aot.check(module, each.plan, path, entry, prepared.execution.device)
    except Exception as error:  # the exporter's and the compiler's failures are of any type
        logger.debug("%s", path.name, exc_info=True)
        first_line = next(iter(str(error).strip().splitlines()), "")
        raise AheadError(
            f"no package can be made of {each.target} in {' and '.join(each.buckets)}: "
            f"{type(error).__name__}: {first_line}"
        ) from error
    return entry


def main(config_path: Path, root: Path, folder: Path) -> None:
    config = ModelConfig.load(config_path)
    device = any_device(config.deviceType)
    if device.type == "cpu":
        share_cpu(config.minWorkers)
    for warning in config.warnings:
        logger.warning("%s", warning)
    build(load(config, root, device), folder)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    set_logs(inductor=logging.ERROR)
    try:
        main(*(Path(argument) for argument in sys.argv[1:4]))
    except PreheatError as error:
        print(f"preheat: {error}", file=sys.stderr)
        sys.exit(1)
