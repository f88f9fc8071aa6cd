"""The first bytes of an answer's body tell whether it is a stream of events, whatever its Content-Type says.

Servers and gateways get the type wrong in both directions: a stream under `application/json` or without a type, and a
JSON object under `text/event-stream`. JSON begins with a brace or a bracket, and an event stream with the name of one
of its four fields, a comment, or a blank line (WHATWG HTML 9.2.5); no body begins as both.
"""

from __future__ import annotations

import enum
import re
from typing import Final

from streamd.wire.sse import BOM, first_has_id

# Blank bytes in front of a decision that are held while an answer may still pass as it is. Servers that send them as
# signs of life send a line in some seconds, and the commit comes first.
OPENING_BYTES_MAX: Final = 1024

_FIELDS: Final = (b"data", b"event", b"id", b"retry")
_field = re.compile(rb"(?:data|event|id|retry)[:\r\n]").match


class BodyKind(enum.Enum):
    """The kind of a body."""

    EVENTS = "events"
    JSON = "json"
    BYTES = "bytes"  # neither


# Bound of the bytes in which the end of a first event is looked for: MCP's are JSON-RPC messages of some KB.
FIRST_EVENT_BYTES_MAX: Final = 16 * 1024
_begins_id = re.compile(rb"^id[:\r\n]", re.MULTILINE).search
_begins_data = re.compile(rb"^data[:\r\n]", re.MULTILINE).search


def has_own_ids(opening: bytes, *, at_end: bool = False, is_late: bool = False) -> bool | None:
    """Whether the events of a stream that begins like this have ids of the server's own; None: more bytes decide.

    at_end: no more bytes come. is_late: they aren't waited for any longer; the first event may still have an id.
    """
    found = first_has_id(opening + b"\n\n" if at_end else opening)
    if found is not None or at_end:
        return bool(found)
    if is_late:
        return True
    if len(opening) < FIRST_EVENT_BYTES_MAX:
        return None
    return _begins_id(opening) is not None or _begins_data(opening) is None


def kind_of(opening: bytes, *, is_typed: bool, at_end: bool = False) -> BodyKind | None:
    """The kind of a body that begins like this; None: more bytes decide.

    is_typed: the head says that it is a stream, so that only JSON is none. at_end: no more bytes come.
    """
    text = opening.removeprefix(BOM).lstrip(b" \t\r\n")
    if not text or (BOM.startswith(opening) and not at_end):
        is_over = at_end or (not is_typed and len(opening) > OPENING_BYTES_MAX)
        return (BodyKind.EVENTS if is_typed else BodyKind.BYTES) if is_over else None
    if text[:1] in (b"{", b"["):
        return BodyKind.JSON
    if is_typed or text[:1] == b":" or _field(text):
        return BodyKind.EVENTS
    is_undecided = not at_end and any(field.startswith(text) for field in _FIELDS)
    return None if is_undecided else BodyKind.BYTES
