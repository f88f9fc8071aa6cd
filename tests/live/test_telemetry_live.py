"""A daemon and a collector on loopback: spans and metrics arrive, and without the collector nothing else changes."""

from __future__ import annotations

import json
import re
import signal

from collector import collecting, plain
from served import Served, served, upstream

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
COMPLETE = (("reason", "complete"),)


def chat(d: Served, stream: bool = True, **fields: str) -> None:
    body = {"model": "mock-llm", "messages": [{"role": "user", "content": "a secret prompt"}]}
    body |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    headers = {"Content-Type": "application/json", "X-Mock-Tokens": "5", "X-Request-Id": "alices-own-id"} | fields
    answer = d.request("POST", "/v1/chat/completions", json.dumps(body).encode(), headers)
    assert answer.status == 200 and answer.read()


def number(d: Served, metric: str) -> float:
    text = d.request("GET", "/metrics").read().decode()
    found = re.search(rf"^{metric} (\S+)$", text, re.MULTILINE)
    assert found is not None, metric
    return float(found[1])


def test_spans_and_metrics_of_two_workers_reach_a_collector_and_the_last_leave_at_the_drain() -> None:
    args = ("--workers", "2", "--otlp-metrics-interval", "1s", "--upstream")
    environ = {"OTEL_BSP_SCHEDULE_DELAY": "600000", "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test"}
    with collecting() as c, upstream() as mock, served(*args, mock, "--otlp-endpoint", c.url, **environ) as d:
        d.notify.until("READY=1")
        for k in range(6):
            chat(d, stream=k % 2 == 0, traceparent=PARENT)
        # The daemon's totals come from a single worker, under the names of /metrics.
        d.until(lambda: COMPLETE in (p := c.points("streamd_requests_ended")) and p[COMPLETE].as_int == 6, "metrics")
        ended = c.points("streamd_requests_ended")[COMPLETE]
        assert ended.start_time_unix_nano < ended.time_unix_nano
        (latency,) = c.points("streamd_e2e_request_latency_seconds").values()
        assert latency.count == sum(latency.bucket_counts) == 6 and latency.sum > 0
        assert len(latency.bucket_counts) == len(latency.explicit_bounds) + 1
        assert not latency.HasField("max")
        assert c.spans == []
        d.signal(signal.SIGTERM)
        assert d.ended() == 0
    assert len(c.spans) == 6
    resources = [plain(each.resource.attributes) for export in c.traces for each in export.resource_spans]
    assert {each["service.name"] for each in resources} == {"streamd"}
    assert {each["deployment.environment.name"] for each in resources} == {"test"}
    assert len({each["service.instance.id"] for each in resources}) == 1, "all workers are one instance"
    for span in c.spans:
        facts = plain(span.attributes)
        assert span.name == "chat mock-llm" and facts["gen_ai.operation.name"] == "chat"
        assert span.trace_id.hex() in PARENT and span.parent_span_id.hex() in PARENT
        assert facts["gen_ai.usage.output_tokens"] == 5 and facts["gen_ai.response.finish_reasons"] == ["stop"]
        assert facts["server.address"] == "127.0.0.1" and facts["http.response.status_code"] == 200
        assert 0 < span.start_time_unix_nano < span.end_time_unix_nano
    assert sum(plain(span.attributes).get("gen_ai.request.stream", False) for span in c.spans) == 3
    told = b"".join(export.SerializeToString() for export in c.traces)
    assert not any(secret in told for secret in (b"secret prompt", b"alices-own-id"))


def test_an_outage_of_the_collector_is_one_warning_and_counted_and_does_not_hold_up_the_end() -> None:
    args = ("--otlp-metrics-interval", "0", "--upstream")
    environ = {"OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_EXPORTER_OTLP_TIMEOUT": "2"}
    with (
        collecting(is_up=False) as c,
        upstream() as mock,
        served(*args, mock, "--otlp-endpoint", f"{c.url}/base/", **environ) as d,
    ):
        d.notify.until("READY=1")
        chat(d)
        d.line(r"WARNING collector out; .*endpoint=http://127.0.0.1:\d+/base/ error=.*refused")
        chat(d)
        d.until(lambda: number(d, "streamd_otlp_spans_lost_total") == 2, "two lost spans")
        assert number(d, "streamd_otlp_export_failures_total") == 2
        c.go_up()
        chat(d)
        d.line(r"INFO collector back .*spans_lost=2")
        assert len(c.spans) == number(d, "streamd_otlp_spans_total") == 1
        assert c.paths == {"/base/v1/traces"}
        assert sum(" WARNING " in line or " ERROR " in line for line in d.lines) == 1
        c.go_down()  # its port takes connections that nobody answers
        chat(d)
        d.signal(signal.SIGTERM)
        assert d.ended() == 0
