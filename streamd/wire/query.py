"""The query string: one parameter of it, and what of it may stand in a log.

Reading and redacting undo percent-encoding in names the same way, so `access%5Ftoken=…` is found by both or by neither.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote_plus

REDACTED: Final = "***"
# Parts of parameter names whose values are nobody's business. `max_tokens` losing its number in a log is the cheaper
# mistake.
_SECRET_NAME = re.compile(r"token|key|secret|passw|auth|sig|cred|jwt|session|code", re.I)
# A JWT begins with the base64url of `{"`, an API key with `sk-`: such values are secrets under any name.
_SECRET_VALUE = re.compile(r"eyJ|sk-")


def parameter(query: str, name: str) -> tuple[str, ...]:
    """The decoded values of parameter `name` (case counts), in order; empty if there is none."""
    found = []
    for part in query.split("&"):
        key, _, value = part.partition("=")
        if unquote_plus(key) == name:
            found.append(unquote_plus(value))
    return tuple(found)


def redact_query(query: str) -> str:
    """The query with secret values replaced: all that a log may hold of it.

    `;` separates too: some parsers take it so, and what they would read as a token must not pass here as another's
    value.
    """
    return re.sub(r"[^&;]+", lambda part: _redact(part[0]), query)


def _redact(part: str) -> str:
    name, equals, _ = part.partition("=")
    if _SECRET_VALUE.search(unquote_plus(part)):
        return REDACTED if _SECRET_VALUE.search(unquote_plus(name)) else f"{name}={REDACTED}"
    if equals and _SECRET_NAME.search(unquote_plus(name)):
        return f"{name}={REDACTED}"
    return part
