"""The codings of a body (Content-Encoding, RFC 9110 8.4): whether its bytes can be read as they are."""

from __future__ import annotations

from typing import Final

# `identity` and `none` name no coding. Servers of event streams send them to keep middleware in front from compressing.
# A charset or `binary` is none either: programs write them where Content-Type was meant, and browsers pass over them.
_NO_CODING: Final = frozenset((b"", b"identity", b"none", b"utf-8", b"utf8", b"us-ascii", b"binary", b"8bit"))


# Codings that the standard library undoes, by each of their names.
_UNDONE: Final = {b"gzip": b"gzip", b"x-gzip": b"gzip", b"deflate": b"deflate"}


def undone(content_encoding: bytes | None) -> bytes | None:
    """The only coding of a body, if it is one that wire/inflate.py undoes: gzip or deflate."""
    words = [word.strip() for word in (content_encoding or b"").lower().split(b",")]
    codings = [word for word in words if word not in _NO_CODING]
    return _UNDONE.get(codings[0]) if len(codings) == 1 else None


def is_plain(content_encoding: bytes | None) -> bool:
    """Whether a body with this Content-Encoding is not encoded at all."""
    return all(word.strip() in _NO_CODING for word in (content_encoding or b"").lower().split(b","))
