"""Answers as TorchServe rows: a status, headers and bytes."""

from __future__ import annotations

import base64
import http
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from preheat import images
from preheat.engine import Answer
from preheat.errors import RequestError, RunError


@dataclass(frozen=True, slots=True)
class Response:
    """One row's answer. Header values are strings: TorchServe's worker dies of any other type."""

    code: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def phrase(self) -> str:
        return http.HTTPStatus(self.code).phrase


def json_response(code: int, document: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(code, json.dumps(document).encode(), {"content-type": "application/json", **(headers or {})})


def from_error(error: RequestError | RunError) -> Response:
    return json_response(error.code, error.body())


def from_answer(answer: Answer) -> Response:
    """The response to a request that reached the pipeline: raw image bytes, or JSON with the images in base64."""
    request, plan = answer.job.request, answer.job.plan
    if answer.error is not None:
        return from_error(answer.error)
    encoded = [images.encode(picture, request.output_format) for picture in answer.pictures]
    headers = _headers(answer)
    if request.response_format == "image":
        return Response(200, encoded[0], {"content-type": images.CONTENT_TYPES[request.output_format], **headers})
    data = [
        {"b64_json": base64.b64encode(picture).decode(), "seed": (request.seed + index) % 2**63}
        for index, picture in enumerate(encoded)
    ]
    document = {
        "data": data,
        "width": plan.width,
        "height": plan.height,
        "bucket": [plan.bucket.height, plan.bucket.width],
        "engine": answer.engine,
        "padding": round(plan.padding, 4),
        "exact": answer.exact,
        "output_format": request.output_format,
    }
    return json_response(200, document, headers)


def _headers(answer: Answer) -> dict[str, str]:
    request, plan = answer.job.request, answer.job.plan
    return {
        "x-preheat-bucket": str(plan.bucket),
        "x-preheat-engine": answer.engine,
        "x-preheat-seed": str(request.seed),
        "x-preheat-padding": f"{plan.padding:.4f}",
        "x-preheat-exact": answer.exact,
    }
