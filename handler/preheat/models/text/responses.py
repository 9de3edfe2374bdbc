"""Answers of the text family as events (`protocol.events`):

{"event": "queued"}
{"event": "text", "text": "..."}     with "token", "token_text", "logprob" and "top_logprobs" where
                                     asked for
{"event": "done", "finish_reason": "stop" | "length", "seed", "engine", "usage"}; or
{"event": "error", "code", "type", "message", "field"}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from preheat.models.text.job import Answer
from preheat.models.text.sampler import Choice
from preheat.protocol.responses import Response


def logprobs(choice: Choice, decode: Callable[[Sequence[int]], str]) -> dict[str, object]:
    """What is said of a token beside the text; nothing unless it was asked for.

    Args:
        decode: tokens to text, special ones too.
    """
    if choice.logprob is None:
        return {}
    top = [_said(token, value, decode) for token, value in choice.top]
    return {**_said(choice.token, choice.logprob, decode), "top_logprobs": top}


def _said(token: int, logprob: float, decode: Callable[[Sequence[int]], str]) -> dict[str, object]:
    # after itself: some decoders drop the first space of a text
    text = decode([token, token])[len(decode([token])) :]
    return {"token": token, "token_text": text, "logprob": logprob}


def last(answer: Answer) -> Response:
    """The end of an answer, after whatever of it was kept."""
    job = answer.job
    if answer.error is not None:
        return job.events.close("error", **answer.error.body())
    return job.events.close(
        "done",
        finish_reason=answer.finish,
        seed=job.sampling.seed,
        engine=answer.engine,
        usage={"prompt_tokens": len(job.prompt), "completion_tokens": len(answer.tokens)},
    )
