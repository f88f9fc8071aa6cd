"""The four dialects of streaming: when is an answer complete, and how does an error, a gap or a farewell look in each.

The little that is known of the JSON is here, and none of it is on a token's path: Progress sees the events that are not
known to be pure text, and everything else is made once per stream or per mishap.

When is a stream complete? A clean end without `[DONE]` counts as success in the SDKs, so streamd must know better (the
HTTP framing has ended properly, and):

    chat, completions   `[DONE]`, or a finish_reason on every choice begun: some servers never send `[DONE]`
    responses           response.completed, response.failed or response.incomplete
    messages            message_stop
    unknown             the framing decides

What streamd itself puts into a stream has to pass through the SDKs (tests/wire/test_dialect_sdks.py runs the real
ones). They look at different things: the OpenAI SDK at an `error` member of the JSON and never at the event's type;
Anthropic's at the type alone: `ping` is skipped, `error` raises, and no type at all is skipped in silence.
"""

from __future__ import annotations

import enum
from typing import Any, Final

import orjson

from streamd.wire.sse import parse_event

Json = dict[str, Any]

# A choice's index becomes a bit. OpenAI's bound of `n` is 128; a higher index is an upstream's fault, and ignored.
CHOICE_INDEX_MAX: Final = 1023

_RESPONSES_END: Final = frozenset({"response.completed", "response.failed", "response.incomplete"})


class Dialect(enum.Enum):
    """Which API a stream speaks; decided by the path of its request."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    MESSAGES = "messages"
    UNKNOWN = "unknown"


_DIALECTS: Final = {
    "/v1/chat/completions": Dialect.CHAT,
    "/v1/completions": Dialect.COMPLETIONS,
    "/v1/responses": Dialect.RESPONSES,
    "/v1/messages": Dialect.MESSAGES,
}

_DONE_ENDS: Final = frozenset({Dialect.CHAT, Dialect.COMPLETIONS, Dialect.UNKNOWN})


def dialect_of(path: str) -> Dialect:
    """The dialect of a request's path, without its query. What lies below speaks alike: /v1/responses/{id}."""
    for root in ("/v1/responses/", "/v1/messages/"):
        if path.startswith(root):
            return _DIALECTS[root[:-1]]
    return _DIALECTS.get(path, Dialect.UNKNOWN)


class Progress:
    """How far one stream has come, from the events that were shown to it. Tolerates anything.

    It has to see every event but those known to be pure text like one that it saw: at least the first of each choice.
    """

    __slots__ = (
        "_begun",
        "_finished",
        "chunk_head",
        "complete",
        "dialect",
        "response_id",
        "sequence_number",
        "terminal",
        "text_bytes",
        "text_events",
        "usage",
    )

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self.complete = dialect is Dialect.UNKNOWN  # a proper end of the framing from here on is no truncation
        self.terminal = False  # nothing can follow: the reader may close and has completed. terminal implies complete
        self._begun = 0  # bit i: choice i was mentioned
        self._finished = 0  # bit i: choice i has its finish_reason
        self.usage: tuple[int, int] | None = None  # (input, output) tokens by the upstream's own count
        self.text_events = 0  # events with text, of those seen
        self.text_bytes = 0  # UTF-8 bytes of that text
        self.response_id: str | None = None  # of the first response.created; it doesn't change any more
        self.sequence_number: int | None = None  # the last one seen (Responses)
        self.chunk_head = (
            b""  # what a gap event repeats of the first chunk: its id, object, created, model, as JSON members
        )

    def see(self, event: bytes) -> None:
        """Take note of one whole event."""
        name, data = parse_event(event)
        if data.startswith(b"[DONE]"):  # the OpenAI SDK's own rule
            if self.dialect in _DONE_ENDS:
                self.complete = self.terminal = True
            return
        body = _json_object(data)
        if body is None:
            return
        self._count(body)
        match self.dialect:
            case Dialect.CHAT | Dialect.COMPLETIONS:
                self._see_chunk(body)
            case Dialect.RESPONSES:
                self._see_response(body, name)
            case Dialect.MESSAGES:
                if (_str(body, "type") or name) == "message_stop":
                    self.complete = self.terminal = True

    def _count(self, body: Json) -> None:
        text_bytes = sum(len(text.encode()) for text in _texts(self.dialect, body))
        if text_bytes:
            self.text_events += 1
            self.text_bytes += text_bytes
        for holder in (body, body.get("response"), body.get("message")):
            if isinstance(holder, dict) and isinstance(holder.get("usage"), dict):
                self.usage = _usage(holder["usage"], self.usage)

    def _see_chunk(self, body: Json) -> None:
        if not self.chunk_head:
            self.chunk_head = _chunk_head(self.dialect, body)
        for choice in _objects(body, "choices"):
            index = choice.get("index", 0)
            if type(index) is not int or not 0 <= index <= CHOICE_INDEX_MAX:
                continue
            self._begun |= 1 << index
            if choice.get("finish_reason") is not None:
                self._finished |= 1 << index
        if not self.terminal:
            self.complete = self._begun != 0 and self._begun == self._finished

    def _see_response(self, body: Json, name: str | None) -> None:
        kind = _str(body, "type") or name
        number = body.get("sequence_number")
        if type(number) is int:
            self.sequence_number = number
        if kind in _RESPONSES_END:
            self.complete = self.terminal = True
        elif kind == "response.created" and self.response_id is None and isinstance(body.get("response"), dict):
            self.response_id = _str(body["response"], "id")


