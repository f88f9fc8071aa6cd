"""The dialects of streaming, each for an API, and streamd's own events in each of them.

Knowledge of an API stands in its module, in wire/dialects/, as an Api. None of it is on a token's path: Progress sees
only the events that are not known to be pure text, and everything else is made once per stream or per mishap.

SDKs take a clean end without `[DONE]` for success, so streamd must know better when an answer is complete; each API's
module says when, given that the HTTP framing has ended properly. Events that streamd adds to a stream have to pass
through the SDKs, which look at different things (tests/wire/test_dialect_sdks.py runs the real SDKs).
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Final

import orjson

from streamd.wire.dialects.api import CHOICE_INDEX_MAX, Api, Progress
from streamd.wire.dialects.chat import Chat
from streamd.wire.dialects.completions import Completions
from streamd.wire.dialects.gemini import Gemini
from streamd.wire.dialects.members import Json, clean
from streamd.wire.dialects.messages import Messages
from streamd.wire.dialects.published import Published
from streamd.wire.dialects.responses import Responses, sequence_number_of

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
    "gap_event",
    "generates",
    "reconnect_event",
    "sequence_number_of",
]


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
    for dialect in Dialect:
        if dialect.api.serves(path):
            return dialect
    return next((dialect for dialect in Dialect if dialect.api.claims(path, query, field)), Dialect.UNKNOWN)


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
