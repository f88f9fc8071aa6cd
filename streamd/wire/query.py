"""Parameters of a query string. No part of a query is ever logged.

A request looks for several parameters, one after another: its query is taken apart once. Queries have FIELDS_MAX fields
at most; the connection refuses more (net/client.py), because a field costs a microsecond however short it is.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final
from urllib.parse import unquote_plus

# The APIs here know a dozen parameters; the longest lists that SDKs send, `include[]` of OpenAI's, have seven.
FIELDS_MAX: Final = 256


def has_too_many_fields(query: str) -> bool:
    """Whether the query has more than FIELDS_MAX fields."""
    return query.count("&") >= FIELDS_MAX


def parameter(query: str, name: str) -> tuple[str, ...]:
    """The decoded values of parameter `name` (case counts), in order; empty if the query doesn't have it."""
    return tuple(value for key, value in fields(query) if key == name)


@lru_cache(maxsize=1)
def fields(query: str) -> tuple[tuple[str, str], ...]:
    """(name, value) of all fields, decoded, in order; a field without `=` has an empty value, an empty field isn't any.

    None of a query with too many fields. The latest query is remembered, for the lookups of a request.
    """
    if has_too_many_fields(query):
        return ()
    found = []
    for part in query.split("&"):
        if part:
            name, _, value = part.partition("=")
            found.append((unquote_plus(name), unquote_plus(value)))
    return tuple(found)
