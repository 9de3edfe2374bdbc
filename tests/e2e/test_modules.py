"""Modules over real TorchServe and real Inductor: a masked encoder, a CNN and a plain --model-file
archive on one server.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
import yaml

from preheat.models import tiny
from preheat.torchserve import server
from preheat.torchserve.archive import build_archive
from preheat.torchserve.client import Client, Reply
from served import CACHE, Served, blocks, started

NUM_REQUESTS = 1000
LENGTHS, HEIGHTS, WIDTH = (16, 32), (32, 48), 32
CONFIGS: dict[str, Any] = {
    name: yaml.safe_load((server.ROOT / "model-config" / f"{name}.yaml").read_text())
    for name in ("bert", "resnet")
}
for config in CONFIGS.values():  # what compiles in requests, if anything does
    config["pt2"]["compile"]["backend"] = "inductor"
CONFIGS["bert"]["module"]["inputs"]["input_ids"]["buckets"] = {"sequence": list(LENGTHS)}
CONFIGS["resnet"]["module"]["inputs"]["pixel_values"]["buckets"] = {
    "height": list(HEIGHTS),
    "width": [WIDTH],
}
PLAIN = (
    "import torch\n\n\nclass Net(torch.nn.Linear):\n    def __init__(self):\n"
    "        super().__init__(4, 3)\n"
)


@dataclass(frozen=True)
class Modules:
    """The server, a client for each model, and the folders that they were made from."""

    running: server.TorchServe
    clients: dict[str, Client]
    folder: Path

    def eager(self, name: str) -> Any:
        auto = {
            "bert": transformers.AutoModel,
            "resnet": transformers.AutoModelForImageClassification,
        }[name]
        return auto.from_pretrained(self.folder / name).eval()


def archive_plainly(work: Path) -> Path:
    """As docs/modules.md says, from another folder."""
    (work / "model.py").write_text(PLAIN)
    torch.save(
        {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.zeros(3)}, work / "weights.pt"
    )
    (work / "plain.yaml").write_text(
        "minWorkers: 1\nmaxWorkers: 1\npt2: {compile: {enable: true, backend: aot_eager}}\n"
    )
    (work / "tmp").mkdir()
    (work / "handler").symlink_to(server.ROOT / "handler")
    (command,) = [block for block in blocks("bash", "docs/modules.md") if "--model-file" in block]
    command = command.replace(
        "torch-model-archiver", f"{sys.executable} -m model_archiver.model_packaging", 1
    )
    subprocess.run(
        ["bash", "-euc", command],
        cwd=work,
        check=True,
        env={**os.environ, "TMPDIR": str(work / "tmp")},
    )
    return work / "plain.mar"


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Modules]:
    work = tmp_path_factory.mktemp("modules")
    archives = [archive_plainly(work)]
    for name, config in CONFIGS.items():
        tiny.build(name, work / name)
        (work / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        archives.append(build_archive(work / f"{name}.yaml", work / name, output=work / "archives"))
    with (
        started(archives, work, cache=CACHE, env={"OMP_NUM_THREADS": "2"}) as warm,
        ExitStack() as stack,
    ):
        names = ("bert", "resnet", "plain")
        yield Modules(
            warm, {name: stack.enter_context(Client.to(warm, name)) for name in names}, work
        )


def test_the_documents_two_commands_work_as_pasted(modules: Modules) -> None:
    (block,) = [block for block in blocks("bash", "docs/modules.md") if "curl" in block]
    commands = "\n".join(line for line in block.splitlines() if not line.startswith("make "))
    commands = commands.replace("http://127.0.0.1:8080", modules.running.inference)
    done = subprocess.run(
        ["bash", "-euc", commands], cwd=modules.folder, check=True, capture_output=True, text=True
    )
    assert '"last_hidden_state":[[[' in done.stdout
    answered = safetensors.torch.load_file(modules.folder / "hidden.safetensors")
    assert answered["last_hidden_state"].shape == (1, 3, 32)


def npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def ask(client: Client, index: int, inputs: dict[str, Any]) -> dict[str, Any]:
    """Over REST and gRPC by turns, as JSON, safetensors or .npy by turns."""
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    form = index // 2 % 3
    if form == 0:
        body, kind = (
            json.dumps({"inputs": {n: t.tolist() for n, t in tensors.items()}}).encode(),
            "application/json",
        )
    elif form == 1 or len(tensors) > 1:
        body, kind = safetensors.torch.save(tensors), "application/safetensors"
    else:
        body, kind = npy(next(iter(tensors.values())).numpy()), "application/x-npy"
    rest = index % 2 == 0
    reply = (
        client.post(content=body, headers={"content-type": kind})
        if rest
        else client.call_grpc({"data": body})
    )
    assert reply.status == (200 if rest else 0) and reply.error is None, reply.body[:300]
    document: dict[str, Any] = reply.json()
    return document


def test_a_thousand_requests_of_random_lengths_and_sizes_compile_nothing(modules: Modules) -> None:
    rng, dice = random.Random(2), np.random.default_rng(2)
    wishes: list[tuple[int, str, dict[str, Any]]] = []
    for index in range(NUM_REQUESTS):
        if index % 4 < 2:
            length = rng.randint(1, LENGTHS[-1])
            wishes.append(
                (index, "bert", {"input_ids": [rng.randrange(5, 190) for _ in range(length)]})
            )
        else:
            pixels = dice.standard_normal(
                (3, rng.randint(1, HEIGHTS[-1]), rng.randint(1, WIDTH)), dtype=np.float32
            )
            wishes.append((index, "resnet", {"pixel_values": pixels.tolist()}))
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda wish: ask(modules.clients[wish[1]], wish[0], wish[2]), wishes)
        )
    bert, resnet, worst = modules.eager("bert"), modules.eager("resnet"), 0.0
    with torch.no_grad():
        for (_, name, inputs), answer in zip(wishes, answers, strict=True):
            assert answer["engine"] == "compiled"
            if name == "resnet":
                assert_cnn(resnet, answer, inputs["pixel_values"])
                continue
            assert answer["exact"] == "rounding"
            alone = bert(torch.tensor([inputs["input_ids"]]))
            for key in ("last_hidden_state", "pooler_output"):
                worst = max(
                    worst, float((torch.tensor(answer["outputs"][key]) - alone[key]).abs().max())
                )
    print(
        "largest difference between padded, batched, compiled and the unpadded eager encoder: "
        f"{worst:.2g}"
    )
    assert worst < 1e-4
    for name in ("bert", "resnet"):
        state = modules.clients[name].state()
        assert state["state"] == "hot" and state["requests"] >= NUM_REQUESTS // 2
        assert state["compiles_since_ready"] == state["incidents"] == state["eager_fallbacks"] == 0
        served = Served(modules.running, modules.clients[name])
        assert (
            served.metric("preheat_requests_total", ModelName=name, Engine="compiled")
            == state["requests"]
        )
        assert served.metric("preheat_compiles_since_ready_total", ModelName=name) == 0
        bucket = {"bert": "sequence=16", "resnet": "height=48 width=32"}[name]
        assert served.metric("preheat_requests_total", ModelName=name, Bucket=bucket) > 0
        assert {row["engine"] for row in state["buckets"]} == {"compiled"} and all(
            row["dims"] for row in state["buckets"]
        )


def assert_cnn(resnet: Any, answer: dict[str, Any], pixels: list[Any]) -> None:
    """The answer is that of the picture whose edges are continued up to the bucket's size."""
    height, width = (int(part.partition("=")[2]) for part in answer["bucket"].split())
    image = np.asarray(pixels, dtype=np.float32)
    margins = ((0, 0), (0, height - image.shape[1]), (0, width - image.shape[2]))
    expected = resnet(torch.from_numpy(np.pad(image, margins, mode="edge"))[None]).logits
    torch.testing.assert_close(
        torch.tensor(answer["outputs"]["logits"]), expected, atol=1e-4, rtol=1e-4
    )


