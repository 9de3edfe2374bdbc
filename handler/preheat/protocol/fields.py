"""What is read of any request, whatever the family: a TorchServe row's body and parts, and the
fields in them by type.

Every refusal is a RequestError that names the field; it quotes numbers and short words, never a
prompt or a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import TypeVar

from preheat.errors import RequestError
from preheat.protocol.json_text import (
    LONGEST_WHOLE,
    decoded,
    from_base64,
    in_bytes,
    loads,
    shown_name,
)

DEADLINE_HEADER = "x-preheat-deadline"
Choice = TypeVar("Choice", bound=str)


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


def envelope(
    row: object, reserved: Collection[str] = (), *, hint: str
) -> tuple[object, dict[str, object]]:
    """The body in a row, as it came, and the parts beside it, text as bytes; a row of parts alone
    has the body {}.

    Args:
        reserved: names of the family's own fields, which are no envelope.
        hint: what to send, for whoever sent nothing.

    Raises:
        RequestError: the row is empty.
    """
    if not isinstance(row, Mapping) or not row:
        # What `curl -d` without a content type comes down to: TorchServe drops form-encoded bodies.
        raise RequestError(f"is empty; {hint}", "body")
    parts = {name: in_bytes(value) for name, value in row.items()}
    for name in ("data", "body"):  # over gRPC, and over REST
        if name in parts and name not in reserved:
            del parts[name]
            return row[name], parts
    return {}, parts


def together(
    inside: Mapping[str, object], parts: Mapping[str, object], body: str
) -> dict[str, object]:
    """The fields in the body (`body` says what that is) and beside it.

    Raises:
        RequestError: one is given twice.
    """
    for name in parts:
        if name in inside:
            raise RequestError(f"is given twice, in the {body} and beside it", shown_name(name))
    return {**inside, **parts}


def unknown(name: object, known: Sequence[str], kind: str, listed: str) -> RequestError:
    """The refusal of a name that is none of `known`, with the nearest of them, or all."""
    shown = shown_name(name)
    close = get_close_matches(shown, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"{listed} {', '.join(known)}"
    return RequestError(f"is an unknown {kind}; {hint}", shown)


class Fields:
    """The fields as they came, read one at a time; None is as good as absent.

    JSON has no bytes, so a value in bytes is always a part of its own (multipart, gRPC map).

    Args:
        known: the names that there are.
        unserved: names that others have, and what there is instead.

    Raises:
        RequestError: a field is unknown.
    """

    def __init__(
        self,
        values: Mapping[str, object],
        known: Sequence[str],
        unserved: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        for name in values:
            if name in unserved:
                raise RequestError(f"is not served: {unserved[name]}", name)
            if name not in known:
                raise unknown(name, known, "field", "known are")
        self._values = values

    def text(self, name: str, max_chars: int) -> str | None:
        value = self._word(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise RequestError(f"must be text, got {shown_value(value)}", name)
        if len(value) > max_chars:
            raise RequestError(
                f"has {len(value)} characters, at most {max_chars} are allowed", name
            )
        if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
            raise RequestError("holds a NUL or half a surrogate pair, which are not text", name)
        return value

    def choice(self, name: str, choices: tuple[Choice, ...]) -> Choice | None:
        value = self._word(name)
        if value is None:
            return None
        for one in choices:
            if value == one:
                return one
        raise RequestError(f"must be one of {', '.join(choices)}, got {shown_value(value)}", name)

    def raw(self, name: str) -> object:
        """As it came; from a part of its own, what JSON or else text it is."""
        return self._numeral(name)

    def flag(self, name: str) -> bool | None:
        value = self._numeral(name)
        if value is None or isinstance(value, bool):
            return value
        raise RequestError(f"must be true or false, got {shown_value(value)}", name)

    def whole(self, name: str, low: int, high: int) -> int | None:
        value = self._numeral(name)
        if value is None:
            return None
        if type(value) is not int or not low <= value <= high:  # type(), since True is an int
            raise RequestError(
                f"must be a whole number from {low} to {high}, got {shown_value(value)}", name
            )
        return value

    def number(self, name: str, high: float, *, zero: bool = True) -> float | None:
        value = self._numeral(name)
        if value is None:
            return None
        # Compared before it is converted: Python compares a huge int exactly, and NaN to nothing.
        if (
            isinstance(value, int | float)
            and type(value) is not bool
            and 0 <= value <= high
            and (zero or value > 0)
        ):
            return float(value)
        legal = f"from 0 to {high:g}" if zero else f"above 0 and at most {high:g}"
        raise RequestError(f"must be a number {legal}, got {shown_value(value)}", name)

    def file(self, name: str, max_bytes: int) -> bytes | None:
        value = self._values.get(name)
        if value is None:
            return None
        if isinstance(value, str):
            value = from_base64(value, name, max_bytes)
        if not isinstance(value, bytes):
            raise RequestError(f"must be an image file in base64, got {shown_value(value)}", name)
        if not value:
            raise RequestError("is empty", name)
        if len(value) > max_bytes:
            raise RequestError(f"has {len(value)} bytes, at most {max_bytes} are allowed", name)
        return value

    def _word(self, name: str) -> object:
        value = self._values.get(name)
        return decoded(value, name) if isinstance(value, bytes) else value

    def _numeral(self, name: str) -> object:
        """A number or a truth value, from a part of its own as JSON writes it."""
        value = self._values.get(name)
        if not isinstance(value, bytes):
            return value
        text = decoded(value, name)
        try:
            return loads(text)
        except ValueError:
            return text


def shown_value(value: object) -> str:
    """A value for a message: numbers and short words themselves, of anything else the kind
    alone.
    """
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float) or (
        isinstance(value, int) and value.bit_length() <= 4 * LONGEST_WHOLE
    ):
        return repr(value)
    if isinstance(value, str):
        return ascii(value) if len(value) <= 20 else f"text of {len(value)} characters"
    kinds = {int: "a huge number", list: "a list", dict: "an object"}
    return kinds.get(type(value), "something else")
