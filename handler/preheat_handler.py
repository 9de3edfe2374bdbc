"""The archive's entry point. TorchServe imports this file by its bare name and wants exactly one
class defined in it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ts.handler_utils.utils import send_intermediate_predict_response
from ts.metrics.dimension import Dimension
from ts.metrics.metric_type_enum import MetricTypes

from preheat.config.model import ModelConfig
from preheat.device import (
    cuda_unasked,
    keep_freed_memory,
    num_gpus,
    pick_device,
    see_one_gpu,
    share_cpu,
    use_tensor_cores,
)
from preheat.errors import PreheatError
from preheat.protocol.call import Call
from preheat.protocol.responses import Response, json_response
from preheat.status import StatusFile
from preheat.user_code import left_out
from preheat.worker.metrics import Arrival, Metrics
from preheat.worker.turns import AnyTurns
from preheat.worker.worker import AnyPending, AnyWorker

# BaseHandler imports OpenVINO's backend of torch.compile wherever it is installed: two seconds of
# every start, and not what the engine `openvino` here runs on.
with left_out("openvino.torch"), cuda_unasked():
    from ts.torch_handler.base_handler import BaseHandler

logger = logging.getLogger(__name__)


class PreheatHandler(BaseHandler):  # type: ignore[misc]  # ts has no types
    """Adapts TorchServe's contexts and rows to `preheat.worker.worker.Worker`.

    `BaseHandler.handle` runs `preprocess`, `inference` and `postprocess`, and keeps its timing
    metric and profiler.
    """

    def __init__(self) -> None:
        super().__init__()
        self._since: dict[str, Arrival] = {}

    def initialize(self, context: Any) -> None:
        """Load, compile, warm and verify; TorchServe shows READY when this returns.

        Raises:
            SystemExit: the model cannot be served as its YAML says, and the log has the reason;
                TorchServe tries again.
        """
        self.context, self.manifest = context, context.manifest
        gpus = num_gpus()
        properties = {
            **context.system_properties,
            "gpu_id": see_one_gpu(context.system_properties.get("gpu_id")),
        }
        self.metrics = Metrics(self._emit)
        self.metrics.start()
        status = StatusFile.from_environment(context.model_name or "model")
        status.write("loading")
        try:
            config = self._config()
            self.device = pick_device(properties.get("gpu_id"), config.deviceType)
            use_tensor_cores(self.device)
            share_cpu(config.minWorkers, gpus if self.device.type == "cuda" else 0)
            if self.device.type == "cpu":
                keep_freed_memory()
            self.worker = AnyWorker(
                config,
                Path(properties["model_dir"]),
                self.device,
                status=status,
                metrics=self.metrics,
                manifest=self.manifest,
            )
        except PreheatError as error:
            status.fail(str(error), lasting=error.lasting)
            logger.error("cannot serve %s: %s", context.model_name, error)
            # The message says it all; raised as it is, TorchServe would print 35 lines of its own
            # loader around it.
            raise SystemExit(1) from None
        except Exception as error:
            status.fail(f"{type(error).__name__}: {error}", lasting=False)
            raise
        self.initialized = True

    def handle(self, data: Sequence[Mapping[str, object]], context: Any) -> list[bytes]:
        """Answer a batch; with `continuousBatching`, a part of every request that is open."""
        if self.worker.turns is None:
            answered: list[bytes] = super().handle(data, context)
            return answered
        self.context = context
        return self._turn(self.worker.turns, data)

    def _turn(self, turns: AnyTurns, data: Sequence[Mapping[str, object]]) -> list[bytes]:
        """TorchServe brings every open request at every turn, its row and headers at the first one
        only; who is missing has left.
        """
        ids: dict[int, str] = self.context.request_ids
        self._since = {
            name: self._since.get(name) or self.metrics.took(self._headers(index))
            for index, name in ids.items()
        }
        parts = turns.take(
            {ids[index]: partial(self._call, index, row) for index, row in enumerate(data)}
        )
        bodies, ends = [], {}
        for index, name in list(ids.items()):
            part, response = parts[name], parts[name].response
            if response is None:
                # whom the message does not name TorchServe sends nothing, and brings again
                del ids[index]
            else:
                self._head(index, response)
                ends[index] = partial(_told, None if part.refusal else part.last)
            if part.last:
                self.metrics.left([self._since[name]], [part.served_in])
            bodies.append(response.body if response is not None else b"")
        self.context.stopping_criteria = ends
        return bodies

    def preprocess(self, data: Sequence[Mapping[str, object]]) -> Sequence[AnyPending]:
        """Every row as a job, or with the reason why not."""
        self._arrivals = [self.metrics.took(self._headers(index)) for index in range(len(data))]
        return self.worker.preprocess(self._call(index, row) for index, row in enumerate(data))

    def inference(
        self, data: Sequence[AnyPending], *args: Any, **kwargs: Any
    ) -> Sequence[AnyPending]:
        """Serve the jobs."""
        return self.worker.inference(data)

    def postprocess(self, data: Sequence[AnyPending]) -> list[bytes]:
        """Set each row's status and headers; the bodies are the output."""
        answered = self.worker.postprocess(data)
        for index, response in enumerate(answered):
            self._head(index, response)
            # Without this header TorchServe 0.12 takes an answer over gRPC for a part of a stream,
            # and the worker dies.
            if self.is_grpc(index):
                self.context.set_response_header(index, "ts_stream_next", "false")
        self.metrics.left(self._arrivals, [each.served_in for each in data])
        return [response.body for response in answered]

    def describe_handle(self) -> dict[str, Any]:
        """What `GET /models/{name}?customized=true` shows under `customizedMetadata`."""
        return {"preheat": self.worker.description()}

    def _config(self) -> ModelConfig:
        """The YAML as it was written where it is one of ours: of a key that stands twice TorchServe
        has lost the first.
        """
        read = self.context.model_yaml_config or {}
        name = (self.manifest or {}).get("model", {}).get("configFile")
        if name is None or not isinstance(read, Mapping) or not ModelConfig.names_a_family(read):
            return ModelConfig.parse(read)
        return ModelConfig.load(Path(self.context.system_properties["model_dir"], name))

    def _call(self, index: int, row: Mapping[str, object]) -> Call | Response:
        headers = self._headers(index)
        # The management port asks with an empty row. A client of the inference port can send the
        # header too, but its row holds at least a `body`, unless it is a form, and then it has a
        # content type.
        if (
            not row
            and headers.get("describe") == "True"
            and not {"url_path", "content-type"} & headers.keys()
        ):
            return json_response(200, self.describe_handle())
        return Call(row, headers, self._sender(index))

    def _headers(self, index: int) -> dict[str, str]:
        """By lower-case name: clients spell them as they like, and TorchServe's lookup is
        case-sensitive. The dicts that it keeps among them, one for each part of a body, are no
        headers.
        """
        sent = self.context.get_all_request_header(index)
        return {name.lower(): value for name, value in sent.items() if isinstance(value, str)}

    def is_grpc(self, index: int) -> bool:
        """Whether neither HTTP/1.1's own header is there nor the one that /predictions adds; gRPC
        has no way to send them. An HTTP client who is taken for gRPC would wait for ever.
        """
        return not {"url_path", "host"} & self._headers(index).keys()

    def _sender(self, index: int) -> Callable[[Response], None] | None:
        """What sends a part of one row's answer at once; None over gRPC, but where the YAML says
        that every client can stand it.
        """
        live = not self.is_grpc(index) or self.worker.config.family.streams_over_grpc
        return partial(self._send, index) if live else None

    def _send(self, index: int, part: Response) -> None:
        """TorchServe makes it a chunk (REST) or a message (gRPC) of that client's own."""
        self._head(index, part)
        ids = {index: self.context.request_ids[index]}
        send_intermediate_predict_response(
            {index: part.body}, ids, "Intermediate Prediction success", 200, self.context
        )

    def _head(self, index: int, response: Response) -> None:
        self.context.set_response_status(code=response.code, phrase=response.phrase, idx=index)
        for name, value in response.headers.items():
            self.context.set_response_header(index, name, value)

    def _emit(
        self, kind: str, name: str, value: float, unit: str, dimensions: Mapping[str, str]
    ) -> None:
        pairs = [Dimension(key, text) for key, text in dimensions.items()]
        self.context.metrics.add_metric(
            name, value, unit, dimensions=pairs, metric_type=MetricTypes(kind)
        )

    def _is_describe(self) -> bool:
        """Never for the whole batch: BaseHandler would answer everybody with the state because one
        client sent the header.
        """
        return False

    def _is_explain(self) -> bool:
        """Never: an `explain` header would send the whole batch down a road no pipeline has."""
        return False


def _told(last: bool | None, _body: bytes) -> bool | None:
    """What TorchServe asks of each answer of a turn (`Context.stopping_criteria`); None: it is no
    part of a stream.
    """
    return last
