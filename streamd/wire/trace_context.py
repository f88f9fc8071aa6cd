"""Trace context (W3C Recommendation): the fields traceparent and tracestate, read from a request, written upstream.

A traceparent names a trace, the span that asks, and flags. A version later than 00 is read as far as 00 goes (section
3.2.4); anything else that isn't well-formed is as good as no traceparent, and its tracestate is dropped with it
(section 3.3).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

TRACEPARENT: Final = b"traceparent"
TRACESTATE: Final = b"tracestate"

SAMPLED: Final = 0x01  # the caller may have recorded its span
_RANDOM: Final = 0x02  # level 2: the trace id was drawn at random

_well_formed = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL).fullmatch

Field = tuple[bytes, bytes]


class TraceParent(NamedTuple):
    """A span as its traceparent names it; ids are never 0."""

    trace_id: int  # 128 bits
    span_id: int  # 64 bits
    flags: int

    @property
    def is_sampled(self) -> bool:
        return bool(self.flags & SAMPLED)

    def encoded(self) -> str:
        """The value of the field, in version 00."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{self.flags & (SAMPLED | _RANDOM):02x}"


def parent_in(fields: Sequence[Field]) -> TraceParent | None:
    """The span that asks, by a request's fields, whose names are in lower case. None: no valid traceparent, or two."""
    given = [value for name, value in fields if name == TRACEPARENT]
    found = _well_formed(given[0].strip()) if len(given) == 1 else None
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == b"ff" or (version == b"00" and more is not None):
        return None
    parent = TraceParent(int(trace_id, 16), int(span_id, 16), int(flags, 16))
    return parent if parent.trace_id and parent.span_id else None


def passed_on(fields: Sequence[Field], own: TraceParent, *, has_parent: bool) -> list[Field]:
    """The fields for the upstream, which `own` asks. A tracestate passes if it came with a valid traceparent."""
    dropped = (TRACEPARENT,) if has_parent else (TRACEPARENT, TRACESTATE)
    return [*(field for field in fields if field[0] not in dropped), (TRACEPARENT, own.encoded().encode())]
