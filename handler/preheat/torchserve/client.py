"""Ask a TorchServe for pictures over REST and gRPC: what the demo, the tests and the benches talk
through.

The gRPC messages are built from the few lines of TorchServe's `inference.proto` that a prediction
needs, so that no compiler and no generated code is carried along.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from typing_extensions import Self

from preheat.torchserve.server import TorchServe

PACKAGE = "org.pytorch.serve.grpc.inference"
SERVICE = f"/{PACKAGE}.InferenceAPIsService"
MAX_MESSAGE = 2**31 - 1
"""Bytes. gRPC's own default of 4 MiB is less than a large PNG."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. `status` is the HTTP status over REST and the gRPC status code (0 is OK) over
    gRPC.

    TorchServe cannot send a refusal as a gRPC status: there the body alone says so, see `error`.
    """

    status: int
    body: bytes
    milliseconds: float
    headers: Mapping[str, str] = field(default_factory=dict)
    """Names are lower case; empty over gRPC."""

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any] | None:
        """The error object in the body, over either protocol; None where the body is none."""
        try:
            document = json.loads(self.body)
        except ValueError:
            return None
        return (
            document
            if isinstance(document, dict) and "code" in document and "message" in document
            else None
        )


class Client:
    """Predictions from one model of one server; a context manager. `timeout` is seconds per
    request.
    """

    def __init__(
        self,
        model: str,
        *,
        inference: str = "http://127.0.0.1:8080",
        management: str = "http://127.0.0.1:8081",
        grpc_target: str = "127.0.0.1:7070",
        token: str | None = None,
        timeout: float = 300,
    ) -> None:
        self.model, self._inference, self._management, self._timeout = (
            model,
            inference,
            management,
            timeout,
        )
        authorization = {"Authorization": f"Bearer {token}"} if token else {}
        # trust_env=False: a proxy in the environment knows nothing of this loopback.
        self._http = httpx.Client(timeout=timeout, headers=authorization, trust_env=False)
        self._metadata = (
            [("protocol", "gRPC"), ("authorization", f"Bearer {token}")] if token else None
        )
        sizes = [
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            ("grpc.max_send_message_length", MAX_MESSAGE),
        ]
        self._channel = grpc.insecure_channel(
            grpc_target, options=[*sizes, ("grpc.enable_http_proxy", 0)]
        )

    @classmethod
    def to(cls, server: TorchServe, model: str | None = None, **options: Any) -> Client:
        """A client of a server that `preheat.torchserve.server` started; `model` may be left out
        where it has only one.
        """
        (only,) = (model,) if model else server.models
        places = {
            "inference": server.inference,
            "management": server.management,
            "grpc_target": server.grpc,
        }
        return cls(only, **{**places, **options})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()
        self._channel.close()

    def predict(self, payload: Mapping[str, object]) -> Reply:
        """POST the request as JSON.

        Raises:
            httpx.HTTPError: no answer came.
        """
        return self.post(json=payload)

    def post(self, **arguments: Any) -> Reply:
        """POST to the model with httpx's arguments (`content`, `data`, `files`, `headers`), for odd
        requests too.
        """
        begun = time.perf_counter()
        response = self._http.post(f"{self._inference}/predictions/{self.model}", **arguments)
        elapsed = 1000 * (time.perf_counter() - begun)
        return Reply(response.status_code, response.content, elapsed, dict(response.headers))

    def stream(self, payload: Mapping[str, object]) -> Generator[str]:
        """POST the request as JSON and give the answer's lines as they come: events, or one line of
        a refusal.

        Raises:
            httpx.HTTPError: no answer came, or not all of it.
        """
        with self._http.stream(
            "POST", f"{self._inference}/predictions/{self.model}", json=payload
        ) as response:
            yield from response.iter_lines()

    def predict_grpc(self, payload: Mapping[str, object]) -> Reply:
        """The same JSON over gRPC, in the input map under `data`."""
        return self.call_grpc({"data": json.dumps(payload).encode()})

    def call_grpc(self, fields: Mapping[str, bytes]) -> Reply:
        """A unary prediction with the input map `fields` as it is."""
        request, response = messages()
        call = self._channel.unary_unary(
            f"{SERVICE}/Predictions",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        begun = time.perf_counter()
        try:
            answer = call(
                request(model_name=self.model, input=fields),
                timeout=self._timeout,
                metadata=self._metadata,
            )
        except grpc.RpcError as error:
            return Reply(
                error.code().value[0],
                str(error.details()).encode(),
                1000 * (time.perf_counter() - begun),
            )
        return Reply(0, answer.prediction, 1000 * (time.perf_counter() - begun))

    def stream_grpc(self, payload: Mapping[str, object]) -> Generator[bytes]:
        """The parts that StreamPredictions answers; closing the generator cancels the call.

        Raises:
            grpc.RpcError: the stream ended with an error.
        """
        request, response = messages()
        call = self._channel.unary_stream(
            f"{SERVICE}/StreamPredictions",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        message = request(model_name=self.model, input={"data": json.dumps(payload).encode()})
        parts = call(message, timeout=self._timeout, metadata=self._metadata)
        try:
            for part in parts:
                yield part.prediction
        finally:
            parts.cancel()

    def describe(self) -> dict[str, Any]:
        """The model as the management API describes it, with one worker's state under
        `customizedMetadata`.

        Raises:
            httpx.HTTPError: no answer came, or a refusal.
        """
        response = self._http.get(
            f"{self._management}/models/{self.model}", params={"customized": "true"}
        )
        response.raise_for_status()
        described: dict[str, Any] = response.json()[0]
        return described

    def state(self) -> dict[str, Any]:
        """One worker's state: the `preheat` object of the design. Queues behind the predictions
        under way.
        """
        metadata = self.describe()["customizedMetadata"]
        state: dict[str, Any] = (json.loads(metadata) if isinstance(metadata, str) else metadata)[
            "preheat"
        ]
        return state

    def worker_pids(self) -> list[int]:
        """Of the model's workers, in the order of their ids."""
        response = self._http.get(f"{self._management}/models/{self.model}")
        response.raise_for_status()
        return [
            worker["pid"]
            for worker in sorted(response.json()[0]["workers"], key=lambda w: str(w["id"]))
        ]


@functools.cache
def messages() -> tuple[Any, Any]:
    """The classes PredictionsRequest and PredictionResponse, by their field numbers in TorchServe's
    inference.proto.
    """
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="preheat/inference.proto", package=PACKAGE, syntax="proto3"
    )

    def add(
        message: Any,
        name: str,
        number: int,
        kind: int,
        repeated: bool = False,
        of: str | None = None,
    ) -> None:
        label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
        message.field.add(name=name, number=number, type=kind, label=label, type_name=of)

    request = file.message_type.add(name="PredictionsRequest")
    entry = request.nested_type.add(name="InputEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, kinds.TYPE_STRING)
    add(entry, "value", 2, kinds.TYPE_BYTES)
    add(request, "model_name", 1, kinds.TYPE_STRING)
    add(request, "model_version", 2, kinds.TYPE_STRING)
    add(request, "input", 3, kinds.TYPE_MESSAGE, True, f".{PACKAGE}.PredictionsRequest.InputEntry")
    response = file.message_type.add(name="PredictionResponse")
    add(response, "prediction", 1, kinds.TYPE_BYTES)

    # of its own: the default one may hold TorchServe's generated file
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = ("PredictionsRequest", "PredictionResponse")
    found = [
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
        for name in names
    ]
    return found[0], found[1]
