"""A collector of OpenTelemetry: takes OTLP over HTTP, decodes it, and can be out of reach or refuse."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import threading
from collections.abc import Iterator
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue


class Collector(http.server.ThreadingHTTPServer):
    """`traces` and `metrics` grow with each export that it takes; `status` is its answer."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Export, bind_and_activate=False)
        self.server_bind()  # so the port is its own, and refuses connections
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._thread: threading.Thread | None = None
        self.status = 200
        self.traces: list[ExportTraceServiceRequest] = []
        self.metrics: list[ExportMetricsServiceRequest] = []
        self.paths: set[str] = set()

    def go_up(self) -> None:
        """Serve from now on."""
        self.server_activate()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def go_down(self) -> None:
        """Serve no more."""
        if self._thread is not None:
            self.shutdown()
            self._thread.join()

    @property
    def spans(self) -> list[Any]:
        return [
            span
            for export in self.traces
            for resource in export.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def points(self, name: str) -> dict[tuple[tuple[str, str], ...], Any]:
        """The points of a metric in the last export, by their attributes."""
        if not self.metrics:
            return {}
        found = [
            metric
            for resource in self.metrics[-1].resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
        ]
        return {
            tuple(sorted(plain(point.attributes).items())): point
            for metric in found
            for point in getattr(metric, metric.WhichOneof("data")).data_points
        }

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore connections that streamd or its death broke off."""


def plain(attributes: Any) -> dict[str, Any]:
    """Attributes as a dict."""
    return {each.key: _value(each.value) for each in attributes if isinstance(each, KeyValue)}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind or "string_value")


class _Export(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        server = self.server
        server.paths.add(self.path)
        if server.status == 200 and self.path.endswith("/v1/traces"):
            server.traces.append(ExportTraceServiceRequest.FromString(body))
        elif server.status == 200:
            server.metrics.append(ExportMetricsServiceRequest.FromString(body))
        self.send_response(server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words: object) -> None:
        """Log nothing."""


@contextlib.contextmanager
def collecting(*, is_up: bool = True) -> Iterator[Collector]:
    """A collector; unless it `is_up`, out of reach until the test calls `go_up()`."""
    with Collector() as collector:
        if is_up:
            collector.go_up()
        try:
            yield collector
        finally:
            collector.go_down()
