"""Which of its backends serves a target: named in the YAML, read from what was chosen before, or
chosen by the first call (`pt2.compile.backend: auto`).

The order of the roads decides, and a measurement may only veto, so that noise changes little; and
what was chosen is written down, so that it changes nothing (`cache.choice`).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from preheat.compilation.backends.base import RoadName
from preheat.compilation.race import Clock, Race

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Roads:
    """What is known of a target's roads.

    Args:
        ruled_out: why a road is not on the list.
        is_open: the first call is to choose.
        may_veto: a road that loses to eager is not chosen; else the order alone decides.
    """

    ruled_out: dict[RoadName, str] = field(default_factory=dict)
    is_open: bool = False
    may_veto: bool = True
    chosen: RoadName | None = None
    """None: the YAML named what serves, or no call has come yet."""
    source: str = "named"
    """Who chose: `measured`, `order`, or `kept`, of an earlier start or another worker."""
    failures: dict[RoadName, str] = field(default_factory=dict)
    """Of the first call: a road that failed or disagreed with eager."""
    races: dict[RoadName, Race] = field(default_factory=dict)
    clock: Clock = time.perf_counter

    def note(self, name: str, road: RoadName, race: Race) -> bool:
        """Keep this target's race; whether it rules the road out."""
        self.races[road] = race
        ruled_out = self.is_open and self.may_veto and race.is_lost
        logger.log(
            logging.WARNING if race.is_lost else logging.INFO,
            "%s: %s takes %.1f ms a call, eager %.1f (%.2f of eager's time, %d pairs)%s",
            name,
            road,
            race.seconds * 1e3,
            race.eager_seconds * 1e3,
            race.ratio,
            race.num_pairs,
            self._consequence(race, ruled_out=ruled_out),
        )
        return ruled_out

    def _consequence(self, race: Race, *, ruled_out: bool) -> str:
        if not race.is_lost:
            return ""
        return ": it is not chosen" if ruled_out else ": it serves all the same, as it was chosen"

    @property
    def failed(self) -> str | None:
        """What kept the target from an engine, where that is no lost race."""
        if self.races and not self.failures:
            return None
        return "; ".join([*self.failures.values(), *self.ruled_out.values()]) or None

    def document(self) -> dict[str, object]:
        """As JSON: who serves and why, and a row for every road that was looked at."""
        rows = {
            **{road: {"reason": reason} for road, reason in self.ruled_out.items()},
            **{road: {"reason": reason} for road, reason in self.failures.items()},
            **{road: _document(race) for road, race in self.races.items()},
        }
        return {"chosen": self.chosen or "", "source": self.source, "roads": rows}


def _document(race: Race) -> dict[str, object]:
    return {
        "milliseconds": round(race.seconds * 1e3, 3),
        "eager_milliseconds": round(race.eager_seconds * 1e3, 3),
        "ratio": round(race.ratio, 3),
        "pairs": race.num_pairs,
        "reason": "slower than eager" if race.is_lost else "",
    }
