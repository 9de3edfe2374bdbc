"""Throw made-up requests at a running server and judge every answer.

    python tests/fuzz.py [--count 10000] [--seed N]

Starts a tiny SDXL of its own. The requests follow from the seed alone; eight are under way at any
time, so that legal and hostile ones share batches, and every tenth is a legal one whose picture is
known.
"""

from __future__ import annotations

import base64
import json
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Annotated, Any

import grpc
import httpx
import hypothesis
import numpy as np
import typer
import yaml
from hypothesis import HealthCheck, Phase
from PIL import Image

from fuzz_bodies import Sent, sent
from preheat.cli.demo import build_tiny
from preheat.torchserve import server
from preheat.torchserve.archive import build_archive
from preheat.torchserve.client import MAX_MESSAGE, SERVICE, Client, messages
from served import opened

STATE = server.ROOT / ".preheat"
MAX_REQUEST_BYTES = 180_000
"""Of the server that is started here: less than the largest body sent, so that TorchServe's own
refusal is met too.
"""
FRONT_END = ("ErrorDataDecoderException", "StringIndexOutOfBoundsException")
"""What TorchServe 0.12's Java front end answers, with a 500, to multipart that it cannot take apart
(an unknown charset or transfer encoding, an empty boundary or name). No worker hears of it, and no
setting changes it; so it is counted apart."""
NUM_CLIENTS = 8
NUM_THREADS = 2  # of the worker, whatever the machine has
TIMEOUT = 60  # seconds
PROBE_EVERY = 10
PROBES: tuple[Mapping[str, Any], ...] = tuple(
    {
        "prompt": f"a cat {index}",
        "height": 64 - 9 * index,
        "width": 40 + 7 * index,
        "seed": index,
        "num_inference_steps": 1,
    }
    for index in range(4)
)
MODEL: Mapping[str, Any] = {
    "minWorkers": 1,
    "maxWorkers": 1,
    "batchSize": 4,
    "maxBatchDelay": 5,
    "startupTimeout": 600,
    "maxRetryTimeoutInSec": 1200,
    "pt2": {
        # Dynamo's guards, without the wait for Inductor
        "compile": {"enable": True, "backend": "eager", "dynamic": False},
        "shapes": {"buckets": [[64, 64]], "batch_sizes": "dynamic"},
    },
    "pipeline": {
        "path": ".",
        "limits": {"max_image_pixels": 1_000_000},
        "defaults": {"num_inference_steps": 2},
    },
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class Got:
    """An answer over any protocol. `status` is HTTP's, or gRPC's code with 0 for OK; -1 where no
    answer came.
    """

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    """An answer that should not have been."""

    fault: str
    sent: Sent
    got: Got

    def __str__(self) -> str:
        sent = self.sent
        said = (
            f"{sent.protocol} {dict(sent.headers)} {_short(sent.content)}"
            if sent.protocol == "rest"
            else ""
        )
        said = (
            said
            or f"{sent.protocol} { ({name: _short(value) for name, value in sent.fields.items()}) }"
        )
        return (
            f"{self.fault} [{sent.kind}]\n  sent {said}\n  got {self.got.status} "
            f"{_short(self.got.body, 300)}"
        )


@dataclass(slots=True)
class Tally:
    """What a campaign has come to."""

    outcomes: Counter[str] = field(default_factory=Counter)
    own_refusals: Counter[str] = field(default_factory=Counter)
    """TorchServe's own, before the handler."""
    kinds: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    num_probes: int = 0
    num_wrong_probes: int = 0

    @property
    def hopeless(self) -> bool:
        """Whether the server seems to be gone for good: what is left is not sent."""
        return self.num_wrong_probes >= 5

    @property
    def num_sent(self) -> int:
        return sum(self.kinds.values())


class Target:
    """A server under fire, over REST and gRPC with nothing in between that would mend a request."""

    def __init__(self, running: server.TorchServe, *, max_request_bytes: int) -> None:
        self.client, self.max_request_bytes = Client.to(running, timeout=TIMEOUT), max_request_bytes
        self._url = f"{running.inference}/predictions/{self.client.model}"
        self._http = httpx.Client(timeout=TIMEOUT, trust_env=False)
        sizes = [
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            ("grpc.max_send_message_length", MAX_MESSAGE),
        ]
        self._channel = grpc.insecure_channel(
            running.grpc, options=[*sizes, ("grpc.enable_http_proxy", 0)]
        )

    def close(self) -> None:
        self.client.close()
        self._http.close()
        self._channel.close()

    def ask(self, one: Sent) -> Got:
        if one.leaves:
            self._leave(one)
            return Got(0, b"")
        if one.protocol == "rest":
            try:
                response = self._http.post(
                    self._url, content=one.content, headers=list(one.headers)
                )
            except httpx.HTTPError as error:
                return Got(-1, f"{type(error).__name__}: {error}".encode())
            return Got(response.status_code, response.content, dict(response.headers))
        try:
            return Got(0, self._call(one))
        except grpc.RpcError as error:
            return Got(error.code().value[0], str(error.details()).encode())

    def _leave(self, one: Sent) -> None:
        """Hang up after the first part of the answer, however it reads."""
        with suppress(httpx.HTTPError, grpc.RpcError):
            if one.protocol == "rest":
                with self._http.stream(
                    "POST", self._url, content=one.content, headers=list(one.headers)
                ) as response:
                    next(response.iter_raw(), None)
            else:
                with closing(self.client.stream_grpc(json.loads(one.fields["data"]))) as parts:
                    next(parts, None)

    def _call(self, one: Sent) -> bytes:
        request, response = messages()
        message = request(model_name=self.client.model, input=one.fields)
        how = {
            "request_serializer": request.SerializeToString,
            "response_deserializer": response.FromString,
        }
        if one.protocol == "grpc":
            answer = self._channel.unary_unary(f"{SERVICE}/Predictions", **how)(
                message, timeout=TIMEOUT
            )
            return bytes(answer.prediction)
        parts = self._channel.unary_stream(f"{SERVICE}/StreamPredictions", **how)(
            message, timeout=TIMEOUT
        )
        return b"".join(part.prediction for part in parts)


def made_up(count: int, seed: int, use: Callable[[Sent], None]) -> None:
    """Hand `count` requests to `use`, the same for the same seed."""

    @hypothesis.settings(
        max_examples=count,
        phases=(Phase.generate,),
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.seed(seed)
    @hypothesis.given(sent())
    def each(one: Sent) -> None:
        use(one)

    each()


def campaign(
    target: Target, count: int, seed: int, show: Callable[[Tally], None] = lambda _: None
) -> Tally:
    """Send `count` requests and the probes between them; return when all are answered."""
    tally, lock, free = Tally(), Lock(), BoundedSemaphore(2 * NUM_CLIENTS)
    known = [_picture(_asked(target, probe)) for probe in PROBES]

    def fuzz(one: Sent) -> None:
        if tally.hopeless:
            return
        got = target.ask(one)
        outcome, fault = judged(one, got, target.max_request_bytes)
        with lock:
            tally.kinds[f"{one.kind}, {one.protocol}"] += 1
            tally.outcomes[outcome] += 1
            if outcome == "refused by TorchServe":
                tally.own_refusals[_own_refusal(got)] += 1
            if fault:
                tally.findings.append(Finding(fault, one, got))

    def probe(index: int) -> None:
        got = _asked(target, PROBES[index])
        right = got.status == 200 and (np.abs(_picture(got) - known[index]) <= 1).all()
        with lock:
            tally.num_probes += 1
            tally.num_wrong_probes += not right
            if not right:
                tally.findings.append(
                    Finding("a legal request was answered wrong", _probe(PROBES[index]), got)
                )

    def bounded(work: Callable[[Any], None], argument: Any) -> None:
        def done() -> None:
            try:
                work(argument)
            finally:
                free.release()

        free.acquire()
        futures.append(pool.submit(done))

    num_handed = 0

    def use(one: Sent) -> None:
        nonlocal num_handed
        if tally.hopeless:
            return
        bounded(fuzz, one)
        if num_handed % PROBE_EVERY == 0:
            bounded(probe, num_handed // PROBE_EVERY % len(PROBES))
        if num_handed % 1000 == 0:
            show(tally)
        num_handed += 1

    futures: list[Any] = []
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        made_up(count, seed, use)
    for future in futures:
        future.result()
    return tally


def judged(one: Sent, got: Got, max_request_bytes: int) -> tuple[str, str | None]:
    """(outcome, what is wrong with it): a picture, a refusal that names its field, or TorchServe's
    own refusal.
    """
    if one.leaves:
        return "left early", None
    too_long = one.num_bytes + 1000 > max_request_bytes  # headers and frames count too
    if got.status == -1 or got.status == 413:
        fault = None if too_long or _half_sent(one) else "the connection was closed"
        return ("refused by TorchServe", fault) if fault is None else ("no answer", fault)
    if one.protocol != "rest" and got.status:
        small = not too_long and got.status not in (3, 8)  # INVALID_ARGUMENT, RESOURCE_EXHAUSTED
        return "refused by TorchServe", f"gRPC status {got.status}" if small else None
    lines = _lines(got.body)
    if len(lines) > 1 and (fault := _stream_fault(lines)):
        return "stream", fault
    pictures = _pictures(got)
    if pictures:
        size = pictures[0].size[::-1]
        if one.size and size != one.size:
            return "picture", f"asked for {one.size}, got {size}"
        return "picture", f"{one.at_fault} was taken" if one.expect == "refusal" else None
    document = lines[-1] if lines else {}
    if "code" not in document or "message" not in document:
        return "neither picture nor error", "neither picture nor error"
    return _judged_error(one, got, document)


def _judged_error(one: Sent, got: Got, document: Mapping[str, Any]) -> tuple[str, str | None]:
    code, at_fault = document["code"], document.get("field")
    if one.protocol == "rest" and code != got.status and "event" not in document:
        return "error", f"status {got.status}, but the body says {code}"
    if code == 504 and one.header(b"x-preheat-deadline") is not None:
        return "late", None
    if "field" not in document:
        own = document.get("type") in FRONT_END or (isinstance(code, int) and 400 <= code < 500)
        fault = None if own else f"{code} of TorchServe's own"
        return "refused by TorchServe", fault or (
            "a legal request was refused" if one.expect == "picture" else None
        )
    if code != 400 or not isinstance(at_fault, str) or not at_fault or not document["message"]:
        return "error", f"{code} that names {at_fault!r}"
    if one.expect == "picture":
        return "refused", f"a legal request was refused for {at_fault}: {document['message']}"
    if (
        one.at_fault is not None
        and at_fault not in (one.at_fault, "body")
        and not _named(one.at_fault, at_fault)
    ):
        return "refused", f"{one.at_fault} is wrong, {at_fault} was blamed"
    return "refused", None


def _named(name: str, shown: str) -> bool:
    """Whether `shown` is what the handler makes of a name that is no plain word."""
    return name == "" or (not name.isascii() and shown.startswith("\\x"))


def _half_sent(one: Sent) -> bool:
    """Whether the headers promise what the body does not hold."""
    return one.header(b"content-encoding") in (b"gzip", b"br")


def _pictures(got: Got) -> list[Image.Image]:
    """The pictures in an answer of any form: a file, base64 in JSON, or events."""
    if got.body[:1] not in (b"{", b""):
        return [opened(got.body)]
    entries = [entry for line in _lines(got.body) for entry in line.get("data") or [line]]
    coded = [
        entry["b64_json"] for entry in entries if isinstance(entry, dict) and "b64_json" in entry
    ]
    return [opened(base64.b64decode(one)) for one in coded]


def _lines(body: bytes) -> list[dict[str, Any]]:
    """The JSON objects in a body: one in any layout, or one a line."""
    whole = _document(body)
    return (
        [whole]
        if whole
        else [_document(line) for line in body.splitlines()]
        if body[:1] == b"{"
        else []
    )


def _stream_fault(lines: list[dict[str, Any]]) -> str | None:
    """What is wrong with the order of events, if anything is."""
    kinds = [line.get("event") for line in lines]
    steps = [line["step"] for line in lines if line.get("event") == "step"]
    images = kinds.count("image")
    ends = ["image"] * images + (["done"] if images else ["error"])
    if kinds != ["queued", *["step"] * len(steps), *ends]:
        return f"events out of order: {kinds}"
    if steps != sorted(steps) or (
        images and steps[-1] != [line for line in lines if "of" in line][-1]["of"]
    ):
        return f"steps {steps}"
    return None


def _document(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _own_refusal(got: Got) -> str:
    document = _document(got.body)
    if document:
        return f"{got.status} {document.get('type')}: {str(document.get('message'))[:60]}"
    return f"{got.status} {got.body[:30].decode(errors='replace')}"


def _probe(payload: Mapping[str, Any]) -> Sent:
    headers = ((b"Content-Type", b"application/json"),)
    return Sent("probe", content=json.dumps(payload).encode(), headers=headers, expect="picture")


def _asked(target: Target, payload: Mapping[str, Any]) -> Got:
    return target.ask(_probe(payload))


def _picture(got: Got) -> Any:
    return np.asarray(opened(got.body)).astype(int)


def _short(data: bytes, most: int = 200) -> str:
    return repr(data) if len(data) <= most else f"{data[:most]!r}... ({len(data)} bytes)"


@contextmanager
def tiny_server() -> Iterator[server.TorchServe]:
    """A tiny SDXL behind a TorchServe of its own, warm, with little patience for large requests."""
    run_dir = STATE / "run" / "fuzz"
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    left = server.recall(run_dir)
    if left is not None:
        left.stop()  # of an earlier run that was killed
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=STATE) as folder:
        config = Path(folder, "fuzz.yaml")
        config.write_text(yaml.safe_dump(dict(MODEL)))
        model = build_tiny("sdxl", Path(folder, "model"))
        archive = build_archive(config, model, output=Path(folder))
        limits = {"max_request_size": str(MAX_REQUEST_BYTES)}
        running = server.start(
            [archive],
            run_dir,
            ports=server.Ports.free(),
            properties=limits,
            # On one thread torch's kernels raise what ends a process on two.
            env={"OMP_NUM_THREADS": str(NUM_THREADS)},
        )
        try:
            running.wait_ready(600)
            yield running
        finally:
            running.stop()


def smallest(findings: list[Finding]) -> list[Finding]:
    """One finding a fault and kind: the shortest."""
    by_fault: dict[tuple[str, ...], Finding] = {}
    for finding in sorted(findings, key=lambda one: one.sent.num_bytes):
        by_fault.setdefault(
            (finding.fault[:40], finding.sent.kind, _own_refusal(finding.got)), finding
        )
    return list(by_fault.values())


@app.command()
def main(
    count: Annotated[int, typer.Option(help="Of made-up requests.")] = 10_000,
    seed: Annotated[int | None, typer.Option(help="Default: a new one, which is printed.")] = None,
) -> None:
    """Send made-up requests to a tiny server and judge every answer."""
    seed = secrets.randbelow(2**32) if seed is None else seed
    print(
        f"fuzz: {count} requests, seed {seed} (again: make fuzz COUNT={count} SEED={seed})",
        flush=True,
    )
    begun = time.monotonic()
    with tiny_server() as running:
        target = Target(running, max_request_bytes=MAX_REQUEST_BYTES)
        pids = target.client.worker_pids()
        tally = campaign(
            target, count, seed, lambda tally: print(f"{tally.num_sent} answered", flush=True)
        )
        same_worker = target.client.worker_pids() == pids
        state = target.client.state()
        alone = [replace(one, got=target.ask(one.sent)) for one in smallest(tally.findings)]
        target.close()
    print(f"{time.monotonic() - begun:.0f} s, {tally.num_sent} requests")
    for title, counted in (
        ("sent", tally.kinds),
        ("answered", tally.outcomes),
        ("by TorchServe", tally.own_refusals),
    ):
        for name, number in counted.most_common():
            print(f"  {title}: {number:6} {name}")
    print(
        f"  legal requests in between: {tally.num_probes}, answered wrong: {tally.num_wrong_probes}"
    )
    print(
        f"  same worker throughout: {same_worker}, of {state['num_threads']} threads; compiles "
        f"since READY: {state['compiles_since_ready']}"
    )
    print(f"  findings: {len(tally.findings)}")
    for finding, again in zip(smallest(tally.findings), alone, strict=True):
        print(f"{finding}\n  alone afterwards: {again.got.status} {_short(again.got.body)}")
    if tally.num_sent < count:
        print(f"  given up after {tally.num_sent}: the server no longer answers")
    as_meant = same_worker and state["num_threads"] == NUM_THREADS
    if tally.num_sent < count or tally.findings or not as_meant or state["compiles_since_ready"]:
        sys.exit(1)


if __name__ == "__main__":
    # unwinds, so that the server is stopped
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    app()
