"""A request's fields as its worker will find them, at no more cost than its bytes: what they say of
its price is read in the event loop that serves everybody.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from preheat.errors import RequestError
from preheat.gateway.bodies import MAX_BYTES
from preheat.protocol.json_text import loads

LONG = 65_536
"""Bytes of JSON that are not read in the event loop, and of a form that are read at a time."""
_MOST_STRUCTURE = 10_000
"""Of `[`, `{` and `,`: the scanner makes an object for each, and holds the interpreter's lock."""
_CHARSETS = frozenset(
    {"utf-8", "utf8", "us-ascii", "ascii", "iso-8859-1", "iso8859-1", "latin-1", "latin1"}
)
_FILES = frozenset({"image", "mask_image"})


def check_charset(content_type: str) -> None:
    """Refuse a form whose text is to be decoded by another of Python's codecs: some take the
    square of a field's length (punycode).

    Raises:
        RequestError: it names one.
    """
    _, options = parse_options_header(content_type)  # as the parser of the form reads it
    charset = options.get(b"charset", b"utf-8").decode("latin-1").lower().replace("_", "-")
    if charset not in _CHARSETS:
        raise RequestError("must be in UTF-8", "body")


async def of_json(text: bytes) -> Mapping[str, object]:
    """The fields of a JSON object; none of another value, which the worker refuses.

    Raises:
        ValueError: it is no JSON, or more than a request's.
        RequestError: a name stands twice.
    """
    if sum(map(text.count, (b"[", b"{", b","))) > _MOST_STRUCTURE:
        raise ValueError("more structure than any request has")
    return await asyncio.to_thread(_json, text) if len(text) > LONG else _json(text)


def _json(text: bytes) -> Mapping[str, object]:
    found = loads(text.decode("utf-8"))
    return found if isinstance(found, dict) else {}


async def of_form(body: bytes, content_type: str) -> Mapping[str, object]:
    """The fields of a multipart form, of which a worker takes a part sent as a file like any other,
    and one named `data` or `body` as JSON with more of them (`protocol.fields.envelope`); images
    are not read.

    Raises:
        ValueError: it is no such form, or holds what is no JSON.
        RequestError: a name stands twice.
    """
    parser = MultiPartParser(
        Headers({"content-type": content_type}), _pieces(body), max_part_size=MAX_BYTES
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise ValueError(error.message) from None
    try:
        parts: dict[str, object] = {}
        inside: Mapping[str, object] = {}
        for name, value in form.items():
            parts[name] = True if name in _FILES else await _text(value)
        for name in ("data", "body"):
            if name in parts:
                sent, text = form[name], parts.pop(name)
                if not _is_prompt(sent):
                    inside = await of_json(str(text).encode("utf-8", "surrogatepass"))
                break
    finally:
        await form.close()
    return {**inside, **parts}


async def _pieces(body: bytes) -> AsyncGenerator[bytes, None]:
    for start in range(0, len(body), LONG):
        yield body[start : start + LONG]
        await asyncio.sleep(0)  # others' turn


async def _text(value: str | UploadFile) -> str:
    return value if isinstance(value, str) else (await value.read()).decode("utf-8", "replace")


def _is_prompt(value: str | UploadFile) -> bool:
    """TorchServe decodes a file that calls itself text, which the worker then takes as it is."""
    return isinstance(value, UploadFile) and (value.content_type or "").startswith("text")
