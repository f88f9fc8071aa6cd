"""Anthropic's Messages. Complete with message_stop, or with a stop_reason: some servers leave message_stop out. An
event of the type `error` is the end, too.

The SDK looks at an event's type alone: `ping` is skipped, `error` raises, and no type at all is skipped in silence.
"""

from __future__ import annotations

from typing import ClassVar, Final

import orjson

from streamd.wire.dialects.api import UPSTREAM_ERROR, Api, NamedEvent, Part, Progress, is_error, tokens_of, waits
from streamd.wire.dialects.chat import is_finish
from streamd.wire.dialects.failure import Failure
from streamd.wire.dialects.members import Json, Usage, clean, is_text, object_of, objects_of, string_of
from streamd.wire.dialects.merging import Merge, Merging, merges

_DELTAS: Final = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}
_MERGING: Final = Merging(
    {
        "type": Merge.EQUAL,
        "index": Merge.EQUAL,
        "delta.type": Merge.EQUAL,
        "delta.text": Merge.TEXT,
        "delta.thinking": Merge.TEXT,
        "delta.partial_json": Merge.TEXT,
        "delta.signature": Merge.APART,
        "delta.citation": Merge.APART,
    }
)
_DELTA_RULES: Final = _MERGING.at("delta")


# A block's members that come in deltas, and the type of these.
_PARTS: Final = (("text", "text_delta"), ("thinking", "thinking_delta"), ("signature", "signature_delta"))
# Anthropic's types of errors by HTTP status, for an upstream that states no type: SDKs and agents look at it.
_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class Messages(Api):
    """`/v1/messages`, and the paths below it."""

    paths: ClassVar = ("/v1/messages",)
    below: ClassVar = ("/v1/messages/",)
    key_field: ClassVar = b"x-api-key"
    error_name: ClassVar = "error"
    reconnect_name: ClassVar = "error"
    heartbeat: ClassVar = b'event: ping\ndata: {"type":"ping"}\n\n'
    text_keys: ClassVar = tuple(_DELTAS.values())
    spaces_end: ClassVar = True
    merging: ClassVar = _MERGING

    def credentials(self, key: bytes) -> list[tuple[bytes, bytes]]:
        return [*super().credentials(key), (self.key_field, key)]

    def see(self, progress: Progress, body: Json, name: str | None) -> None:
        kind = string_of(body, "type") or name
        if kind == "message_stop":
            progress.end()
        elif kind == "message_delta" and is_finish(object_of(body, "delta").get("stop_reason")):
            progress.complete = True

    def is_error(self, body: Json, name: str | None) -> bool:
        kind = string_of(body, "type") or name
        return kind == "error" or ((kind is None or body.get("object") == "error") and is_error(body))

    def texts(self, body: Json) -> list[str | None]:
        return [string_of(object_of(body, "delta"), key) for key in _DELTAS.values()]

    def usage(self, body: Json, before: Usage | None) -> Usage | None:
        return tokens_of(object_of(object_of(body, "message"), "usage"), super().usage(body, before))

    def error(self, status: int, message: str, type: str, code: str, param: str | None) -> Json:
        return self.error_event(message, type, code, param)

    def error_event(self, message: str, type: str, code: str, param: str | None) -> Json:
        return {"type": "error", "error": {"type": type, "message": clean(message)}}

    def failure_event(self, failure: Failure) -> Json:
        kind = failure.type or _TYPES.get(failure.status, UPSTREAM_ERROR)
        request_id = failure.envelope.get("request_id")
        named = {"request_id": request_id} if isinstance(request_id, str) else {}
        return {
            "type": "error",
            "error": {**waits(failure), **failure.given, "type": kind, "message": failure.message},
            **named,
        }

    def gap_event(self, progress: Progress, gap: bytes) -> tuple[str | None, bytes]:
        return "ping", b'{"type":"ping",%b}' % gap

    # -- wholes

    def as_events(self, body: Json) -> list[NamedEvent] | None:
        """Each block of the message begins empty, and comes in a delta of its own type."""
        content = body.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list) or not (body.get("type") == "message" or body.get("role") == "assistant"):
            return None
        usage = body.get("usage") or {"input_tokens": 0, "output_tokens": 0}  # the SDKs add to it
        ended = {name: body.get(name) for name in ("stop_reason", "stop_sequence")}
        opened = {**body, "type": "message", "content": [], "usage": usage, **dict.fromkeys(ended)}
        events: list[Json] = [{"type": "message_start", "message": opened}]
        for index, block in enumerate(objects_of({"content": content}, "content")):
            begun, deltas = _begun(block)
            events.append({"type": "content_block_start", "index": index, "content_block": begun})
            events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
            events.append({"type": "content_block_stop", "index": index})
        events += [{"type": "message_delta", "delta": ended, "usage": usage}, {"type": "message_stop"}]
        return [(event["type"], event) for event in events]

    # -- texts

    def parts(self, parsed: Json) -> list[Part] | None:
        delta = parsed.get("delta")
        if parsed.get("type") != "content_block_delta" or not isinstance(delta, dict):
            return None
        name = _DELTAS.get(str(delta.get("type")), "")
        others = delta.keys() & set(_DELTAS.values()) - {name}
        is_pure = not others and is_text(delta.get(name)) and merges(delta, _DELTA_RULES)
        return [Part({}, 0, [(delta, name)])] if is_pure else []


def _begun(block: Json) -> tuple[Json, list[Json]]:
    """A block as it begins, and the deltas that complete it; a block of a type without deltas begins whole."""
    kind = string_of(block, "type") or ""
    if isinstance(block.get("input"), dict) and kind.endswith("tool_use"):
        arguments = orjson.dumps(block["input"]).decode()
        return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": arguments}]
    if kind not in ("text", "thinking"):
        return block, []
    given = [(name, delta) for name, delta in _PARTS if is_text(block.get(name))]
    deltas = [{"type": delta, name: block[name]} for name, delta in given]
    begun = {**block, **{name: "" for name, _ in given}}
    cited = objects_of(block, "citations")
    if cited:
        begun["citations"] = []
        deltas += [{"type": "citations_delta", "citation": citation} for citation in cited]
    return begun, deltas
