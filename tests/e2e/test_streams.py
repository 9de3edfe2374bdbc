"""Streams on a real TorchServe: events over REST while neighbours in the same batch hear nothing,
and whatever gRPC can have.
"""

from __future__ import annotations

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
from PIL import Image

from preheat.torchserve.client import Reply
from served import ENGINE, Served, events, kinds, opened, picture, streamed

ASKED: dict[str, Any] = {
    "prompt": "a cat",
    "height": 200,
    "width": 120,
    "seed": 4,
    "num_inference_steps": 5,
}
STREAMED = ASKED | {"stream": True}


def test_a_stream_ends_with_the_picture_that_everybody_gets(served: Served) -> None:
    plain = served.client.predict(ASKED)
    url = f"{served.running.inference}/predictions/{served.client.model}"
    with (
        httpx.Client(trust_env=False, timeout=60) as http,
        http.stream("POST", url, json=STREAMED) as response,
    ):
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/x-ndjson"
        assert response.headers["transfer-encoding"] == "chunked"
        assert (
            response.headers["x-preheat-seed"] == "4"
            and response.headers["x-preheat-bucket"] == "320x192"
        )
        chunks = list(response.iter_raw())
    assert len(chunks) > 2, "nothing came before the end"
    told = events(b"".join(chunks))
    assert kinds(told) == ["queued", *["step"] * 5, "image", "done"]
    assert [(event["step"], event["of"]) for event in told[1:6]] == [
        (step, 5) for step in range(1, 6)
    ]
    assert picture(told[-2]) == plain.body
    facts = {
        name: told[-2][name]
        for name in ("index", "seed", "width", "height", "bucket", "engine", "output_format")
    }
    assert facts == {
        "index": 0,
        "seed": 4,
        "width": 120,
        "height": 200,
        "bucket": [320, 192],
        "engine": ENGINE,
        "output_format": "png",
    }


def test_neighbours_in_the_same_batch_are_answered_as_ever(served: Served) -> None:
    """Four at once are one batch; two of them stream, one with previews of two pictures."""
    calm = [ASKED | {"seed": seed} for seed in (21, 22)]
    alone = [served.client.predict(request) for request in calm]
    runs = served.metric("preheat_inference_seconds_count")
    loud = [STREAMED | {"seed": 23}, STREAMED | {"seed": 24, "preview_every": 2, "num_images": 2}]
    with ThreadPoolExecutor(4) as clients:
        streams = [clients.submit(streamed, served, request) for request in loud]
        replies = [clients.submit(served.client.predict, request) for request in calm]
        told = [stream.result() for stream in streams]
        answers = [reply.result() for reply in replies]
    assert served.metric("preheat_inference_seconds_count") < runs + 4, (
        "nobody shared a run: nothing was tried"
    )
    for answer, before in zip(answers, alone, strict=True):
        _assert_same(answer, before)
    assert kinds(told[0]) == ["queued", *["step"] * 5, "image", "done"]
    shown = [event for event in told[1] if "preview" in event]
    assert sorted(event["index"] for event in shown) == [0, 0, 1, 1]
    for event in shown:
        small = Image.open(io.BytesIO(base64.b64decode(event["preview"])))
        assert small.format == "JPEG" and small.size == (120 // 8, 200 // 8)
    images = [opened(picture(event)) for event in told[1] if event["event"] == "image"]
    assert [image.size for image in images] == [(120, 200)] * 2 and images[0] != images[1]


def _assert_same(answer: Reply, before: Reply) -> None:
    volatile = {"x-request-id"}
    assert {
        name: value
        for name, value in answer.headers.items()
        if name not in volatile | {"content-length"}
    } == {
        name: value
        for name, value in before.headers.items()
        if name not in volatile | {"content-length"}
    }
    mine, its = (np.asarray(opened(reply.body)).astype(int) for reply in (answer, before))
    assert np.abs(mine - its).max() <= 1


def test_over_grpc_the_events_are_one_message_whichever_call_it_is(served: Served) -> None:
    """TorchServe does not say whether it was Predictions, which a second message would kill the
    worker of.
    """
    pids, plain = served.worker_pids(), served.client.predict(ASKED)
    unary = served.client.predict_grpc(STREAMED | {"preview_every": 5})
    (part,) = served.client.stream_grpc(STREAMED)
    assert unary.status == 0
    for text in (unary.body, part):
        told = events(text)
        assert (
            kinds(told) == ["queued", *["step"] * 5, "image", "done"]
            and picture(told[-2]) == plain.body
        )
    assert "preview" in events(unary.body)[5]
    assert served.worker_pids() == pids


def test_what_is_refused_is_refused_as_ever(served: Served) -> None:
    for bad in ({"width": 0}, {"preview_every": -1}, {"stream": "yes"}):
        rest, grpc = (
            served.client.predict(STREAMED | bad),
            served.client.predict_grpc(STREAMED | bad),
        )
        (parted,) = served.client.stream_grpc(STREAMED | bad)
        assert rest.status == 400 and rest.headers["content-type"] == "application/json"
        for document in (rest.json(), grpc.json(), json.loads(parted)):
            assert document["code"] == 400 and [document["field"]] == list(bad)


def test_a_client_that_leaves_harms_nobody(served: Served) -> None:
    pids, plain = served.worker_pids(), served.client.predict(ASKED)
    long = STREAMED | {"num_inference_steps": 40, "preview_every": 1}
    url = f"{served.running.inference}/predictions/{served.client.model}"
    for _ in range(3):
        with (
            httpx.Client(trust_env=False, timeout=60) as http,
            http.stream("POST", url, json=long) as response,
        ):
            assert next(response.iter_lines()) == '{"event": "queued"}'
        assert served.client.predict(ASKED).body == plain.body
    assert served.worker_pids() == pids


def test_streaming_has_compiled_nothing(served: Served) -> None:
    state = served.state()
    assert (state["compiles_since_ready"], state["incidents"], state["eager_fallbacks"]) == (
        0,
        0,
        0,
    )
