"""Answers as TorchServe rows: a status, headers and bytes."""

from __future__ import annotations

import http
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from preheat.errors import PutOff, RequestError, RunError


@dataclass(frozen=True, slots=True)
class Response:
    """One row's answer. Header values are strings: TorchServe's worker dies of any other type."""

    code: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def phrase(self) -> str:
        return http.HTTPStatus(self.code).phrase


def json_response(
    code: int, document: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> Response:
    return Response(
        code, json.dumps(document).encode(), {"content-type": "application/json", **(headers or {})}
    )


def texts(facts: Mapping[str, object]) -> dict[str, str]:
    """What is said of an answer, as headers say it."""
    return {name: _text(value) for name, value in facts.items()}


def preheat_headers(facts: Mapping[str, object]) -> dict[str, str]:
    """The same as headers: `prompt_dropped` is `x-preheat-prompt-dropped`."""
    named = texts(facts).items()
    return {f"x-preheat-{name.replace('_', '-')}": text for name, text in named}


def _text(value: object) -> str:
    if isinstance(value, bool):
        return json.dumps(value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def from_error(error: RequestError | RunError) -> Response:
    seconds = error.retry_after if isinstance(error, PutOff) else None
    headers = {"retry-after": str(seconds)} if seconds is not None else None
    return json_response(error.code, error.body(), headers)
