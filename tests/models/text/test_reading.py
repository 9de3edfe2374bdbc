"""Whatever a client sends for text is a job or a RequestError."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.text.texts import BUCKETS, MAX_LENGTH, config
from preheat.config.text import TextConfig
from preheat.errors import RequestError
from preheat.models.text import tiny
from preheat.models.text.request import FIELDS, Reader
from preheat.protocol.call import Call

TOKENIZER = tiny.tokenizer()
TOKENIZER.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
READER = Reader(config().section(TextConfig), TOKENIZER, len(TOKENIZER))

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=5,
)
messages = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "x"]), st.text(max_size=9) | anything),
    max_size=3,
)
likely = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.text(max_size=12) | anything,
        "messages": messages | anything,
        "max_new_tokens": st.integers(-1, 60),
        "temperature": st.floats(allow_nan=True),
        "top_p": st.floats(-1, 2),
        "stop": st.lists(st.text(max_size=3), max_size=9),
        "seed": st.integers(-1, 2**64),
    },
)


@given(likely | st.dictionaries(st.sampled_from([*FIELDS, "n"]), anything), st.booleans())
def test_any_body_is_a_job_or_a_request_error(body: dict[str, Any], in_parts: bool) -> None:
    row: dict[str, object] = {"body": body}
    if in_parts:  # as a form or gRPC has it: each field by itself, in bytes
        row = {
            name: json.dumps(value).encode("utf-8", "surrogatepass") for name, value in body.items()
        }
    try:
        job = READER.read(Call(row))
    except RequestError as refused:
        assert refused.code == 400 and refused.field
        return
    assert 0 < len(job.prompt) <= job.prefill <= BUCKETS[-1]
    assert 0 < job.max_new_tokens <= MAX_LENGTH - len(job.prompt)
    assert 0 <= job.sampling.seed < 2**63


@given(st.binary(max_size=60))
def test_any_bytes_are_no_request(body: bytes) -> None:
    with pytest.raises(RequestError):
        READER.read(Call({"body": body}))


def test_each_field_may_be_a_part_of_its_own() -> None:
    row = {"prompt": b"hi", "max_new_tokens": b"3", "stop": b'["a", "b"]', "temperature": b"0.5"}
    job = READER.read(Call(row))
    assert (len(job.prompt), job.max_new_tokens, job.stops) == (2, 3, ("a", "b"))
    assert job.sampling.temperature == 0.5


def test_a_seed_that_is_not_sent_is_drawn() -> None:
    seeds = {READER.read(Call({"body": {"prompt": "x"}})).sampling.seed for _ in range(8)}
    assert len(seeds) == 8
