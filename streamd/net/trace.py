"""Trace: a generation's place in a distributed trace, and what has happened to it, until its span is written."""

from __future__ import annotations

from typing import Final, NamedTuple

from streamd.core.answer_edges import AnswerEdges
from streamd.core.stream import Stream
from streamd.reasons import CloseReason
from streamd.wire.trace_context import Field, TraceParent, passed_on

# Events of a generation: three retries and a reader that comes back each minute for an hour. OpenTelemetry's SDKs keep
# 128 unless told otherwise.
EVENTS_MAX: Final = 64


class TraceEvent(NamedTuple):
    """A step that people want to see beside the span: a retry, a detach, a resume, a gap."""

    at: float
    name: str
    facts: dict[str, str | int | float]


class Trace:
    """A generation that is traced. Times are monotonic seconds."""

    __slots__ = (
        "edges",
        "ended_at",
        "events",
        "is_request_over",
        "operation",
        "own",
        "parent",
        "reason",
        "status",
        "stream",
    )

    def __init__(self, operation: str, own: TraceParent, parent: TraceParent | None) -> None:
        self.operation = operation
        self.own = own  # the span of the generation, the parent of the upstream's
        self.parent = parent
        # until the end
        self.events: list[TraceEvent] = []
        self.stream: Stream | None = None  # of an answer that is, or may become, a stream
        self.edges: AnswerEdges | None = None  # of a whole answer
        self.status = 0  # of the upstream's last answer
        self.is_request_over = False
        # the end
        self.ended_at = 0.0
        self.reason: CloseReason | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether a span is written; else only the ids go on."""
        return self.own.is_sampled

    def note(self, at: float, name: str, /, **facts: str | int | float) -> None:
        """Keep an event for the span."""
        if self.is_recorded and len(self.events) < EVENTS_MAX:
            self.events.append(TraceEvent(at, name, facts))

    def passed_on(self, fields: list[Field]) -> list[Field]:
        """The client's fields for the upstream, with this generation as the span that asks."""
        return passed_on(fields, self.own, has_parent=self.parent is not None)

    def whole_answer(self) -> AnswerEdges:
        """The answer passes as bytes, and states its facts at its ends."""
        self.edges = AnswerEdges()
        return self.edges
