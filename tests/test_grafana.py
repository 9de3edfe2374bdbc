"""The dashboard asks for nothing that the server does not export, and the declaration is what the
handler emits.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DASHBOARD = json.loads((ROOT / "archive" / "grafana" / "preheat.json").read_text())
DECLARED = yaml.safe_load((ROOT / "archive" / "metrics.yaml").read_text())
SUFFIXES = ("_bucket", "_sum", "_count")
"""Of the samples that Prometheus makes of a histogram."""

WORD = r"[A-Za-z_:][\w:]*"
SELECTOR = re.compile(rf"({WORD})\s*\{{([^}}]*)\}}")
GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
OPERATORS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}


class Metric(NamedTuple):
    kind: str
    labels: frozenset[str]


def declared() -> dict[str, Metric]:
    """Every metric of archive/metrics.yaml with its kind and labels."""
    found = {}
    for section, own in (("ts_metrics", set()), ("model_metrics", {"Hostname"})):
        for kind, entries in DECLARED[section].items():
            for entry in entries:
                assert entry["name"] not in found, f"{entry['name']} is declared twice"
                found[entry["name"]] = Metric(kind, frozenset({*entry["dimensions"], *own}))
    return found


def family(name: str) -> str:
    """The declared metric that a sample belongs to: itself, or the histogram it is a part of."""
    metrics = declared()
    bases = [name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)]
    return next(
        (base for base in bases if base in metrics and metrics[base].kind == "histogram"), name
    )


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


@functools.cache
def expressions() -> tuple[str, ...]:
    """Every PromQL expression, those of the variables included."""
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    queries = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    return (*found, *(re.sub(r"^label_values\((.*),[^,]*\)$", r"\1", query) for query in queries))


def names(expression: str) -> set[str]:
    """The metrics that an expression names: what is neither function, operator, label, duration nor
    string.
    """
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    bare = GROUPING.sub("", bare)
    words = re.findall(rf"(?<![\w.$])({WORD})\b(?!\s*\()", bare)
    return {word for word in words if word not in OPERATORS}


def dashboard_metrics() -> set[str]:
    """The samples that the dashboard reads, as the metrics port names them: a histogram's end in
    _bucket, _sum or _count.
    """
    return set[str]().union(*map(names, expressions()))


def selectors() -> Iterator[tuple[str, set[str]]]:
    """Every metric with the labels it is selected by."""
    for expression in expressions():
        for name, labels in SELECTOR.findall(expression):
            yield (
                name,
                set(re.findall(rf"({WORD})\s*(?:=~|!~|!=|=)", re.sub(r'"[^"]*"', "", labels))),
            )


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ('sum by (Bucket, le) (rate(a_total{x=~"b c"}[5m])) / 1e6', {"a_total"}),
        (
            "histogram_quantile(0.99, sum(rate(b_bucket[$__rate_interval])) by (le)) or vector(0)",
            {"b_bucket"},
        ),
        ("1 - QueueTime / on (Hostname) group_left() c:d unless e", {"QueueTime", "c:d", "e"}),
    ],
)
def test_names_are_told_from_all_else(expression: str, expected: set[str]) -> None:
    assert names(expression) == expected


def test_every_metric_on_the_dashboard_is_declared() -> None:
    metrics = declared()
    assert not {name for name in dashboard_metrics() if family(name) not in metrics}
    for name in dashboard_metrics():
        assert (metrics[family(name)].kind == "histogram") == (family(name) != name), (
            f"{name}: a histogram has no bare sample"
        )


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    ours = {name for name in declared() if name.startswith("preheat_")}
    assert ours == {family(name) for name in dashboard_metrics() if name.startswith("preheat_")}


def test_labels_are_those_the_metric_has() -> None:
    metrics, chosen = declared(), list(selectors())
    assert len(chosen) >= len(expressions()) - 1
    for name, labels in chosen:
        assert labels <= metrics[family(name)].labels, name
    for expression in expressions():
        known = frozenset[str]().union(
            {"le"}, *(metrics[family(name)].labels for name in names(expression))
        )
        for grouping in GROUPING.findall(expression):
            assert set(re.findall(WORD, grouping)) <= known, expression


def test_counters_are_read_as_rates_but_for_the_five_that_are_totals() -> None:
    metrics, bare = declared(), set()
    for expression in expressions():
        rated = set(re.findall(rf"\b(?:rate|increase)\(({WORD})", expression))
        bare |= {
            name for name in names(expression) if metrics[family(name)].kind != "gauge"
        } - rated
    assert bare == {
        "preheat_compiles_since_ready_total",
        "preheat_incidents_total",
        "preheat_eager_fallbacks_total",
        "preheat_planned_eager_total",
        "preheat_shared_cache_total",
    }


@pytest.mark.parametrize(
    "metric",
    [
        "preheat_compiles_since_ready_total",
        "preheat_incidents_total",
        "preheat_eager_fallbacks_total",
    ],
)
def test_a_broken_promise_is_red(metric: str) -> None:
    (panel,) = [p for p in panels() if p["type"] == "stat" and metric in p["targets"][0]["expr"]]
    steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert steps == [{"color": "green", "value": None}, {"color": "red", "value": 1}]


@pytest.mark.parametrize("quantile", ["0.5", "0.95", "0.99"])
def test_every_histogram_is_shown_in_quantiles(quantile: str) -> None:
    for name, metric in declared().items():
        if metric.kind == "histogram":
            wanted = re.compile(
                rf"histogram_quantile\({re.escape(quantile)}, sum by \(le\) \(rate\({name}_bucket\b"
            )
            assert any(wanted.match(expression) for expression in expressions()), name


def test_a_user_picks_the_source_and_the_model() -> None:
    variables = {variable["name"]: variable["type"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource": "datasource", "model": "query", "host": "query"}
    sources = [
        variable["datasource"]
        for variable in DASHBOARD["templating"]["list"]
        if variable["type"] == "query"
    ]
    for panel in panels():
        sources += [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all("$model" in t["expr"] or "$host" in t["expr"] for t in panel["targets"]), panel[
            "title"
        ]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


def test_panels_have_their_own_place_and_say_what_they_show() -> None:
    assert DASHBOARD["schemaVersion"] >= 39
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for a, b in itertools.combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
    assert all(panel["title"] and panel["description"] for panel in panels())


def test_the_declaration_is_what_the_handler_emits() -> None:
    every = [*(ROOT / "handler").glob("*.py"), *(ROOT / "handler" / "preheat").rglob("*.py")]
    # the gateway's own go past TorchServe, which drops what is not declared
    sources = [path for path in every if "gateway" not in path.parts]
    emitted = {
        name
        for path in sources
        for name in re.findall(
            r'"(preheat_\w+_(?:total|seconds|bytes|bucket|sum))"', path.read_text()
        )
    }
    assert emitted == {name for name in declared() if name.startswith("preheat_")}


def test_our_metrics_end_in_the_labels_that_torchserve_has() -> None:
    for entries in DECLARED["model_metrics"].values():
        assert all(entry["dimensions"][-2:] == ["ModelName", "Level"] for entry in entries)


def test_torchserves_own_metrics_are_as_it_ships_them() -> None:
    spec = find_spec("ts")
    assert spec is not None and spec.origin is not None
    shipped = yaml.safe_load((Path(spec.origin).parent / "configs" / "metrics.yaml").read_text())
    assert DECLARED["ts_metrics"] == shipped["ts_metrics"]
    assert all(
        entry in DECLARED["model_metrics"]["gauge"] for entry in shipped["model_metrics"]["gauge"]
    )


def test_help_texts_say_what_is_counted_in_what_torchserve_reads_as_a_unit() -> None:
    """Its own pattern of a metric's line takes words and spaces only."""
    units = {
        entry["name"]: entry["unit"]
        for entries in DECLARED["model_metrics"].values()
        for entry in entries
        if entry["name"].startswith("preheat_")
    }
    assert all(re.fullmatch(r"\w+( \w+)+", unit) for unit in units.values()), units
