"""READY means hot, and nothing compiles after it: read from the state and from Prometheus, under
traffic of every kind.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

from served import Served, opened, random_request
from test_grafana import dashboard_metrics

NUM_REQUESTS = 1000
COUNTERS = {
    "compiles_since_ready": "preheat_compiles_since_ready_total",
    "incidents": "preheat_incidents_total",
    "eager_fallbacks": "preheat_eager_fallbacks_total",
    "planned_eager": "preheat_planned_eager_total",
}


def test_a_thousand_requests_of_every_kind_compile_nothing(served: Served) -> None:
    """Eight clients at once, so that batches are made up by chance; REST and gRPC by turns."""
    rng = random.Random(1)
    wishes = [(index, random_request(rng)) for index in range(NUM_REQUESTS)]
    before, answered_before = served.state(), served.metric("preheat_requests_total")
    batches_before = served.metric("preheat_rows_painted_total")

    def ask(wish: tuple[int, dict[str, object]]) -> None:
        index, request = wish
        rest = index % 2 == 0
        reply = served.client.predict(request) if rest else served.client.predict_grpc(request)
        assert reply.status == (200 if rest else 0) and reply.error is None, reply.body[:300]
        assert opened(reply.body).size == (request["width"], request["height"])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, wishes))
    after = served.state()
    assert after["requests"] == before["requests"] + NUM_REQUESTS
    assert served.metric("preheat_requests_total") == answered_before + NUM_REQUESTS
    assert served.metric("preheat_requests_total", Engine="compiled") == served.metric(
        "preheat_requests_total"
    )
    assert served.metric("preheat_rows_painted_total") >= batches_before + NUM_REQUESTS
    for key, counter in COUNTERS.items():
        assert after[key] == 0, key
        assert any(line.startswith(counter) for line in served.exported()), (
            f"{counter} is exported even when it is 0"
        )
        assert served.metric(counter) == after[key], counter


def test_padding_and_time_are_counted(served: Served) -> None:
    generated, cropped = "preheat_pixels_painted_total", "preheat_pixels_cropped_total"
    before = [
        served.metric(name) for name in (generated, cropped, "preheat_inference_seconds_count")
    ]
    served.client.predict({"prompt": "a", "height": 128, "width": 256})
    after = [
        served.metric(name) for name in (generated, cropped, "preheat_inference_seconds_count")
    ]
    assert [now - then for now, then in zip(after, before, strict=True)] == [
        320 * 192,
        320 * 192 - 128 * 256,
        1,
    ]


def test_a_refusal_is_counted_by_field_and_never_by_a_clients_text(served: Served) -> None:
    before = [served.metric("preheat_refused_total", Field=field) for field in ("width", "other")]
    served.client.predict({"prompt": "a", "width": -1})
    served.client.predict({"prompt": "a", 'evil"} 1\n[METRICS]': 1})
    after = [served.metric("preheat_refused_total", Field=field) for field in ("width", "other")]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1]
    assert not any("evil" in line for line in served.exported())


def test_a_request_that_came_too_late_is_counted_as_failed(served: Served) -> None:
    before = served.metric("preheat_failed_total", Code="504")
    assert (
        served.client.post(json={"prompt": "a"}, headers={"x-preheat-deadline": "1"}).status == 504
    )
    assert served.metric("preheat_failed_total", Code="504") == before + 1


def test_every_metric_that_the_dashboard_names_is_exported(served: Served) -> None:
    served.client.predict({"prompt": "a", "height": 64, "width": 64})
    served.client.predict({"prompt": "a", "width": -1})
    served.client.post(json={"prompt": "a"}, headers={"x-preheat-deadline": "1"})
    # TorchServe's own Requests5XX has no sample before there was one.
    names = {line.removeprefix("# TYPE ").split("{")[0].split(" ")[0] for line in served.exported()}
    assert dashboard_metrics() <= names, sorted(dashboard_metrics() - names)


def test_no_prompt_is_logged(served: Served) -> None:
    secret = "xylophone-7319"
    # longer than CLIP takes
    served.client.predict({"prompt": f"{secret} " * 100, "height": 64, "width": 64})
    served.client.predict({"prompt": secret, "width": -1})
    served.client.predict({"prompt": secret, secret: 1})
    logs = [path for path in served.running.run_dir.rglob("*.log") if path.is_file()]
    assert logs and all(secret not in path.read_text(errors="replace") for path in logs)
