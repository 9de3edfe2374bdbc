"""JSON, text and base64 as clients send them: read without surprises, and refused by field."""

from __future__ import annotations

import base64
import gc
import json
import re

from preheat.errors import RequestError

LONGEST_WHOLE = 40
"""Digits. Nothing here needs more than 19, and int() of a million is a way to keep a server busy.
"""

_LONG_WHOLE = b"0" * (LONGEST_WHOLE + 1)
_ZEROS = bytes.maketrans(b"123456789", b"0" * 9)
_DATA_URL = re.compile(rb"data:[^,]{0,200};base64,", re.IGNORECASE)
_WHITE = b" \t\r\n"


def loads(text: str) -> object:
    """`text` as JSON. Raises ValueError with a short reason, and RequestError for a name that
    stands twice.
    """
    collecting = gc.isenabled()
    # a million small lists would be walked again and again while they are made: two thirds of the
    # time
    gc.disable()
    try:
        # Called for each number, a function of ours takes four times as long as all the rest.
        parse_int = (
            _whole_literal
            if _LONG_WHOLE in text.encode(errors="replace").translate(_ZEROS)
            else None
        )
        return json.loads(text, object_pairs_hook=_once, parse_int=parse_int)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    finally:
        if collecting:
            gc.enable()


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise RequestError("is given twice", shown_name(name))
        found[name] = value
    return found


def _whole_literal(digits: str) -> int | float:
    return int(digits) if len(digits) <= LONGEST_WHOLE else float(digits)


def in_bytes(value: object) -> object:
    """A part of a row in bytes: TorchServe has decoded those that call themselves text."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    return bytes(value) if isinstance(value, bytearray | memoryview) else value


def decoded(value: bytes, name: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"is not UTF-8 (byte {error.start})", name) from None


def document(data: bytes, name: str, hint: str = "") -> object:
    """`data` as JSON; `hint`: what to send instead.

    Raises:
        RequestError: it is none.
    """
    try:
        return loads(decoded(data, name))
    except ValueError as error:
        raise RequestError("; ".join(filter(None, [f"is not JSON: {error}", hint])), name) from None


def from_base64(text: str, name: str, max_bytes: int, *, refusal: str = "is not base64") -> bytes:
    """The bytes in `text`, with or without a data URL's head; the size is checked before anything
    is decoded.
    """
    try:
        raw = text.encode("ascii")
    except UnicodeEncodeError:
        raise RequestError(refusal, name) from None
    head = _DATA_URL.match(raw)
    # the base64 command wraps its lines
    coded = raw[head.end() if head else 0 :].translate(None, _WHITE)
    size = len(coded) // 4 * 3
    if size - 2 > max_bytes:
        raise RequestError(f"has about {size} bytes, at most {max_bytes} are allowed", name)
    try:
        return base64.b64decode(coded, validate=True)
    except ValueError:
        raise RequestError(refusal, name) from None


def shown_name(name: object) -> str:
    """A field's name fit for an answer: short, printable ASCII."""
    text = ascii(name)[1:-1] if isinstance(name, str) and name else '""'
    return text if len(text) <= 64 else f"{text[:61]}..."
