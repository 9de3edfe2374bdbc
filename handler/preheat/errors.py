"""Every error Preheat raises on purpose, in one tree.

    PreheatError
    ├── ConfigError      the model YAML says something that cannot be done; names the YAML path
    ├── RequestError     a client asked for something that cannot be done; becomes a 4xx answer
    │   └── NoBucket         it is larger than every bucket, under `oversize: reject`
    ├── RunError         a legal request that could not be generated; becomes a 5xx answer
    │   ├── DeadlinePassed   504: it waited longer than its client would
    │   ├── PutOff           503: not begun, the call has no time left for it; Retry-After says when
    │   ├── OutOfMemory      507: not even alone does it fit
    │   ├── AnswerTooLarge   413: TorchServe would end the worker that sends it
    │   ├── Unreachable      503: the gateway's host does not answer
    │   ├── TooManyRequests  429 of the gateway; Retry-After says when
    │   │   ├── QueueFull        of all clients, or of this one
    │   │   └── QuotaSpent       its key has had its share of this minute
    │   └── PipelineFailure  500: the model raised
    ├── LogError         a log of asked sizes cannot be read; names the line
    ├── ArchiveError     a model folder cannot be packaged
    ├── AheadError       a target cannot be compiled ahead of time
    ├── WarmupError      a variant could not be warmed where the config insists on it
    ├── ModelError       a model cannot be served
    ├── HubError         a model of the hub cannot be had, this time
    ├── ServerError      TorchServe does not start, or does not stop
    ├── GatewayError     the gateway cannot start so: its keys, its address
    └── Untrusted        a compiled file that must not be run; whoever reads one compiles instead

Anything else that is raised is a bug, or the machine's doing; signals between two functions of a
wing, such as `NoCode`, are not drawn.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from preheat.buckets import Bucket


class PreheatError(Exception):
    """Root of the tree."""

    lasting = False
    """Whether the next try must fail alike: a wrong YAML, a missing file. `preheat ready` then
    waits no longer.
    """


class ConfigError(PreheatError):
    """A wrong value in the model YAML.

    `path` is where it stands, such as `pt2.shapes.buckets[1][0]`; empty for the document itself.
    """

    lasting = True

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.path = path

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


def in_one_line(error: BaseException) -> str:
    """What a library raised, as part of a message of one line: its first 300 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


class RequestError(PreheatError):
    """A request that is refused; `field` is the request's field at fault, None where no single one
    is.

    `message` says something of the field, as in "is missing": clients read it after the field's
    name.
    """

    def __init__(self, message: str, field: str | None = None, code: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.code = code

    def __str__(self) -> str:
        return f"{self.field} {self.message}" if self.field else self.message

    def body(self) -> dict[str, int | str | None]:
        """The JSON object the client receives, the same over REST and gRPC."""
        return {
            "code": self.code,
            "type": "InvalidRequest",
            "message": str(self),
            "field": self.field,
        }


class NoBucket(RequestError):
    """A size that no bucket covers; `asked` is it, where the request says all of it."""

    def __init__(self, message: str, field: str | None, asked: Bucket | None) -> None:
        super().__init__(message, field)
        self.asked = asked


class RunError(PreheatError):
    """A legal request that got no picture; `code` is the answer's HTTP status."""

    code = 500

    def body(self) -> dict[str, int | str | None]:
        """The JSON object the client receives, in the form of `RequestError.body`."""
        return {"code": self.code, "type": type(self).__name__, "message": str(self), "field": None}


class DeadlinePassed(RunError):
    """The client's deadline was over before the request's turn came; nothing was generated."""

    code = 504


class PutOff(RunError):
    """Its batch has no time left for it, so it was not begun. Sent again after `retry_after`
    seconds it comes first, and if its batch begins soon then there is time for it
    (`compilation.pace.Budget`); None: nobody knows when.
    """

    code = 503
    retry_after: int | None = None

    def __str__(self) -> str:
        again = (
            "send it again later"
            if self.retry_after is None
            else f"send it again after {self.retry_after} s, and it is served before others"
        )
        return (
            "not begun: with the requests before it the answer would take longer than "
            f"responseTimeout; {again}"
        )

    def body(self) -> dict[str, int | str | None]:
        """With `retry_after` where that is known: not every client sees headers."""
        known = {} if self.retry_after is None else {"retry_after": self.retry_after}
        return super().body() | known


class OutOfMemory(RunError):
    """The request does not fit into memory, at the smallest batch size there is."""

    code = 507


class AnswerTooLarge(RunError):
    """The request was served, and TorchServe would end the worker that answers with so much."""

    code = 413


class Unreachable(RunError):
    """The host behind the gateway does not answer, or stopped in the middle."""

    code = 503


class TooManyRequests(RunError):
    """Not now: 429, and after `retry_after` seconds there is room, as far as can be told."""

    code = 429

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = max(1, math.ceil(retry_after))

    def body(self) -> dict[str, int | str | None]:
        return super().body() | {"retry_after": self.retry_after}


class QueueFull(TooManyRequests):
    """Too many requests wait at the gateway, of all clients or of this one."""


class QuotaSpent(TooManyRequests):
    """The client's key has had what it may have in a minute."""


class PipelineFailure(RunError):
    """The pipeline raised on this request's group; the log has the traceback."""


class LogError(PreheatError):
    """Asked sizes that cannot be read."""


class ArchiveError(PreheatError):
    """A model folder that cannot be packaged."""


class AheadError(PreheatError):
    """A target that cannot be compiled ahead of time, or not so that a worker could load it."""


class WarmupError(PreheatError):
    """A variant that could not be warmed although `on_failure: fail` asks for every one."""


class ModelError(PreheatError):
    """A model that cannot be served: no file, no class or family that is known, other weights than
    it has, or weights that are more than tensors.
    """

    lasting = True


class HubError(PreheatError):
    """A hub id whose files cannot be had, this time: TorchServe tries again, and the hub may answer
    then.
    """


class ServerError(PreheatError):
    """A server that cannot be started, or that died."""


class GatewayError(PreheatError):
    """A gateway that cannot start as it is told to, or keys that cannot be read."""

    lasting = True


class Untrusted(PreheatError):
    """A compiled file that must not be run: unsigned, altered, made for something else, or open to
    others.
    """


def is_panic(error: BaseException) -> bool:
    """Whether it is a panic of a library written in Rust (tokenizers, safetensors), which is no
    `Exception` to Python.

    pyo3 derives it from BaseException on purpose; its class can be imported from nowhere.
    """
    return type(error).__module__ == "pyo3_runtime"
