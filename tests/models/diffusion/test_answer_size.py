"""An answer that TorchServe would end the worker for is not sent, in any form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compilation.test_pace import Clockwork, Machine
from preheat.errors import AnswerTooLarge, PipelineFailure
from preheat.models.diffusion.job import Answer
from preheat.models.diffusion.responses import encoded, from_answer
from preheat.protocol.events import EventStream
from preheat.protocol.responses import Response

FORMS: dict[str, dict[str, Any]] = {
    "a picture": {"response_format": "image"},
    "json": {"num_images": 3},
    "a stream": {"num_images": 3, "stream": True},
    "a kept stream": {"num_images": 3, "stream": True},
}


KEPT = 5000  # characters of a preview, less than a picture


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def kept() -> EventStream:
    """What gRPC gets: every event at the end, one with a preview among them."""
    stream = EventStream(None, {})
    stream.emit("step", preview="p" * KEPT)
    return stream


def bodies(form: str, pool: Executor, most: int) -> tuple[Answer, list[Response]]:
    """All that is sent for noise, of which no file is small."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    job, sent = Machine(runner=Clockwork).job(**FORMS[form]), list[Response]()
    if job.request.stream:
        job = replace(job, events=EventStream(sent.append, {}) if form == "a stream" else kept())
    answer = Answer(job, pictures=[Image.fromarray(noise)] * job.request.num_images)
    (files,) = encoded([answer], pool, most=most)
    sent.append(from_answer(answer, files))  # after what the call itself sends
    return answer, sent


@pytest.mark.parametrize("form", FORMS)
def test_no_body_is_larger_than_the_limit_and_none_is_refused_that_is_far_below(
    form: str, pool: Executor
) -> None:
    answer, sent = bodies(form, pool, 300_000_000)
    largest = max(len(each.body) for each in sent)
    assert answer.error is None and largest > 12_000
    answer, _ = bodies(form, pool, largest + 4 * 1000)
    assert answer.error is None
    answer, sent = bodies(form, pool, largest - 1)
    assert isinstance(answer.error, AnswerTooLarge) and max(len(each.body) for each in sent) < 1000
    assert b"max_response_bytes" in sent[-1].body
    assert sent[-1].code == (200 if "stream" in form else 413), "its status is sent already"


def test_what_a_failed_stream_has_kept_is_dropped_where_it_is_too_much(pool: Executor) -> None:
    """The failure is what its client reads, not that it is too long."""
    job = Machine(runner=Clockwork).job(stream=True)
    answer = Answer(replace(job, events=kept()), error=PipelineFailure("no"))
    for most, event in ((KEPT + 1100, "step"), (KEPT, "error")):
        (files,) = encoded([answer], pool, most=most)
        body = from_answer(answer, files).body
        assert len(body) <= most
        assert json.loads(body.splitlines()[0])["event"] == event
        assert json.loads(body.splitlines()[-1])["type"] == "PipelineFailure"
