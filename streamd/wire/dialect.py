"""The dialects of streaming, each for an API, and streamd's own events in each of them.

Knowledge of an API stands in its module, in wire/dialects/, as an Api. None of it is on a token's path: Progress sees
only the events that are not known to be pure text, and everything else is made once per stream or per mishap.

SDKs take a clean end without `[DONE]` for success, so streamd must know better when an answer is complete; each API's
module says when, given that the HTTP framing has ended properly. Events that streamd adds to a stream have to pass
through the SDKs, which look at different things (tests/wire/test_dialect_sdks.py runs the real SDKs).
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Callable
from typing import Final

import orjson

from streamd.wire.dialects.api import CHOICE_INDEX_MAX, Api, Progress, is_error
from streamd.wire.dialects.chat import Chat
from streamd.wire.dialects.completions import Completions
from streamd.wire.dialects.failure import TEXT_CHARS_MAX, Failure, failure_in
from streamd.wire.dialects.gemini import Gemini
from streamd.wire.dialects.members import Json, clean, object_of, objects_of, readable_object, shallow_object, string_of
from streamd.wire.dialects.messages import Messages
from streamd.wire.dialects.published import Published
from streamd.wire.dialects.responses import Responses, sequence_number_of
from streamd.wire.json_scan import is_deep
from streamd.wire.path_models import PATHS_KNOWN_MAX
from streamd.wire.sse import BOM, EventSplitter, EventTooLarge, is_event

__all__ = [
    "APIS",
    "CHOICE_INDEX_MAX",
    "KEY_FIELDS",
    "KEY_OPENING",
    "KEY_PARAMETER",
    "Dialect",
    "Progress",
    "dialect_named",
    "dialect_of",
    "error_body",
    "error_event",
    "failure_event",
    "gap_event",
    "generates",
    "reconnect_event",
    "sequence_number_of",
    "stray_events",
    "whole_events",
]


# Bounds of a block without data that is searched for an error. Error objects have a few hundred bytes; the longest seen
# had a traceback. So many small objects take 4 ms.
STRAY_BYTES_MAX: Final = 16 * 1024
STRAY_LINES_MAX: Final = 1024
# Lines of it that are looked at one by one, 3 us each.
STRAY_NAMES_MAX: Final = 64


class Dialect(enum.Enum):
    """The API that a stream speaks; decided by the path of its request, for a few paths by its client."""

    CHAT = "chat", Chat()
    COMPLETIONS = "completions", Completions()
    RESPONSES = "responses", Responses()
    MESSAGES = "messages", Messages()
    GEMINI = "gemini", Gemini()
    UNKNOWN = "unknown", Published()

    api: Api

    def __new__(cls, word: str, api: Api) -> Dialect:
        dialect = object.__new__(cls)
        dialect._value_ = word  # in snapshots
        dialect.api = api
        return dialect


APIS: Final = tuple(dialect.api for dialect in Dialect)
# The header fields, beside Authorization, in which clients of any API send a key.
KEY_FIELDS: Final = (*(api.key_field for api in APIS if api.key_field), b"api-key")  # Azure's clients, of any API
# The query parameter in which clients send a key, on the paths of the APIs that have it. Elsewhere it opens nothing,
# and with a value that begins like a key of streamd's own it goes no further.
KEY_PARAMETER: Final = next(api.key_parameter for api in APIS if api.key_parameter)
KEY_OPENING: Final = "sk-"


def dialect_of(path: str, query: str = "", field: Callable[[bytes], bytes | None] = lambda name: None) -> Dialect:
    """The dialect of a request's path; where several APIs have the path, the client decides. `field` gives a header."""
    found = _dialect_by_path(path)
    if found is not None:
        return found
    return next((dialect for dialect in Dialect if dialect.api.claims(path, query, field)), Dialect.UNKNOWN)


@functools.lru_cache(PATHS_KNOWN_MAX)
def _dialect_by_path(path: str) -> Dialect | None:
    return next((dialect for dialect in Dialect if dialect.api.serves(path)), None)


