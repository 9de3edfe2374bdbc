"""The official client's completions against the gateway: what it asks, gets, and raises."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fake_host import PIECES, TEXT, FakeHost
from memory_host import MemoryHost
from preheat.errors import RequestError, Unreachable
from preheat.gateway import openai_replies
from preheat.gateway.app import create_app
from preheat.gateway.openai_text_requests import Kind, wanted

SAID = "".join(PIECES)
KINDS: tuple[Kind, ...] = ("completions", "chat")
HELLO: Any = [{"role": "user", "content": "hello"}]
USAGE = {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}


@pytest.fixture
def host(host: FakeHost) -> FakeHost:
    host.models = [TEXT]
    return host


@pytest.fixture
def client(gateway: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key="none", timeout=30) as client:
        yield client


def test_a_chat_is_answered(host: FakeHost, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=TEXT,
        messages=[{"role": "system", "content": "Count."}, *HELLO],
        max_completion_tokens=9,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stop=["x"],
        n=1,
        user="me",
        extra_body={"top_k": 7},
    )
    assert host.bodies == [
        {
            "messages": [{"role": "system", "content": "Count."}, *HELLO],
            "max_new_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
            "seed": 3,
            "stop": ["x"],
        }
    ]
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", SAID)
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("stop", 0, None)
    assert answer.usage is not None and answer.usage.to_dict() == USAGE
    assert (answer.object, answer.model) == ("chat.completion", TEXT)
    assert answer.model_extra == {"seed": 3, "engine": "compiled"}


def test_a_text_goes_on(host: FakeHost, client: openai.OpenAI) -> None:
    for prompt in ("hello", ["hello"]):
        answer = client.completions.create(model=f"{TEXT}@1.0", prompt=prompt, max_tokens=9)
        assert host.bodies.pop() == {"prompt": "hello", "max_new_tokens": 9}
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason, choice.logprobs) == (SAID, "length", None)
        assert answer.usage is not None and answer.usage.to_dict() == USAGE
        assert (answer.object, answer.model) == ("text_completion", f"{TEXT}@1.0")
    assert host.paths == [f"/predictions/{TEXT}/1.0"] * 2


@pytest.mark.parametrize("usage", [True, False])
def test_a_chat_comes_in_pieces(host: FakeHost, client: openai.OpenAI, usage: bool) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if usage else {}
    first, *pieces = client.chat.completions.create(
        model=TEXT, messages=HELLO, stream=True, **options
    )
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    if usage:
        told = pieces.pop()
        assert told.usage is not None and told.usage.to_dict() == USAGE and told.choices == []
    *texts, last = pieces
    assert [piece.choices[0].delta.content for piece in texts] == list(PIECES)
    assert [piece.choices[0].finish_reason for piece in texts] == [None] * len(PIECES)
    assert (last.choices[0].finish_reason, last.choices[0].delta.content) == ("length", None)
    assert last.model_extra == {"seed": 3, "engine": "compiled"}
    assert {piece.id for piece in pieces} == {first.id}
    assert {piece.object for piece in pieces} == {"chat.completion.chunk"}
    assert all(piece.usage is None for piece in pieces)


def test_a_text_comes_in_pieces(host: FakeHost, client: openai.OpenAI) -> None:
    *texts, last, used = client.completions.create(
        model=TEXT, prompt="hi", stream=True, stream_options={"include_usage": True}
    )
    assert [piece.choices[0].text for piece in (*texts, last)] == [*PIECES, ""]
    assert last.choices[0].finish_reason == "length"
    assert used.usage is not None and used.usage.to_dict() == USAGE


def test_a_stream_is_server_sent_events_to_its_done(host: FakeHost, gateway: str) -> None:
    answer = httpx.post(
        f"{gateway}/v1/completions",
        json={"prompt": "hi", "stream": True},
        trust_env=False,
        timeout=30,
    )
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["x-preheat-bucket"] == "prompt=8" and "x-secret" not in answer.headers
    first, *events, last, end = answer.text.split("\n\n")
    assert (first, last, end) == (": queued", "data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["id"] for event in events)
    assert "usage" not in answer.text


def test_a_stream_begins_before_it_ends(host: FakeHost, client: openai.OpenAI) -> None:
    stream = client.completions.create(model=TEXT, prompt="slow", stream=True)
    assert next(stream).choices[0].text == "One"
    host.go.set()
    assert "".join(piece.choices[0].text for piece in stream) == "".join(PIECES[1:])


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_takes_the_request_back(
    host: FakeHost, client: openai.OpenAI, stream: bool
) -> None:
    if stream:
        events = client.completions.create(model=TEXT, prompt="slow", stream=True)
        next(events)
        events.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5, max_retries=0).completions.create(
                model=TEXT, prompt="slow"
            )
    assert host.left.wait(30)


def test_log_probabilities_of_a_chat(host: FakeHost, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=TEXT, messages=HELLO, logprobs=True, top_logprobs=2
    )
    assert host.bodies[0]["logprobs"] == 2
    told = answer.choices[0].logprobs
    assert told is not None and told.content is not None
    one, half, *_ = told.content
    assert (one.token, one.logprob, one.bytes) == ("One", -0.5, [79, 110, 101])
    assert [each.logprob for each in one.top_logprobs] == [-0.5, -9999.0]
    assert half.bytes is None
    client.chat.completions.create(model=TEXT, messages=HELLO, logprobs=True)
    assert host.bodies[1]["logprobs"] == 0
    pieces = list(
        client.chat.completions.create(model=TEXT, messages=HELLO, logprobs=True, stream=True)
    )
    listed = [piece.choices[0].logprobs for piece in pieces[1:-1]]
    assert [one.content[0].token for one in listed if one and one.content] == [
        piece or "\ufffd" for piece in PIECES
    ]


@pytest.mark.parametrize("stream", [True, False])
def test_log_probabilities_of_a_text(host: FakeHost, client: openai.OpenAI, stream: bool) -> None:
    answer: Any = client.completions.create(model=TEXT, prompt="hi", logprobs=2, stream=stream)
    told = [one.choices[0].logprobs for one in (list(answer)[:-1] if stream else [answer])]
    tokens = [text for each in told for text in each.tokens]
    assert tokens == [piece or "\ufffd" for piece in PIECES]
    assert [value for each in told for value in each.token_logprobs] == [-0.5] * 4
    assert [place for each in told for place in each.text_offset] == [0, 3, 3, 8]
    assert [top for each in told for top in each.top_logprobs] == [{text: -0.5} for text in tokens]


def test_messages_come_as_the_client_has_them(host: FakeHost, client: openai.OpenAI) -> None:
    """In parts of text, and as answers that are sent back."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    said = client.chat.completions.create(model=TEXT, messages=HELLO).choices[0].message
    sent: Any = [*HELLO, said, {"role": "user", "content": parts}]
    client.chat.completions.create(model=TEXT, messages=sent)
    assert host.bodies[1]["messages"] == [
        *HELLO,
        {"role": "assistant", "content": SAID},
        {"role": "user", "content": "a\nb"},
    ]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"n": 2}, "n"),
    ({"n": True}, "n"),
    ({"messages": None}, "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0]",
    ),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, "max_completion_tokens"),
    ({"max_tokens": 101}, "max_tokens"),
    ({"max_completion_tokens": 101}, "max_completion_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": True}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage"),
    ({"prompt": "hi"}, "prompt"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=lambda case: json.dumps(case))
