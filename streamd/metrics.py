"""The counters as Prometheus text and as the dict of /status; rendered only when somebody asks.

Names and units follow Prometheus's conventions: base units (seconds, bytes), `_total` on counters, labels from enums
only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, exposition
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from streamd import __version__
from streamd.counters import Histogram
from streamd.net.totals import Totals


class StreamdCollector(Collector):
    """Turns the daemon's totals into metric families. `saturation` is by part, 0 to 1."""

    def __init__(self, totals: Callable[[], Totals], saturation: Callable[[], dict[str, float]]) -> None:
        self._totals = totals
        self._saturation = saturation

    def collect(self) -> Iterable[Metric]:
        totals = self._totals()
        yield from self._connections(totals)
        yield from self._streams(totals)
        yield from self._readers(totals)
        yield from self._upstream(totals)
        yield from self._process(totals)

    def _connections(self, totals: Totals) -> Iterator[Metric]:
        counters, gauges = totals.counters, totals.gauges
        yield _gauge("streamd_connections", "Downstream connections open now.", gauges["connections"])
        yield _counter(
            "streamd_connections_accepted", "Downstream connections accepted.", counters.connections_accepted
        )
        yield _by_reason("streamd_connections_closed", "Downstream connections ended.", counters.connections_closed)
        yield _counter("streamd_passed_on", "Connections handed to the worker that owns their stream.", counters.moved)
        yield _counter("streamd_requests", "Requests whose head was read.", counters.requests)
        yield _by_reason("streamd_requests_ended", "Requests ended.", counters.requests_ended)
        yield _by_reason("streamd_requests_refused", "Requests that streamd answered with an error.", counters.refused)
        responses = CounterMetricFamily("streamd_responses", "Answers begun, by status.", labels=["status"])
        for status, count in sorted(counters.responses.items()):
            responses.add_metric([str(status)], count)
        yield responses
        yield _histogram("streamd_request_duration_seconds", "From a request's head to its end.", counters.request_s)
        yield _gauge("streamd_request_bodies_bytes", "Request bodies held now.", gauges["bodies_bytes"])

    def _streams(self, totals: Totals) -> Iterator[Metric]:
        counters, gauges = totals.counters, totals.gauges
        streams = GaugeMetricFamily("streamd_streams", "Streams held now, by state.", labels=["state"])
        streams.add_metric(["live"], gauges["streams_live"] - gauges["streams_detached"])
        streams.add_metric(["detached"], gauges["streams_detached"])
        streams.add_metric(["sealed"], gauges["streams_sealed"])
        yield streams
        yield _counter("streamd_streams_opened", "Streams opened.", counters.streams_opened)
        yield _by_reason("streamd_streams_sealed", "Streams ended.", counters.streams_sealed)
        yield _counter("streamd_events", "Events that came from upstreams and publishers.", counters.events)
        yield _counter(
            "streamd_text_events", "Of these, events with text: tokens, for most servers.", counters.text_events
        )
        yield _counter("streamd_event_bytes", "Their bytes, framed, each counted once.", counters.event_bytes)
        yield _gauge("streamd_replay_log_bytes", "Memory of all replay logs.", gauges["log_bytes"])

    def _readers(self, totals: Totals) -> Iterator[Metric]:
        counters, gauges = totals.counters, totals.gauges
        yield _gauge("streamd_subscribers", "Readers of streams now.", gauges["subscribers"])
        yield _gauge(
            "streamd_subscribers_paused", "Readers whose connection takes nothing now.", gauges["subscribers_paused"]
        )
        yield _counter("streamd_subscriptions", "Subscriptions begun.", counters.subscriptions)
        yield _counter("streamd_resumes", "Of these, with a position.", counters.resumes)
        yield _counter(
            "streamd_delivered_events", "Events handed to readers' sockets, ended readers.", counters.delivered_events
        )
        yield _counter("streamd_delivered_bytes", "Their bytes, ended readers.", counters.delivered_bytes)
        yield _counter("streamd_dropped_events", "Events announced to readers as gaps.", counters.dropped_events)
        yield _counter("streamd_pauses", "Times that a connection's socket was full.", counters.paused)
        yield _histogram(
            "streamd_time_to_first_event_seconds", "From a request's head to its first event.", counters.first_event_s
        )
        yield _histogram(
            "streamd_added_before_upstream_seconds",
            "Of that, what streamd added: from the head to the request sent upstream, connecting included.",
            counters.added_s,
        )

    def _upstream(self, totals: Totals) -> Iterator[Metric]:
        counters = totals.counters
        in_flight = GaugeMetricFamily("streamd_upstream_in_flight", "Requests under way.", labels=["upstream"])
        idle = GaugeMetricFamily("streamd_upstream_idle_connections", "Pooled connections.", labels=["upstream"])
        left_out = GaugeMetricFamily("streamd_upstream_left_out", "1 while left out for failing.", labels=["upstream"])
        for name, values in totals.upstreams.items():
            in_flight.add_metric([name], values["in_flight"])
            idle.add_metric([name], values["idle"])
            left_out.add_metric([name], values["left_out"])
        yield from (in_flight, idle, left_out)
        yield _by_upstream("streamd_upstream_requests", "Requests sent.", counters.upstream_requests)
        yield _by_upstream("streamd_upstream_connects", "Connections established.", counters.upstream_connects)
        yield _by_upstream(
            "streamd_upstream_cancels", "Requests cut off because nobody reads.", counters.upstream_cancels
        )
        failures = CounterMetricFamily("streamd_upstream_failures", "Failures.", labels=["upstream", "reason"])
        for (name, reason), count in counters.upstream_failures.items():
            failures.add_metric([name, reason.word], count)
        yield failures
        yield _histogram("streamd_upstream_connect_seconds", "Establishing a connection.", counters.upstream_connect_s)
        yield _histogram(
            "streamd_upstream_first_byte_seconds",
            "From a request sent to its answer's head.",
            counters.upstream_first_byte_s,
        )

    def _process(self, totals: Totals) -> Iterator[Metric]:
        counters = totals.counters
        yield _histogram("streamd_loop_lag_seconds", "How late the 250 ms sweep came.", counters.loop_lag_s)
        saturation = GaugeMetricFamily(
            "streamd_saturation", "How full, 0 to 1, by part; the highest is the autoscaler's.", labels=["part"]
        )
        parts = self._saturation()
        for part, value in {**parts, "highest": max(parts.values())}.items():
            saturation.add_metric([part], value)
        yield saturation
        yield _counter("streamd_bugs", "Mistakes of streamd itself; the log has each one's traceback.", counters.bugs)
        info = GaugeMetricFamily("streamd_build_info", "Always 1.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info


class Metrics:
    """GET /metrics."""

    def __init__(self, collector: Collector) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(collector)

    def render(self) -> tuple[bytes, bytes]:
        """(content type, text)."""
        return exposition.CONTENT_TYPE_LATEST.encode(), exposition.generate_latest(self._registry)


def status(totals: Totals, *, state: str, uptime_s: float, admission: dict[str, object]) -> dict[str, Any]:
    """The state in a person's words, for /status."""
    gauges = totals.gauges
    return {
        "version": __version__,
        "state": state,
        "uptime_s": round(uptime_s, 1),
        "connections": gauges["connections"],
        "streams": {
            "live": gauges["streams_live"],
            "detached": gauges["streams_detached"],
            "sealed": gauges["streams_sealed"],
        },
        "subscribers": gauges["subscribers"],
        "log_bytes": gauges["log_bytes"],
        "admission": admission,
        "upstreams": totals.upstreams,
    }


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _by_reason(name: str, text: str, counts: dict[Any, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=["reason"])
    for reason, count in counts.items():
        family.add_metric([reason.word], count)
    return family


def _by_upstream(name: str, text: str, counts: dict[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=["upstream"])
    for upstream, count in counts.items():
        family.add_metric([upstream], count)
    return family


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    buckets: list[tuple[str, float]] = []
    total = 0
    for bound, count in zip((*histogram.buckets, float("inf")), histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=histogram.sum)
