"""Failure: an error as an upstream tells it, in any shape that servers have for errors.

Its type, code and text are kept for readers that can't be shown the answer itself, because they have a stream's head
already. The shapes: OpenAI's and Google's `error` object, `error` as a text (TGI, Ollama), Anthropic's, the object
itself (SGLang, vLLM), FastAPI's `detail`, RFC 9457's `title`, and any of these alone in an array or as an event's data.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final

from streamd.wire.dialects.members import Json, clean, is_text, objects_of, shallow_object, string_of
from streamd.wire.sse import parse_event

# Text of a body that is no JSON: a line or two; a page of HTML would fill the client's screen.
TEXT_CHARS_MAX: Final = 1000

_MESSAGES: Final = ("message", "msg", "Message", "detail", "error_message", "error_description", "title", "error")


@dataclass(frozen=True, slots=True)
class Failure:
    """An upstream's error. `given` has all members of its object, `envelope` the object around that."""

    message: str
    status: int = 0  # of the answer that told it
    type: str = ""
    code: str | int | None = None
    param: str | None = None
    wait_s: int | None = None  # the Retry-After of that answer
    given: Json = field(default_factory=dict)
    envelope: Json = field(default_factory=dict)


def failure_of(data: bytes, status: int, code: str) -> Failure | None:
    """The error in the body of an answer, with this code unless it has its own; None if it has no known shape."""
    body = _object_in(data)
    failure = None if body is None else failure_in(body, status)
    return replace(failure, code=code) if failure is not None and failure.code is None else failure


def failure_in(body: Json, status: int = 0) -> Failure | None:
    """The error that an object tells; None if it has no text."""
    inner = body.get("error")
    given = inner if isinstance(inner, dict) else body.get("detail")
    if not isinstance(given, dict):
        given = body
    message = _text_of(given)
    if message is None:
        return None
    kind = string_of(given, "type") or string_of(given, "error_type") or string_of(given, "status") or ""
    code = given.get("code")
    return Failure(
        clean(message),
        status,
        clean(kind),
        code if type(code) is int else clean(code) if isinstance(code, str) else None,
        string_of(given, "param"),
        given={} if given is body else given,
        envelope=body,
    )


def _object_in(data: bytes) -> Json | None:
    """The object that a body holds, also alone in an array or as the data of an event."""
    text = data.strip()
    if not text.startswith((b"{", b"[")):
        events = text.replace(b"\r\n", b"\n").split(b"\n\n")
        text = next((found for event in events if (found := parse_event(event)[1])), b"")
    if text.startswith(b"["):
        return next(iter(objects_of(shallow_object(b'{"a":%b}' % text) or {}, "a")), None)
    return shallow_object(text)


def _text_of(error: Json) -> str | None:
    """The text of an error object: the first member that has one, or that of the first of its errors."""
    for each in (error, *objects_of(error, "errors")[:1]):
        for name in _MESSAGES:
            value = each.get(name)
            if is_text(value):
                return str(value)
            if name == "detail" and isinstance(value, list) and value:
                return "; ".join(map(_detail, value))
    return None


def _detail(value: Any) -> str:
    """An entry of FastAPI's list: the place and the complaint about it."""
    if not isinstance(value, dict):
        return str(value)
    place = value.get("loc")
    where = ".".join(map(str, place)) + ": " if isinstance(place, list) else ""
    return where + (string_of(value, "msg") or string_of(value, "message") or "")
