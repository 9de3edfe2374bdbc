"""The official client against the gateway: what it asks, gets, and raises."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_host import FakeHost, png
from preheat.errors import RequestError
from preheat.gateway import openai_requests
from preheat.gateway.backend import Answer
from preheat.gateway.openai_answers import pictures
from preheat.gateway.openai_replies import lines

SIZED: dict[str, Any] = {"prompt": "a cat", "size": "120x200"}


@pytest.fixture
def client(gateway: str) -> Iterator[openai.OpenAI]:
    """As users have it, but for waiting between retries."""
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key="none", timeout=30) as client:
        yield client


def image(data: bytes = b"png", name: str = "image.png") -> tuple[str, io.BytesIO]:
    return name, io.BytesIO(data)


def files(answer: Any) -> list[bytes]:
    return [base64.b64decode(each.b64_json) for each in answer.data]


def test_pictures_are_generated(host: FakeHost, client: openai.OpenAI) -> None:
    ours = {"seed": 3, "negative_prompt": "dogs", "num_inference_steps": 4, "guidance_scale": 2.5}
    answer = client.images.generate(
        **SIZED, n=2, output_format="png", user="me", quality="auto", extra_body=ours
    )
    assert host.bodies == [
        {
            "prompt": "a cat",
            "width": 120,
            "height": 200,
            "num_images": 2,
            "output_format": "png",
            "response_format": "b64_json",
            **ours,
        }
    ]
    assert files(answer) == [png(host.bodies[0] | {"seed": seed}) for seed in (3, 4)]
    assert (answer.size, answer.output_format) == ("120x200", "png")
    assert answer.created > 1_700_000_000
    assert answer.model_extra is not None and answer.model_extra["bucket"] == [320, 192]


def test_what_is_left_out_is_the_workers_to_choose(host: FakeHost, client: openai.OpenAI) -> None:
    client.images.generate(prompt="a cat", size="auto")
    assert host.bodies == [{"prompt": "a cat", "response_format": "b64_json"}]


def test_an_edit_repaints_what_is_transparent(host: FakeHost, client: openai.OpenAI) -> None:
    picture, mask = bytes(range(256)), b"mask"
    client.images.edit(
        image=image(picture),
        mask=image(mask),
        output_format="webp",
        output_compression=50,
        extra_body={"strength": 0.5},
        **SIZED,
    )
    (asked,) = host.bodies
    assert base64.b64decode(asked.pop("image")) == picture
    assert base64.b64decode(asked.pop("mask_image")) == mask
    assert asked == {
        "prompt": "a cat",
        "width": 120,
        "height": 200,
        "mask_channel": "alpha",
        "output_format": "webp",
        "output_compression": 50,
        "strength": 0.5,
        "response_format": "b64_json",
    }


def test_an_edit_takes_one_image(host: FakeHost, client: openai.OpenAI) -> None:
    client.images.edit(prompt="a cat", image=[image()])
    assert base64.b64decode(host.bodies[0]["image"]) == b"png"
    with pytest.raises(openai.BadRequestError, match="several files") as caught:
        client.images.edit(prompt="a cat", image=[image(), image()])
    assert caught.value.param == "image"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_variation_has_no_prompt(host: FakeHost, client: openai.OpenAI) -> None:
    answer = client.images.create_variation(image=image(), n=1, size="256x256")
    (asked,) = host.bodies
    assert asked["prompt"] == "" and "mask_image" not in asked and asked["width"] == 256
    assert len(files(answer)) == 1


@pytest.mark.parametrize("num", [0, 1, 3])
def test_a_stream_has_partial_images_and_then_the_picture(
    host: FakeHost, client: openai.OpenAI, num: int
) -> None:
    stream = client.images.generate(**SIZED, stream=True, partial_images=num)
    *partial, last = list(stream)
    assert host.bodies[0]["num_previews"] == num and host.bodies[0]["stream"] is True
    assert [event.type for event in partial] == ["image_generation.partial_image"] * num
    for index, event in enumerate(partial):
        assert event.type == "image_generation.partial_image"
        assert event.partial_image_index == index and event.size == "120x200"
        assert base64.b64decode(event.b64_json).startswith(b"jpeg")
    assert last.type == "image_generation.completed"
    assert base64.b64decode(last.b64_json) == png(host.bodies[0])
    assert (last.size, last.output_format, last.usage.total_tokens) == ("120x200", "png", 0)


def test_an_edit_streams_under_its_own_name(host: FakeHost, client: openai.OpenAI) -> None:
    stream = client.images.edit(image=image(), stream=True, partial_images=1, **SIZED)
    kinds = [event.type for event in stream]
    assert kinds == ["image_edit.partial_image", "image_edit.completed"]


def test_a_stream_begins_before_it_ends(host: FakeHost, client: openai.OpenAI) -> None:
    stream = client.images.generate(prompt="slow", stream=True, partial_images=1)
    assert host.begun.wait(10)
    host.go.set()
    assert [event.type for event in stream][-1] == "image_generation.completed"


def test_who_leaves_a_stream_takes_the_request_back(host: FakeHost, client: openai.OpenAI) -> None:
    stream = client.images.generate(prompt="slow", stream=True)
    stream.close()
    assert host.left.wait(10)


def test_a_failure_in_the_middle_of_a_stream_is_raised(
    host: FakeHost, client: openai.OpenAI
) -> None:
    stream = client.images.generate(prompt="break", stream=True, partial_images=3)
    with pytest.raises(openai.APIError, match="it raised") as caught:
        list(stream)
    assert caught.value.type == "server_error" and caught.value.code == "PipelineFailure"


def test_a_stream_that_is_refused_is_no_stream(host: FakeHost, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a cat", n=5, stream=True)
    assert caught.value.param == "n"


def test_models_are_listed(host: FakeHost, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "preheat"
    assert client.models.retrieve("tiny@1.0").id == "tiny@1.0"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none")


def test_a_model_is_named_with_its_version_or_is_the_only_one(
    host: FakeHost, client: openai.OpenAI
) -> None:
    for model in ("tiny", "tiny@1.0"):
        client.images.generate(prompt="a cat", model=model)
    client.images.generate(prompt="a cat")
    assert host.paths == [f"/predictions/{name}" for name in ("tiny", "tiny/1.0", "tiny")]
    for unknown in ("dall-e-2", "tiny@2.0", "../models", "tiny@.."):
        with pytest.raises(openai.NotFoundError) as caught:
            client.images.generate(prompt="a cat", model=unknown)
        assert caught.value.code == "model_not_found"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"n": 5}, "n"),
    ({"size": "big"}, "size"),
    ({"size": "10x"}, "size"),
    ({"response_format": "url"}, "response_format"),
    ({"quality": "high"}, "quality"),
    ({"style": "natural"}, "style"),
    ({"background": "transparent"}, "background"),
    ({"moderation": "low"}, "moderation"),
    ({"partial_images": 4, "stream": True}, "partial_images"),
    ({"extra_body": {"stream": "yes"}}, "stream"),
    ({"extra_body": {"num_images": 2}}, "num_images"),
    ({"extra_body": {"image": "aGk="}}, "image"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=lambda case: json.dumps(case))
def test_what_is_not_there_is_refused_by_its_name(
    host: FakeHost, client: openai.OpenAI, change: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": "a cat", **change})
    error = caught.value
    assert (error.param, error.type) == (param, "invalid_request_error")
    assert str(error.body["message"]).startswith(param)  # type: ignore[index]


FAILURES: list[tuple[str, type[openai.APIStatusError], int]] = [
    ("400 InvalidRequest", openai.BadRequestError, 1),
    ("401 Unauthorized", openai.AuthenticationError, 1),
    ("404 ModelNotFoundException", openai.NotFoundError, 1),
    ("413 AnswerTooLarge", openai.APIStatusError, 1),
    ("429 TooMany", openai.RateLimitError, 3),
    ("500 PipelineFailure", openai.InternalServerError, 1),
    ("500 InternalServerException", openai.InternalServerError, 3),
    ("503 PutOff", openai.InternalServerError, 3),
    ("504 DeadlinePassed", openai.InternalServerError, 1),
    ("507 OutOfMemory", openai.InternalServerError, 1),
    ("507 InternalServerException", openai.InternalServerError, 3),
]


def _soon(answer: Any) -> None:
    """Whoever asks again is to wait no longer."""
    answer.headers["retry-after-ms"] = "1"


@pytest.mark.parametrize(("failure", "raised", "asked"), FAILURES, ids=lambda case: str(case))
def test_each_failure_is_its_own_exception_and_asked_again_where_that_helps(
    host: FakeHost,
    client: openai.OpenAI,
    failure: str,
    raised: type[openai.APIStatusError],
    asked: int,
) -> None:
    with (
        openai.DefaultHttpxClient(event_hooks={"response": [_soon]}) as http,
        pytest.raises(raised) as caught,
    ):
        client.with_options(http_client=http).images.generate(prompt=f"fail {failure}")
    assert caught.value.status_code == int(failure[:3])
    assert len(host.bodies) == asked


def test_bodies_that_are_none_are_refused(host: FakeHost, gateway: str) -> None:
    def code(path: str, **body: Any) -> int:
        answer = httpx.post(f"{gateway}/v1/images/{path}", trust_env=False, **body)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        return answer.status_code

    assert code("generations", content=b"{") == 400
    assert code("generations", content=b'"a cat"') == 400
    assert code("generations", content=b'{"prompt": "a", "prompt": "b"}') == 400
    assert code("generations", content=b"\xff") == 400
    assert code("edits", json={"prompt": "a cat"}) == 400
    assert code("edits", files={"mask": b"mask"}, data={"prompt": "a"}) == 400
    kind = {"content-type": "multipart/form-data; boundary=x"}
    assert code("edits", content=b"nonsense", headers=kind) == 400
    slow = "multipart/form-data; boundary=x; charset=punycode"
    head = b'content-disposition: form-data; name="image-"; filename="a-"'
    form = b"--x\r\n" + head + b"\r\n\r\na\r\n--x--\r\n"
    assert code("variations", content=form, headers={"content-type": slow}) == 400
    assert not host.bodies
    assert code("edits", files={"image": b" " * 100_001}) == 413
    assert code("none", json={}) == 404


def test_a_body_of_json_is_as_long_as_one_without_files() -> None:
    assert openai_requests.from_json(b"{" + b" " * (openai_requests.MAX_JSON - 2) + b"}") == {}
    with pytest.raises(RequestError, match="body is over") as refused:
        openai_requests.from_json(b"{" + b" " * openai_requests.MAX_JSON + b"}")
    assert refused.value.code == 413


@given(
    num_data=st.integers(0, 9000),
    num_after=st.integers(0, 20),
    cuts=st.lists(st.integers(0, 10_000), max_size=5),
)
def test_an_answer_is_completed_wherever_it_is_cut(
    num_data: int, num_after: int, cuts: list[int]
) -> None:
    said = {"data": [{"b64_json": "A" * num_data}], "width": 120, "height": 200, "bucket": [3, 1]}
    said["more"] = "x" * num_after
    text = json.dumps(said).encode()
    ends = sorted({0, *(min(cut, len(text)) for cut in cuts), len(text)})

    async def told() -> bytes:
        async def come() -> AsyncIterator[bytes]:
            for begin, end in pairwise(ends):
                yield text[begin:end]

        reply = await pictures(Answer(200, {"x-preheat-seed": "7", "content-length": "1"}, come()))
        assert "content-length" not in reply.headers and reply.headers["x-preheat-seed"] == "7"
        return b"".join([part async for part in reply.body])

    document = json.loads(asyncio.run(told()))
    assert document.pop("created") > 1_700_000_000
    assert document == {**said, "size": "120x200"}


@given(text=st.binary(max_size=30), cuts=st.lists(st.integers(0, 30), max_size=5))
def test_lines_are_the_same_wherever_they_are_cut(text: bytes, cuts: list[int]) -> None:
    ends = sorted({0, *(min(cut, len(text)) for cut in cuts), len(text)})
    parts = [text[a:b] for a, b in pairwise(ends)]

    async def told() -> list[bytes]:
        async def come() -> AsyncIterator[bytes]:
            for part in parts:
                yield part

        return [line async for line in lines(come())]

    whole = text.split(b"\n")
    assert asyncio.run(told()) == (whole if whole[-1] else whole[:-1])
