"""Fills an archive's `aot/`: runs every variant as a worker would, and compiles what its targets
were asked.

    python -m preheat.worker.build_packages <name>.yaml <archive's root> <folder to fill>

Made for `archiving`, which runs it on the kind of machine that will serve.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch._logging._internal import set_logs

from preheat.cache.shared import CacheUse
from preheat.cache.trust import Trust
from preheat.compilation.attention import attention_backend
from preheat.compilation.backends import aot
from preheat.compilation.variants import Variant
from preheat.config.model import ModelConfig
from preheat.device import any_device, pick_device, share_cpu
from preheat.errors import AheadError, PreheatError
from preheat.status import Phase as StatePhase
from preheat.status import StatusFile
from preheat.worker.worker import Service

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Wanted:
    """A package to be made; buckets that a target cannot tell apart share it."""

    target: str
    plan: aot.PackageSpec
    buckets: list[str]


class Rehearsal(Service):
    """A worker that runs every variant eagerly and keeps what its targets were called with, instead
    of getting hot.
    """

    def build(self, folder: Path) -> None:
        """Write the packages and their index, showing a bar per bucket."""
        folder.mkdir()
        entries: list[aot.Entry] = []
        with _progress() as progress:
            bars = {
                bucket: progress.add_task(
                    bucket, total=sum(bucket == each.buckets[0] for each in self._wanted)
                )
                for bucket in dict.fromkeys(each.buckets[0] for each in self._wanted)
            }
            for each in self._wanted:
                bucket = each.buckets[0]
                progress.update(bars[bucket], description=f"{bucket} {each.target}")
                path = folder / f"{each.target}-{bucket}-{len(entries)}.pt2"
                entries.append(self._built(each, path))
                progress.update(bars[bucket], advance=1, description=bucket)
        aot.write_index(
            folder, self.state.fingerprint, entries, Trust.resolve(self.config.pt2.cache.trust)
        )

    def _built(self, each: Wanted, path: Path) -> aot.Entry:
        """One package, built and tried.

        Raises:
            AheadError: the compiler fails on it, or a worker could not use it.
        """
        module = self._work.target(each.target)
        try:
            with attention_backend(self.config.pt2.attention):
                aot.build(module, each.plan, path, self.config.pt2.compile.kwargs)
                entry = aot.describe(path, each.target, each.buckets, each.plan)
                aot.check(module, each.plan, path, entry, self._device)
        except Exception as error:  # the exporter's and the compiler's failures are of any type
            logger.debug("%s", path.name, exc_info=True)
            first_line = next(iter(str(error).strip().splitlines()), "")
            raise AheadError(
                f"no package can be made of {each.target} in {' and '.join(each.buckets)}: "
                f"{type(error).__name__}: {first_line}"
            ) from error
        return entry

    def _attach_packages(self, folder: Path, trust: Trust) -> None:
        """They are about to be made."""

    @contextmanager
    def _sharing_compiles(self, trust: Trust, started: float) -> Iterator[CacheUse | None]:
        yield None  # packages are made anew, whatever others have compiled

    def _heat(self, leave_out: Collection[Variant], sharing: CacheUse | None) -> StatePhase:
        made: dict[tuple[str, str], Wanted] = {}
        for bucket, variants in groupby(
            self._work.variants(self._warmed_sizes()), key=lambda variant: variant.bucket
        ):
            for target, plan in self._rehearse(variants):
                wanted = made.setdefault((target, plan.key), Wanted(target, plan, []))
                wanted.buckets.append(str(bucket))
        self._wanted = list(made.values())
        return "hot"

    def _rehearse(self, variants: Iterable[Variant]) -> Iterator[tuple[str, aot.PackageSpec]]:
        with ExitStack() as stack:
            calls = {
                name: stack.enter_context(router.observing(keep=True))
                for name, router in self._routers.items()
            }
            for variant in variants:
                self._work.serve_variant(variant)
        for name, observed in calls.items():
            for spec in aot.specs(list(observed.examples.values())):
                yield name, spec


def main(config_path: Path, root: Path, folder: Path) -> None:
    config = ModelConfig.load(config_path)
    device = pick_device(None, "cpu") if config.deviceType == "cpu" else any_device()
    if device.type == "cpu":
        share_cpu(config.minWorkers)
    rehearsal = Rehearsal(config, root, device, status=StatusFile(None, config_path.stem))
    rehearsal.build(folder)


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
