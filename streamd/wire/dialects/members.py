"""Reading an upstream's JSON, whatever it holds, and writing streamd's own."""

from __future__ import annotations

import json
import re
from typing import Any, Final

import orjson

from streamd.wire.json_scan import is_deep

# An escaped backslash, a surrogate pair, or a half of a pair.
_halves = re.compile(
    rb"(\\\\)|(\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|\\u[dD][89a-fA-F][0-9a-fA-F]{2}"
)

_not_numbers = re.compile(rb"[:,\[ ](?:NaN|-?Infinity)\b").search

# Largest count of tokens that is believed: a hundred times the longest context of any model (10 million tokens). A
# larger number is no count. Sums of counts below this stay far below 2^63.
TOKENS_MAX: Final = 999_999_999
# Largest number of an event by its API's own counting that is counted on: the error event that may have to follow gets
# the next number, and that is Number.MAX_SAFE_INTEGER at most, since SDKs in JavaScript compare it.
EVENT_NUMBER_MAX: Final = 2**53 - 2

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
    """The same, for reading alone, with two faults that orjson refuses: a lone half of a surrogate pair is read as
    U+FFFD, and the numbers NaN and Infinity, which JSON has not, are read.

    Servers send such halves where a token ends in the middle of a character, and Python's json writes such numbers for
    log probabilities. The event around them may still say that a choice has ended, or how many tokens there were.
    """
    if data[:1] == b"[":
        return None  # `[DONE]`, mostly
    body = json_object(data)
    if body is None and b"\\u" in data:
        body = json_object(_halves.sub(lambda found: found[0] if found[1] or found[2] else rb"\ufffd", data))
    if body is None and _not_numbers(data):
        body = _pythons_object(data)
    return body


def _pythons_object(data: bytes) -> Json | None:
    """The object that `data` encodes for Python's own parser."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


def shallow_object(data: bytes) -> Json | None:
    """The object that `data` encodes, if it can be written again: orjson reads 1,024 levels and writes 254."""
    return None if is_deep(data) else json_object(data)


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
    """The first of these members that is a count from 0 to TOKENS_MAX; None if none is."""
    return next((count for key in keys if (count := whole(body.get(key), TOKENS_MAX)) is not None), None)


def whole(value: object, most: int) -> int | None:
    """A whole number from 0 to `most`, also one that JSON has as `5.0` (Lua's cjson); None for any other value.

    Every number of another party that is kept, added to another or written again comes in through here.
    """
    if type(value) is not int and not (type(value) is float and value.is_integer()):
        return None
    return int(value) if 0 <= value <= most else None


def whole_in(digits: bytes, most: int) -> int | None:
    """The same for a number as JSON writes it; None for anything else."""
    try:
        return whole(orjson.loads(digits), most)
    except orjson.JSONDecodeError:
        return None


# Words that mean "no" to pydantic, which vLLM and SGLang read requests with; it takes `1` and `"true"` for yes.
_NO: Final = frozenset(("", "0", "f", "false", "n", "no", "off"))


def says_yes(value: object) -> bool:
    """Whether any server may take this member for true. A server that takes it for no answers as if it were missing."""
    return value.strip().lower() not in _NO if isinstance(value, str) else bool(value)


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
