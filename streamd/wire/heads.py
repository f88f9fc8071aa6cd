"""The parts of HTTP/1.1 heads as values, and their limits. http1.py reads and writes heads."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class HeadLimits:
    """Limits of a head. RFC 9112 3 asks for 8,000 bytes of request line; 100 fields is Apache's number."""

    head_bytes_max: int = 16384  # request or status line, fields and blank line
    headers_max: int = 100
    target_bytes_max: int = 8192


HEAD_LIMITS = HeadLimits()

# Memory of a parsed field beside its own bytes: a tuple, two bytes objects, and a place in the tuple of all and in the
# dictionary by name.
FIELD_BYTES = 200


class Framing(enum.Enum):
    """How a message tells the end of its body (RFC 9112 6.3)."""

    NONE = "none"
    LENGTH = "length"
    CHUNKED = "chunked"
    UNTIL_CLOSE = "until_close"  # responses only


def joined(headers: Headers) -> dict[bytes, bytes]:
    """The values by name; of several fields with a name joined with a comma (RFC 9110 5.3)."""
    by_name = dict(headers)
    if len(by_name) < len(headers):
        by_name.clear()
        for name, value in headers:
            by_name[name] = b"%b, %b" % (by_name[name], value) if name in by_name else value
    return by_name


# Why not frozen: setting the fields of a frozen object would take a fifth of the time of a head on the quick path.
@dataclass(slots=True)
class RequestHead:
    """A request's head, valid by all rules. `target` is origin-form or `*`, `path` and `query` its parts: the path in
    its normal form (http1.normal_path), the others as sent. Nobody changes a head.
    """

    method: str
    target: bytes
    path: str
    query: str
    http10: bool
    headers: Headers  # lower-case names, in order
    authority: bytes  # absolute-form's, else Host's; empty for HTTP/1.0 without either
    framing: Framing  # NONE, LENGTH or CHUNKED
    content_length: int  # 0 unless LENGTH
    keep_alive: bool  # an HTTP/1.0 client has to ask for it
    expect_continue: bool
    upgrade: bool  # asks for another protocol; h2c isn't counted (http1.py)
    bytes_read: int  # of the head
    by_name: dict[bytes, bytes] = field(compare=False, repr=False)  # joined(headers)

    @property
    def held_bytes(self) -> int:
        """Memory of the target and of the fields."""
        return 3 * len(self.target) + self.bytes_read + FIELD_BYTES * len(self.headers)

    def get(self, name: bytes) -> bytes | None:
        """The field's value by lower-case name, several joined with a comma (RFC 9110 5.3); None if absent."""
        return self.by_name.get(name)


@dataclass(slots=True)
class ResponseHead:
    """A response's head, valid by all rules. So is that of a 1xx, with framing NONE: another head follows it."""

    status: int
    reason: bytes
    headers: Headers
    framing: Framing
    content_length: int  # 0 unless LENGTH
    keep_alive: bool
    by_name: dict[bytes, bytes] = field(compare=False, repr=False)  # joined(headers)

    def get(self, name: bytes) -> bytes | None:
        """The field's value by lower-case name, several joined with a comma (RFC 9110 5.3); None if absent."""
        return self.by_name.get(name)
