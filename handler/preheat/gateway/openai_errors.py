"""Errors in OpenAI's form, and whether its clients should ask again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FINAL = frozenset({"PipelineFailure", "OutOfMemory", "AnswerTooLarge", "DeadlinePassed"})
"""Failures that painting again would repeat. A dead worker's and a full queue's it would not."""
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}


def renamed(said: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A worker's error document about a field that OpenAI's API names otherwise (`names`)."""
    ours, message = said.get("field"), str(said.get("message", ""))
    theirs = names.get(str(ours), ours)
    if ours and message.startswith(f"{ours} "):
        message = f"{theirs}{message[len(str(ours)) :]}"
    return {**said, "field": theirs, "message": message}


def document(status: int, said: Mapping[str, Any]) -> dict[str, Any]:
    """The error document `said` in OpenAI's form."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    cause = said.get("type")
    error = {
        "message": said.get("message", ""),
        "type": kind,
        "param": said.get("field"),
        "code": cause if cause == "NotFound" else _CODES.get(status, cause),  # of a path: no model
    }
    return {"error": error}


def headers(status: int, said: Mapping[str, Any]) -> dict[str, str]:
    """The client repeats 408, 409, 429 and 5xx by itself unless it is told not to."""
    return {"x-should-retry": "false"} if said.get("type") in FINAL else {}
