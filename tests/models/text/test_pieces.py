"""Pieces joined are the whole text: no character split, nothing of a stop string sent."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from preheat.models.text import tiny
from preheat.models.text.pieces import REPLACEMENT, Detokenizer, StopStrings, TextStream


def _with_spaces() -> Any:
    """As Llama 2's: a word begins with a space, a text does not, and what is in no vocabulary is
    written in bytes.
    """
    letters = ["<unk>", "▁", *"abc", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: index for index, token in enumerate(letters)}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


TOKENIZERS = {"bytes": tiny.tokenizer(), "spaces": _with_spaces()}


def whole(tokenizer: Any, tokens: Sequence[int]) -> str:
    text: str = tokenizer.decode(
        list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(partial(whole, tokenizer))
    return [*map(detokenizer.push, tokens), detokenizer.close()]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]) | st.sampled_from("ab c€🜚")))
def test_a_texts_pieces_are_whole_characters_and_joined_the_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    sent = pieces(tokenizer, tokens)
    assert "".join(sent) == whole(tokenizer, tokens) == text
    assert REPLACEMENT in text or not any(REPLACEMENT in piece for piece in sent)


@given(st.lists(st.integers(0, 256)))
def test_any_tokens_become_the_text_that_decoding_them_together_gives(tokens: list[int]) -> None:
    """A model may write bytes that are no character, and tokens that are no text."""
    tokenizer = TOKENIZERS["bytes"]
    assert "".join(pieces(tokenizer, tokens)) == whole(tokenizer, tokens)


def test_a_character_is_sent_with_its_last_byte_and_the_rest_at_once() -> None:
    tokens = TOKENIZERS["bytes"]("a€b").input_ids
    assert pieces(TOKENIZERS["bytes"], tokens) == ["a", "", "", "€", "b", ""]


def test_what_is_decoded_for_a_token_does_not_grow_with_the_text() -> None:
    seen: list[int] = []

    def decode(tokens: Sequence[int]) -> str:
        seen.append(len(tokens))
        return whole(TOKENIZERS["bytes"], tokens)

    detokenizer = Detokenizer(decode)
    for token in TOKENIZERS["bytes"]("some text " * 20).input_ids:
        detokenizer.push(token)
    assert max(seen) <= 2


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the stop string that is complete first; of several, the longest."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


ab = st.text("ab", min_size=1, max_size=4)


@given(st.lists(st.text("abc", max_size=5), max_size=12), st.lists(ab, max_size=3))
def test_nothing_of_a_stop_string_is_sent_however_the_text_is_cut(
    chunks: list[str], stops: list[str]
) -> None:
    stopping = StopStrings(stops)
    wanted, sent = cut("".join(chunks), stops), ""
    for chunk in chunks:
        sent += stopping.push(chunk)
        assert wanted.startswith(sent)
    sent += stopping.close()
    assert sent == wanted
    assert (stopping.found is not None) == any(stop in "".join(chunks) for stop in stops)


def test_text_is_held_no_longer_than_it_may_be_a_stop_string() -> None:
    stopping = StopStrings(["END"])
    assert [stopping.push(piece) for piece in ("a E", "N", "x", "EN", "D more")] == [
        "a ",
        "",
        "ENx",
        "",
        "",
    ]
    assert (stopping.found, stopping.push("z"), stopping.close()) == ("END", "", "")


def test_a_stop_string_may_be_characters_of_several_tokens() -> None:
    tokenizer = TOKENIZERS["bytes"]
    stream = TextStream(partial(whole, tokenizer), ["€€"])
    sent = [stream.push(token) for token in tokenizer("a€b€€c").input_ids]
    assert "".join([*sent, stream.close()]) == "a€b"
    assert stream.stop == "€€"
