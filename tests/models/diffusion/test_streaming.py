"""Streams: what a job that is watched is told, whatever becomes of its runs."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from models.diffusion.test_engine import Bench
from preheat.models.diffusion.job import Answer
from preheat.models.diffusion.responses import from_answer, plan_headers
from preheat.protocol.events import CONTENT_TYPE, EventStream
from preheat.protocol.responses import Response

FILE = b"file"


def events(lines: list[bytes]) -> list[dict[str, Any]]:
    text = b"".join(lines)
    assert not text or text.endswith(b"\n")
    return [json.loads(line) for line in text.splitlines()]


def streamed(
    bench: Bench, *wishes: dict[str, Any]
) -> tuple[list[Answer], list[list[dict[str, Any]]]]:
    """The answers to requests of one batch, and the events of each; none where `stream` was not
    asked for.
    """
    jobs = [bench.job(**wish) for wish in wishes]
    parts: list[list[Response]] = [[] for _ in jobs]
    watched = [
        replace(job, events=EventStream(own.append, plan_headers(job)))
        if job.request.stream
        else job
        for job, own in zip(jobs, parts, strict=True)
    ]
    answers = bench.run(watched)
    for answer, own in zip(answers, parts, strict=True):
        if answer.job.events is not None:
            own.append(from_answer(answer, [FILE] * len(answer.pictures)))
    return answers, [events([part.body for part in own]) for own in parts]


def test_the_events_of_a_picture() -> None:
    bench = Bench()
    (answer,), (told,) = streamed(
        bench, {"stream": True, "num_inference_steps": 3, "height": 30, "seed": 5}
    )
    assert told[:4] == [
        {"event": "queued"},
        *({"event": "step", "step": k, "of": 3} for k in (1, 2, 3)),
    ]
    assert told[4] == {
        "event": "image",
        "index": 0,
        "b64_json": base64.b64encode(FILE).decode(),
        "seed": 5,
        "width": 40,
        "height": 30,
        "bucket": [96, 48] if answer.job.plan.bucket.width == 48 else [64, 64],
        "engine": "eager",
        "padding": round(answer.job.plan.padding, 4),
        "exact": "rounding",
        "output_format": "png",
    }
    assert told[5:] == [{"event": "done"}]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "stream": st.booleans(),
                "seed": st.integers(0, 250),
                "num_inference_steps": st.integers(1, 4),
                "num_images": st.integers(1, 5),
            }
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 4),
)
def test_steps_only_go_forward_through_every_split_and_neighbours_hear_nothing(
    wishes: list[dict[str, Any]], most_rows: int
) -> None:
    bench = Bench()
    # larger runs are generated up to their last step and then again in smaller ones
    bench.canvas.most_rows = most_rows
    # it collects garbage, a third of a second each time
    with patch("preheat.models.batching.release_memory"):
        answers, told = streamed(bench, *wishes)
    for wish, answer, own in zip(wishes, answers, told, strict=True):
        assert answer.error is None and len(answer.pictures) == wish["num_images"]
        if not wish["stream"]:
            assert own == []
            continue
        steps = [event["step"] for event in own if event["event"] == "step"]
        assert steps == list(range(1, wish["num_inference_steps"] + 1))
        assert [event["event"] for event in own[1 + len(steps) :]] == ["image"] * wish[
            "num_images"
        ] + ["done"]
        assert [event["index"] for event in own if event["event"] == "image"] == list(
            range(wish["num_images"])
        )


def test_previews_come_every_so_often_for_each_picture_and_are_its_own() -> None:
    bench = Bench(batch_sizes=(1,))
    asked = {
        "stream": True,
        "preview_every": 2,
        "num_inference_steps": 5,
        "num_images": 2,
        "seed": 40,
    }
    _, (told,) = streamed(bench, asked | {"width": 16, "height": 64})
    shown = [
        (event["step"], event["index"], event["preview"]) for event in told if "preview" in event
    ]
    assert [(step, index) for step, index, _ in shown] == [(1, 0), (2, 0), (3, 1), (4, 1)]
    for _, index, coded in shown:
        image = Image.open(io.BytesIO(base64.b64decode(coded)))
        assert image.format == "JPEG" and image.size == (2, 8)
        assert image.getpixel((0, 0)) == pytest.approx((40 + index,) * 3, abs=2)
    steps = [event["step"] for event in told if event["event"] == "step"]
    assert steps == sorted(steps)


def test_so_many_previews_are_spread_evenly_over_each_pictures_steps() -> None:
    bench = Bench(batch_sizes=(1,))
    asked = {"stream": True, "num_previews": 2, "num_inference_steps": 6, "num_images": 2}
    _, (told,) = streamed(bench, asked | {"width": 16, "height": 64})
    shown = [(event["step"], event["index"]) for event in told if "preview" in event]
    assert shown == [(1, 0), (2, 0), (4, 1), (5, 1)]


def test_what_was_painted_in_vain_is_told_once() -> None:
    bench = Bench(batch_sizes=(1, 4))
    bench.canvas.most_rows = 3
    wishes = [{"stream": True, "preview_every": 1, "seed": seed} for seed in range(4)]
    _, told = streamed(bench, *wishes)
    assert [len(batch.rows) for batch in bench.canvas.batches] == [4, 1, 1, 1, 1]
    for own in told:
        assert [event["step"] for event in own if "preview" in event] == [1, 2]


def test_an_error_is_the_last_event_and_carries_what_an_answer_would() -> None:
    bench = Bench()
    answers, (told, calm) = streamed(
        bench, {"stream": True, "prompt": "explode"}, {"num_inference_steps": 1}
    )
    assert answers[0].error is not None and told[-1] == {
        "event": "error",
        **answers[0].error.body(),
    }
    assert told[-1]["code"] == 500 and calm == [] and answers[1].pictures


def test_without_a_sender_all_events_are_the_answer() -> None:
    bench = Bench()
    job = bench.job(stream=True, num_inference_steps=2)
    stream = EventStream(None, plan_headers(job))
    (answer,) = bench.run([replace(job, events=stream)])
    response = from_answer(answer, [FILE])
    kinds = [event["event"] for event in events([response.body])]
    assert kinds == ["queued", "step", "step", "image", "done"]
    assert (
        response.headers["content-type"] == CONTENT_TYPE
        and response.headers["x-preheat-seed"] == "7"
    )
