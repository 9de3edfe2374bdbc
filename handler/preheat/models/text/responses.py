"""Answers of the text family as events (`protocol.events`):

{"event": "queued"}
{"event": "text", "text": "..."}     with "token", "logprob" and "top_logprobs" where asked for
{"event": "done", "finish_reason": "stop" | "length", "seed", "engine", "usage"}; or
{"event": "error", "code", "type", "message", "field"}
"""

from __future__ import annotations

from preheat.models.text.job import Answer
from preheat.models.text.sampler import Choice
from preheat.protocol.responses import Response


def logprobs(choice: Choice) -> dict[str, object]:
    """What is said of a token beside its text; nothing unless it was asked for."""
    if choice.logprob is None:
        return {}
    top = [{"token": token, "logprob": value} for token, value in choice.top]
    return {"token": choice.token, "logprob": choice.logprob, "top_logprobs": top}


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
