"""OpenAI's Responses. Complete with response.completed, response.failed, response.incomplete or response.done.

Its events have a number of their own: the SDK's `starting_after` is a `sequence_number`, and the SDK compares it.
"""

from __future__ import annotations

from typing import ClassVar, Final

from streamd.wire.dialects.api import Api, Part, Progress, is_error, openai_error, tokens_of
from streamd.wire.dialects.excerpt import excerpt
from streamd.wire.dialects.members import (
    EVENT_NUMBER_MAX,
    Json,
    Usage,
    is_text,
    object_of,
    string_of,
    whole,
)
from streamd.wire.dialects.merging import Merge, Merging
from streamd.wire.kept_objects import WATCHED

_END: Final = frozenset({"response.completed", "response.failed", "response.incomplete", "response.done"})
_FAILED: Final = frozenset({"error", "response.failed"})
# Longest id by which a response is found: a longer id is passed on and names nothing. OpenAI's have 55 characters.
RESPONSE_ID_CHARS_MAX: Final = 256
_DELTAS: Final = frozenset(
    (
        "response.output_text.delta",
        "response.refusal.delta",
        "response.reasoning_text.delta",
        "response.reasoning_summary_text.delta",
        "response.function_call_arguments.delta",
        "response.mcp_call_arguments.delta",
        "response.custom_tool_call_input.delta",
    )
)


class Responses(Api):
    """`/v1/responses`, and the paths below it."""

    paths: ClassVar = ("/v1/responses",)
    below: ClassVar = ("/v1/responses/",)
    numbered: ClassVar = True
    error_name: ClassVar = "error"
    # OpenAI's own, which its SDKs skip; there it has a sequence_number, but the log's events alone are numbered here.
    heartbeat: ClassVar = b'event: keepalive\ndata: {"type":"keepalive"}\n\n'
    text_keys: ClassVar = ("delta",)
    merging: ClassVar = Merging(
        {
            "type": Merge.EQUAL,
            "item_id": Merge.EQUAL,
            "output_index": Merge.EQUAL,
            "content_index": Merge.EQUAL,
            "summary_index": Merge.EQUAL,
            "sequence_number": Merge.LAST,
            "obfuscation": Merge.LAST,
            "delta": Merge.TEXT,
            "logprobs": Merge.APART,
        }
    )
    watched: ClassVar = WATCHED

    def see(self, progress: Progress, body: Json, name: str | None) -> None:
        kind = string_of(body, "type") or name
        number = _number_of(body)
        if number is not None:
            progress.sequence_number = number
        if kind in _END:
            progress.end()
        elif kind == "response.created" and progress.response_id is None:
            response_id = string_of(object_of(body, "response"), "id") or ""
            if 0 < len(response_id) <= RESPONSE_ID_CHARS_MAX:
                progress.response_id = response_id

    def is_error(self, body: Json, name: str | None) -> bool:
        """By the event's type. A member `error` alone is none: a response's own is null as long as all is well."""
        kind = string_of(body, "type") or name
        return kind in _FAILED or (kind is None and is_error(body))

    def texts(self, body: Json) -> list[str | None]:
        return [string_of(body, "delta")]

    def usage(self, body: Json, before: Usage | None) -> Usage | None:
        return tokens_of(object_of(object_of(body, "response"), "usage"), super().usage(body, before))

    def error_event(self, message: str, type: str, code: str, param: str | None) -> Json:
        error = openai_error(message, type, code, param)
        top = {key: error[key] for key in ("code", "message", "param")}
        return {"type": "error", **top, "error": error}

    def gap_event(self, progress: Progress, gap: bytes) -> tuple[str | None, bytes]:
        """An event of a type that the SDK doesn't know. The SDK compares the number, so it has to be there."""
        return "gap", b'{"type":"gap","sequence_number":%d,%b}' % (progress.sequence_number or 0, gap)

    def parts(self, parsed: Json) -> list[Part] | None:
        kind = parsed.get("type")
        if not isinstance(kind, str) or kind not in _DELTAS:
            return None
        return [Part({}, 0, [(parsed, "delta")])] if is_text(parsed.get("delta")) else []


def sequence_number_of(event: bytes) -> int | None:
    """The API's own number of an event, as in `starting_after`; None if it has none that can be counted on."""
    body = excerpt(event).body
    return None if body is None else _number_of(body)


def _number_of(body: Json) -> int | None:
    return whole(body.get("sequence_number"), EVENT_NUMBER_MAX)
