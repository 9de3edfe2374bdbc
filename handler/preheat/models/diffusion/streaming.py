"""A picture's progress as events (`protocol.events`):

{"event": "queued"}                           its batch has begun
{"event": "step", "step": 3, "of": 30}        every so often with {"preview": base64 JPEG,
                                              "index": which picture}
{"event": "image", "index": 0, ...}           one a picture, with what `b64_json` answers say
{"event": "done"}                             with "prompt_dropped" where a prompt was cut; or
{"event": "error", "code", "type", "message", "field"}
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from preheat.models.diffusion.job import Answer

_JPEG_QUALITY = 80


@dataclass(slots=True)
class Steps:
    """How far a job is.

    A step counts for the job when all its pictures are through it, on the average: those of
    `num_images` may take several runs, one after the other, and then the count goes on from one to
    the next. It never goes back: what an out-of-memory split repeats is reported when it comes
    further than before.
    """

    through: Counter[int] = field(default_factory=Counter)
    """Of each picture."""
    reported: int = 0


def emit_step(
    answer: Answer, index: int, step: int, of: int, sketch: Callable[[], Image.Image]
) -> None:
    """Picture number `index` is through denoising step `step` of `of`, counted from 1, and looks
    like `sketch`.
    """
    steps, request, events = answer.steps, answer.job.request, answer.job.events
    if events is None or step <= steps.through[index]:
        return
    steps.through[index] = step
    count = steps.through.total() // request.num_images
    sketched = request.shows(step, of)
    if count > steps.reported or sketched:
        steps.reported = count
        preview = {"index": index, "preview": _jpeg(sketch())} if sketched else {}
        events.emit("step", step=count, of=of, **preview)


def _jpeg(image: Image.Image) -> str:
    file = BytesIO()
    image.save(file, "jpeg", quality=_JPEG_QUALITY)
    return base64.b64encode(file.getvalue()).decode()
