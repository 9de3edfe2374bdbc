"""Rows and fields as every family reads them; see also the tests of the families' requests."""

from __future__ import annotations

from typing import Any

import pytest

from preheat.errors import RequestError
from preheat.protocol.fields import Fields, envelope, parse_deadline, together


@pytest.mark.parametrize("name", ["data", "body"])
def test_a_body_keeps_its_form_and_text_beside_it_is_bytes(name: str) -> None:
    row = {name: "as it came", "seed": "7", "image": bytearray(b"\1")}
    assert envelope(row, hint="") == ("as it came", {"seed": b"7", "image": b"\1"})
    assert set(row) == {name, "seed", "image"}


def test_a_row_of_parts_has_an_empty_body() -> None:
    assert envelope({"seed": b"7"}, hint="") == ({}, {"seed": b"7"})


def test_of_two_envelopes_one_is_a_part() -> None:
    assert envelope({"body": b"1", "data": b"2"}, hint="") == (b"2", {"body": b"1"})


def test_a_familys_own_field_is_no_envelope() -> None:
    row = {"data": b"1", "body": b"2"}
    assert envelope(row, ["data"], hint="") == (b"2", {"data": b"1"})
    assert envelope(row, ["data", "body"], hint="") == ({}, row)


@pytest.mark.parametrize("row", [{}, None, [], "text"])
def test_an_empty_row_is_told_what_to_send(row: object) -> None:
    with pytest.raises(RequestError, match="is empty; send two numbers"):
        envelope(row, hint="send two numbers")


def test_a_field_comes_once() -> None:
    assert together({"a": 1}, {"b": b"2"}, "JSON") == {"a": 1, "b": b"2"}
    with pytest.raises(RequestError, match="a is given twice, in the JSON and beside it"):
        together({"a": 1}, {"a": b"1"}, "JSON")


def test_fields_are_the_same_from_json_and_from_parts() -> None:
    known = ("text", "word", "flag", "whole", "number", "file")
    of_json: dict[str, Any] = {
        "text": "a",
        "word": "png",
        "flag": True,
        "whole": 3,
        "number": 0.5,
        "file": "AQ==",
    }
    of_parts: dict[str, Any] = {
        "text": b"a",
        "word": b"png",
        "flag": b"true",
        "whole": b"3",
        "number": b"0.5",
        "file": b"\1",
    }
    for values in (of_json, of_parts, dict.fromkeys(known), {}):
        fields, absent = Fields(values, known), not any(values.values())
        read = (
            fields.text("text", 1),
            fields.choice("word", ("png", "jpeg")),
            fields.flag("flag"),
            fields.whole("whole", 3, 3),
            fields.number("number", 0.5),
            fields.file("file", 1),
        )
        assert read == ((None,) * 6 if absent else ("a", "png", True, 3, 0.5, b"\1"))


def test_a_name_that_others_have_is_told_what_there_is_instead() -> None:
    with pytest.raises(RequestError, match="steps is not served: use n"):
        Fields({"steps": 1}, ["n"], {"steps": "use n"})
    with pytest.raises(RequestError, match=r"nn is an unknown field; did you mean n\?"):
        Fields({"nn": 1}, ["n"])


@pytest.mark.parametrize("text", ["", "-1", "1.5", "1" * 16, "\N{ARABIC-INDIC DIGIT ONE}"])
def test_a_deadline_is_a_unix_time_in_milliseconds(text: str) -> None:
    assert parse_deadline(None) is None and parse_deadline(" 1500 ") == 1.5
    with pytest.raises(RequestError, match="x-preheat-deadline must be a Unix time"):
        parse_deadline(text)
