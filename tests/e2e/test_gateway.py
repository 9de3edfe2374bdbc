"""The gateway before a real TorchServe: OpenAI's client paints, and the bytes are everybody's."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from fake_host import listening
from preheat.gateway.app import create_app
from preheat.gateway.torchserve import Places, TorchServeBackend
from preheat.torchserve.client import Client
from served import Served, opened

ASKED = {"prompt": "a cat", "height": 200, "width": 120, "seed": 4, "num_inference_steps": 5}
OURS = {"seed": 4, "num_inference_steps": 5}


@pytest.fixture(scope="module")
def gateway(served: Served) -> Iterator[str]:
    running = served.running
    places = Places(
        inference=running.inference,
        management=running.management,
        metrics=running.metrics,
        status_dir=running.status_dir,
        models=running.models,
    )
    with listening(create_app(TorchServeBackend(places))) as url:
        yield url


@pytest.fixture(scope="module")
def client(gateway: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key="none", timeout=60) as client:
        yield client


def decoded(coded: str | None) -> bytes:
    assert coded is not None
    return base64.b64decode(coded)


def test_a_picture_is_the_same_whichever_way_it_was_asked_for(
    served: Served, gateway: str, client: openai.OpenAI
) -> None:
    plain = served.client.predict(ASKED)
    with Client(served.client.model, inference=gateway) as through:
        passed = through.predict(ASKED)
    volatile = {"x-request-id", "pragma", "cache-control", "expires", "connection", "date"}
    assert passed.body == plain.body == served.client.predict_grpc(ASKED).body
    assert {name for name in plain.headers if name not in passed.headers} <= volatile
    answer = client.images.generate(prompt="a cat", size="120x200", extra_body=OURS)
    assert answer.data is not None and decoded(answer.data[0].b64_json) == plain.body
    assert answer.size == "120x200"


def test_an_edit_changes_only_what_is_transparent(served: Served, client: openai.OpenAI) -> None:
    rng = np.random.default_rng(0)
    drawn = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).resize((120, 200))
    alpha = Image.new("L", drawn.size, 255)
    alpha.paste(0, (0, 0, 120, 100))  # its upper half
    mask = drawn.copy()
    mask.putalpha(alpha)

    def file(image: Image.Image) -> tuple[str, bytes]:
        buffer = io.BytesIO()
        image.save(buffer, "png")
        return "image.png", buffer.getvalue()

    answer = client.images.edit(image=file(drawn), mask=file(mask), prompt="a cat", extra_body=OURS)
    assert answer.data is not None
    by_luminance = ASKED | {
        "image": base64.b64encode(file(drawn)[1]).decode(),
        "mask_image": base64.b64encode(file(Image.eval(alpha, lambda a: 255 - a))[1]).decode(),
    }
    theirs = decoded(answer.data[0].b64_json)
    assert theirs == served.client.predict(by_luminance).body
    assert opened(theirs).size == (120, 200)


def test_a_stream_shows_partial_images_and_ends_with_the_picture(
    served: Served, client: openai.OpenAI
) -> None:
    stream = client.images.generate(
        prompt="a cat", size="120x200", stream=True, partial_images=2, extra_body=OURS
    )
    *partial, last = list(stream)
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 2
    assert opened(decoded(partial[0].b64_json)).format == "JPEG"
    assert decoded(last.b64_json) == served.client.predict(ASKED).body


def test_refusals_are_the_workers_in_openais_form(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a cat", n=9)
    assert caught.value.param == "n" and "from 1 to 4" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="a cat", model="dall-e-2")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="a cat", model="tiny-sdxl@7.0")


def test_a_hot_server_is_ready_and_its_buckets_are_told(served: Served, gateway: str) -> None:
    with httpx.Client(base_url=gateway, trust_env=False, timeout=30) as http:
        for path in ("/health", "/v2/health/ready", f"/v2/models/{served.client.model}/ready"):
            assert http.get(path).status_code == 200
        warmup = http.get("/warmup")
        assert warmup.status_code == 200
        for worker in warmup.json()["workers"]:
            assert worker["state"] == "hot" and worker["done"] == worker["total"] > 0
        text = http.get("/metrics").text
    assert "preheat_requests_total" in text and "preheat_gateway_seconds_bucket" in text
