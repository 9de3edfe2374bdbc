"""Where a request's time goes inside the handler, stage by stage: what is not the model should be
small, and known.

    python -m bench.stages < spec.json > result.json

The handler runs as TorchServe's worker runs it, with real rows, real metrics and the YAML of the
spec, but nobody at the other end. A stage's time is its own: what it calls that is a stage too is
taken off.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

from preheat.compilation.router import Router
from preheat.models.batching import BatchRunner
from preheat.models.diffusion import image_processor, responses
from preheat.models.diffusion.pipeline import DiffusionPipeline
from preheat.models.diffusion.preprocess import Planner
from preheat.protocol import images
from preheat.torchserve import server
from preheat_handler import PreheatHandler

STAGES: Mapping[str, Sequence[tuple[Any, str]]] = {
    "parse": [(PreheatHandler, "preprocess")],
    "decode": [(images, "decode"), (images, "decode_mask")],
    "lay": [(image_processor, "fit_to"), (image_processor, "place")],
    "plan": [(Planner, "plan")],
    "group": [(BatchRunner, "run")],
    "denoiser": [(Router, "__call__")],
    "model": [(DiffusionPipeline, "generate")],
    "crop": [(image_processor, "finish")],
    "encode": [(responses, "encoded")],
    "respond": [(PreheatHandler, "postprocess")],
    "rest": [(PreheatHandler, "handle")],
}
"""By name, the functions whose own time it is: parsing with the request's limits, decoding its
images, laying them in the bucket, choosing the bucket, grouping and filling up rows, the denoiser's
calls, the rest of the pipeline's, cutting the pictures out, encoding them, headers and bodies, and
what is left of BaseHandler's."""


class Stopwatch:
    """Seconds by stage. `watch` replaces functions by timed ones, for good: it is for a process
    that does nothing else.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inner: list[float] = []  # seconds that stages inside took, of each stage under way

    def watch(self, owner: Any, name: str, stage: str) -> None:
        setattr(owner, name, self._timed(getattr(owner, name), stage))

    def _timed(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - begun
                self.seconds[stage] += took - self._inner.pop()  # type: ignore[assignment]  # a Counter of seconds
                if self._inner:
                    self._inner[-1] += took

        return timed


class Context(SimpleNamespace):
    """What the handler asks of TorchServe's context: `headers` are those of each row, answers are
    dropped.
    """

    def get_all_request_header(self, index: int) -> Mapping[str, Any]:
        headers: Mapping[str, Any] = self.headers[index]
        return headers

    def get_request_header(self, index: int, name: str) -> Any:
        return self.headers[index].get(name)

    def set_response_status(self, **_: Any) -> None: ...

    def set_response_header(self, *_: Any) -> None: ...


def profiled(spec: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Milliseconds per request by stage, for each kind of request in the spec.

    `spec` holds `yaml` (the model's), `model_dir`, `batch` (requests at once), `batches` (how many
    are measured) and `kinds` (JSON bodies by kind, repeated as needed).
    """
    metrics = MetricsCacheYamlImpl(config_file_path=str(server.METRICS))
    metrics.initialize_cache()
    context = Context(
        manifest={},
        model_name="profiled",
        model_yaml_config=spec["yaml"],
        system_properties={"model_dir": spec["model_dir"], "gpu_id": None},
        metrics=metrics,
        headers=[{"url_path": "", "Content-Type": "application/json"}] * spec["batch"],
    )
    stopwatch = Stopwatch()
    for stage, functions in STAGES.items():
        for owner, name in functions:
            stopwatch.watch(owner, name, stage)
    handler = PreheatHandler()
    handler.initialize(context)
    found = {}
    for kind, bodies in spec["kinds"].items():
        batches = [
            [{"body": bodies[(start + index) % len(bodies)]} for index in range(spec["batch"])]
            for start in range(0, spec["batches"] * spec["batch"], spec["batch"])
        ]
        handler.handle(batches[0], context)
        stopwatch.seconds.clear()
        for batch in batches:
            handler.handle(batch, context)
        num_requests = spec["batches"] * spec["batch"]
        found[kind] = {
            stage: round(1000 * stopwatch.seconds[stage] / num_requests, 3) for stage in STAGES
        }
    return found


def main() -> None:
    result = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # metrics go through the worker's standard output
    json.dump(profiled(json.load(sys.stdin)), result)
    result.close()


if __name__ == "__main__":
    main()
