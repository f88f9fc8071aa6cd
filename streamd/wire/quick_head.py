"""The quick path for heads: those that clients and servers really send, in two passes of a regular expression.

http1.py asks here first. The result is the head, or None for a head with anything unusual, which then goes through all
gates of http1.py and through h11. So this module never refuses a head, and it must never take a head that the gates
refuse or read in another way: a property test and a fuzzer compare both for the same bytes, valid and broken.

Usual is a head with all of these, and everything else is left to the gates:

    line        HTTP/1.1; for a request a known method, and a target in origin-form whose path is in normal form
                already: no escape, no empty segment. For a response a final status; a reason without spaces at its ends
    fields      `name: value` with a single space or none in front of the value and none behind it, no tab
    Host        once; a name or an IPv4 address, perhaps with a port
    framing     either Content-Length, once and in decimal digits, or `Transfer-Encoding: chunked`, or none of the two
    Connection  `close` or `keep-alive`
    no Expect, no Upgrade, a Content-Type without a comma

Two fields with a name of this list have their values joined with a comma, which is in none of the allowed values.
"""

from __future__ import annotations

from typing import Final

from streamd.wire.heads import Framing, Headers, HeadLimits, RequestHead, ResponseHead, joined
from streamd.wire.possessive import compiled

_request = compiled(
    rb"(GET|POST|PUT|DELETE|HEAD|OPTIONS|PATCH) "
    rb"((/[A-Za-z0-9\-._~!$&'()*+,;=:@/|\[\]]*+)(?:\?([!\"$-~]*+))?+) HTTP/1\.1\r\n"
).match
_status = compiled(rb"HTTP/1\.1 ([2-5][0-9][0-9])(?: ([!-~](?:[ -~]*+(?<! ))?+))?+\r\n").match
# A line from the LF in front of it to the CR behind it. As many of these as there are LFs are all lines.
_fields = compiled(
    rb"\n([!#$%&'*+\-.^_`|~0-9A-Za-z]++): ?+([!-~\x80-\xff](?:[ -~\x80-\xff]*+(?<! ))?+)?+\r(?=\n)"
).findall
_host = compiled(rb"[A-Za-z0-9\-._~]++(?::([0-9]{0,5}))?").fullmatch

_CONTENT_LENGTH_DIGITS_MAX: Final = 18  # below 2^63
_PORT_MAX: Final = 65535
_CR: Final = 0x0D


def _fields_of(head: bytes, line_end: int, limits: HeadLimits) -> Headers | None:
    """The fields behind the first line, which ends before `line_end`."""
    found = _fields(head, line_end - 1)
    count = len(found)
    if count != head.count(b"\n", line_end) - 1 or count > limits.headers_max or len(head) > limits.head_bytes_max:
        return None
    return tuple([(name.lower(), value) for name, value in found]) if head.endswith(b"\r\n\r\n") else None


def _framing(by_name: dict[bytes, bytes]) -> tuple[Framing, int] | None:
    """RFC 9112 6.3."""
    length, coding = by_name.get(b"content-length"), by_name.get(b"transfer-encoding")
    if coding is not None:
        return (Framing.CHUNKED, 0) if coding == b"chunked" and length is None else None
    if length is None:
        return Framing.NONE, 0
    if not length.isdigit() or len(length) > _CONTENT_LENGTH_DIGITS_MAX:
        return None
    return Framing.LENGTH, int(length)


def _keeps_alive(by_name: dict[bytes, bytes]) -> bool | None:
    option = by_name.get(b"connection")
    if option is None:
        return True
    option = option.lower()
    return option == b"keep-alive" or (False if option == b"close" else None)


def quick_request(head: bytes, limits: HeadLimits) -> RequestHead | None:
    """The parts of a usual request's head with its blank line; None: http1.py has to look at it."""
    line = _request(head)
    if line is None:
        return None
    method, target, path, query = line.groups()
    headers = _fields_of(head, line.end(), limits)
    if headers is None or b"//" in path or len(target) > limits.target_bytes_max:
        return None
    by_name = joined(headers)
    framing, keep_alive = _framing(by_name), _keeps_alive(by_name)
    host = by_name.get(b"host")
    place = _host(host) if host is not None else None
    if framing is None or keep_alive is None or host is None or place is None or int(place[1] or 0) > _PORT_MAX:
        return None
    if b"expect" in by_name or b"upgrade" in by_name or b"," in by_name.get(b"content-type", b""):
        return None
    return RequestHead(
        method.decode(),
        target,
        path.decode(),
        query.decode() if query else "",
        False,
        headers,
        host,
        framing[0],
        framing[1],
        keep_alive,
        False,
        False,
        len(head),
        by_name,
    )


def quick_response(head: bytes, request_method: str, limits: HeadLimits) -> ResponseHead | None:
    """The parts of a usual final head that answers a `request_method`; None: http1.py has to look at it."""
    line = _status(head)
    if line is None:
        return None
    headers = _fields_of(head, line.end(), limits)
    if headers is None:
        return None
    by_name = joined(headers)
    framed, keep_alive = _framing(by_name), _keeps_alive(by_name)
    if framed is None or keep_alive is None:
        return None
    status = int(line[1])
    framing, content_length = framed
    if request_method == "HEAD" or status in (204, 304):
        framing, content_length = Framing.NONE, 0
    elif framing is Framing.NONE:
        framing = Framing.UNTIL_CLOSE
    keeps = keep_alive and framing is not Framing.UNTIL_CLOSE
    return ResponseHead(status, line[2] or b"", headers, framing, content_length, keeps, by_name)


def whole_head(data: bytes, limits: HeadLimits) -> int:
    """The size of the head that `data` begins with, if it is all there; 0: a HeadReader has to collect it.

    Empty lines in front of a request are the HeadReader's matter, and so is a head that is too large.
    """
    end = data.find(b"\r\n\r\n", 0, limits.head_bytes_max)
    return end + 4 if end >= 0 and data[0] != _CR else 0
