"""Requests that are served a step at a time, for hosts that bring all open ones again and again:
who is new joins, who is missing has left, and everyone gets what there is for him.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Generic, TypeAlias

from preheat.models.base import StepRunner
from preheat.models.batching import BaseJob, JobT, Outcome, ResultT
from preheat.protocol import events
from preheat.protocol.call import Call
from preheat.protocol.responses import Response

if TYPE_CHECKING:
    from preheat.worker.worker import Worker

NOTHING_NEW = Response(200, b"", {"content-type": events.CONTENT_TYPE})


@dataclass(frozen=True, slots=True)
class Part:
    """What one request is answered at a turn; without a response nothing, since its client can take
    one message only and it is not through.
    """

    response: Response | None
    last: bool = False
    refusal: bool = False
    """An answer with an error's status, by itself; what follows only says that it was the last."""
    served_in: str | None = None
    """The bucket of a good answer, at its end."""


@dataclass(slots=True)
class _Open(Generic[ResultT]):
    """A request whose end was not said yet."""

    result: ResultT | None
    """None: it is refused."""
    live: bool
    parts: list[Response] = field(default_factory=list)
    """Since the last turn."""
    told: bool = False
    end: Part | None = None
    """What is left to say: everything else was."""


class Turns(Generic[JobT, ResultT]):
    """The open requests of a worker whose runner serves step by step.

    An answer in parts has two at least: TorchServe's REST side never ends one whose first part is
    its last (RestJob.responseInference), and it closes the connection after the head of one whose
    status is an error, so that such an answer can be no part.
    """

    def __init__(self, worker: Worker[JobT, ResultT], runner: StepRunner[JobT, ResultT]) -> None:
        self._worker, self._runner = worker, runner
        self._open: dict[str, _Open[ResultT]] = {}

    def take(self, calls: Mapping[str, Callable[[], Call | Response]]) -> dict[str, Part]:
        """One turn. `calls` has every request that is open, by a name of the host's, and reads
        those that are new.
        """
        for name in self._open.keys() - calls.keys():
            gone = self._open.pop(name)
            if gone.result is not None:
                self._runner.leave(gone.result)
        for name, read in calls.items():
            if name not in self._open:
                self._open[name] = self._begun(read())
        if any(each.result is not None and not each.result.done for each in self._open.values()):
            self._runner.step()
        parts = {name: self._part(self._open[name]) for name in calls}
        for name, part in parts.items():
            if part.last:
                del self._open[name]
        return parts

    def _begun(self, call: Call | Response) -> _Open[ResultT]:
        if isinstance(call, Response):
            return _Open(None, live=False, parts=[call])
        parts: list[Response] = []
        live = call.send is not None
        pending = self._worker.pending(replace(call, send=parts.append if live else None))
        if pending.job is None:
            assert pending.response is not None
            return _Open(None, live, [pending.response])
        result = self._runner.result(pending.job)
        self._runner.join(result)
        return _Open(result, live, parts)

    def _part(self, own: _Open[ResultT]) -> Part:
        if own.end is not None:
            return own.end
        end = self._end(own)
        if end is None and not own.live:
            return Part(None)
        whole = _joined(own.parts) if own.parts else NOTHING_NEW
        own.parts.clear()
        if end is not None and (own.told or not own.live):
            return replace(end, response=whole)
        own.told, own.end = True, end
        return Part(whole, refusal=whole.code >= 400)

    def _end(self, own: _Open[ResultT]) -> Part | None:
        """What its end says, after its last part; None: it is not through."""
        result = own.result
        if result is None:
            return Part(NOTHING_NEW, last=True)
        if not result.done:
            return None
        own.parts += self._runner.postprocess([result])
        self._worker.served([result])
        served_in = result.bucket if result.error is None else None
        return Part(NOTHING_NEW, last=True, served_in=served_in)


def _joined(parts: list[Response]) -> Response:
    return replace(parts[0], body=b"".join(part.body for part in parts))


AnyTurns: TypeAlias = Turns[BaseJob, Outcome]
