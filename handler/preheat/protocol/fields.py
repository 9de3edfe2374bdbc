"""What is read of any request, whatever the family."""

from __future__ import annotations

import re

from preheat.errors import RequestError

DEADLINE_HEADER = "x-preheat-deadline"


def parse_deadline(text: str | None) -> float | None:
    """The header `x-preheat-deadline`, Unix time in milliseconds, as seconds; None where there is
    none.

    Raises:
        RequestError: it is no whole number.
    """
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,15}", text.strip(), re.ASCII):
        raise RequestError("must be a Unix time in milliseconds", DEADLINE_HEADER)
    return int(text) / 1000
