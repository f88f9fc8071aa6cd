"""Parameters of a query string. No part of a query is ever logged."""

from __future__ import annotations

from urllib.parse import unquote_plus


def parameter(query: str, name: str) -> tuple[str, ...]:
    """The decoded values of parameter `name` (case counts), in order; empty if the query doesn't have it."""
    found = []
    for part in query.split("&"):
        key, _, value = part.partition("=")
        if unquote_plus(key) == name:
            found.append(unquote_plus(value))
    return tuple(found)
