"""Settles what serves each target that `backend: auto` has left open: as it was chosen before, or
by trying and measuring, one worker at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from preheat.cache.choice import Choice, ChoiceFile
from preheat.compilation.router import Router

logger = logging.getLogger(__name__)


def choose_roads(
    routers: Mapping[str, Router],
    file: ChoiceFile | None,
    run: Callable[[], None],
    *,
    patience: float,
    report: Callable[[str], None],
    keeps_failures: bool,
) -> None:
    """Choose for those of `routers` that are open.

    Args:
        file: where the choice is written down, and read by others and at later starts. None: it
            cannot be, so that another worker might measure otherwise, and the order alone decides.
        run: runs the model, the largest bucket first, until every target has chosen.
        patience: seconds to wait for another worker that chooses; past them the order decides.
        report: told whom it waits for.
        keeps_failures: a road that failed is passed over at later starts too, without a try.
    """
    open_ = {name: each for name, each in routers.items() if each.roads.is_open}
    if not open_:
        return
    if file is not None and not _settled(open_, file.read()):
        with file.locked(patience, report) as held:
            if held and not _settled(open_, file.read()):
                run()
                _write_down(file, open_, keeps_failures=keeps_failures)
    for router in open_.values():
        router.roads.may_veto = False
    run()  # nothing, where all is settled


def _settled(routers: Mapping[str, Router], kept: Mapping[str, Choice]) -> bool:
    """Whether `kept` tells of roads that can all be had; they are taken."""
    if not routers.keys() <= kept.keys():
        return False
    had = {name: router.roads_to_be_had for name, router in routers.items()}
    if gone := [
        f"{kept[name].road} for {name}" for name in had if kept[name].road not in had[name]
    ]:
        logger.warning("what was chosen cannot be had, choosing anew: %s", ", ".join(gone))
        return False
    for name, router in routers.items():
        road = next(each for each in had[name] if each == kept[name].road)
        router.settle(road, kept[name].why or None, source="kept")
    return True


def _write_down(file: ChoiceFile, routers: Mapping[str, Router], *, keeps_failures: bool) -> None:
    """Not what came of failures alone: nothing was measured, and the next start tries again."""
    failures = {name: each.failure for name, each in routers.items() if each.failure}
    if any(not routers[name].roads.races for name in failures) or (failures and not keeps_failures):
        logger.warning("the choice is not written down: %s", "; ".join(failures.values()))
        return
    file.write(
        {
            # a target that no run has met takes the first road
            name: Choice(each.roads.chosen or each.roads_to_be_had[0], failures.get(name, ""))
            for name, each in routers.items()
        }
    )