def test_what_is_not_there_is_refused_by_its_name(
    host: FakeHost, client: openai.OpenAI, change: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=TEXT, messages=HELLO, extra_body=change)
    error = caught.value
    assert (error.param, error.type) == (param, "invalid_request_error")
    assert str(error.body["message"]).startswith(param)  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"messages": HELLO}, "messages"),
    ],
    ids=lambda case: json.dumps(case),
)
def test_a_text_is_refused_by_its_fields(
    host: FakeHost, client: openai.OpenAI, change: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=TEXT, prompt="hi", extra_body=change)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        ("400 InvalidRequest", openai.BadRequestError),
        ("401 Unauthorized", openai.AuthenticationError),
        ("504 DeadlinePassed", openai.InternalServerError),
        ("507 OutOfMemory", openai.InternalServerError),
    ],
)
def test_each_failure_is_its_own_exception(
    host: FakeHost, client: openai.OpenAI, failure: str, raised: type[openai.APIStatusError]
) -> None:
    with pytest.raises(raised) as caught:
        client.completions.create(model=TEXT, prompt=f"fail {failure}")
    assert caught.value.status_code == int(failure[:3])
    assert len(host.bodies) == 1


def test_a_failure_in_the_middle_is_the_answers_status(
    host: FakeHost, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.InternalServerError, match="no room") as caught:
        client.completions.create(model=TEXT, prompt="break")
    assert (caught.value.status_code, caught.value.code) == (507, "OutOfMemory")
    with pytest.raises(openai.InternalServerError, match="ended before its answer") as caught:
        client.with_options(max_retries=0).completions.create(model=TEXT, prompt="vanish")
    assert caught.value.status_code == 503
    with pytest.raises(openai.InternalServerError, match="Worker died"):
        client.with_options(max_retries=0).completions.create(model=TEXT, prompt="die")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("break", "no room"), ("vanish", "ended before"), ("die", "Worker died")],
)
def test_a_failure_in_the_middle_of_a_stream_is_raised_after_its_pieces(
    host: FakeHost, client: openai.OpenAI, prompt: str, message: str
) -> None:
    stream = client.completions.create(model=TEXT, prompt=prompt, stream=True)
    assert [next(stream).choices[0].text for _ in range(2)] == list(PIECES[:2])
    with pytest.raises(openai.APIError, match=message):
        list(stream)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), inner)
    ),
    max_leaves=6,
)
NAMES = (
    *("model", "messages", "prompt", "stream", "stream_options", "max_tokens", "n", "logit_bias"),
    *("max_completion_tokens", "logprobs", "top_logprobs", "stop", "response_format", "tools"),
)
THEIRS = {"prompt", "messages", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop"}


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(KINDS), st.dictionaries(st.sampled_from(NAMES), anything))
def test_any_fields_are_a_request_for_the_worker_or_refused(
    kind: Kind, values: dict[str, object]
) -> None:
    try:
        found = wanted(kind, values)
    except RequestError as refused:
        assert refused.code == 400 and refused.field
        return
    asked = json.loads(found.body)
    assert asked.keys() <= {*THEIRS, "logprobs"} and None not in asked.values()
    assert ("messages" in asked) is (kind == "chat") is not ("prompt" in asked)


