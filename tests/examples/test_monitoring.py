"""The scrape configuration, alert rules and dashboard: they name metrics and labels that there are.

`make test-prometheus` lets a real Prometheus judge them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, chunk, event, get, post, rig

from streamd.config import UpstreamSettings
from streamd.measure import Label
from streamd.metrics import StreamdCollector
from streamd.net import totals

EXAMPLES = Path(__file__).parents[2] / "examples"
RULES = (EXAMPLES / "prometheus" / "streamd.rules.yml").read_text(encoding="utf-8")
TESTS = (EXAMPLES / "prometheus" / "streamd.rules.test.yml").read_text(encoding="utf-8")
DASHBOARD: dict[str, Any] = json.loads((EXAMPLES / "grafana" / "streamd.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ALERTS = re.findall(r"- alert: (\w+)", RULES)


@pytest.fixture(scope="module")
def labels() -> dict[str, set[str]]:
    """The labels of each metric, by the name of its samples."""
    with rig(upstreams=(UpstreamSettings(name="up", url="http://up.test:1", models=("m",)),)) as r:
        r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a"), event("b"), DONE) + LAST)
        found = totals.of_worker(r.runtime, r.worker.upstreams)
        found.counters.engine_writes = dict.fromkeys(totals.KEYS[Label.KIND], 0)
        found.counters.engine_refused = dict.fromkeys(totals.KEYS[Label.WHY], 0)
        found.gauges |= {"engine_servers": 1, "certificate_s": 1, "drain_deadline_s": 1, "pid": 1, "beat_ms": 1}
        found.upstreams["up"]["client_certificate_s"] = 1
        families = StreamdCollector(lambda: found, lambda: {"memory": 0.5}).collect()
        names = {"up": {"job", "instance"}}
        for family in families:
            for name in (family.name, *(sample.name for sample in family.samples)):
                names.setdefault(name, set()).update(*(sample.labels for sample in family.samples))
        failures = {"upstream", "reason"}  # none has happened
        return {**names, "streamd_upstream_failures_total": failures}


def metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:(?:streamd|process)_[a-z0-9_]+[a-z]|up)\b", expression))


def expressions() -> list[str]:
    rules = re.findall(r"expr: \|?(.*?)\n        (?:for|labels):", RULES, re.DOTALL)
    assert len(rules) == len(ALERTS)
    return [*rules, *(target["expr"] for panel in PANELS for target in panel["targets"])]


@pytest.mark.parametrize("expression", expressions())
def test_every_metric_and_label_in_an_expression_exists(expression: str, labels: dict[str, set[str]]) -> None:
    used = metrics_in(expression)
    assert used and sorted(used - set(labels)) == []
    known = {"job", "instance", "le"}.union(*(labels[name] for name in used))
    grouped = {name.strip() for by in re.findall(r"(?:by|on) \(([^)]*)\)", expression) for name in by.split(",")}
    matched = set(re.findall(r"(\w+)[!=]~?\"", expression))
    assert sorted((grouped | matched) - known) == []


def test_every_alert_has_a_summary_a_severity_and_a_test() -> None:
    assert len(ALERTS) == RULES.count("summary: ") == RULES.count("labels: {severity: ")
    for alert in ALERTS:
        firing, calm = (TESTS.count(text) for text in (f"alertname: {alert}\n        exp_alerts:\n", "exp_alerts: []"))
        assert firing == 1 and calm == len(ALERTS), alert


def test_a_dashboards_panels_are_told_apart_and_lie_in_its_grid() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells


def test_a_dashboards_variables_are_those_that_its_queries_use() -> None:
    variables = {each["name"] for each in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(PANELS))) - {"__rate_interval"}
    assert used == variables


def test_the_scrape_configuration_has_the_port_of_the_documents() -> None:
    config = (EXAMPLES / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
    assert '"127.0.0.1:9464"' in config and "streamd.rules.yml" in config
    assert 'metrics_listen = "127.0.0.1:9464"' in (EXAMPLES.parent / "docs" / "OPERATIONS.md").read_text(
        encoding="utf-8"
    )


def test_a_scrape_of_a_used_daemon_is_text_that_promtool_would_take() -> None:
    """Names, types and units as Prometheus' conventions have them."""
    with rig() as r:
        r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        text = r.client(get("/metrics"), listener="metrics").answer.body.decode()
    types = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    helped = set(re.findall(r"^# HELP (\w+) \S", text, re.MULTILINE))
    assert helped == set(types)
    assert [name for name, kind in types.items() if (kind == "counter") != name.endswith("_total")] == []
    assert [name for name, kind in types.items() if kind == "histogram" and not name.endswith("_seconds")] == []
