"""What is counted of requests, and what is not said of them; test_strangers.py reads that nothing
compiles after READY.
"""

from __future__ import annotations

from served import Served
from test_grafana import dashboard_metrics


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
