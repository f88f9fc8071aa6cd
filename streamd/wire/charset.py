"""The charset of a JSON body: UTF-8, in which JSON between systems is written (RFC 8259 8.1).

streamd reads JSON as UTF-8 whatever its Content-Type says; some servers obey a `charset` there. In UTF-7 the same
bytes may name another model to them, so any other charset is refused before the body.
"""

from __future__ import annotations

import functools
from typing import Final

# ASCII is a part of UTF-8; the last spelling is none of IANA's, and common.
_UTF8: Final = frozenset((b"utf-8", b"us-ascii", b"ascii", b"utf8"))


@functools.lru_cache(maxsize=16)  # clients send a handful of types
def is_foreign(content_type: bytes | None) -> bool:
    """Whether a body is said to be JSON in another charset than UTF-8. A parameter of an odd form counts as another."""
    media_type, *parameters = (content_type or b"").lower().split(b";")
    if media_type.strip() != b"application/json":
        return False
    named = (parameter.strip().partition(b"=") for parameter in parameters)
    return any(name.startswith(b"charset") and value.strip().strip(b'"') not in _UTF8 for name, _, value in named)
