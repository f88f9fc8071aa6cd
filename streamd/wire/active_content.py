"""Answers of an upstream that a browser would run as a page of streamd's origin.

Whatever a browser opens at streamd's address belongs to streamd's origin: a script in it reads the reader's streams
with the reader's cookie. No API answers with a page, but a hostile server may, and so may a good server that hands out
its users' files. Such an answer passes as it is, in a sandbox: without scripts, and without an origin.
"""

from __future__ import annotations

from typing import Final

# Types that browsers run, or take for no statement at all and guess from the bytes (WHATWG MIME Sniffing, 7).
_ACTIVE: Final = frozenset(
    (
        b"",
        b"*/*",
        b"application/unknown",
        b"application/xml",
        b"multipart/x-mixed-replace",
        b"text/html",
        b"text/xml",
        b"text/xsl",
        b"unknown/unknown",
    )
)

_HELD: Final = ((b"content-security-policy", b"sandbox"), (b"x-content-type-options", b"nosniff"))


def holding(content_type: bytes | None) -> tuple[tuple[bytes, bytes], ...]:
    """The fields that keep an answer of this type from running; none for a type that browsers only show or save."""
    media_type = (content_type or b"").split(b";")[0].strip().lower()
    is_active = media_type in _ACTIVE or media_type.endswith(b"+xml") or b"/" not in media_type or b"," in media_type
    return _HELD if is_active else ()
