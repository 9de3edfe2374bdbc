"""A request for text: from a TorchServe row to tokens, every limit checked once."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from preheat.config.text import LEAST_TEMPERATURE, TextConfig
from preheat.errors import RequestError, is_panic
from preheat.models.text.job import Job, bucket
from preheat.models.text.sampler import Sampling
from preheat.protocol.call import Call
from preheat.protocol.events import EventStream
from preheat.protocol.fields import Fields, envelope, shown_value, together
from preheat.protocol.json_text import document, in_bytes
from preheat.protocol.responses import preheat_headers

FIELDS = (
    "prompt",
    "messages",
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "stop",
    "logprobs",
)
_UNSERVED = {
    "max_tokens": "here it is max_new_tokens",
    "n": "send the request n times, each with a seed of its own",
    "stream": "an answer always comes in parts, a line of JSON each",
}
_SEND = 'send JSON: {"prompt": "..."}'
_MOST_SEED = 2**63 - 1


class Tokenizer(Protocol):
    """The folder's own, as far as it is used; see transformers.PreTrainedTokenizerBase."""

    chat_template: Any

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, Any]: ...

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, str]], *, tokenize: bool, **kwargs: Any
    ) -> Any: ...

    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str: ...


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads the requests of one model."""

    config: TextConfig
    tokenizer: Tokenizer
    num_embeddings: int
    """Tokens that the model knows; its tokenizer may know more."""

    def read(self, call: Call) -> Job:
        """The request as a job, its prompt in tokens.

        Raises:
            RequestError: anything that is not a legal request.
        """
        fields = Fields(_values(call.row), FIELDS, _UNSERVED)
        prompt = self._prompt(fields)
        prefill = min(each for each in self.config.prefill_buckets if len(prompt) <= each)
        seed = fields.whole("seed", 0, _MOST_SEED)
        seed = secrets.randbelow(_MOST_SEED) if seed is None else seed
        facts = {"bucket": bucket(prefill), "seed": seed}
        return Job(
            prompt=prompt,
            prefill=prefill,
            max_new_tokens=self._max_new_tokens(fields, len(prompt)),
            sampling=self._sampling(fields, seed),
            stops=self._stops(fields),
            events=EventStream(call.send, preheat_headers(facts)),
            deadline=call.deadline,
        )

    def _prompt(self, fields: Fields) -> list[int]:
        text = fields.text("prompt", self.config.limits.max_prompt_chars)
        messages = fields.raw("messages")
        if (text is None) == (messages is None):
            raise RequestError(
                "is missing; send it, or messages"
                if text is None
                else "stands beside messages; send one of the two",
                "prompt",
            )
        field = "prompt" if messages is None else "messages"
        # a template writes what begins a text itself
        written = self._chat(messages) if text is None else text
        tokens = self._tokens(written, field, special=text is not None)
        most = max(self.config.prefill_buckets)
        if not tokens:
            raise RequestError("is empty: a text goes on from one token at least", field)
        if len(tokens) > most:
            raise RequestError(
                f"has {len(tokens)} tokens; the largest bucket is {most} "
                "(text.prefill_buckets in the YAML)",
                field,
            )
        return tokens

    def _tokens(self, text: str, field: str, *, special: bool) -> list[int]:
        try:
            tokens = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        except BaseException as error:
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise RequestError(f"cannot be tokenized ({type(error).__name__})", field) from error
        if tokens and max(tokens) >= self.num_embeddings:  # an index that would cost a GPU
            raise RequestError("holds a token that the model has no embedding of", field)
        return tokens

    def _chat(self, messages: object) -> str:
        if self.tokenizer.chat_template is None:
            raise RequestError("need a chat template, which this model has not", "messages")
        limits, checked, num_chars = self.config.limits, list[dict[str, str]](), 0
        if not isinstance(messages, list) or not 0 < len(messages) <= limits.max_messages:
            raise RequestError(f"must be a list of 1 to {limits.max_messages} messages", "messages")
        for index, message in enumerate(messages):
            name = f"messages[{index}]"
            if not isinstance(message, Mapping) or message.keys() != {"role", "content"}:
                raise RequestError("must be an object of role and content", name)
            own = Fields(message, ("role", "content"))
            left = limits.max_prompt_chars - num_chars
            role, content = own.text("role", 20), own.text("content", left)
            if role is None or content is None:
                raise RequestError("must have text in role and content", name)
            num_chars += len(content)
            checked.append({"role": role, "content": content})
        try:
            text: str = self.tokenizer.apply_chat_template(
                checked, tokenize=False, add_generation_prompt=True
            )
        # templates raise what they like on roles in an order that they do not know
        except Exception as error:
            raise RequestError(
                f"are nothing that the model's chat template takes ({type(error).__name__})",
                "messages",
            ) from error
        return text

    def _max_new_tokens(self, fields: Fields, num_prompt: int) -> int:
        room = self.config.max_length - num_prompt
        asked = fields.whole("max_new_tokens", 1, self.config.max_length)
        if asked is None:
            return min(self.config.defaults.max_new_tokens, room)
        if asked > room:
            raise RequestError(
                f"is {asked}, and the prompt has {num_prompt} tokens; together at most "
                f"{self.config.max_length} are served (text.max_length in the YAML)",
                "max_new_tokens",
            )
        return asked

    def _sampling(self, fields: Fields, seed: int) -> Sampling:
        defaults = self.config.defaults
        temperature = fields.number("temperature", 100.0)
        if temperature is not None and 0 < temperature < LEAST_TEMPERATURE:
            raise RequestError(
                f"must be 0, or from {LEAST_TEMPERATURE:g} to 100, got {temperature}",
                "temperature",
            )
        top_k = fields.whole("top_k", 0, 1_000_000)
        top_p = fields.number("top_p", 1.0, zero=False)
        return Sampling(
            temperature=defaults.temperature if temperature is None else temperature,
            top_k=defaults.top_k if top_k is None else top_k,
            top_p=defaults.top_p if top_p is None else top_p,
            seed=seed,
            logprobs=fields.whole("logprobs", 0, self.config.limits.max_logprobs),
        )

    def _stops(self, fields: Fields) -> tuple[str, ...]:
        stops, limits = fields.raw("stop"), self.config.limits
        if stops is None:
            return self.config.defaults.stop
        listed = [stops] if isinstance(stops, str) else stops
        if not isinstance(listed, list) or len(listed) > limits.max_stop_strings:
            raise RequestError(
                f"must be a string, or a list of at most {limits.max_stop_strings}", "stop"
            )
        for stop in listed:
            if not isinstance(stop, str) or not 0 < len(stop) <= limits.max_stop_chars:
                raise RequestError(
                    f"must be strings of 1 to {limits.max_stop_chars} characters, "
                    f"got {shown_value(stop)}",
                    "stop",
                )
        return tuple(listed)


def stop_tokens(model: Any, tokenizer: Any) -> Collection[int]:
    """The tokens that end a text, by the folder's generation config and its tokenizer."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = named if isinstance(named, list) else [named]
    return {end for end in (*ends, tokenizer.eos_token_id) if end is not None}


def _values(row: Mapping[str, object]) -> dict[str, object]:
    """The fields of a request, in a JSON body or beside it."""
    body, parts = envelope(row, FIELDS, hint=_SEND)
    body = in_bytes(body)
    if isinstance(body, bytes):
        body = document(body, "body")
    if not isinstance(body, Mapping):
        raise RequestError(f"must be a JSON object; {_SEND}", "body")
    return together(body, parts, "body")
