"""A worker's text as OpenAI's completions give it: whole, and as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from preheat.errors import RunError, Unreachable
from preheat.gateway import openai_replies
from preheat.gateway.backend import Answer
from preheat.gateway.openai_text_requests import Wanted
from preheat.gateway.relay import Reply

_LEAST = -9999.0
"""The log-probability of what is impossible, for which JSON has no number."""
_NO_CHARACTER = "\ufffd"

Event = Mapping[str, Any]


class Texts:
    """Tells the answer of one request.

    Args:
        model: as it was asked for.
    """

    def __init__(self, wanted: Wanted, model: str) -> None:
        self._wanted, self._model = wanted, model
        chat = wanted.kind == "chat"
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._object = "chat.completion" if chat else "text_completion"
        self._created = int(time.time())
        self._num_chars = 0

    async def __call__(self, answer: Answer) -> Reply:
        if answer.status != 200:
            return await openai_replies.refusal(answer, self._wanted.names)
        if self._wanted.stream:
            return openai_replies.events(answer, self._events(answer.parts))
        return await self._whole(answer)

    async def _whole(self, answer: Answer) -> Reply:
        every = [event async for event in openai_replies.told(answer.parts)]
        last = every[-1] if every else {"event": "none"}
        if last["event"] == "error":
            return openai_replies.failed(last, self._wanted.names)
        if last["event"] != "done":
            raise Unreachable("the worker ended before its answer did")
        told = [event for event in every if event["event"] == "text"]
        choice = self._choice(told, last["finish_reason"])
        document = {**self._begun(self._object), "choices": [choice], **_end(last)}
        return openai_replies.document(200, document, openai_replies.own(answer))

    async def _events(self, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        ended = False
        try:
            async for event in openai_replies.told(parts):
                ended = ended or event["event"] in ("done", "error")
                for said in self._told(event):
                    yield said
        except RunError as error:
            ended = True
            yield self._failed(error.body())
        if not ended:
            yield self._failed(Unreachable("the worker ended before its answer did").body())

    def _told(self, event: Event) -> Iterator[bytes]:
        if event["event"] == "error":
            yield self._failed(event)
        elif event["event"] == "done":
            used = _end(event)
            usage = used.pop("usage")
            yield self._chunk([self._choice([], event["finish_reason"])], **used)
            if self._wanted.include_usage:
                yield self._chunk([], usage=usage)
            yield b"data: [DONE]\n\n"
        elif event["event"] == "text":
            yield self._chunk([self._choice([event], None)])
        elif self._wanted.kind == "chat":
            yield self._chunk([_chosen({"delta": {"role": "assistant", "content": ""}})])
        else:  # a comment: proxies see that it lives, clients skip it
            yield f": {event['event']}\n\n".encode()

    def _choice(self, told: Sequence[Event], finish: str | None) -> dict[str, Any]:
        """The text of these events, or a piece of it."""
        text = "".join(event["text"] for event in told)
        tokens = [event for event in told if "token" in event]
        if self._wanted.kind == "completions":
            found = self._listed(tokens) if tokens else None
            return _chosen({"text": text}, found, finish)
        found = {"content": [_token(event) for event in tokens]} if tokens else None
        if not self._wanted.stream:
            return _chosen({"message": {"role": "assistant", "content": text}}, found, finish)
        return _chosen({"delta": {"content": text} if told else {}}, found, finish)

    def _listed(self, tokens: Sequence[Event]) -> dict[str, Any]:
        """Log-probabilities as the older API has them."""
        offsets = list[int]()
        for event in tokens:
            offsets.append(self._num_chars)
            if _NO_CHARACTER not in event["token_text"]:
                self._num_chars += len(event["token_text"])
            elif event["text"].strip(_NO_CHARACTER):  # the part that completes the character
                self._num_chars += 1
        return {
            "tokens": [event["token_text"] for event in tokens],
            "token_logprobs": [_number(event["logprob"]) for event in tokens],
            "top_logprobs": [_by_text(event["top_logprobs"]) for event in tokens],
            "text_offset": offsets,
        }

    def _begun(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, choices: Sequence[Mapping[str, Any]], **more: Any) -> bytes:
        kind = f"{self._object}.chunk" if self._wanted.kind == "chat" else self._object
        usage = {"usage": None} if self._wanted.include_usage else {}
        return _event({**self._begun(kind), "choices": choices, **usage, **more})

    def _failed(self, said: Event) -> bytes:
        return _event(openai_replies.failure(said, self._wanted.names))


def _event(document: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(document)}\n\n".encode()


def _chosen(
    said: Mapping[str, Any], logprobs: Mapping[str, Any] | None = None, finish: str | None = None
) -> dict[str, Any]:
    return {"index": 0, **said, "logprobs": logprobs, "finish_reason": finish}


def _end(done: Event) -> dict[str, Any]:
    """What the last event says of the whole, with our own `seed` and `engine`."""
    usage = done["usage"]
    total = usage["prompt_tokens"] + usage["completion_tokens"]
    own = {name: done[name] for name in ("seed", "engine")}
    return {**own, "usage": {**usage, "total_tokens": total}}


def _token(event: Event) -> dict[str, Any]:
    top = [_one(each) for each in event["top_logprobs"]]
    return {**_one(event), "top_logprobs": top}


def _one(said: Event) -> dict[str, Any]:
    text = said["token_text"]
    # part of a character has bytes that the worker does not tell
    known = None if _NO_CHARACTER in text else list(text.encode())
    return {"token": text, "logprob": _number(said["logprob"]), "bytes": known}


def _by_text(top: Sequence[Event]) -> dict[str, float]:
    """The most probable of those that look the same."""
    return {each["token_text"]: _number(each["logprob"]) for each in reversed(top)}


def _number(logprob: float) -> float:
    return max(_LEAST, logprob)  # in this order NaN, for which JSON has none either, is the least
