"""How much of a prompt the text encoders read: diffusers cuts what is past their length, and logs
it where nobody looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from preheat.errors import RequestError, is_panic

_TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class Tokenizer(Protocol):
    """See `transformers.PreTrainedTokenizerBase.__call__`."""

    model_max_length: int

    def __call__(self, text: str, *, truncation: bool, verbose: bool) -> Any: ...


@dataclass(frozen=True, slots=True)
class Reader:
    """The tokenizers of a pipeline, each with the number of tokens that its encoder is given, begin
    and end among them.
    """

    tokenizers: Sequence[tuple[Tokenizer, int]]

    @classmethod
    def of(cls, pipe: Any, long: int | None) -> Reader:
        """Those of a diffusers pipeline; `long` is what T5 is given (`max_sequence_length`), CLIP
        has a length of its own.
        """
        found = []
        for tokenizer_name, encoder_name in zip(_TOKENIZERS, TEXT_ENCODERS, strict=True):
            tokenizer, encoder = (
                getattr(pipe, tokenizer_name, None),
                getattr(pipe, encoder_name, None),
            )
            if tokenizer is not None and encoder is not None:  # SD3 may be loaded without its T5
                is_t5 = type(encoder).__name__.startswith("T5")
                found.append(
                    (tokenizer, long if is_t5 and long else int(tokenizer.model_max_length))
                )
        return cls(tuple(found))

    def num_dropped(self, text: str, field: str) -> int:
        """Tokens at the end of `text` that no encoder reads.

        Of encoders that are given different lengths the one that reads furthest counts: Flux and
        SD3 go on with T5 where their CLIPs, which give a summary, have stopped.

        Raises:
            RequestError: a tokenizer cannot read the text.
        """
        try:
            numbers = [
                max(0, len(tokenizer(text, truncation=False, verbose=False)["input_ids"]) - length)
                for tokenizer, length in self.tokenizers
            ]
        except BaseException as error:
            if not is_panic(error):
                raise
            raise RequestError("cannot be tokenized", field) from None
        return min(numbers, default=0)
