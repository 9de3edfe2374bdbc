"""TorchServe's entry point: what it makes of the YAML, of the device it was given, and of bodies
that TorchServe decodes or not.
"""

from __future__ import annotations

import json
import socket
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from ts.context import Context, RequestProcessor
from ts.protocol.otf_message_handler import _retrieve_input_data, create_predict_response

from preheat.config.diffusion import DefaultsConfig, LimitsConfig
from preheat.errors import PutOff
from preheat.models.batching import BaseJob, Outcome
from preheat.models.diffusion.request import parse_row
from preheat.protocol.responses import Response
from preheat.worker.metrics import Metrics
from preheat.worker.turns import Part
from preheat.worker.worker import AnyPending
from preheat_handler import PreheatHandler


def load(folder: Path, text: str, gpu: int | None = None) -> None:
    """As ts/service.py does: TorchServe reads the YAML, and says where it lies."""
    (folder / "model.yaml").write_text(text)
    manifest = {"model": {"configFile": "model.yaml"}}
    read = yaml.safe_load(text)
    context = Context("m", str(folder), manifest, 1, gpu, "0.12.0", model_yaml_config=read)
    context.metrics = mock.Mock()
    PreheatHandler().initialize(context)


def refusal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, gpu: int | None = None
) -> str:
    """What the status says of a load that ends the worker without a traceback."""
    monkeypatch.setenv("PREHEAT_STATUS_DIR", str(folder / "status"))
    with pytest.raises(SystemExit) as caught:
        load(folder, text, gpu)
    assert caught.value.code == 1
    (status,) = (json.loads(file.read_text()) for file in (folder / "status").glob("*.json"))
    assert status["state"] == "failed"
    return str(status["message"])


REFUSED = [
    ("pipeline: {}\npt2: {shapes: {}}\npt2: {}", None, "pt2: stands twice, in lines 2 and 3"),
    (
        "module: {}\npt2: {compile: {enable: true, backend: openvno}}",
        None,
        "did you mean openvino?",
    ),
    ("module: {}\ndeviceType: gpu", None, "deviceType: gpu, and TorchServe gave this worker none"),
    ("pt2: {compile: {}}", None, "pt2.compile.enable: is missing"),
    ("3", None, "a model YAML is a mapping of keys to values, got 3"),
    pytest.param(
        "pipeline: {}",
        0,
        "deviceType: TorchServe gave this worker GPU 0, which torch",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU here"),
    ),
]