def sequence_number_of(event: bytes) -> int | None:
    """The Responses dialect's own number of an event, which `starting_after` means; None if it has none."""
    body = _json_object(parse_event(event)[1])
    number = None if body is None else body.get("sequence_number")
    return number if type(number) is int else None


# What streamd says itself


def error_event(
    dialect: Dialect,
    *,
    message: str,
    type: str,
    code: str,
    param: str | None = None,
    sequence_number: int | None = None,
) -> bytes:
    """The event that ends a stream which did not end well. `type` and `code` are the OpenAI error object's.

    sequence_number (Responses): one more than the last that the reader was sent, if that is known.
    """
    body = _error(dialect, message, type, code, param)
    if dialect is Dialect.RESPONSES:
        body["sequence_number"] = sequence_number
    name = "error" if dialect in (Dialect.RESPONSES, Dialect.MESSAGES) else None
    return _event(name, orjson.dumps(body))


def reconnect_event(dialect: Dialect, *, message: str, last_id: str, retry_ms: int) -> bytes:
    """A reader is sent away and may come back after retry_ms with last_id. SDKs raise on it; an EventSource returns.

    Both stand beside the error object and in it: the SDKs hand out only its inside.
    """
    body = _error(dialect, message, "server_error", "reconnect", None)
    position = {"last_id": _clean(last_id), "retry_ms": retry_ms}
    body.update(position)
    body["error"].update(position)
    if dialect is Dialect.RESPONSES:
        body["sequence_number"] = None
    name = "error" if dialect is Dialect.MESSAGES else "reconnect"
    return b"retry: %d\n" % retry_ms + _event(name, orjson.dumps(body))


def gap_event(
    dialect: Dialect,
    progress: Progress,
    seq_from: int,
    seq_to: int,
    *,
    reset: bool = False,
) -> bytes:
    """The seqs seq_from to seq_to, both included, are lost to this reader. reset: its position is of another epoch.

    A shape that each dialect's SDK takes for an event without content: a chunk without choices, a ping, an event of a
    type that it doesn't know.
    """
    lost: Json = {"from": seq_from, "to": seq_to}
    if reset:
        lost["reset"] = True
    gap = b'"gap":' + orjson.dumps(lost)
    match dialect:
        case Dialect.CHAT | Dialect.COMPLETIONS:
            head = progress.chunk_head or _chunk_head(dialect, {})
            return _event("gap", b'{%b,"choices":[],%b}' % (head, gap))
        case Dialect.MESSAGES:
            return _event("ping", b'{"type":"ping",%b}' % gap)
        case Dialect.RESPONSES:
            # The SDK compares sequence_number with starting_after: it has to be a number.
            return _event(
                "gap",
                b'{"type":"gap","sequence_number":%d,%b}' % (progress.sequence_number or 0, gap),
            )
        case Dialect.UNKNOWN:
            return _event("gap", b"{%b}" % gap)


