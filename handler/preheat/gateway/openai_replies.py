"""What all answers in OpenAI's form have in common."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from preheat.errors import Unreachable
from preheat.gateway import openai_errors
from preheat.gateway.backend import Answer
from preheat.gateway.headers import OWN
from preheat.gateway.relay import Reply, whole


def document(
    status: int, said: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> Reply:
    """The whole answer, in JSON."""
    body = json.dumps(said).encode()
    about = {"content-type": "application/json", "content-length": str(len(body))}
    return Reply(status, {**(headers or {}), **about}, whole(body))


def events(answer: Answer, body: AsyncIterator[bytes]) -> Reply:
    """Server-sent events, in place of the worker's own."""
    headers = {
        **own(answer),
        "content-type": "text/event-stream",
        "cache-control": "no-cache",
        "x-accel-buffering": "no",  # nginx would keep them together
    }
    return Reply(200, headers, body)


def failure(said: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A worker's error document in OpenAI's form.

    Args:
        names: of our fields, where OpenAI's have others.
    """
    return openai_errors.document(_status(said), openai_errors.renamed(said, names))


def failed(
    said: Mapping[str, Any], names: Mapping[str, str], retry_after: str | None = None
) -> Reply:
    """An answer that is a worker's error document."""
    status = _status(said)
    headers = openai_errors.headers(status, said)
    if retry_after is not None:
        headers["retry-after"] = retry_after
    return document(status, failure(said, names), headers)


def _status(said: Mapping[str, Any]) -> int:
    return int(said.get("code") or 500)


async def refusal(answer: Answer, names: Mapping[str, str]) -> Reply:
    """The answer of a worker or host that is none of status 200."""
    text = await answer.read()
    try:
        said = json.loads(text)
    except ValueError:
        said = None
    if not isinstance(said, dict) or "message" not in said:  # TorchServe's own, at times empty
        said = {"message": f"the host answers {answer.status}"}
    return failed({**said, "code": answer.status}, names, answer.headers.get("retry-after"))


def own(answer: Answer) -> dict[str, str]:
    """Our headers among the worker's."""
    return {name: value for name, value in answer.headers.items() if name.startswith(OWN)}


async def told(parts: AsyncIterator[bytes]) -> AsyncIterator[Mapping[str, Any]]:
    """The events of a worker's stream.

    Raises:
        Unreachable: what came is none.
    """
    async for line in lines(parts):
        try:
            event = json.loads(line)
        except ValueError:  # also where it is no text
            event = None
        if isinstance(event, dict) and "event" not in event and "message" in event:
            event = {"event": "error", **event}  # another host's word on a worker that has died
        if not isinstance(event, dict) or "event" not in event:
            raise Unreachable("the worker's answer is no stream of events")
        yield event


async def lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The lines of what comes in parts that end anywhere."""
    begun: list[bytes] = []  # a picture's line is megabytes: joined once
    async for part in parts:
        *ends, rest = part.split(b"\n")
        for end in ends:
            yield b"".join([*begun, end])
            begun.clear()
        if rest:
            begun.append(rest)
    if begun:
        yield b"".join(begun)
