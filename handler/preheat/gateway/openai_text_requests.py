"""What OpenAI's completions ask for, as a request of ours; no token is made or read here.

The limits are the worker's, which knows the model and its chat template: what it refuses comes back
under OpenAI's names (`Wanted.names`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from preheat.errors import RequestError
from preheat.gateway import openai_models
from preheat.protocol.fields import Fields, shown_value

Kind = Literal["completions", "chat"]

_AS_THEY_ARE = ("temperature", "top_p", "seed", "stop")
_OURS = ("top_k",)
_HARMLESS: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "n": (1,),
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
        "service_tier": ("auto", "default"),
        "store": (False,),
    }
)
"""Fields that nothing here listens to, with the values that ask for nothing."""
_HARMLESS_OF: Mapping[Kind, Mapping[str, tuple[object, ...]]] = MappingProxyType(
    {
        "completions": {**_HARMLESS, "best_of": (1,), "echo": (False,), "suffix": ("",)},
        "chat": {
            **_HARMLESS,
            "response_format": ({"type": "text"},),
            "modalities": (["text"],),
            "tools": ([],),
            "tool_choice": ("none", "auto"),
            "parallel_tool_calls": (True, False),
            "functions": ([],),
            "function_call": ("none", "auto"),
            "reasoning_effort": ("none",),
            "verbosity": ("medium",),
            "prompt_cache_retention": ("in_memory",),
            "prediction": (None,),
            "audio": (None,),
            "moderation": (None,),
            "web_search_options": (None,),
        },
    }
)
_IGNORED = ("user", "safety_identifier", "prompt_cache_key", "metadata")
"""Taken and thrown away."""
_COMMON = ("model", "stream", "stream_options", "max_tokens", *_AS_THEY_ARE, *_OURS, *_IGNORED)
_KNOWN: Mapping[Kind, tuple[str, ...]] = MappingProxyType(
    {
        "completions": (*_COMMON, "prompt", "logprobs", *_HARMLESS_OF["completions"]),
        "chat": (
            *(*_COMMON, "messages", "logprobs", "top_logprobs", "max_completion_tokens"),
            *_HARMLESS_OF["chat"],
        ),
    }
)
_MOST_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class Wanted:
    """One request for text."""

    kind: Kind
    model: str | None
    """None: the only one there is."""
    version: str | None
    stream: bool
    include_usage: bool
    """A stream ends with what was used."""
    names: Mapping[str, str]
    """Of our fields, as OpenAI's API names them."""
    body: bytes = field(repr=False)
    """For the worker, in JSON."""


def wanted(kind: Kind, values: Mapping[str, object]) -> Wanted:
    """The request in these fields.

    Raises:
        RequestError: a field is unknown, asks for what is not there, or is no such thing.
    """
    fields = Fields(values, _KNOWN[kind])
    for name, harmless in _HARMLESS_OF[kind].items():
        _refuse(name, values.get(name), harmless)
    model, version = openai_models.asked(fields)
    stream = fields.flag("stream") or False
    limit, num_tokens = _limit(fields)
    names = {"max_new_tokens": limit}
    if kind == "chat":
        names["logprobs"] = "top_logprobs"
        own = {"messages": _messages(values.get("messages")), "logprobs": _logprobs(fields)}
    else:
        own = {"prompt": _prompt(values.get("prompt")), "logprobs": values.get("logprobs")}
    body = {
        **own,
        **{name: values.get(name) for name in (*_AS_THEY_ARE, *_OURS)},
        "max_new_tokens": num_tokens,
    }
    coded = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
    usage = _include_usage(values.get("stream_options"), stream=stream)
    return Wanted(kind, model, version, stream, usage, names, coded)


def _refuse(name: str, value: object, harmless: tuple[object, ...]) -> None:
    """All but None and the harmless; True is no 1."""
    if value is not None and not any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in harmless
    ):
        told = " or ".join(map(json.dumps, harmless))
        raise RequestError(f"must be {told}: nothing else is served here", name)


def _limit(fields: Fields) -> tuple[str, object]:
    """Its name, and what it says."""
    sent = {name: fields.raw(name) for name in ("max_tokens", "max_completion_tokens")}
    said = {name: value for name, value in sent.items() if value is not None}
    if len(said) > 1:
        raise RequestError("stands beside max_tokens; send one of the two", "max_completion_tokens")
    return next(iter(said.items()), ("max_tokens", None))


def _prompt(prompt: object) -> object:
    if prompt is None:
        raise RequestError("is missing", "prompt")
    # several would be several answers; the worker refuses whatever is no text
    return prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt


def _messages(messages: object) -> object:
    """With their content as one text, and nothing that only says None or holds nothing, as answers
    that are sent back have it.
    """
    if messages is None:
        raise RequestError("is missing", "messages")
    if not isinstance(messages, list):
        return messages  # the worker says what it must be
    return [
        {
            name: _text(value, f"messages[{index}].content") if name == "content" else value
            for name, value in message.items()
            if value is not None and value != []
        }
        if isinstance(message, dict)
        else message
        for index, message in enumerate(messages)
    ]


def _text(content: object, name: str) -> object:
    """A list of parts as their lines."""
    if not isinstance(content, list):
        return content
    texts = list[str]()
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise RequestError("must be a part of type text", f"{name}[{index}]")
        texts.append(text)
    return "\n".join(texts)


def _logprobs(fields: Fields) -> int | None:
    top = fields.whole("top_logprobs", 0, _MOST_LOGPROBS)
    if fields.flag("logprobs"):
        return top or 0
    if top is not None:
        raise RequestError("needs logprobs: true beside it", "top_logprobs")
    return None


def _include_usage(options: object, *, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise RequestError("is for streams: send stream: true beside it", "stream_options")
    if not isinstance(options, dict):
        raise RequestError(f"must be an object, got {shown_value(options)}", "stream_options")
    fields = Fields(options, ("include_usage", "include_obfuscation"))
    fields.flag("include_obfuscation")  # nothing is to be hidden: it is answered without
    return fields.flag("include_usage") or False
