"""READY means hot, and nobody's picture depends on who shares the batch: requests of every kind
that have nothing in common, some of them invalid.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preheat.compilation.watch import CompileWatch
from preheat.errors import RequestError
from preheat.torchserve.client import Client, Reply
from preheat.worker.worker import Worker
from served import BUCKETS, ENGINE, Served, noise, opened
from worker.test_service import start

NUM_BATCHES = 250
NUM_DISTINCT = 100
COUNTERS = {
    "compiles_since_ready": "preheat_compiles_since_ready_total",
    "incidents": "preheat_incidents_total",
    "eager_fallbacks": "preheat_eager_fallbacks_total",
    "planned_eager": "preheat_planned_eager_total",
}
SMALL = ((64, 64), (96, 32))
INVALID: tuple[dict[str, Any], ...] = (
    {"width": -1},
    {"promt": "a typo"},
    {"num_inference_steps": 10**9},
    {"guidance_scale": "much"},
    {"seed": 2**63},
    {"image": "bm90IGFuIGltYWdl"},
    {"mask_image": noise(20, 20, "L")},
    {"num_images": 3},
)


def stranger(rng: random.Random, buckets: Sequence[Sequence[int]]) -> dict[str, Any]:
    """A legal request of any task, size and number of pictures; few enough kinds that some can
    share a run.
    """
    most_height, most_width = rng.choice(buckets)
    height, width = rng.randint(16, most_height), rng.randint(16, most_width)
    num_steps = rng.choice([1, 1, 1, 1, 1, 1, 2, 3, 4, 5, 6])
    request: dict[str, Any] = {
        "prompt": "word " * rng.randint(0, 100),
        "height": height,
        "width": width,
        "seed": rng.randrange(2**63),
        "num_inference_steps": num_steps,
        "guidance_scale": rng.choice([0.0, 1.0, 5.0, 5.0, 5.0, 7.5]),
    }
    if rng.random() < 0.3:
        request["negative_prompt"] = rng.choice(["", "blurry"])
    if rng.random() < 0.3:
        strength = 1.0 if num_steps == 1 else rng.uniform(0.5, 1.0)
        request |= {"image": noise(height, width), "strength": strength}
        if rng.random() < 0.5:
            request["mask_image"] = noise(height, width, "L")
    if rng.random() < 0.15:
        request |= {"num_images": 2, "response_format": "b64_json"}
    return request


def batches(rng: random.Random, number: int, num_distinct: int) -> list[list[int | None]]:
    """Places in the pool of legal requests, 2 to 8 a batch; None stands for an invalid one."""
    return [
        [
            None if rng.random() < 0.15 else rng.randrange(num_distinct)
            for _ in range(rng.randint(2, 8))
        ]
        for _ in range(number)
    ]


def asked(client: Client, request: dict[str, Any], protocol: str) -> Reply:
    return client.predict(request) if protocol == "rest" else client.predict_grpc(request)


def pictures(reply: Reply) -> list[Any]:
    """Pixels, (height, width, 3) each."""
    if reply.body[:1] == b"{":
        files = [base64.b64decode(entry["b64_json"]) for entry in reply.json()["data"]]
    else:
        files = [reply.body]
    return [np.asarray(opened(file)).astype(int) for file in files]


def test_a_thousand_requests_of_strangers_compile_nothing_and_nobody_sees_the_others(
    served: Served,
) -> None:
    """Over 1,000 requests of every task, with and without guidance, of 1 to 6 steps: first each
    kind alone, by REST and gRPC in turn, then up to eight at once: runs are made up by chance.
    """
    rng = random.Random(5)
    pool = [stranger(rng, BUCKETS) for _ in range(NUM_DISTINCT)]
    before, answered_before = served.state(), served.metric("preheat_requests_total")
    runs_before, rows_before = generated(served)
    alone = [
        pictures(asked(served.client, request, ("rest", "grpc")[index % 2]))
        for index, request in enumerate(pool)
    ]
    for request, own in zip(pool, alone, strict=True):
        size = (request["height"], request["width"], 3)
        assert [picture.shape for picture in own] == [size] * request.get("num_images", 1)

    def check(place: int | None, protocol: str, bad: dict[str, Any]) -> int:
        """How far the answer is from that of the same request alone, in 1/255; invalid ones have to
        be refused.
        """
        if place is None:
            reply = asked(served.client, {"prompt": "a"} | bad, protocol)
            assert reply.status == (400 if protocol == "rest" else 0), reply.body[:300]
            assert (
                reply.error is not None
                and reply.error["code"] == 400
                and reply.error["field"] in bad
            )
            return 0
        reply = asked(served.client, pool[place], protocol)
        assert reply.status == (200 if protocol == "rest" else 0) and reply.error is None, (
            reply.body[:300]
        )
        if protocol == "rest":
            assert reply.headers["x-preheat-exact"] == "rounding"
        together = zip(pictures(reply), alone[place], strict=True)
        return max(int(np.abs(mine - its).max()) for mine, its in together)

    num_answered = NUM_DISTINCT
    with ThreadPoolExecutor(8) as clients:
        for batch in batches(rng, NUM_BATCHES, NUM_DISTINCT):
            protocols = [rng.choice(["rest", "grpc"]) for _ in batch]
            bad = [rng.choice(INVALID) for _ in batch]
            assert max(clients.map(check, batch, protocols, bad)) <= 1
            num_answered += sum(place is not None for place in batch)
    after, (runs, rows) = served.state(), generated(served)
    assert num_answered > 4 * NUM_BATCHES and after["requests"] == before["requests"] + num_answered
    assert runs - runs_before < 0.9 * (rows - rows_before), (
        "hardly any request shared a run: nothing was tried"
    )
    assert served.metric("preheat_requests_total") == answered_before + num_answered
    assert served.metric("preheat_requests_total", Engine=ENGINE) == served.metric(
        "preheat_requests_total"
    )
    for key, counter in COUNTERS.items():
        assert after[key] == 0, key
        assert any(line.startswith(counter) for line in served.exported()), (
            f"{counter} is exported even when it is 0"
        )
        assert served.metric(counter) == after[key], counter


def generated(served: Served) -> tuple[float, float]:
    """(pipeline runs, rows asked for) so far."""
    rows = served.metric("preheat_rows_painted_total") - served.metric("preheat_rows_filled_total")
    return served.metric("preheat_inference_seconds_count"), rows


@pytest.mark.parametrize("batch_sizes", [[1, 4], "dynamic"])
def test_invariant_strangers_are_equal_to_the_last_bit(
    watch: CompileWatch, tiny_sdxl: Path, batch_sizes: list[int] | str
) -> None:
    rng = random.Random(6)
    shapes = {
        "buckets": [list(bucket) for bucket in SMALL],
        "batch_sizes": batch_sizes,
        "invariant": True,
    }
    service = start(tiny_sdxl.parent, batchSize=4, shapes=shapes)
    pool = [stranger(rng, SMALL) for _ in range(30)]
    alone = [answered(service, [request])[0] for request in pool]
    for batch in batches(rng, 40, len(pool)):
        wishes = [
            {"prompt": "a"} | rng.choice(INVALID) if place is None else pool[place]
            for place in batch
        ]
        for place, answer in zip(batch, answered(service, wishes), strict=True):
            assert answer == (None if place is None else alone[place])
    state = service.current_state()
    assert (state.compiles_since_ready, state.incidents, state.eager_fallbacks) == (0, 0, 0)


def answered(service: Worker[Any, Any], wishes: Sequence[dict[str, Any]]) -> list[bytes | None]:
    """The bodies as a client gets them, of requests that arrive together; None for one that is
    refused.
    """
    jobs = []
    for index, wish in enumerate(wishes):
        try:
            jobs.append((index, service.parse({"body": wish})))
        except RequestError as error:
            assert error.code == 400 and error.field in wish
    bodies: list[bytes | None] = [None] * len(wishes)
    answers = service.run([job for _, job in jobs])
    for (index, _), response in zip(jobs, service.runner.postprocess(answers), strict=True):
        assert response.code == 200 and response.headers["x-preheat-exact"] == "bitwise"
        bodies[index] = response.body
    return bodies
