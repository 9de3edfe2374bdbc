"""Bad input over real REST and gRPC: a clear 400 that names the field, and the same worker
afterwards.
"""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from typing import Any

import httpx
import pytest
from PIL import Image

from served import Served

GOOD = {"prompt": "a cat", "height": 64, "width": 64, "seed": 1}


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header promises this size and which holds next to nothing: a decompression bomb's
    face.
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def truncated() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "png")
    return buffer.getvalue()[:-200]


BAD_FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("promt", {"promt": "a typo"}),
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": 5}),
    ("prompt", {"prompt": "x" * 1_000_000}),
    ("height", {"height": -64}),
    ("height", {"height": 2}),
    ("width", {"width": 100_000}),
    ("width", {"width": 10**400}),
    ("width", {"width": 64.5}),
    ("width", {"width": "64"}),
    ("height", {"height": True}),
    ("guidance_scale", {"guidance_scale": float("nan")}),
    ("guidance_scale", {"guidance_scale": float("inf")}),
    ("guidance_scale", {"guidance_scale": -1}),
    ("num_inference_steps", {"num_inference_steps": 0}),
    ("num_inference_steps", {"num_inference_steps": 10**9}),
    ("seed", {"seed": -1}),
    ("seed", {"seed": 2**63}),
    ("strength", {"image": b64(truncated()), "strength": 0}),
    ("image", {"image": "not base64!"}),
    ("image", {"image": b64(b"not an image")}),
    ("image", {"image": b64(truncated())}),
    ("image", {"image": b64(png_header(50_000, 50_000))}),
    ("mask_image", {"mask_image": b64(truncated())}),
    ("output_format", {"output_format": "gif"}),
    ("num_images", {"num_images": 2}),
    ("num_images", {"num_images": 10**6}),
]


def identify(case: tuple[str, dict[str, Any]]) -> str:
    return f"{case[0]}={str(case[1].get(case[0]))[:20]}"


@pytest.mark.parametrize("case", BAD_FIELDS, ids=identify)
@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_a_bad_field_is_a_400_that_names_it(
    served: Served, case: tuple[str, dict[str, Any]], protocol: str
) -> None:
    field, change = case
    # writes NaN and Infinity, which json.loads takes and JSON does not know
    body = json.dumps(GOOD | change).encode()
    if protocol == "rest":
        reply = served.client.post(content=body, headers={"content-type": "application/json"})
        assert reply.status == 400
        assert reply.headers["content-type"] == "application/json"
    else:
        reply = served.client.call_grpc({"data": body})
        assert reply.status == 0, "TorchServe cannot send a status over gRPC: the body says it"
    error = reply.error
    assert error is not None and set(error) == {"code", "type", "message", "field"}
    # TorchServe's own JSON parser refuses NaN before we see a field; then the body is at fault.
    assert (
        error["field"] in (field, "body")
        and error["code"] == 400
        and error["type"] == "InvalidRequest"
    )
    assert error["field"] == field or "NaN" in body.decode() or "Infinity" in body.decode()
    assert error["message"] and len(error["message"]) < 500


BAD_BODIES: list[tuple[str, dict[str, Any]]] = [
    ("broken JSON", {"content": b'{"prompt": "a', "headers": {"content-type": "application/json"}}),
    ("a list", {"content": b'["a"]', "headers": {"content-type": "application/json"}}),
    ("nothing", {}),
    ("empty JSON", {"content": b"{}", "headers": {"content-type": "application/json"}}),
    ("curl -d without a content type", {"data": {"prompt": "a cat"}}),
    (
        "random bytes",
        {"content": bytes(range(256)), "headers": {"content-type": "application/octet-stream"}},
    ),
    ("deep nesting", {"content": b"[" * 100_000, "headers": {"content-type": "application/json"}}),
]


@pytest.mark.parametrize(
    "request_", [body for _, body in BAD_BODIES], ids=[name for name, _ in BAD_BODIES]
)
def test_a_body_that_is_no_request_is_a_400(served: Served, request_: dict[str, Any]) -> None:
    reply = served.client.post(**request_)
    assert reply.status == 400, reply.body
    assert (
        reply.error is not None
        and reply.error["message"]
        and reply.error["field"] in ("body", "prompt")
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"data": b""},
        {"data": b"\xff\xfe"},
        {"data": b'{"prompt"'},
        {"other": b"x"},
        {"url_path": b"x"},
    ],
)
def test_an_input_map_that_is_no_request_is_an_error_body(
    served: Served, fields: dict[str, bytes]
) -> None:
    reply = served.client.call_grpc(fields)
    assert reply.error is not None and reply.error["code"] == 400


def test_the_worker_is_the_same_afterwards_and_still_right(served: Served) -> None:
    pids = served.worker_pids()
    before = served.client.predict(GOOD)
    for _, change in BAD_FIELDS:
        served.client.call_grpc({"data": json.dumps(GOOD | change).encode()})
        served.client.post(
            content=json.dumps(GOOD | change), headers={"content-type": "application/json"}
        )
    for _, body in BAD_BODIES:
        served.client.post(**body)
    assert served.client.predict(GOOD).body == before.body
    assert served.worker_pids() == pids
    assert served.state()["compiles_since_ready"] == 0


def test_a_size_that_no_bucket_covers_names_the_largest_ones(served: Served) -> None:
    reply = served.client.predict(GOOD | {"height": 257, "width": 256})
    assert reply.status == 400 and reply.error is not None
    assert reply.error["field"] == "height" and "256x256" in reply.error["message"]


@pytest.mark.parametrize(
    "content_type", ["", "application/x-www-form-urlencoded", "application/json"]
)
@pytest.mark.parametrize("path", ["/predictions/{}", "/models/{}/invoke"])
def test_the_state_is_for_the_management_port(served: Served, path: str, content_type: str) -> None:
    url = served.running.inference + path.format(served.client.model)
    headers = {"describe": "True"} | ({"content-type": content_type} if content_type else {})
    reply = httpx.post(url, headers=headers, timeout=60)
    assert reply.status_code == 400 and "fingerprint" not in reply.text
    assert served.state()["fingerprint"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"prompt": "a cat", "seed": 1, "seed": 2}', "seed is given twice"),
        (b'"a cat"', "body must be a JSON object, got 'a cat'"),
        (b"[" * 100_000, "body is not JSON: nested too deeply; "),
    ],
    ids=["a name twice", "text alone", "a hundred thousand lists"],
)
def test_torchserve_leaves_json_to_us(served: Served, body: bytes, message: str) -> None:
    """It would take all three: a body is read before its limits are known, and of two seeds the
    last counts.
    """
    reply = served.client.post(content=body, headers={"content-type": "application/json"})
    assert reply.status == 400 and reply.error is not None
    assert reply.error["message"].startswith(message)


@pytest.mark.parametrize("name", ["lora", "clip_skip", "prompt_2"])
def test_a_field_that_is_not_served_says_what_there_is_instead(served: Served, name: str) -> None:
    reply = served.client.predict(GOOD | {name: 1})
    assert reply.status == 400 and reply.error is not None and reply.error["field"] == name
    assert reply.error["message"].startswith(f"{name} is not served: ")


def test_a_bad_request_costs_its_neighbours_nothing(served: Served) -> None:
    from concurrent.futures import ThreadPoolExecutor

    wishes = [GOOD | ({"width": -1} if index % 3 == 0 else {"seed": index}) for index in range(12)]
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(served.client.predict, wishes))
    assert [reply.status for reply in replies] == [
        400 if index % 3 == 0 else 200 for index in range(12)
    ]
