"""Text as it comes: tokens to pieces that end at whole characters and hold nothing of a stop
string, and that, joined, are the whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are no character (yet)."""


class Detokenizer:
    """Decodes a sequence's tokens as they come.

    A token may be part of a character, and some decoders drop a text's first space: so new tokens
    are decoded after those of the piece before, never by themselves, and a piece waits until it
    ends in a whole character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode, self._tokens = decode, list[int]()
        self._before = ""
        """Text of the tokens that are sent already and kept as context, the first `_sent` ones."""
        self._sent = 0

    def push(self, token: int) -> str:
        """What this token adds to the text, and those before it that have waited."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        return "" if text.endswith(REPLACEMENT) else self._piece(text)

    def close(self) -> str:
        """What has waited for the rest of a character that did not come."""
        return self._piece(self._decode(self._tokens))

    def _piece(self, text: str) -> str:
        piece = text[len(self._before) :]
        if piece:
            self._tokens = self._tokens[self._sent :]
            self._before, self._sent = self._decode(self._tokens), len(self._tokens)
        return piece


class StopStrings:
    """Lets text through up to the first stop string to be complete, that string excluded."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = stops, ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """What of the text up to here is not part of a stop string, whatever comes."""
        if self.found is not None:
            return ""
        self._held += piece
        ends = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := self._held.find(stop)) >= 0
        ]
        if ends:
            _, start, self.found = min(ends)
            return self._release(start)
        return self._release(len(self._held) - max(map(self._begun, self._stops), default=0))

    def close(self) -> str:
        """What was held for a stop string that did not come."""
        return "" if self.found is not None else self._release(len(self._held))

    def _begun(self, stop: str) -> int:
        """How many characters of `stop` the text ends with."""
        most = min(len(stop) - 1, len(self._held))
        return next((n for n in range(most, 0, -1) if self._held.endswith(stop[:n])), 0)

    def _release(self, end: int) -> str:
        released, self._held = self._held[:end], self._held[end:]
        return released


class TextStream:
    """A sequence's text in pieces."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> None:
        self._detokenizer, self._stops = Detokenizer(decode), StopStrings(stops)

    @property
    def stop(self) -> str | None:
        """The stop string that has ended it, if one has."""
        return self._stops.found

    def push(self, token: int) -> str:
        """What may be sent now."""
        return self._stops.push(self._detokenizer.push(token))

    def close(self) -> str:
        """What may be sent at the end."""
        return self._stops.push(self._detokenizer.close()) + self._stops.close()
