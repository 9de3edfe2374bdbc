"""The main job: pictures of the size that was asked for, over REST and gRPC, from modules that were
hot before.
"""

from __future__ import annotations

import base64
import random
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml

from preheat.config.model import ModelConfig
from preheat.status import StatusFile
from preheat.torchserve.client import Reply
from preheat.worker.worker import Worker
from served import (
    BUCKETS,
    CONFIG,
    ENGINE,
    Served,
    events,
    kinds,
    noise,
    opened,
    picture,
    random_request,
)


def test_the_server_is_hot_and_says_so(served: Served) -> None:
    state = served.state()
    assert (
        state["state"] == "hot"
        and state["strategy"] == "buckets"
        and len(state["fingerprint"]) == 64
    )
    assert {(row["height"], row["width"]) for row in state["buckets"]} == set(BUCKETS)
    assert {row["engine"] for row in state["buckets"]} == {ENGINE}
    assert {row["target"] for row in state["buckets"]} == {"unet"}
    assert {row["batch_size"] for row in state["buckets"]} == {1, 2, 3, 4}, "every size was met"
    roads = state["roads"]["unet"]
    assert roads["chosen"] == ENGINE and roads["source"] in ("measured", "kept")
    assert 0 < roads["roads"][ENGINE]["ratio"] and not roads["roads"][ENGINE]["reason"]


def test_rest_and_grpc_give_the_same_bytes_for_the_same_seed(served: Served) -> None:
    request = {"prompt": "a cat", "height": 201, "width": 99, "seed": 11}
    rest, grpc = served.client.predict(request), served.client.predict_grpc(request)
    assert (rest.status, grpc.status) == (200, 0)
    assert opened(rest.body).size == (99, 201)
    assert rest.body == grpc.body
    assert served.client.predict(request | {"seed": 12}).body != rest.body


def test_headers_say_what_was_done(served: Served) -> None:
    reply = served.client.predict(
        {"prompt": "a cat", "height": 128, "width": 256, "seed": 2**63 - 1}
    )
    assert reply.headers["content-type"] == "image/png"
    assert reply.headers["x-preheat-bucket"] == "192x320"
    assert reply.headers["x-preheat-engine"] == ENGINE
    assert reply.headers["x-preheat-seed"] == str(2**63 - 1)
    assert float(reply.headers["x-preheat-padding"]) == pytest.approx(
        1 - 128 * 256 / (192 * 320), abs=1e-4
    )


def test_what_is_cut_off_a_prompt_is_said(served: Served) -> None:
    request = {"prompt": "x " * 100, "height": 64, "width": 64, "seed": 1}
    assert served.client.predict(request).headers["x-preheat-prompt-dropped"] == "25"
    document = served.client.predict_grpc(request | {"response_format": "b64_json"}).json()
    assert document["prompt_dropped"] == 25


def test_a_seed_that_was_not_given_is_returned_and_gives_the_picture_again(served: Served) -> None:
    request = {"prompt": "a cat", "height": 64, "width": 64}
    first = served.client.predict(request)
    again = served.client.predict(request | {"seed": int(first.headers["x-preheat-seed"])})
    assert again.body == first.body


def test_plain_text_is_a_prompt(served: Served) -> None:
    reply = served.client.post(content="a cat", headers={"content-type": "text/plain"})
    assert reply.status == 200 and opened(reply.body).size == BUCKETS[0][::-1]


def test_multipart_fields_and_files_are_a_request(served: Served) -> None:
    png = base64.b64decode(noise(90, 120))
    reply = served.client.post(
        data={"prompt": "a cat", "strength": "0.5"}, files={"image": ("a.png", png)}
    )
    assert reply.status == 200 and opened(reply.body).size == (120, 90)


@pytest.mark.parametrize("path", ["/models/{}/invoke", "/invocations", "/{}/predict"])
def test_torchserves_other_paths_answer_as_predictions_does(served: Served, path: str) -> None:
    """They give the worker no url_path; a stream over one of them comes in parts too."""
    request = {"prompt": "a cat", "height": 64, "width": 64, "seed": 1}
    url = served.running.inference + path.format(served.client.model)
    answer = httpx.post(url, json=request, timeout=60)
    assert answer.status_code == 200
    assert answer.content == served.client.predict(request).body
    told = events(httpx.post(url, json=request | {"stream": True}, timeout=60).content)
    assert kinds(told)[-2:] == ["image", "done"] and picture(told[-2]) == answer.content


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_every_output_format(served: Served, output_format: str) -> None:
    reply = served.client.predict(
        {"prompt": "a", "height": 50, "width": 70, "output_format": output_format}
    )
    assert reply.headers["content-type"] == f"image/{output_format}"
    image = opened(reply.body)
    assert image.format == output_format.upper() and image.size == (70, 50)


def test_many_images_come_as_json(served: Served) -> None:
    request = {
        "prompt": "a",
        "height": 50,
        "width": 70,
        "seed": 5,
        "num_images": 3,
        "response_format": "b64_json",
    }
    document = served.client.predict_grpc(request).json()
    pictures = [base64.b64decode(entry["b64_json"]) for entry in document["data"]]
    assert [entry["seed"] for entry in document["data"]] == [5, 6, 7] and len(set(pictures)) == 3
    assert document["bucket"] == [192, 320] and document["engine"] == ENGINE
    alone = served.client.predict({"prompt": "a", "height": 50, "width": 70, "seed": 6})
    difference = np.asarray(opened(pictures[1])).astype(int) - np.asarray(
        opened(alone.body)
    ).astype(int)
    assert np.abs(difference).max() <= 1


def test_compiled_pictures_equal_eager_ones(served: Served, tiny_sdxl: Path) -> None:
    data = yaml.safe_load(CONFIG.read_text())
    data["pt2"]["compile"]["enable"] = False
    data["pipeline"]["path"] = "."  # as an archive has it: tiny:sdxl is made before there is one
    eager = Worker[Any, Any](
        ModelConfig.parse(data),
        tiny_sdxl.parent,
        torch.device("cpu"),
        status=StatusFile(None, "eager"),
    )
    rng = random.Random(3)
    for _ in range(12):
        request = random_request(rng)
        (answer,) = eager.run([eager.parse({"body": request})])
        answer.raise_if_failed()
        generated = np.asarray(opened(served.client.predict(request).body)).astype(int)
        assert np.abs(generated - np.asarray(answer.pictures[0]).astype(int)).max() <= 1


def test_a_stream_call_gets_its_one_answer_and_the_worker_lives(served: Served) -> None:
    pids = served.worker_pids()
    request = {"prompt": "a cat", "height": 64, "width": 64, "seed": 1}
    parts = list(served.client.stream_grpc(request))
    assert b"".join(parts) == served.client.predict(request).body
    assert served.worker_pids() == pids


@pytest.mark.parametrize("header", ["describe", "explain"])
def test_a_client_cannot_turn_a_prediction_into_something_else(served: Served, header: str) -> None:
    reply: Reply = served.client.post(
        json={"prompt": "a", "height": 64, "width": 64}, headers={header: "True"}
    )
    assert reply.status == 200 and opened(reply.body).size == (64, 64)
