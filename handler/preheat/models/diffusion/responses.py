"""Answers of the diffusion family as rows: headers, JSON and encoded pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any

from preheat.device import is_out_of_memory
from preheat.errors import AnswerTooLarge, OutOfMemory
from preheat.protocol import images
from preheat.protocol.events import EventStream
from preheat.protocol.responses import Response, from_error, json_response, preheat_headers

if TYPE_CHECKING:
    from PIL import Image

    from preheat.models.diffusion.job import Answer, Job
    from preheat.models.diffusion.request import ImageRequest


_WORDS = 1000  # bytes of JSON beside a picture, at most


def encoded(answers: Sequence[Answer], pool: Executor, *, most: int) -> list[list[bytes]]:
    """Each answer's pictures as files, encoded side by side in the pool's threads; what does not
    fit into memory, or into a body of `most` bytes, is that answer's error.

    Pillow lets go of the GIL while it writes PNG and WebP (measured: another thread waits 3 ms at
    most of the 75 that a 1024x1024 PNG takes); a JPEG, of 6 ms, holds it.
    """
    tasks = [
        [pool.submit(_file, picture, answer.job.request) for picture in answer.pictures]
        if answer.error is None
        else []
        for answer in answers
    ]
    files = [_files(answer, own) for answer, own in zip(answers, tasks, strict=True)]
    for answer, own in zip(answers, files, strict=True):
        if (size := _body_bytes(answer.job, own)) > most:
            answer.error = answer.error or AnswerTooLarge(
                f"the answer has about {size} bytes, at most {most} are allowed "
                "(pipeline.limits.max_response_bytes); ask for fewer pictures or previews, smaller "
                "ones, or output_format webp or jpeg"
            )
            if answer.job.events is not None:
                answer.job.events.drop_kept()
    return files


def _file(picture: Image.Image, request: ImageRequest) -> bytes:
    return images.encode(picture, request.output_format, request.output_compression)


def _body_bytes(job: Job, files: Sequence[bytes]) -> int:
    """Of the largest body that holds these files: a stream that is live has one for each, and one
    that is not has kept its other events for the same body.
    """
    in_json = [4 * -(-len(file) // 3) + _WORDS for file in files]
    if job.events is None:
        return sum(map(len, files)) if job.request.response_format == "image" else sum(in_json)
    if job.events.is_live:
        return max(in_json, default=0)
    return sum(in_json) + job.events.num_kept + _WORDS  # of the last event


def from_answer(answer: Answer, files: Sequence[bytes]) -> Response:
    """The response to a request that reached the pipeline: raw image bytes, or JSON with the images
    in base64, or what is left of its events.

    `files` are its encoded pictures.
    """
    request, events = answer.job.request, answer.job.events
    if events is not None:
        return _last_event(events, answer, files)
    if answer.error is not None:
        return from_error(answer.error)
    flagged = {"flagged": any(answer.flagged)} if answer.flagged else {}
    ran = {"engine": answer.engine, "exact": answer.exact, **flagged}
    headers = {**plan_headers(answer.job), **preheat_headers(ran)}
    if request.response_format == "image":
        return Response(
            200, files[0], {"content-type": images.CONTENT_TYPES[request.output_format], **headers}
        )
    return json_response(200, {"data": _pictures(answer, files), **_facts(answer)}, headers)


def _last_event(events: EventStream, answer: Answer, files: Sequence[bytes]) -> Response:
    if answer.error is not None:
        return events.close("error", **answer.error.body())
    for index, picture in enumerate(_pictures(answer, files)):
        events.emit("image", index=index, **picture, **_facts(answer))
    return events.close("done", **_dropped(answer.job))


def _pictures(answer: Answer, files: Sequence[bytes]) -> list[dict[str, Any]]:
    """What JSON says of each picture: the file in base64, its own seed, and where it was checked
    whether it was blackened.
    """
    seed = answer.job.request.seed
    return [
        {"b64_json": base64.b64encode(file).decode(), "seed": (seed + index) % 2**63}
        | ({"flagged": answer.flagged[index]} if answer.flagged else {})
        for index, file in enumerate(files)
    ]


def _facts(answer: Answer) -> dict[str, Any]:
    """What JSON says of how an answer was generated; sizes in pixels."""
    plan = answer.job.plan
    return {
        "width": plan.width,
        "height": plan.height,
        "bucket": [plan.bucket.height, plan.bucket.width],
        "engine": answer.engine,
        "padding": round(plan.padding, 4),
        **({"painted": [plan.painted.height, plan.painted.width]} if plan.is_masked else {}),
        "exact": answer.exact,
        "output_format": answer.job.request.output_format,
        **_dropped(answer.job),
    }


def plan_headers(job: Job) -> dict[str, str]:
    """What headers say of a request before it is generated."""
    plan, seed = job.plan, job.request.seed
    painted = {"painted": plan.painted} if plan.is_masked else {}
    facts = {"bucket": plan.bucket, "seed": seed, "padding": plan.padding, **painted}
    return preheat_headers({**facts, **_dropped(job)})


def _files(answer: Answer, tasks: Sequence[Future[bytes]]) -> list[bytes]:
    try:
        return [task.result() for task in tasks]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        answer.error = OutOfMemory(
            f"a {answer.job.request.output_format} file of {answer.bucket} does not fit into memory"
        )
        return []


def _dropped(job: Job) -> dict[str, int]:
    """What is said of prompts that were cut: `prompt_dropped`, `negative_prompt_dropped`, in
    tokens; nothing of whole ones.
    """
    return {f"{field}_dropped": number for field, number in job.dropped.items()}
