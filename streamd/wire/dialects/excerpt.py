"""The type and the JSON of an event, for reading alone, in bounded work: a large event is read at its edges.

An event may have megabytes: an image, audio, a whole answer with the log probabilities of each token. Parsing such an
event would hold the loop for 10 to 80 ms a megabyte and build objects of thirty times its size, only to find its type,
its usage, and whether a choice has ended. All of these stand before or behind the bulk, because the bulk is a single
member somewhere: a string, or a list of things that are alike. So the middle of the event is left out, from a place in
the bulk to a place of the same kind in the bulk, and what is left is JSON again. If it isn't, the next kind of place is
tried; the parser decides. What is read of it is a true excerpt as long as the bulk is the only part that was cut.

Rejected: a scan without building (wire/json_scan.py: 10 to 480 ms a megabyte), reading on in later turns (an event's
meaning has to be known before the next event comes).
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from streamd.wire.dialects.members import Json, readable_object
from streamd.wire.sse import parse_event

# An event of this size is read whole, whatever is in it: 5 ms of nested lists at the worst.
READ_BYTES_MAX: Final = 64 * 1024
# A larger event is read whole up to this size if it has few values, as text and images have: 1 ms, or 2 of escapes.
LIGHT_BYTES_MAX: Final = 1024 * 1024
# Commas, opening brackets, escapes and line ends of a light event, in its texts as well: 0.06 to 0.35 us each, 6 ms at
# most.
LIGHT_MARKS_MAX: Final = 16 * 1024
# Of a heavy event this much is read at each end. A whole response has its usage within 1 KiB of its end; the names in
# front of the bulk take 2 KiB at most. All ways to join two edges of this size take 15 ms at the worst.
EDGE_BYTES_MAX: Final = 16 * 1024

# The places for a cut: anywhere in a string or a number, between escapes, objects, lists, values, words.
_CUTS: Final = (b"", b"\\u", b"},", b"],", b",", b" ")
_MARKS: Final = (b",", b"[", b"{", b"\\u", b"\n")
_INNER_BYTES: Final = bytes(range(0x80, 0xC0))  # of UTF-8: no character begins with them
_type = re.compile(rb'\s*\{\s*"type"\s*:\s*"([A-Za-z0-9_.-]{1,100})"').match


class Excerpt(NamedTuple):
    """The parts of an event that are looked at."""

    name: str | None  # its type, by the `event:` line
    opening: bytes  # its data, or the beginning of them
    body: Json | None  # the object that the data encode, perhaps without its middle; None for anything else


def excerpt(event: bytes) -> Excerpt:
    """An event as EventSplitter gives it, read whole if that is little work, else at its edges."""
    if len(event) <= READ_BYTES_MAX or _is_light(event):
        name, data = parse_event(event)
        return Excerpt(name, data, readable_object(data))
    name, front = parse_event(event[:EDGE_BYTES_MAX])
    # The back begins in the middle of a line of data: a line that is whole begins with `data`, too.
    later_name, back = parse_event(b"data:" + event[-EDGE_BYTES_MAX:])
    return Excerpt(later_name or name, front, joined(front, back))


def _is_light(event: bytes) -> bool:
    return len(event) <= LIGHT_BYTES_MAX and sum(map(event.count, _MARKS)) <= LIGHT_MARKS_MAX


def joined(front: bytes, back: bytes) -> Json | None:
    """The object of JSON without its middle, by its two edges. None if it can't be told."""
    front = front.decode("utf-8", "ignore").encode()
    back = back.lstrip(_INNER_BYTES)
    for cut in _CUTS:
        end, start = front.rfind(cut), back.find(cut)
        if end >= 0 and start >= 0:
            body = readable_object(front[:end] + back[start:])
            if body is not None:
                return body
    found = _type(front)
    return {"type": found[1].decode()} if found else None