def error_body(
    *,
    message: str,
    type: str,
    code: str,
    param: str | None = None,
    dialect: Dialect = Dialect.UNKNOWN,
) -> bytes:
    """The JSON of an HTTP error answer: OpenAI's error object, or Anthropic's for Messages."""
    if dialect is Dialect.MESSAGES:
        return orjson.dumps(_error(dialect, message, type, code, param))
    return orjson.dumps({"error": _openai_error(message, type, code, param)})


def _error(dialect: Dialect, message: str, type: str, code: str, param: str | None) -> Json:
    match dialect:
        case Dialect.MESSAGES:
            return {
                "type": "error",
                "error": {"type": type, "message": _clean(message)},
            }
        case Dialect.RESPONSES:
            error = _openai_error(message, type, code, param)
            top = {key: error[key] for key in ("code", "message", "param")}
            return {"type": "error", **top, "error": error}
        case _:
            return {"error": _openai_error(message, type, code, param)}


def _openai_error(message: str, type: str, code: str, param: str | None) -> Json:
    return {
        "message": _clean(message),
        "type": type,
        "param": None if param is None else _clean(param),
        "code": code,
    }


def _event(name: str | None, data: bytes) -> bytes:
    """JSON has no raw line end, so one data line holds it."""
    line = b"data: " + data + b"\n\n"
    return line if name is None else b"event: " + name.encode() + b"\n" + line


def _clean(text: str) -> str:
    """Without lone surrogates, which undecodable bytes of a header may have left and orjson refuses."""
    return text.encode("utf-8", "replace").decode()


# What is read of an upstream's JSON


def _json_object(data: bytes) -> Json | None:
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return body if isinstance(body, dict) else None


def _objects(body: Json, key: str) -> list[Json]:
    """The objects in the array body[key]; none if it is something else."""
    values = body.get(key)
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _object(body: Json, key: str) -> Json:
    value = body.get(key)
    return value if isinstance(value, dict) else {}


def _str(body: Json, key: str) -> str | None:
    value = body.get(key)
    return value if isinstance(value, str) else None


def _texts(dialect: Dialect, body: Json) -> list[str]:
    """Every piece of generated text in one event."""
    match dialect:
        case Dialect.CHAT:
            found = [text for choice in _objects(body, "choices") for text in _delta_texts(_object(choice, "delta"))]
        case Dialect.COMPLETIONS:
            found = [_str(choice, "text") for choice in _objects(body, "choices")]
        case Dialect.MESSAGES:
            found = [_str(_object(body, "delta"), key) for key in ("text", "thinking", "partial_json")]
        case Dialect.RESPONSES | Dialect.UNKNOWN:  # of unknown ones, what streamd makes of published plain text
            found = [_str(body, "delta")]
    return [text for text in found if text]


def _delta_texts(delta: Json) -> list[str | None]:
    calls = [_object(call, "function") for call in _objects(delta, "tool_calls")]
    # vLLM sends the same text under both names.
    reasoning = _str(delta, "reasoning_content") or _str(delta, "reasoning")
    plain = [_str(delta, "content"), reasoning, _str(delta, "refusal")]
    return plain + [_str(call, "arguments") for call in calls]


def _usage(usage: Json, before: tuple[int, int] | None) -> tuple[int, int] | None:
    """(input, output) tokens; a number that is missing stays as it was: Anthropic's come in two events."""
    read = _tokens(usage, "prompt_tokens", "input_tokens")
    made = _tokens(usage, "completion_tokens", "output_tokens")
    if read is None and made is None:
        return before
    was_read, was_made = before or (0, 0)
    return (was_read if read is None else read, was_made if made is None else made)


def _tokens(usage: Json, *keys: str) -> int | None:
    for key in keys:
        value = usage.get(key)
        if type(value) is int and value >= 0:
            return value
    return None


def _chunk_head(dialect: Dialect, body: Json) -> bytes:
    """The members `id`, `object`, `created`, `model` of a chunk, without braces; defaults for what is missing."""
    created = body.get("created")
    kind = "chat.completion.chunk" if dialect is Dialect.CHAT else "text_completion"
    head = {
        "id": _str(body, "id") or "",
        "object": _str(body, "object") or kind,
        "created": created if type(created) is int else 0,
        "model": _str(body, "model") or "",
    }
    return orjson.dumps(head)[1:-1]