@functools.lru_cache(PATHS_KNOWN_MAX)
def generates(method: str, path: str) -> bool:
    """Whether the tokens in the answer were made for this request.

    Servers keep answers and give them out again, with their usage: on a GET, and on a POST to a path below that of the
    API (OpenAI's `/v1/responses/{id}/cancel`, `/v1/chat/completions/{id}`).
    """
    path = path.rstrip("/")
    below = any(path.startswith(f"{whole}/") for api in APIS for whole in api.paths)
    return method not in ("GET", "HEAD", "DELETE", "OPTIONS") and not below


def dialect_named(word: str) -> Dialect:
    """The dialect with this word for its value."""
    return next(dialect for dialect in Dialect if dialect.value == word)


def error_event(
    dialect: Dialect,
    *,
    message: str,
    type: str,
    code: str,
    param: str | None = None,
    sequence_number: int | None = None,
) -> bytes:
    """The event at the end of a stream that did not end well. `type` and `code` are the OpenAI error object's.

    sequence_number (Responses): the number after the last that the reader was sent, if that is known.
    """
    api = dialect.api
    body = api.error_event(message, type, code, param)
    if api.numbered:
        body["sequence_number"] = sequence_number
    return _event(api.error_name, orjson.dumps(body))


def failure_event(dialect: Dialect, failure: Failure, *, sequence_number: int | None = None) -> bytes:
    """The event at the end of a stream whose upstream answered with an error; as error_event()."""
    body = dialect.api.failure_event(failure)
    if dialect.api.numbered:
        body["sequence_number"] = sequence_number
    return _event(dialect.api.error_name, orjson.dumps(body))


def whole_events(dialect: Dialect, data: bytes) -> list[bytes]:
    """The events of a stream that says the same as the whole answer in `data`: JSON, a JSON array, or JSON lines, and
    perhaps events behind it.

    An upstream's error becomes its event. JSON that is no answer of the dialect stays in an event as it is, and ends
    nothing. [] if `data` is no JSON.
    """
    api, behind = dialect.api, b""
    data = data.removeprefix(BOM).strip()
    if data[:1] not in (b"{", b"["):
        return []
    bodies = _objects_in(data)
    if bodies is None:
        data, *rest = _json_end.split(data.replace(b"\r\n", b"\n"), 1)
        behind = b"".join(rest)
        bodies = _objects_in(data)
    if not bodies:
        return [] if bodies is None else [_data_event(data)]
    events: list[bytes] = []
    is_answer = True
    for body in bodies:
        found = api.as_events(body)
        told = found is None and (is_error(body) or api.is_error(body, None))
        failure = failure_in(body) if told else None
        if failure is not None:
            return [*events, failure_event(dialect, failure, sequence_number=len(events))]
        events += [_event(name, orjson.dumps(event)) for name, event in found or [(None, body)]]
        is_answer = is_answer and found is not None
    if not is_answer:
        return events
    events += [event for event in _events_in(behind) if event != _DONE]
    return [*events, _DONE] if api.done_ends else events


def stray_events(dialect: Dialect, lines: bytes, *, sequence_number: int) -> tuple[list[bytes], bool]:
    """The events that lines of no known field stand for, and whether they tell an error, which is their last then.

    An error in any known shape becomes the dialect's event: as JSON of its own, or behind a name (`error: {…}`, as
    llama.cpp wrote it). JSON that is an event or an answer of the dialect becomes its events, without `[DONE]`.
    """
    if len(lines) > STRAY_BYTES_MAX or lines.count(b"\n") > STRAY_LINES_MAX:
        return [], False
    api = dialect.api
    text = b"".join(line for line in lines.splitlines(keepends=True) if not line.startswith(b"event:")).strip()
    bodies = _objects_in(text) if text[:1] in (b"{", b"[") else None
    events: list[bytes] = []
    for body in bodies or ():
        if is_error(body) or api.is_error(body, None):
            return [*events, _told(dialect, body, sequence_number + len(events))], True
        kind = string_of(body, "type") if api.error_name is not None else None
        found = api.as_events(body) or ([(kind, body)] if kind else [])
        events += [_event(name, orjson.dumps(event)) for name, event in found]
    if bodies is None:
        failure = _named_failure(text)
        if failure is not None:
            return [failure_event(dialect, failure, sequence_number=sequence_number)], True
    return events, False


