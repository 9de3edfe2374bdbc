"""What `preheat doctor` says, and the registry of what it looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from preheat.preflight.facts import Context


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that would go wrong in production."""

    what: str
    why: str
    """What comes of it."""
    remedy: str
    """The YAML or the command that mends it."""
    blocks: bool = True
    """Whether it should keep the model from production; the others cost time or surprise."""
    check: str = ""
    """The name of the check."""


Check = Callable[[Context], Iterator[Finding]]
CHECKS: dict[str, Check] = {}
"""By name, in the order in which they are made; `register` adds one."""


def register(check: Check) -> Check:
    """A decorator: a function that yields its findings, of what is in the context alone."""
    CHECKS[check.__name__] = check
    return check


def diagnose(context: Context) -> list[Finding]:
    """Every check's findings, those that block first."""
    found = [
        replace(finding, check=name) for name, check in CHECKS.items() for finding in check(context)
    ]
    return sorted(found, key=lambda finding: not finding.blocks)