def test_an_image_of_a_buckets_size_is_answered_as_the_model_does(modules: Modules) -> None:
    pixels = np.random.default_rng(0).random((3, HEIGHTS[1], WIDTH), dtype=np.float32)
    headers = {"content-type": "application/x-npy", "accept": "application/x-npy"}
    reply = modules.clients["resnet"].post(content=npy(pixels), headers=headers)
    assert (
        reply.headers["x-preheat-bucket"] == "height=48 width=32"
        and reply.headers["x-preheat-exact"] == "rounding"
    )
    with torch.no_grad():
        expected = modules.eager("resnet")(torch.from_numpy(pixels)[None]).logits
    np.testing.assert_allclose(np.load(io.BytesIO(reply.body)), expected.numpy(), atol=1e-4)
    smaller = modules.clients["resnet"].post(content=npy(pixels[:, :40, :20]), headers=headers)
    assert (
        smaller.headers["x-preheat-exact"] == "padded"
        and float(smaller.headers["x-preheat-padding"]) > 0
    )


def test_text_and_parts_by_name(modules: Modules) -> None:
    client = modules.clients["bert"]
    text = client.post(content="hello", headers={"content-type": "text/plain"}).json()
    grpc = client.call_grpc({"text": b"hello"}).json()
    assert text["outputs"] == grpc["outputs"] and np.shape(
        text["outputs"]["last_hidden_state"]
    ) == (1, 7, 32)
    ids = np.arange(5, 11)
    parts = client.call_grpc(
        {
            "input_ids": npy(ids),
            "attention_mask": npy(np.ones(6, np.int64)),
            "accept": b"application/safetensors",
        }
    )
    assert safetensors.torch.load(parts.body)["last_hidden_state"].shape == (1, 6, 32)