def _told(dialect: Dialect, body: Json, sequence_number: int) -> bytes:
    failure = failure_in(body)
    if failure is None:  # it says no more than that it is an error
        return _event(dialect.api.error_name, orjson.dumps(body))
    return failure_event(dialect, failure, sequence_number=sequence_number)


def _named_failure(lines: bytes) -> Failure | None:
    """The error in lines of which each may have a name in front of it. The name `error` makes an error of any text."""
    for line in lines.splitlines()[:STRAY_NAMES_MAX]:
        name, _, value = line.partition(b":")
        is_named, value = name.strip().lower() == b"error", value.strip()
        for text in (value, line):
            body = shallow_object(text) if text[:1] == b"{" else None
            if body is not None and (is_error(body) or (is_named and text is value)):
                failure = failure_in(body)
                if failure is not None:
                    return failure
        if is_named and value not in (b"", b"null"):
            return Failure(clean(value.decode("utf-8", "replace"))[:TEXT_CHARS_MAX])
    return None


_DONE: Final = b"data: [DONE]\n\n"
# Where events begin behind JSON: a blank line, which some servers forget.
_json_end = re.compile(rb"\n(?=\n|data:|event:)")


def _objects_in(data: bytes) -> list[Json] | None:
    """The object in JSON, or the objects in an array or in lines of JSON, if they can be written again; None if the
    bytes are none of these.
    """
    for form in (b'{"a":%b}' % data, b'{"a":[%b]}' % b",".join(filter(None, data.splitlines()))):
        found = readable_object(form)
        if found is not None:
            whole = object_of(found, "a")
            return [] if is_deep(form) else [whole] if whole else objects_of(found, "a")
    return None


def _events_in(data: bytes) -> list[bytes]:
    splitter = EventSplitter(event_bytes_max=len(data) + 2)  # with the blank line that the last event may lack
    try:
        return [piece for piece in (*splitter.feed(data), *splitter.finish()) if is_event(piece)]
    except EventTooLarge as large:  # by its lines
        return [piece for piece in large.before if is_event(piece)]


def _data_event(data: bytes) -> bytes:
    """Any text as an event: a data line for each of its lines."""
    return b"".join(b"data: %b\n" % line for line in data.splitlines()) + b"\n"


def reconnect_event(dialect: Dialect, *, message: str, last_id: str, retry_ms: int) -> bytes:
    """A reader is sent away and may come back after retry_ms with last_id. SDKs raise on it; an EventSource returns.

    Both values stand beside the error object and in it: the SDKs hand out only the inside of the error object.
    """
    api = dialect.api
    body = api.error_event(message, "server_error", "reconnect", None)
    position = {"last_id": clean(last_id), "retry_ms": retry_ms}
    body.update(position)
    body["error"].update(position)
    if api.numbered:
        body["sequence_number"] = None
    retry = b"" if api.data_only else b"retry: %d\n" % retry_ms
    return retry + _event(api.reconnect_name, orjson.dumps(body))


def gap_event(
    dialect: Dialect,
    progress: Progress,
    seq_from: int,
    seq_to: int,
    *,
    reset: bool = False,
) -> bytes:
    """The seqs seq_from to seq_to, both included, are lost to this reader. reset: its position is of another epoch.

    The event has a shape that each dialect's SDK takes for an event without content.
    """
    lost: Json = {"from": seq_from, "to": seq_to}
    if reset:
        lost["reset"] = True
    return _event(*dialect.api.gap_event(progress, b'"gap":' + orjson.dumps(lost)))


def error_body(
    *,
    message: str,
    type: str,
    code: str,
    param: str | None = None,
    status: int = 500,
    dialect: Dialect = Dialect.UNKNOWN,
) -> bytes:
    """The JSON of an HTTP error answer: OpenAI's error object, or the dialect's equivalent."""
    return orjson.dumps(dialect.api.error(status, message, type, code, param))


def _event(name: str | None, data: bytes) -> bytes:
    """JSON has no raw line end, so a single data line holds it."""
    line = b"data: " + data + b"\n\n"
    return line if name is None else b"event: " + name.encode() + b"\n" + line