class Hosting(MemoryHost):
    """One model of a family."""

    def __init__(self, family: str) -> None:
        super().__init__()
        (worker,) = self.seen.workers
        self.seen = replace(self.seen, workers=(replace(worker, family=family),))


async def posted(host: Hosting, path: str, body: dict[str, Any]) -> httpx.Response:
    transport = httpx.ASGITransport(create_app(host))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        return await http.post(f"/v1/{path}", json=body)


@pytest.mark.parametrize(
    ("family", "path", "message"),
    [
        ("pipeline", "completions", "model tiny paints pictures: ask /v1/images/generations"),
        ("pipeline", "chat/completions", "model tiny paints pictures"),
        ("module", "completions", "model tiny takes tensors: ask /predictions"),
        ("module", "images/generations", "model tiny takes tensors"),
        ("text", "images/generations", "model tiny writes text: ask /v1/chat/completions"),
    ],
)
@pytest.mark.parametrize("name", ["tiny", None])
def test_a_model_of_another_kind_is_refused(
    family: str, path: str, message: str, name: str | None
) -> None:
    body = {"model": name, "messages" if path.startswith("chat") else "prompt": HELLO}
    answer = asyncio.run(posted(Hosting(family), path, body))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "model")
    assert error["message"].startswith(message)


@pytest.mark.parametrize(
    "sent", [b"null", b"[]", b"{", b"\x89PNG", b'{"step": 1}', b'{\n "code": 500\n}']
)
def test_what_is_no_stream_of_events_is_said_as_such(sent: bytes) -> None:
    async def parts() -> AsyncIterator[bytes]:
        yield b'{"event": "queued"}\n' + sent

    async def read() -> list[Any]:
        return [event async for event in openai_replies.told(parts())]

    with pytest.raises(Unreachable, match="no stream of events"):
        asyncio.run(read())


def test_fields_that_ask_for_nothing_are_taken() -> None:
    nothing = {"reasoning_effort": None, "verbosity": "medium", "audio": None}
    answered = {"role": "assistant", "content": "hi", "tool_calls": [], "annotations": []}
    asked = wanted("chat", {"messages": [*HELLO, answered], **nothing})
    assert json.loads(asked.body)["messages"][1] == {"role": "assistant", "content": "hi"}
    with pytest.raises(RequestError, match="audio"):
        wanted("chat", {"messages": HELLO, "audio": {"voice": "ash"}})