def test_a_plain_model_file_archive_is_served_as_basehandler_would(modules: Modules) -> None:
    reply = modules.clients["plain"].predict({"inputs": [[1.0, 2.0, 3.0, 4.0]]})
    assert reply.status == 200, reply.body
    assert (
        reply.json()["outputs"]["output"] == [[20.0, 60.0, 100.0]]
        and reply.json()["engine"] == "compiled"
    )
    assert modules.clients["plain"].state()["state"] == "cold"


IDS = [5, 6, 7]
BAD: list[tuple[str, str, bytes, str]] = [
    ("bert", "input_ids", b'{"input_ids": [[[1]]]}', "rank"),
    ("bert", "input_ids", b'{"input_ids": [1.5]}', "dtype"),
    ("bert", "input_ids", b'{"input_ids": [[1, 2], [3]]}', "ragged"),
    ("bert", "input_ids", json.dumps({"input_ids": [1] * 33}).encode(), "over the largest bucket"),
    ("bert", "attention_mask", b'{"input_ids": [1, 2], "attention_mask": [1]}', "two lengths"),
    ("bert", "nonsense", b'{"nonsense": [1]}', "unknown"),
    (
        "bert",
        "body",
        safetensors.torch.save({"input_ids": torch.tensor(IDS)})[:-3],
        "corrupt safetensors",
    ),
    ("bert", "input_ids", npy(np.array(IDS))[:-3], "corrupt npy"),
    ("bert", "input_ids", npy(np.array([{}], dtype=object), allow_pickle=True), "pickle inside"),
    ("bert", "body", pickle.dumps(IDS), "a pickle"),
    ("resnet", "pixel_values", npy(np.zeros((3, 32, 33), np.float32)), "too wide"),
    ("resnet", "pixel_values", npy(np.zeros((1, 32, 32), np.float32)), "grey"),
    ("resnet", "pixel_values", b"\x89PNG\r\n\x1a\nno picture", "a broken image"),
]


@pytest.mark.parametrize(("name", "field", "body", "_why"), BAD, ids=[why for *_, why in BAD])
def test_bad_input_is_a_400_that_names_it_and_the_worker_lives(
    modules: Modules, name: str, field: str, body: bytes, _why: str
) -> None:
    client = modules.clients[name]
    pids = client.worker_pids()
    kind = "application/json" if body.startswith(b"{") else "application/octet-stream"
    replies: list[Reply] = [
        client.post(content=body, headers={"content-type": kind}),
        client.call_grpc({"data": body}),
    ]
    assert [reply.status for reply in replies] == [400, 0]
    for reply in replies:
        assert reply.error is not None and (reply.error["code"], reply.error["field"]) == (
            400,
            field,
        ), reply.body
    good = ask(
        client,
        0,
        {"input_ids": IDS} if name == "bert" else {"pixel_values": np.zeros((3, 4, 4)).tolist()},
    )
    assert good["engine"] == "compiled" and client.worker_pids() == pids


INDICES = [
    (name, field, number)
    for name, config in CONFIGS.items()
    for field, spec in config["module"]["inputs"].items()
    if "int" in spec["dtype"]
    for number in (-1, 9_999)
]


@pytest.mark.parametrize(("name", "field", "number"), [*INDICES, ("bert", "token_type_ids", 9)])
def test_no_number_outside_its_table_ends_the_worker(
    modules: Modules, name: str, field: str, number: int
) -> None:
    """On two threads, as the worker has here, Inductor would abort the process, and with it every
    stranger in the batch.
    """
    client = modules.clients[name]
    pids = client.worker_pids()
    body = json.dumps(
        {"inputs": {"input_ids": [2, 3, 4], "token_type_ids": [0, 0, 0], field: [0, number, 0]}}
    ).encode()
    rest = client.post(content=body, headers={"content-type": "application/json"})
    grpc = client.call_grpc({"data": body})
    assert rest.status == 400
    for reply in (rest, grpc):
        assert reply.error is not None and (reply.error["code"], reply.error["field"]) == (
            400,
            field,
        ), reply.body
    assert (
        ask(client, 0, {"input_ids": IDS})["engine"] == "compiled" and client.worker_pids() == pids
    )
