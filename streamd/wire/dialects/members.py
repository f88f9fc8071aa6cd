"""Reading an upstream's JSON, whatever it holds, and writing streamd's own."""

from __future__ import annotations

import re
from typing import Any

import orjson

# An escaped backslash, a surrogate pair, or a half of a pair.
_halves = re.compile(
    rb"(\\\\)|(\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
)

Json = dict[str, Any]
# Tokens by the upstream's own count: (input, output).
Usage = tuple[int, int]


def json_object(data: bytes) -> Json | None:
    """The object that `data` encodes; None for anything else."""
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return body if isinstance(body, dict) else None


def readable_object(data: bytes) -> Json | None:
    """The same, for reading alone: a lone half of a surrogate pair, which orjson refuses, is read as U+FFFD.

    Servers send such halves where a token ends in the middle of a character; the event around one may still say that a
    choice has ended, or how many tokens there were.
    """
    body = json_object(data)
    if body is None and b"\\u" in data:
        body = json_object(_halves.sub(lambda found: found[0] if found[1] or found[2] else rb"\ufffd", data))
    return body


def objects_of(body: Json, key: str) -> list[Json]:
    """The objects in the array body[key]; none if it is something else."""
    values = body.get(key)
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def object_of(body: Json, key: str) -> Json:
    """The object body[key]; an empty object if it is something else."""
    value = body.get(key)
    return value if isinstance(value, dict) else {}


def string_of(body: Json, key: str) -> str | None:
    """The string body[key]; None if it is something else."""
    value = body.get(key)
    return value if isinstance(value, str) else None


def count_of(body: Json, *keys: str) -> int | None:
    """The first of these members that is a count; None if none is."""
    for key in keys:
        value = body.get(key)
        if type(value) is int and value >= 0:
            return value
    return None


def is_text(value: object) -> bool:
    """Whether this is a string that isn't empty."""
    return isinstance(value, str) and value != ""


def updated(before: Usage | None, read: int | None, made: int | None) -> Usage | None:
    """The usage with new numbers; a missing number stays as it was: Anthropic's come in two events."""
    if read is None and made is None:
        return before
    was_read, was_made = before or (0, 0)
    return (was_read if read is None else read, was_made if made is None else made)


def clean(text: str) -> str:
    """Without lone surrogates, which undecodable bytes of a header may have left and orjson refuses."""
    return text.encode("utf-8", "replace").decode()
