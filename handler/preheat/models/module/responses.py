"""Answers of the module family as rows: tensors in the form that the request wished."""

from __future__ import annotations

from collections.abc import Sequence

from preheat.errors import RequestError
from preheat.models.module import tensors
from preheat.models.module.job import Answer
from preheat.models.module.request import ACCEPT, Accept
from preheat.protocol.responses import Response, from_error, preheat_headers, texts

MANY_TENSORS: Sequence[Accept] = ("application/json", "application/safetensors")
"""The forms that hold any number of outputs."""
ACCEPTS: Sequence[Accept] = (*MANY_TENSORS, "application/x-npy")


def from_answer(answer: Answer, most_bytes: int) -> Response:
    """JSON, one .npy, or safetensors, as the request wished, of at most so many bytes
    (`module.limits.max_response_bytes`). What cannot be sent so is the answer's error.
    """
    if answer.error is None:
        answer.error = _unsendable(answer, most_bytes)
    if answer.error is not None:
        return from_error(answer.error)
    facts = {
        "bucket": answer.bucket,
        "engine": answer.engine,
        "padding": round(answer.padding, 4),
        "exact": answer.exact,
    }
    headers = {"content-type": answer.job.accept, **preheat_headers(facts)}
    if answer.job.accept == "application/safetensors":
        return Response(200, tensors.to_safetensors(answer.outputs, texts(facts)), headers)
    if answer.job.accept == "application/x-npy":
        (tensor,) = answer.outputs.values()
        return Response(200, tensors.to_npy(tensor), headers)
    lists = {name: tensors.to_lists(tensor) for name, tensor in answer.outputs.items()}
    return Response(200, tensors.dumps({"outputs": lists, **facts}), headers)


def _unsendable(answer: Answer, most: int) -> RequestError | None:
    """Why this answer is not encoded, or None: an .npy file holds one tensor, and TorchServe ends a
    worker that answers more than max_response_size.
    """
    outputs = answer.outputs.values()
    as_file = sum(tensor.nbytes for tensor in outputs)
    as_json = answer.job.accept == "application/json"
    size = sum(map(tensors.json_bytes, outputs)) if as_json and 26 * as_file > most else as_file
    if size <= most:
        as_npy = answer.job.accept == "application/x-npy"
        return too_many_for_npy(list(answer.outputs)) if as_npy and len(outputs) != 1 else None
    what = (
        f"the answer has about {size} bytes, at most {most} are allowed "
        "(module.limits.max_response_bytes)"
    )
    if as_json and as_file <= most:
        return RequestError(
            f"{what}; ask for application/safetensors, {as_file} bytes", ACCEPT, code=406
        )
    return RequestError(what, "body", code=413)


def too_many_for_npy(names: Sequence[str]) -> RequestError:
    return RequestError(
        f"asks for an .npy file, which holds one tensor, and this model answers {', '.join(names)}",
        "accept",
        code=406,
    )
