"""Pace: the speed of a stream's tokens, and how long ago an event of it came.

A token stores no time. So the time of an event is computed, as if the events had come evenly between the first and the
last; for generations, whose tokens do come evenly, it is right to a few events.
"""

from __future__ import annotations

from streamd.core.stream import Stream


def _began_at(stream: Stream) -> float:
    """The time of the first event; of a stream that an earlier process began, the time of its opening."""
    return stream.first_event_at or stream.opened_at


def age_of_event_s(stream: Stream, seq: int, now: float) -> float:
    """How long before `now` the event `seq` came, seconds; for a stream that has ended, how long before its end.

    0 for the event that comes next.
    """
    if seq >= stream.log.seq_next:
        return 0.0
    until = now if stream.reason is None else stream.sealed_at
    began_at, last_at = _began_at(stream), min(stream.touched_at, until)
    share = (seq - 1) / max(1, stream.events - 1)
    return max(0.0, until - (began_at + share * max(0.0, last_at - began_at)))


def tokens_per_s(stream: Stream, now: float) -> float:
    """The mean since the first event of a stream; 0 before it, and after the stream's end."""
    if stream.reason is not None or not stream.text_events:
        return 0.0
    return stream.text_events / max(1.0, now - _began_at(stream))
