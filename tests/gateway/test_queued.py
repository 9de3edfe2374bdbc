"""The queue before a host, through the whole gateway."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace

import httpx
import pytest

from memory_host import BUCKETS, DEFAULTS, MemoryHost
from preheat.buckets import Bucket
from preheat.errors import RequestError, Unreachable
from preheat.gateway import contents
from preheat.gateway.app import create_app
from preheat.gateway.asked import Asked, Model, read
from preheat.gateway.queued import Queued
from preheat.torchserve.overview import ModelView

PATH = "/predictions/tiny"
MODEL = Model.of(BUCKETS, DEFAULTS)


class Gateway:
    def __init__(self, host: MemoryHost, **options: int) -> None:
        self.host = host
        transport = httpx.ASGITransport(create_app(Queued(host, **options)))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")

    def ask(
        self, prompt: str, headers: Mapping[str, str] | None = None, **fields: object
    ) -> asyncio.Task[httpx.Response]:
        body = {"prompt": prompt, **fields}
        return asyncio.create_task(self.http.post(PATH, json=body, headers=headers))


def test_requests_of_a_bucket_go_together_and_the_rest_waits_here() -> None:
    async def body() -> None:
        host = MemoryHost(batch_size=2)
        gateway = Gateway(host)
        asked = []
        for prompt in ("a1", "b1", "b2", "a2", "a3"):
            asked.append(gateway.ask(prompt, height=700 if prompt[0] == "b" else 100))
        await host.until("a1", "a2", "b1", "b2")  # the last a is of a third run
        metrics = (await gateway.http.get("/metrics")).text
        assert 'preheat_gateway_queued{ModelName="tiny"} 1' in metrics
        assert 'preheat_gateway_inside{ModelName="tiny"} 4' in metrics
        host.go.set()
        assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}
        runs = [sorted(host.inside[start : start + 2]) for start in (0, 2, 4)]
        assert runs == [["a1", "a2"], ["b1", "b2"], ["a3"]]

    asyncio.run(asyncio.wait_for(body(), 30))


def test_slots_take_requests_one_by_one() -> None:
    async def body() -> None:
        host = MemoryHost(batch_size=2)
        (worker,) = host.seen.workers
        slots = replace(worker, request_defaults={"slots": 2})
        host.seen = replace(host.seen, workers=(slots,))
        gateway = Gateway(host)
        asked = [gateway.ask(prompt) for prompt in "abcde"]
        await host.until(*"abcd")  # two a slot, which wait for no others like them
        host.go.set()
        await asyncio.gather(*asked)

    asyncio.run(asyncio.wait_for(body(), 30))


@pytest.mark.parametrize("has_slots", [False, True])
def test_a_place_is_filled_while_its_host_paints_for_who_has_left(has_slots: bool) -> None:
    async def body() -> None:
        host = MemoryHost()
        if has_slots:  # it stops there
            (worker,) = host.seen.workers
            slots = replace(worker, request_defaults={"slots": 1})
            host.seen = replace(host.seen, workers=(slots,))
        gateway = Gateway(host)
        inner, outer = gateway.ask("a", num_inference_steps=1000), gateway.ask("b")
        await host.until("a", "b")
        third = gateway.ask("c")
        inner.cancel()
        await asyncio.wait({inner})
        inside = 'preheat_gateway_inside{ModelName="tiny"} 2'
        assert inside in (await gateway.http.get("/metrics")).text
        assert host.left == ["a"]
        assert ("c" in host.inside) is has_slots
        host.go.set()
        await asyncio.gather(outer, third)

    asyncio.run(asyncio.wait_for(body(), 30))


def test_while_the_workers_were_never_seen_nobody_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body() -> None:
        host = MemoryHost()
        gateway, seen = Gateway(host), host.overview

        async def gone() -> list[ModelView]:
            raise Unreachable("it is gone")

        monkeypatch.setattr(host, "overview", gone)
        for _ in range(2):
            refused = await gateway.ask("now")
            assert refused.status_code == 503 and refused.json()["type"] == "Unreachable"
        assert host.inside == []
        monkeypatch.setattr(host, "overview", seen)
        assert (await gateway.ask("now")).status_code == 200

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_full_queue_is_a_429_that_says_when() -> None:
    async def body() -> None:
        host = MemoryHost()
        gateway = Gateway(host, max_queued=1)
        asked = [gateway.ask(prompt) for prompt in "abc"]
        await host.until("a", "b")
        refused = await gateway.ask("d")
        assert refused.status_code == 429 and refused.json()["type"] == "QueueFull"
        assert refused.headers["retry-after"] == "1"
        host.go.set()
        await asyncio.gather(*asked)

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_deadline_is_kept_in_the_queue() -> None:
    async def body() -> None:
        host = MemoryHost()
        gateway = Gateway(host)
        asked = [gateway.ask(prompt) for prompt in "ab"]
        await host.until("a", "b")
        for seconds in (0.01, 0.2):  # a run takes 0.08 s, so the one is refused at once
            deadline = {"x-preheat-deadline": str(round(1000 * (time.time() + seconds)))}
            late = await gateway.ask("late", deadline)
            assert late.status_code == 504 and late.json()["type"] == "DeadlinePassed"
        wrong = await gateway.ask("wrong", {"x-preheat-deadline": "soon"})
        assert wrong.status_code == 400
        host.go.set()
        await asyncio.gather(*asked)
        assert host.inside == ["a", "b"]

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_model_that_is_not_there_is_the_hosts_to_refuse() -> None:
    async def body() -> None:
        gateway = Gateway(MemoryHost())
        answer = await gateway.http.post("/predictions/other", json={"prompt": "now"})
        assert answer.status_code == 200  # this host knows every name

    asyncio.run(asyncio.wait_for(body(), 30))


@pytest.mark.parametrize(
    ("fields", "bucket", "pixel_steps"),
    [
        ({}, (512, 512), 512 * 512 * 4),
        ({"height": 600}, (768, 512), 768 * 512 * 4),
        ({"height": 100, "width": 700}, (512, 768), 512 * 768 * 4),
        ({"num_inference_steps": 10, "num_images": 2}, (512, 512), 512 * 512 * 20),
        ({"height": 700, "width": 700}, (512, 512), 512 * 512 * 4),  # refused by the worker
        ({"height": "300"}, (512, 512), 512 * 512 * 4),  # as forms have it
        ({"height": True, "width": -5}, (512, 512), 512 * 512 * 4),
        ({"image": "..."}, (768, 512), 768 * 512 * 4),
    ],
)
def test_the_bucket_is_foreseen(
    fields: dict[str, object], bucket: tuple[int, int], pixel_steps: int
) -> None:
    asked = MODEL.asked(fields)
    assert asked.bucket == Bucket(*bucket) and asked.pixel_steps == pixel_steps


def test_what_cannot_share_a_run_is_told_apart() -> None:
    groups = [
        MODEL.asked(fields).group
        for fields in (
            {},
            {"height": 700},
            {"guidance_scale": 1},
            {"num_inference_steps": 5},
            {"negative_prompt": ""},
            {"image": "a", "height": 512, "width": 512},
            {"image": "a", "mask_image": "b", "height": 512, "width": 512},
        )
    ]
    assert len(set(groups)) == len(groups)
    assert MODEL.asked({"seed": 1, "height": 64}).group == MODEL.asked({"prompt": "x"}).group


def _read(body: bytes, content_type: str) -> Asked:
    return asyncio.run(read(body, content_type, MODEL))


def test_forms_and_text_are_read_as_json_is() -> None:
    request = httpx.Request(
        "POST",
        "http://127.0.0.1",
        data={"prompt": "x", "height": "700", "num_inference_steps": "9"},
        files={"image": ("a.png", b"\x89PNG" * 1000)},
    )
    form = _read(request.read(), request.headers["content-type"])
    assert (form.height, form.bucket, form.steps) == (700, Bucket(768, 512), 9)
    assert _read(b"a cat", "text/plain; charset=utf-8") == MODEL.asked({})
    long = b'{"height": 700, "image": "' + b"A" * 100_000 + b'"}'
    assert _read(long, "application/json").bucket == Bucket(768, 512)


def _form(*parts: tuple[str, str, str], charset: str = "") -> tuple[bytes, str]:
    """A form of (name, more of the part's head, content), and its content type."""
    body = "".join(
        f'--x\r\ncontent-disposition: form-data; name="{name}"{head}\r\n\r\n{content}\r\n'
        for name, head, content in parts
    )
    return f"{body}--x--\r\n".encode(), f"multipart/form-data; boundary=x{charset}"


AS_FILE = '; filename="a"'
AS_TEXT = f"{AS_FILE}\r\ncontent-type: text/plain"


@pytest.mark.parametrize(
    ("parts", "steps"),
    [
        ([("num_inference_steps", AS_FILE, "9")], 9),
        ([("body", "", '{"num_inference_steps": 9}')], 9),
        ([("data", AS_FILE, '{"num_inference_steps": 9}')], 9),
        ([("data", "", '{"seed": 1}'), ("num_inference_steps", "", "9")], 9),
        ([("prompt", "", "x" * 1_100_000), ("num_inference_steps", "", "9")], 9),
        ([("body", AS_TEXT, '{"num_inference_steps": 9}')], 4),  # a prompt
        ([("image", AS_FILE, "\u20ac"), ("num_inference_steps", "", "9")], 9),
    ],
)
def test_a_form_is_priced_by_what_its_worker_reads(
    parts: list[tuple[str, str, str]], steps: int
) -> None:
    assert _read(*_form(*parts)).steps == steps


@pytest.mark.parametrize(
    ("charset", "legal"),
    [("utf-8", True), ('"ISO_8859-1"', True), ("punycode", False), ('"punycode"', False)],
)
def test_a_forms_charset_is_one_that_costs_nothing(charset: str, legal: bool) -> None:
    form = _form(("height", "", "700"), charset=f"; charset={charset}")
    if legal:
        assert _read(*form).height == 700
    else:
        with pytest.raises(RequestError, match="body must be in UTF-8"):
            _read(*form)


def test_json_of_countless_parts_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "loads", None)
    hostile = b'{"height": 100, "a": [' + b"[]," * 5000 + b"[]]}"
    assert _read(hostile, "application/json") == MODEL.largest()
    assert _read(*_form(("data", "", hostile.decode()))) == MODEL.largest()


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"{", "application/json"),
        (b'{"a":1,"a":2}', ""),
        (b"\xff", ""),
        (b"x", "multipart/form-data"),
    ],
)
def test_what_cannot_be_read_counts_as_the_largest(body: bytes, kind: str) -> None:
    assert _read(body, kind).bucket == Bucket(768, 512)


def test_a_module_has_no_pictures() -> None:
    asked = Model.of(["sequence=128", "fixed"], {}).asked({"input_ids": [1]})
    assert asked.bucket is None and asked.pixel_steps == 1
