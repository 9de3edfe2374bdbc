"""`preheat paint`: a picture from the terminal, and what is said of it."""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from preheat.errors import PreheatError

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
_FACTS = ("bucket", "painted", "engine", "seed", "padding", "exact", "flagged")
_CUT = ("prompt_dropped", "negative_prompt_dropped")


@dataclass(frozen=True, slots=True)
class Door:
    """Where pictures are asked for: a gateway, or a TorchServe."""

    url: str
    model: str | None
    """None: the only one of a gateway."""
    key: str | None = None
    """An API key, which a gateway may want."""


def request(
    prompt: str,
    out: Path,
    size: str | None,
    files: Mapping[str, Path | None],
    options: Mapping[str, object],
) -> dict[str, Any]:
    """The request as JSON; what is None is left out.

    Args:
        out: its suffix says the format.
        size: "WIDTHxHEIGHT" in pixels.
        files: `image`, `mask_image`.

    Raises:
        PreheatError: a format or size that is none, or a file that cannot be read.
    """
    if out.suffix.lower() not in FORMATS:
        raise PreheatError(f"{out}: the name ends in one of {', '.join(FORMATS)}")
    sides = re.fullmatch(r"(\d{1,6})x(\d{1,6})", size) if size is not None else None
    if size is not None and sides is None:
        raise PreheatError(f"--size {size}: width x height in pixels, such as 640x360")
    asked: dict[str, Any] = {"prompt": prompt, "output_format": FORMATS[out.suffix.lower()]}
    if sides is not None:
        asked |= {"width": int(sides[1]), "height": int(sides[2])}
    for name, path in files.items():
        if path is not None:
            try:
                asked[name] = base64.b64encode(path.read_bytes()).decode()
            except OSError as error:
                raise PreheatError(f"cannot read {path}: {error.strerror}") from error
    return asked | {name: value for name, value in options.items() if value is not None}


def paint(door: Door, asked: Mapping[str, Any], out: Path, previews: Path | None) -> None:
    """Ask for the picture, show how far it is, write it to `out`, and print what was said of it.

    Args:
        previews: where each preview replaces the one before; None: none is asked for.

    Raises:
        PreheatError: it is refused, or nobody answers.
    """
    streamed = {**asked, "stream": True, "num_previews": 0 if previews is None else 8}
    try:
        with _client(door) as http:
            model = door.model or _only_model(http)
            with http.stream("POST", f"/predictions/{model}", json=streamed) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise PreheatError(_reason(answer))
                picture = _follow(answer.iter_lines(), previews)
    except httpx.HTTPError as error:
        raise PreheatError(f"{door.url} does not answer: {error or type(error).__name__}") from None
    out.write_bytes(base64.b64decode(picture["b64_json"]))
    print(f"{out}  {picture['width']}x{picture['height']}")
    for name in (*_FACTS, *_CUT):
        if name in picture:
            value = picture[name]
            told = "x".join(map(str, value)) if isinstance(value, list) else value
            print(f"{name.replace('_', '-'):<10}  {told}")


def _client(door: Door) -> httpx.Client:
    headers = {"authorization": f"Bearer {door.key}"} if door.key else {}
    loopback = httpx.URL(door.url).host in ("127.0.0.1", "localhost", "::1")
    return httpx.Client(
        base_url=door.url,
        headers=headers,
        timeout=httpx.Timeout(None, connect=10),
        trust_env=not loopback,  # a proxy knows nothing of this machine's own
    )


def _only_model(http: httpx.Client) -> str:
    answer = http.get("/v1/models")
    if answer.status_code != 200:
        raise PreheatError(f"{http.base_url} lists no models; say --model")
    names = [model["id"] for model in answer.json()["data"]]
    if len(names) != 1:
        raise PreheatError(f"say --model: {', '.join(names) or 'none is there yet'}")
    return str(names[0])


def _follow(lines: Iterator[str], previews: Path | None) -> dict[str, Any]:
    """The event of the picture; progress is drawn meanwhile."""
    picture: dict[str, Any] | None = None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(file=sys.stderr)) as progress:
        bar = progress.add_task("waiting", total=None)
        for line in lines:
            event = json.loads(line)
            if event["event"] == "step":
                progress.update(
                    bar, description="painting", completed=event["step"], total=event["of"]
                )
            if "preview" in event and previews is not None:
                previews.write_bytes(base64.b64decode(event["preview"]))
            if event["event"] == "error":
                raise PreheatError(event["message"])
            if event["event"] == "image":
                picture = event
    if picture is None:
        raise PreheatError("the answer ended before the picture: the worker has died")
    return picture


def _reason(answer: httpx.Response) -> str:
    try:
        document = answer.json()
        return str(document.get("message") or document["error"]["message"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"status {answer.status_code}: {answer.text[:300].strip()}"
