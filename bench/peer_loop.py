"""What a peer's loop is told, and how it answers: a line of JSON for each line, so that it can take
its turn among the others. Standard library alone, since peers live in environments of their own.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Request = Mapping[str, Any]
"""prompt, height, width (pixels), seed, num_inference_steps, guidance_scale."""
Paint = Callable[[Request], bytes]
"""The picture of a request as a PNG."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What a loop paints with.

    Args:
        kind: of the bench's peers.
        model: the folder: diffusers' own, or what was converted from it.
        dtype: float32 or bfloat16.
        sizes: (height, width) in pixels that will be asked for.
        guidance_scale: of every request.
        num_threads: that it may compute with.
    """

    kind: str
    model: str
    dtype: str
    sizes: Sequence[tuple[int, int]]
    guidance_scale: float
    num_threads: int
    on_gpu: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def serve(load: Callable[[Spec], Paint], versions: Callable[[], Mapping[str, str]]) -> None:
    """Load what the first line says, then paint each line's request, until there are no more. A
    failure is an answer with `error`, and the end.

    Times are those of the call and the PNG, in milliseconds: nobody asks over a network here.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print is no answer
    try:
        paint = load(Spec(**json.loads(sys.stdin.readline())))
        print(json.dumps({"versions": dict(versions())}), file=answers)
        for line in sys.stdin:
            request, begun = json.loads(line), time.perf_counter()
            picture = paint(request)
            milliseconds = 1000 * (time.perf_counter() - begun)
            answer = {
                "milliseconds": milliseconds,
                "picture": base64.b64encode(picture).decode(),
            }
            print(json.dumps(answer), file=answers)
    except Exception as error:  # a row of the result, whatever a peer dies of
        said = str(error).strip().splitlines() or [""]
        print(json.dumps({"error": f"{type(error).__name__}: {said[0]}"[:300]}), file=answers)
        raise
