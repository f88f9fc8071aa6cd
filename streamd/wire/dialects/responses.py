"""OpenAI's Responses. Complete with response.completed, response.failed, response.incomplete or response.done.

Its events have a number of their own: the SDK's `starting_after` is a `sequence_number`, and the SDK compares it.
"""

from __future__ import annotations

from typing import ClassVar, Final

from streamd.wire.dialects.api import Api, NamedEvent, Part, Progress, is_error, openai_error, tokens_of
from streamd.wire.dialects.excerpt import excerpt
from streamd.wire.dialects.failure import Failure
from streamd.wire.dialects.members import (
    EVENT_NUMBER_MAX,
    Json,
    Usage,
    is_text,
    object_of,
    objects_of,
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

# Lists of parts in an item: the member, the name of a part's index, and the events around a part.
_LISTS: Final = (
    ("summary", "summary_index", "response.reasoning_summary_part.added", "response.reasoning_summary_part.done"),
    ("content", "content_index", "response.content_part.added", "response.content_part.done"),
)
# The text in a part, by the part's type: its member, and the beginning of its events' type.
_PART_TEXTS: Final = {
    "output_text": ("text", "response.output_text"),
    "refusal": ("refusal", "response.refusal"),
    "summary_text": ("text", "response.reasoning_summary_text"),
    "reasoning_text": ("text", "response.reasoning_text"),
}
# Texts in an item itself, by its type.
_TEXT_MEMBERS: Final = {
    "function_call": (("arguments", "response.function_call_arguments"),),
    "mcp_call": (("arguments", "response.mcp_call_arguments"),),
    "custom_tool_call": (("input", "response.custom_tool_call_input"),),
    "code_interpreter_call": (("code", "response.code_interpreter_call_code"),),
}


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
            "logprobs": Merge.VARIED,
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
        return kind in _FAILED or ((kind is None or body.get("object") == "error") and is_error(body))

    def texts(self, body: Json) -> list[str | None]:
        return [string_of(body, "delta")]

    def usage(self, body: Json, before: Usage | None) -> Usage | None:
        return tokens_of(object_of(object_of(body, "response"), "usage"), super().usage(body, before))

    def error_event(self, message: str, type: str, code: str, param: str | None) -> Json:
        error = openai_error(message, type, code, param)
        top = {key: error[key] for key in ("code", "message", "param")}
        return {"type": "error", **top, "error": error}

    def failure_event(self, failure: Failure) -> Json:
        error = super().failure_event(failure)["error"]
        top = {key: error[key] for key in ("code", "message", "param")}
        return {"type": "error", **top, "error": error}

    def gap_event(self, progress: Progress, gap: bytes) -> tuple[str | None, bytes]:
        """An event of a type that the SDK doesn't know. The SDK compares the number, so it has to be there."""
        return "gap", b'{"type":"gap","sequence_number":%d,%b}' % (progress.sequence_number or 0, gap)

    # -- wholes

    def as_events(self, body: Json) -> list[NamedEvent] | None:
        """The items of the output one after the other, each with its parts and their texts, as OpenAI sends them."""
        if body.get("object") != "response" and not isinstance(body.get("output"), list):
            return None
        begun = {**body, "status": "in_progress", "output": [], "usage": None}
        events: list[Json] = [
            {"type": "response.created", "response": begun},
            {"type": "response.in_progress", "response": begun},
        ]
        for index, item in enumerate(objects_of(body, "output")):
            events += _output_events(index, item)
        status = string_of(body, "status")
        if status is None or f"response.{status}" in _END:
            events.append({"type": f"response.{status or 'completed'}", "response": body})
        return [(event["type"], {**event, "sequence_number": number}) for number, event in enumerate(events)]

    # -- texts

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


def _output_events(index: int, item: Json) -> list[Json]:
    """An item of the output: begun without its parts, then these, then whole."""
    place = {"output_index": index, "item_id": string_of(item, "id") or ""}
    events: list[Json] = []
    begun = dict(item)
    if "status" in item:
        begun["status"] = "in_progress"
    for name, index_name, added, done in _LISTS:
        parts = objects_of(item, name)
        if not parts:
            continue
        begun[name] = []
        for part_index, part in enumerate(parts):
            at = {**place, index_name: part_index}
            events += _part_events(at, part, added, done)
    for name, kind in _TEXT_MEMBERS.get(string_of(item, "type") or "", ()):
        text = item.get(name)
        if is_text(text):
            begun[name] = ""
            events.append({"type": f"{kind}.delta", **place, "delta": text})
            events.append({"type": f"{kind}.done", **place, name: text})
    whole = {"output_index": index, "item": item}
    opened = {"type": "response.output_item.added", "output_index": index, "item": begun}
    return [opened, *events, {"type": "response.output_item.done", **whole}]


def _part_events(at: Json, part: Json, added: str, done: str) -> list[Json]:
    """A part of an item: begun empty, its text, then whole."""
    name, kind = _PART_TEXTS.get(string_of(part, "type") or "", ("", ""))
    begun, texts = dict(part), []
    if name and isinstance(part.get(name), str):
        begun[name] = ""
        logprobs = {"logprobs": part.get("logprobs") or []} if kind == "response.output_text" else {}
        if part[name]:
            texts.append({"type": f"{kind}.delta", **at, "delta": part[name], **logprobs})
        texts.append({"type": f"{kind}.done", **at, name: part[name], **logprobs})
    notes = [
        {"type": "response.output_text.annotation.added", **at, "annotation_index": place, "annotation": note}
        for place, note in enumerate(objects_of(part, "annotations"))
    ]
    if notes:
        begun["annotations"] = []
    opening = [{"type": added, **at, "part": begun}] if added else []
    closing = [{"type": done, **at, "part": part}] if done else []
    return [*opening, *texts[:-1], *notes, *texts[-1:], *closing]
