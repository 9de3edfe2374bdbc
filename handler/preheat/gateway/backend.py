"""What the gateway asks of the host behind it; whoever can answer this can stand there.

Who has something to say about what goes in (a queue, keys) wraps a backend in another one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from preheat.status import Status
from preheat.torchserve.overview import ModelView


@dataclass(frozen=True, slots=True)
class Call:
    """A request for a model, in the form of docs/requests.md."""

    model: str
    version: str | None
    """None: the model's default one."""
    body: bytes = field(repr=False)
    headers: Mapping[str, str]
    """Names in lower case; those alone that a worker reads."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker, or its host, said."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case; those alone that are for the client."""
    parts: AsyncIterator[bytes]
    """The body as it comes; of a stream of events each part ends anywhere."""

    async def read(self) -> bytes:
        return b"".join([part async for part in self.parts])


@dataclass(frozen=True, slots=True)
class Health:
    """`missing` has a line for everything that is not there yet."""

    missing: tuple[str, ...]
    workers: tuple[Status, ...]
    """What the living workers last wrote of themselves."""

    @property
    def ready(self) -> bool:
        """Whether every worker is warm."""
        return not self.missing


class Backend(Protocol):
    """A host of models. Where it does not answer `health` says so, and the others raise
    `Unreachable`.
    """

    def predict(self, call: Call) -> AbstractAsyncContextManager[Answer]:
        """The answer from its first part on. Leaving the context before its end takes the request
        back, as far as the host can.

        Raises:
            RequestError: it is refused before a worker sees it.
            RunError: it cannot be answered.
        """

    async def models(self) -> list[str]:
        """The names of the models there are."""

    async def overview(self) -> list[ModelView]:
        """Each model with its workers, queue and buckets."""

    async def health(self) -> Health:
        """Waits for no worker, and asks the host at most twice a second, however many probes
        come.
        """

    async def metrics(self) -> bytes:
        """In Prometheus' text form."""

    async def close(self) -> None: ...