@pytest.mark.parametrize(("text", "gpu", "message"), REFUSED)
def test_a_load_that_is_refused_says_why_to_whoever_waits(
    text: str, gpu: int | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert message in refusal(tmp_path, monkeypatch, text, gpu)


def test_torchserves_own_yaml_keeps_its_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of keys that stand twice the last one counts there; this one is then refused for what it
    says.
    """
    said = refusal(tmp_path, monkeypatch, "batchSize: 1\nbatchSize: 0")
    assert "batchSize: must be greater than 0, got 0" in said


def received(content_type: str, value: bytes) -> dict[str, object]:
    """The row that TorchServe's worker makes of a body, by TorchServe's own code."""
    name, kind = b"body", content_type.encode()
    frame = b"".join(struct.pack(">i", len(part)) + part for part in (name, kind, value))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(frame)
        parameter = _retrieve_input_data(ours)
    return {parameter["name"]: parameter["value"]}


BODIES = [
    ("application/json", b'{"prompt": "a K\xc3\xa4se", "seed": 1}', "a Käse"),
    ("application/json; charset=utf-8", b'{"prompt": "a cat", "seed": 1}', "a cat"),
    ("text/plain", "a Käse".encode(), "a Käse"),
    ("text/plain; charset=utf-8", b'{"prompt": "a cat"}', '{"prompt": "a cat"}'),
]


@pytest.mark.parametrize("decode", [None, "true", "false"])
@pytest.mark.parametrize(("content_type", "body", "prompt"), BODIES)
def test_a_body_means_the_same_whoever_decodes_it(
    content_type: str, body: bytes, prompt: str, decode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TS_DECODE_INPUT_REQUEST", raising=False)
    if decode is not None:
        monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", decode)
    row = received(content_type, body)
    assert isinstance(row["body"], bytearray) == (decode == "false" or "json;" in content_type)
    request = parse_row(
        row, content_type=content_type, limits=LimitsConfig(), defaults=DefaultsConfig()
    )
    assert request.prompt == prompt


REST: list[dict[str, object]] = [
    {"Host": "a", "url_path": ""},  # /predictions
    {"host": "a", "Content-Type": "text/plain"},  # /invocations
    {"url_path": ""},  # HTTP/1.0 asks for no Host
]
GRPC: list[dict[str, object]] = [
    {},
    {"url_path": {"content-type": ""}, "host": {"content-type": ""}},  # names of inputs
    {"ts_request_sequence_id": "1"},  # TorchServe's own, of a stream of requests
]


@pytest.mark.parametrize(
    ("headers", "grpc"), [(each, False) for each in REST] + [(each, True) for each in GRPC]
)
def test_a_request_is_known_for_rest_or_grpc_by_what_its_client_could_not_send_otherwise(
    headers: dict[str, object], grpc: bool
) -> None:
    handler = PreheatHandler()
    handler.context = Context("m", ".", {}, 1, None, "0.12.0")
    handler.context.request_processor = [RequestProcessor(headers)]
    assert handler.is_grpc(0) == grpc


def test_only_good_answers_have_a_latency_whatever_a_streams_last_part_says() -> None:
    """The end of a stream is a 200 with its bucket, however it ends."""
    samples = Counter[str]()
    handler = PreheatHandler()
    handler.context = Context("m", ".", {}, 1, None, "0.12.0")
    handler.context.request_processor = [RequestProcessor({"url_path": ""}) for _ in range(3)]
    handler.metrics = Metrics(
        lambda kind, name, value, unit, labels: samples.update({labels.get("le", ""): int(value)})
    )
    last = Response(200, b"", {"x-preheat-bucket": "fixed"})
    put_off = Outcome(BaseJob(), error=PutOff())
    pending = [AnyPending(result=Outcome(BaseJob())), AnyPending(result=put_off), AnyPending()]
    handler.worker = mock.Mock(
        **{"preprocess.return_value": pending, "postprocess.return_value": [last] * 3}
    )
    handler.postprocess(handler.preprocess([{"body": b"a cat"}] * 3))
    assert samples["+Inf"] == 1


def brought(handler: PreheatHandler, rows: Mapping[str, Mapping[str, object]]) -> dict[str, Any]:
    """What TorchServe's worker sends of a turn, by request: body and `ts_stream_next`."""
    context = handler.context
    context.request_ids = dict(enumerate(rows))
    context.request_processor = [RequestProcessor({"url_path": ""}) for _ in rows]
    context.stopping_criteria = None
    bodies = handler.handle([dict(row) for row in rows.values()], context)
    create_predict_response(bodies, context.request_ids, "", 200, context)
    return {
        name: (bodies[index], context.get_response_headers(index).get("ts_stream_next"))
        for index, name in context.request_ids.items()
    }


def test_at_every_turn_each_open_request_is_told_what_there_is() -> None:
    parts = {
        "new": Part(Response(200, b"a")),
        "unary": Part(None),
        "refused": Part(Response(400, b"no"), refusal=True),
        "through": Part(Response(200, b"z"), last=True, served_in="fixed"),
    }
    turns = mock.Mock(**{"take.return_value": parts})
    samples = Counter[str]()
    handler = PreheatHandler()
    handler.context = Context("m", ".", {}, 4, None, "0.12.0")
    handler.metrics = Metrics(
        lambda kind, name, value, unit, labels: samples.update({labels.get("le", ""): int(value)})
    )
    handler.worker = mock.Mock(turns=turns)
    assert brought(handler, {name: {"body": {}} for name in parts}) == {
        "new": (b"a", "true"),
        "refused": (b"no", None),
        "through": (b"z", "false"),
    }, "and nothing of who can take one message only"
    assert samples["+Inf"] == 1
