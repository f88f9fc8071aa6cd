"""The request log: a line per request, written at its end, with its numbers but no prompt, answer, key or query.

Lines are written at the end of the loop's turn, because a line costs 10 us of formatting and a system call: when a
thousand readers leave at once, their thousand upstreams are cut before the first line is written.
"""

from __future__ import annotations

import asyncio

from streamd.core.auth import ANONYMOUS
from streamd.daemon import logs
from streamd.net.answer import Answer
from streamd.net.runtime import Runtime


class LateLines:
    """Log lines that wait for the end of the loop's turn; at most a line per request and stream that ended in it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lines: list[tuple[str, dict[str, logs.Value]]] = []

    def info(self, name: str, /, **fields: logs.Value) -> None:
        """Do logs.event() at level INFO, at the end of the turn."""
        if not self._lines:
            self._loop.call_soon(self.flush)
        self._lines.append((name, fields))

    def flush(self) -> None:
        """Write the waiting lines now."""
        lines, self._lines = self._lines, []
        for name, fields in lines:
            logs.event(logs.INFO, name, **fields)


class RequestLog:
    """Counts each request that has ended, and writes its line."""

    def __init__(self, runtime: Runtime, lines: LateLines) -> None:
        self._runtime = runtime
        self._lines = lines

    def request_ended(self, answer: Answer) -> None:
        request, reader = answer.request, answer.reader
        counters, now = self._runtime.counters, self._runtime.time()
        duration_s = now - request.started_at
        assert request.reason is not None
        counters.requests_ended[request.reason] += 1
        counters.request_s.observe(duration_s)
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
        self._lines.info(
            "request",
            id=request.id,
            peer=answer.origin.peer(request),
            method=request.method,
            path=request.path,
            status=request.status,
            reason=request.reason,
            duration_s=round(duration_s, 4),
            first_s=round(first_s, 4) if first_s is not None else None,
            events=events,
            bytes=delivered if delivered is not None else answer.body_bytes,
            dropped=dropped or None,
            stream=stream.id if stream is not None else None,
            upstream=request.upstream or None,
            model=request.model or None,
            principal=request.principal.id if request.principal is not ANONYMOUS else None,
            traceparent=request.traceparent or None,
        )
