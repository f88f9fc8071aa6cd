"""The access log: one line per request, at its end, with the numbers. No prompt, answer, key or query is in it."""

from __future__ import annotations

from streamd.core.auth import ANONYMOUS
from streamd.daemon import logs
from streamd.net.client import ClientConnection
from streamd.net.request import Request
from streamd.net.runtime import Runtime


class AccessLog:
    """Counts and writes what a request came to."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def request_ended(self, connection: ClientConnection, request: Request) -> None:
        counters, now = self._runtime.counters, self._runtime.time()
        duration_s = now - request.started_at
        assert request.reason is not None
        counters.requests_ended[request.reason] += 1
        counters.request_s.observe(duration_s)
        reader = connection.reader
        stream = reader.stream if reader is not None else None
        events = delivered = dropped = None
        first_s = request.answered_at - request.started_at if request.answered_at else None
        if reader is not None and stream is not None:
            events, delivered, dropped = reader.events_delivered, reader.bytes_delivered, reader.dropped
            counters.delivered_events += events
            counters.delivered_bytes += delivered
            counters.dropped_events += dropped
            first_s = None
            if stream.first_event_at and reader.seq_start == 1:
                first_s = max(0.0, stream.first_event_at - request.started_at)
                counters.first_event_s.observe(first_s)
        logs.event(
            logs.INFO,
            "request",
            id=request.id,
            peer=connection.peer,
            method=request.method,
            path=request.path,
            status=request.status,
            reason=request.reason,
            duration_s=round(duration_s, 4),
            first_s=round(first_s, 4) if first_s is not None else None,
            events=events,
            bytes=delivered if delivered is not None else connection.bytes_passed,
            dropped=dropped or None,
            stream=stream.id if stream is not None else None,
            upstream=request.upstream or None,
            model=request.model or None,
            principal=request.principal.id if request.principal is not ANONYMOUS else None,
            traceparent=request.traceparent or None,
        )
