"""What answers say of themselves."""

from __future__ import annotations

import pytest

from preheat.buckets import Bucket
from preheat.protocol.responses import preheat_headers


@pytest.mark.parametrize(
    ("name", "value", "header", "text"),
    [
        ("bucket", Bucket(1024, 768), "x-preheat-bucket", "1024x768"),
        ("bucket", Bucket(sequence=16), "x-preheat-bucket", "sequence=16"),
        ("padding", 0.25, "x-preheat-padding", "0.2500"),
        ("padding", 0.0, "x-preheat-padding", "0.0000"),
        ("seed", 2**63 - 1, "x-preheat-seed", "9223372036854775807"),
        ("flagged", True, "x-preheat-flagged", "true"),
        ("negative_prompt_dropped", 7, "x-preheat-negative-prompt-dropped", "7"),
    ],
)
def test_a_fact_is_one_header_in_text(name: str, value: object, header: str, text: str) -> None:
    assert preheat_headers({name: value}) == {header: text}
