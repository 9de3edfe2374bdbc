"""Refusals and failures in the form that a path's clients know.

Everywhere they begin as the worker's own document (docs/requests.md, "Errors"): `{"code", "type",
"message", "field"}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from preheat.errors import RequestError, RunError
from preheat.gateway import openai_errors


def refused(request: Request, error: Exception) -> JSONResponse:
    """The answer to `error`, one of those that `app` registers this for."""
    if isinstance(error, RequestError | RunError):
        document: Mapping[str, Any] = error.body()
        status = error.code
    else:
        assert isinstance(error, HTTPException)  # of the router: no such path, or method
        status = error.status_code
        kind = HTTPStatus(status).phrase.title().replace(" ", "")
        document = {"code": status, "type": kind, "message": error.detail, "field": None}
    return in_form(request.url.path, status, document)


def in_form(path: str, status: int, document: Mapping[str, Any]) -> JSONResponse:
    """`document` as the clients of `path` read it."""
    seconds = document.get("retry_after")
    headers = {} if seconds is None else {"retry-after": str(seconds)}
    if path.startswith("/v1/"):
        return JSONResponse(
            openai_errors.document(status, document),
            status,
            {**headers, **openai_errors.headers(status, document)},
        )
    if path.startswith("/v2/"):
        return JSONResponse({"error": document["message"]}, status, headers)
    return JSONResponse(document, status, headers)
