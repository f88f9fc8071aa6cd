"""Header fields of an upstream's answer, on their way to the client, for a whole answer and for a stream.

End-to-end fields pass (rate limits, request ids, times), in the order in which they came. Four kinds don't: fields that
speak for the whole origin (wire/foreign_fields.py), fields that streamd writes itself, fields of CORS, and for a stream
fields about bytes and caches, because its bytes are streamd's: ids stand in them, and neighbours may be merged.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from streamd.wire.cors import REPLACED
from streamd.wire.foreign_fields import is_foreign
from streamd.wire.http1 import Headers, end_to_end

Fields = list[tuple[bytes, bytes]]

EVENT_STREAM: Final = b"text/event-stream"

_WRITTEN: Final = frozenset({b"content-length", b"x-request-id", b"x-stream-id", b"x-upstream"}) | REPLACED
# On a stream: its type and how it may be cached are written anew; the rest are statements about the upstream's bytes.
_WRITTEN_ON_STREAMS: Final = frozenset(
    (
        *(b"content-type", b"cache-control", b"expires", b"pragma", b"age", b"x-accel-buffering"),
        *(b"accept-ranges", b"content-digest", b"content-encoding", b"content-md5", b"content-range", b"digest"),
        *(b"etag", b"last-modified", b"repr-digest"),
    )
)
# Fields that hold the address of a thing on the same server.
_ADDRESSES: Final = frozenset((b"content-location", b"location", b"operation-location"))
# Fields in which servers and their gateways name a request: OpenAI and most others, Anthropic, Azure, AWS, Cloudflare.
_REQUEST_IDS: Final = (
    *(b"x-request-id", b"request-id", b"apim-request-id", b"x-ms-request-id"),
    *(b"x-amzn-requestid", b"x-amzn-request-id", b"x-correlation-id", b"cf-ray"),
)
# Safe to log unchanged (CWE-117); the servers' ids are UUIDs and words.
_sane_id = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}").fullmatch

# scheme, authority, path, and the rest of an absolute reference or one without its scheme (RFC 3986 4.2).
_ABSOLUTE: Final = re.compile(rb"(?:https?:)?//([^/?#\\]*)([^?#]*)(.*)", re.IGNORECASE | re.DOTALL)
# A server names itself by the address that it listens on.
_THIS_MACHINE: Final = re.compile(rb"\A(?:127\.0\.0\.1|\[::1?\]|0\.0\.0\.0)(?=:|\Z)")
_DEFAULT_PORT: Final = re.compile(rb":(?:80|443)?\Z")


class Whereabouts(NamedTuple):
    """The place of an upstream, which no client needs to know: `base` stands for `version` in front of paths."""

    authority: bytes
    base: bytes
    version: bytes = b""


def of_answer(headers: Headers, passed: frozenset[bytes], place: Whereabouts) -> Fields:
    """The fields of a whole answer. `passed` names foreign fields that may pass."""
    return [
        (name, relative(value, place) if name in _ADDRESSES else value)
        for name, value in end_to_end(headers)
        if name not in _WRITTEN and (name in passed or not is_foreign(name))
    ]


def of_stream(headers: Headers, passed: frozenset[bytes], place: Whereabouts) -> Fields:
    """The fields of a stream: the same without those that streamd writes on streams; its type as the upstream has it,
    since some clients compare that as a whole.
    """
    types = [value for name, value in headers if name == b"content-type" and is_event_stream(value)]
    fields = of_answer(headers, passed, place)
    kept = [field for field in fields if field[0] not in _WRITTEN_ON_STREAMS]
    return [(b"content-type", types[0] if types else EVENT_STREAM), *kept]


def is_event_stream(content_type: bytes | None) -> bool:
    """Whether this is the media type of a stream of events, with any parameters."""
    if not content_type or content_type == EVENT_STREAM:
        return content_type == EVENT_STREAM
    return content_type.split(b";")[0].strip().lower() == EVENT_STREAM


_REQUEST_ID_NAMES: Final = frozenset(_REQUEST_IDS)


def request_id_of(headers: Headers, own: bytes) -> str:
    """The name that the upstream has given the request; "" if it has none but `own`, which it was sent."""
    if _REQUEST_ID_NAMES.isdisjoint([name for name, _ in headers]):
        return ""
    found = (value for wanted in _REQUEST_IDS for name, value in headers if name == wanted)
    return next((value.decode() for value in found if value != own and _sane_id(value)), "")


def relative(reference: bytes, place: Whereabouts) -> bytes:
    """The address as a client of streamd can use it: without the upstream's authority and base, if it leads there.

    The scheme isn't compared: a server behind a proxy that speaks TLS for it says http. The result never begins with
    two slashes, or with a backslash, which browsers read alike: that would lead to another host.
    """
    found = _ABSOLUTE.fullmatch(reference)
    if found is not None:
        if _bare(found[1]) != _bare(place.authority):
            return reference
        path, rest = found[2], found[3]
    elif reference.startswith(b"/"):
        path, rest = reference, b""
    else:
        return reference
    base, version = place.base, place.version
    if path == base or path.startswith((base + b"/", base + b"?")):
        path = path[len(base) :]
        if version:
            path = version + b"/" + path.lstrip(b"/\\")
    return b"/" + path.lstrip(b"/\\") + rest


def _bare(authority: bytes) -> bytes:
    """For comparing: without the port of either scheme, and with a single name for this machine."""
    return _THIS_MACHINE.sub(b"localhost", _DEFAULT_PORT.sub(b"", authority.lower()))
