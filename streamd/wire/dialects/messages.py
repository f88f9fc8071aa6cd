"""Anthropic's Messages. Complete with message_stop, or with a stop_reason: some servers leave message_stop out. An
event of the type `error` is the end, too.

The SDK looks at an event's type alone: `ping` is skipped, `error` raises, and no type at all is skipped in silence.
"""

from __future__ import annotations

from typing import ClassVar, Final

from streamd.wire.dialects.api import Api, Part, Progress, is_error, tokens_of
from streamd.wire.dialects.chat import is_finish
from streamd.wire.dialects.members import Json, Usage, clean, is_text, object_of, string_of
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
        return kind == "error" or (kind is None and is_error(body))

    def texts(self, body: Json) -> list[str | None]:
        return [string_of(object_of(body, "delta"), key) for key in _DELTAS.values()]

    def usage(self, body: Json, before: Usage | None) -> Usage | None:
        return tokens_of(object_of(object_of(body, "message"), "usage"), super().usage(body, before))

    def error(self, status: int, message: str, type: str, code: str, param: str | None) -> Json:
        return self.error_event(message, type, code, param)

    def error_event(self, message: str, type: str, code: str, param: str | None) -> Json:
        return {"type": "error", "error": {"type": type, "message": clean(message)}}

    def gap_event(self, progress: Progress, gap: bytes) -> tuple[str | None, bytes]:
        return "ping", b'{"type":"ping",%b}' % gap

    def parts(self, parsed: Json) -> list[Part] | None:
        delta = parsed.get("delta")
        if parsed.get("type") != "content_block_delta" or not isinstance(delta, dict):
            return None
        name = _DELTAS.get(str(delta.get("type")), "")
        others = delta.keys() & set(_DELTAS.values()) - {name}
        is_pure = not others and is_text(delta.get(name)) and merges(delta, _DELTA_RULES)
        return [Part({}, 0, [(delta, name)])] if is_pure else []
