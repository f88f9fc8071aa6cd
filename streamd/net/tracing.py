"""Tracing: gives each generation its place in a distributed trace, and writes its span when it is over.

A generation is over when its stream is sealed and the request that began it has ended; without a stream, when the
request has ended. So a generation whose reader left has a single span, with events for the detach and each resume, and
other requests that read its stream have none.

Nothing here knows OpenTelemetry's SDK: streamd/otel makes spans of finished traces.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from streamd.core.stream import Stream, Subscriber
from streamd.net.request import Request
from streamd.net.trace import Trace
from streamd.wire.gen_ai import operation_of
from streamd.wire.trace_context import SAMPLED, TraceParent, parent_in

_SPACE: Final = 1 << 64  # of the lower half of a trace id, by which OpenTelemetry's SDKs sample


class Tracing:
    """A worker's generations that are traced. `write` gets each that is recorded, with its request, at its end."""

    def __init__(
        self, *, ratio: float, time: Callable[[], float], rng: random.Random, write: Callable[[Trace, Request], None]
    ) -> None:
        """`ratio`: the share that is recorded of generations whose client sent no traceparent."""
        self._bound = round(ratio * _SPACE)
        self._time = time
        self._rng = rng
        self._write = write
        self._live: dict[str, tuple[Trace, Request]] = {}  # by stream; bounded by the streams under way

    def begin(self, request: Request) -> None:
        """The request goes upstream: if it asks for a generation, it gets a trace, which `ask_of` sends on."""
        operation = operation_of(request.method, request.path, request.dialect)
        if not operation or request.head is None:
            return
        parent = parent_in(request.head.headers)
        if parent is not None:
            own = parent._replace(span_id=self._drawn(64))
        else:
            trace_id = self._drawn(128)
            own = TraceParent(trace_id, self._drawn(64), SAMPLED if trace_id % _SPACE < self._bound else 0)
        request.trace = Trace(operation, own, parent)
        request.traceparent = own.encoded()

    def _drawn(self, bits: int) -> int:
        return self._rng.getrandbits(bits) or 1

    def opened(self, request: Request, stream: Stream) -> None:
        """The request's generation is this stream, unless the answer turns out to be none."""
        trace = request.trace
        if trace is not None and trace.is_recorded:
            trace.stream = stream
            self._live[stream.id] = trace, request

    def resumed(self, stream: Stream) -> None:
        """A reader comes back to the stream."""
        found = self._live.get(stream.id)
        if found is not None:
            found[0].note(self._time(), "resume", last_seq=stream.events)

    def ended(self, request: Request, reader: Subscriber | None) -> None:
        """A request has ended: that of a generation, or another reader's of its stream."""
        own = request.trace
        stream = reader.stream if reader is not None else own.stream if own is not None else None
        trace = own
        if stream is not None and (own is None or own.stream is not stream):
            found = self._live.get(stream.id)
            trace = found[0] if found is not None else None
        if trace is not None and stream is not None:
            self._note_leaving(trace, request, stream, reader)
        if own is None or not own.is_recorded:
            return
        own.is_request_over = True
        if own.stream is None:
            own.reason, own.ended_at = request.reason, self._time()
        if own.reason is not None:
            self._finish(own, request)

    def _note_leaving(self, trace: Trace, request: Request, stream: Stream, reader: Subscriber | None) -> None:
        now, reason = self._time(), request.reason.word if request.reason is not None else ""
        if reader is not None and reader.dropped:
            trace.note(now, "gap", events=reader.dropped)
        if stream.reason is None and not stream.readers and stream.grace_until:
            grace_s = round(stream.grace_until - now, 3)
            trace.note(now, "detach", reason=reason, last_seq=stream.events, grace_s=grace_s)

    def sealed(self, stream: Stream) -> None:
        """The stream takes no more events."""
        trace, request = self._live.pop(stream.id, (None, None))
        if trace is None or request is None or trace.stream is not stream:
            return
        trace.reason, trace.ended_at = stream.reason, stream.sealed_at
        if trace.is_request_over:
            self._finish(trace, request)

    def _finish(self, trace: Trace, request: Request) -> None:
        request.trace = None  # through the stream, its source and the request it would be a cycle
        self._write(trace, request)
