"""A request's progress as events: newline-delimited JSON, a line each, sent as it happens.

{"event": "queued"}                        its batch has begun {"event": "step", "step": 3, "of":
30}     every so often with {"preview": base64 JPEG, "index": which picture} {"event": "image",
"index": 0, ...}        one a picture, with what `b64_json` answers say of it {"event": "done"}
with "prompt_dropped" where a prompt was cut; or {"event": "error", "code", "type", "message",
"field"}
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from io import BytesIO
from typing import Any

from preheat.models.diffusion import responses
from preheat.models.diffusion.runner import Answer, Job, Progress
from preheat.protocol.responses import Response

CONTENT_TYPE = "application/x-ndjson"
_JPEG_QUALITY = 80


class Stream:
    """The events of one job.

    A step counts for the job when all its pictures are through it, on the average: those of
    `num_images` may take several runs, one after the other, and then the count goes on from one to
    the next. It never goes back: what an out-of-memory split paints again is told when it comes
    further than before.

    Args:
        job: the request and its plan.
        send: takes a part of the answer at once; None keeps all lines for its end.
    """

    def __init__(self, job: Job, send: Callable[[Response], None] | None) -> None:
        self._job, self._request, self._send = job, job.request, send
        self._kept: list[bytes] = []
        self._through = [0] * job.request.num_images  # steps, of each picture
        self._told = 0

    @classmethod
    def begun(cls, job: Job, send: Callable[[Response], None] | None) -> Stream:
        """A stream whose first event has been sent."""
        stream = cls(job, send)
        stream._tell(_line("queued"))
        return stream

    def progress(self, progress: Progress) -> None:
        if progress.step <= self._through[progress.index]:
            return
        self._through[progress.index] = progress.step
        step = int(Fraction(sum(self._through), len(self._through)))
        every = self._request.preview_every
        sketched = bool(every) and progress.step % every == 0
        if step > self._told or sketched:
            self._told = step
            preview = {"index": progress.index, "preview": _preview(progress)} if sketched else {}
            self._tell(_line("step", step=step, of=progress.of, **preview))

    def finish(self, answer: Answer, files: Sequence[bytes]) -> Response:
        """The pictures' events are sent, the last event is the response; `files` are the encoded
        pictures.
        """
        if answer.error is not None:
            last = _line("error", **answer.error.body())
        else:
            facts = responses.facts(answer)
            for index, picture in enumerate(responses.pictures(answer, files)):
                self._tell(_line("image", index=index, **picture, **facts))
            last = _line("done", **responses.dropped(self._job))
        return self._part(b"".join([*self._kept, last]))

    def _tell(self, line: bytes) -> None:
        if self._send is None:
            self._kept.append(line)
        else:
            self._send(self._part(line))

    def _part(self, body: bytes) -> Response:
        """With what can be said before anything is painted: TorchServe sends the headers of the
        first part.
        """
        headers = responses.plan_headers(self._job)
        return Response(200, body, {"content-type": CONTENT_TYPE, **headers})


def _line(event: str, **more: Any) -> bytes:
    document: Mapping[str, Any] = {"event": event, **more}
    return json.dumps(document).encode() + b"\n"


def _preview(progress: Progress) -> str:
    file = BytesIO()
    progress.sketch().save(file, "jpeg", quality=_JPEG_QUALITY)
    return base64.b64encode(file.getvalue()).decode()
