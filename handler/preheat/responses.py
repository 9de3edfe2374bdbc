"""Answers as TorchServe rows: a status, headers and bytes."""

from __future__ import annotations

import base64
import http
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from preheat import images
from preheat.errors import PutOff, RequestError, RunError
from preheat.geometry import Plan
from preheat.request import ImageRequest

if TYPE_CHECKING:  # a module's worker has no use for diffusers, which takes seconds to import
    from preheat.engine import Answer


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
    headers = {"retry-after": str(error.retry_after)} if isinstance(error, PutOff) else None
    return json_response(error.code, error.body(), headers)


def encoded(answers: Sequence[Answer], pool: Executor) -> list[list[bytes]]:
    """Each answer's pictures as files, encoded side by side in the pool's threads.

    Pillow lets go of the GIL while it writes PNG and WebP (measured: another thread waits 3 ms at most of the 75 that a 1024x1024
    PNG takes); a JPEG, of 6 ms, holds it.
    """
    tasks = [
        [pool.submit(images.encode, picture, answer.job.request.output_format) for picture in answer.pictures]
        if answer.error is None
        else []
        for answer in answers
    ]
    return [[task.result() for task in own] for own in tasks]


def from_answer(answer: Answer, files: Sequence[bytes]) -> Response:
    """The response to a request that reached the pipeline: raw image bytes, or JSON with the images in base64.

    `files` are its encoded pictures.
    """
    request = answer.job.request
    if answer.error is not None:
        return from_error(answer.error)
    headers = {
        **plan_headers(request, answer.job.plan),
        "x-preheat-engine": answer.engine,
        "x-preheat-exact": answer.exact,
    }
    if request.response_format == "image":
        return Response(200, files[0], {"content-type": images.CONTENT_TYPES[request.output_format], **headers})
    return json_response(200, {"data": pictures(answer, files), **facts(answer)}, headers)


def pictures(answer: Answer, files: Sequence[bytes]) -> list[dict[str, Any]]:
    """What JSON says of each picture: the file in base64, and its own seed."""
    seed = answer.job.request.seed
    return [
        {"b64_json": base64.b64encode(file).decode(), "seed": (seed + index) % 2**63}
        for index, file in enumerate(files)
    ]


def facts(answer: Answer) -> dict[str, Any]:
    """What JSON says of how an answer was painted; sizes in pixels."""
    plan = answer.job.plan
    return {
        "width": plan.width,
        "height": plan.height,
        "bucket": [plan.bucket.height, plan.bucket.width],
        "engine": answer.engine,
        "padding": round(plan.padding, 4),
        "exact": answer.exact,
        "output_format": answer.job.request.output_format,
    }


def plan_headers(request: ImageRequest, plan: Plan) -> dict[str, str]:
    """What headers say of a request before it is painted."""
    return {
        "x-preheat-bucket": str(plan.bucket),
        "x-preheat-seed": str(request.seed),
        "x-preheat-padding": f"{plan.padding:.4f}",
    }
