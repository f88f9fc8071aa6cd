"""The query string: one parameter of it. No part of a query is ever logged."""

from __future__ import annotations

from urllib.parse import unquote_plus


def parameter(query: str, name: str) -> tuple[str, ...]:
    """The decoded values of parameter `name` (case counts), in order; empty if there is none."""
    found = []
    for part in query.split("&"):
        key, _, value = part.partition("=")
        if unquote_plus(key) == name:
            found.append(unquote_plus(value))
    return tuple(found)
