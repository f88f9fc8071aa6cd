"""Event ids: the values that a reader sends back as Last-Event-ID.

    <stream id>:<seq>            a stream that streamd named: `s_` + worker slot + incarnation + 22 random characters
    <name>:<epoch>:<seq>         a name chosen by its publisher; the epoch tells apart streams of the same name

    …:<seq>!                     the same position, and the reader was told that the stream's node is lost: a stream
                                 that goes on after all goes on behind seq, and one that doesn't has nothing to add

The grammar (docs/PROTOCOL.md, section 2) has no place for CR, LF, NUL or a space, so an id that parses can go into a
header or an event unescaped (CWE-93). The two forms can't be confused: a chosen name has no colon and doesn't begin
with `s_`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# 1 worker slot + 4 incarnation + 22 base64url characters (128 random bits).
STREAM_ID_CHARS = 1 + 4 + 22

# Largest seq: an id may pass through a JavaScript number, and this is Number.MAX_SAFE_INTEGER + 1.
SEQ_MAX = 2**53

_NAME = rb"(?!s_)(?!\.{1,2}(?::|\Z))[A-Za-z0-9._~-]{1,128}"
_STREAM_ID = rb"s_[A-Za-z0-9_-]{%d}" % STREAM_ID_CHARS
_SEQ = rb"(?:0|[1-9][0-9]{0,15})"  # 2**53 has 16 digits

_is_name = re.compile(_NAME).fullmatch
_is_stream_id = re.compile(_STREAM_ID).fullmatch
_parse_id = re.compile(
    rb"(?:(?P<stream>%b)|(?P<name>%b):(?P<epoch>[A-Za-z0-9_-]{6})):(?P<seq>%b)(?P<told>!?)" % (_STREAM_ID, _NAME, _SEQ)
).fullmatch


@dataclass(frozen=True, slots=True)
class EventId:
    """A position in a stream: its id or chosen name, its epoch (chosen names only), and the last seq that was seen."""

    stream: str
    epoch: str | None
    seq: int  # 0 <= seq <= SEQ_MAX; 0 is "before the first"
    told: bool = False  # that the stream's node is lost


def valid_last_event_id(raw: bytes) -> EventId | None:
    """Parse a Last-Event-ID, of a header or a query; None for a text that streamd can't have written."""
    match = _parse_id(raw)
    if match is None or int(match["seq"]) > SEQ_MAX:
        return None
    name: bytes = match["stream"] or match["name"]
    epoch: bytes | None = match["epoch"]
    return EventId(
        name.decode("ascii"),
        None if epoch is None else epoch.decode("ascii"),
        int(match["seq"]),
        bool(match["told"]),
    )


# Names under which polyfills and other libraries put the id into a query, without case, `-` and `_`: lastEventId
# (event-source-polyfill), last-event-id, Last-Event-ID, lastEventID (Mercure), last_event_id; evs_last_event_id
# (eventsource-polyfill for old browsers).
_PARAMETERS = frozenset(("lasteventid", "evslasteventid"))
_without_dashes = str.maketrans("", "", "-_")


def names_position(parameter: str) -> bool:
    """Whether a query's parameter holds the last event's id, in any of the usual spellings."""
    return parameter.translate(_without_dashes).lower() in _PARAMETERS


def valid_name(raw: bytes) -> bool:
    """Whether a publisher may choose this as the name of a stream."""
    return _is_name(raw) is not None


def valid_stream_id(raw: bytes) -> bool:
    """Whether this has the form of a stream id drawn by streamd."""
    return _is_stream_id(raw) is not None
