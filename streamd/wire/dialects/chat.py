"""OpenAI's chat completions, which most inference servers speak.

Complete with `[DONE]`, or with a finish_reason (not "" or "null") on every choice begun: some servers never send
`[DONE]`. The SDK looks
at an `error` member of the JSON, never at the event's type.

A chunk is pure text if it adds nothing but text: a single text in the delta, no finish_reason, no logprobs, no usage.
Two things look mergeable and are not: a `role` beside the text (some servers repeat it; the SDK *concatenates* it), so
such chunks get a template and are never merged; and unknown members of a delta, which that SDK concatenates or adds up.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

import orjson

from streamd.wire.dialects.api import Api, Part, Progress, is_error
from streamd.wire.dialects.members import EVENT_NUMBER_MAX, Json, is_text, object_of, objects_of, string_of, whole

_CHOICE_KNOWN: Final = frozenset(("index", "delta", "text", "content_filter_results"))
_DELTA_TEXTS: Final = ("content", "reasoning_content", "reasoning")
# Longest `id` and `model` that are kept for gap events: servers' ids have 20 to 60 characters, paths of models 100. The
# members stay in memory for as long as the stream, outside of its log.
_MEMBER_CHARS_MAX: Final = 256
_DELTA_KNOWN: Final = frozenset((*_DELTA_TEXTS, "role", "tool_calls"))


class Chat(Api):
    """`/v1/chat/completions`."""

    paths: ClassVar = ("/v1/chat/completions",)
    chunk: ClassVar[str] = "chat.completion.chunk"  # the `object` of a chunk that has none
    done_ends: ClassVar = True
    text_keys: ClassVar = (*_DELTA_TEXTS, "arguments", "text")
    listed: ClassVar = "choices"
    known: ClassVar = (
        *("id", "object", "created", "model", "choices", "system_fingerprint", "service_tier", "obfuscation"),
        "provider",
    )
    changing: ClassVar = ("created", "obfuscation")
    counted: ClassVar = ("usage", "timings")

    def see(self, progress: Progress, body: Json, name: str | None) -> None:
        if not progress.chunk_head:
            progress.chunk_head = self._chunk_head(body)
        for choice in objects_of(body, "choices"):
            progress.see_choice(choice.get("index", 0), is_finish(choice.get("finish_reason")))
        progress.weigh_choices()

    def is_error(self, body: Json, name: str | None) -> bool:
        """Also an event named so, whatever its data is, and a choice that failed: OpenRouter's servers report both."""
        failed = any(
            choice.get("finish_reason") == "error" or is_error(choice) for choice in objects_of(body, "choices")
        )
        return failed or name == "error" or is_error(body)

    def _chunk_head(self, body: Json) -> bytes:
        """The members `id`, `object`, `created`, `model` of a chunk, without braces; defaults for missing members, and
        for members too long to be kept.
        """
        head = {
            "id": _kept(body, "id"),
            "object": _kept(body, "object") or self.chunk,
            "created": whole(body.get("created"), EVENT_NUMBER_MAX) or 0,
            "model": _kept(body, "model"),
        }
        return orjson.dumps(head)[1:-1]

    def texts(self, body: Json) -> list[str | None]:
        return [text for choice in objects_of(body, "choices") for text in _delta_texts(object_of(choice, "delta"))]

    def gap_event(self, progress: Progress, gap: bytes) -> tuple[str | None, bytes]:
        """A chunk without choices."""
        return "gap", b'{%b,"choices":[],%b}' % (progress.chunk_head or self._chunk_head({}), gap)

    def parts(self, parsed: Json) -> list[Part] | None:
        choices = parsed.get("choices")
        if not isinstance(choices, list):
            return None
        known = [part for choice in choices if (part := _part(choice))]
        return known if len({part.index for part in known}) == len(choices) else []

    def is_known(self, parsed: Json) -> bool:
        choices = objects_of(parsed, "choices")
        return all(value is None or name in _CHOICE_KNOWN for choice in choices for name, value in choice.items())


def _kept(body: Json, name: str) -> str:
    value = string_of(body, name) or ""
    return value if len(value) <= _MEMBER_CHARS_MAX else ""


def _delta_texts(delta: Json) -> list[str | None]:
    calls = [object_of(call, "function") for call in objects_of(delta, "tool_calls")]
    # vLLM sends the same text under both names.
    reasoning = string_of(delta, "reasoning_content") or string_of(delta, "reasoning")
    plain = [string_of(delta, "content"), reasoning, string_of(delta, "refusal")]
    return plain + [string_of(call, "arguments") for call in calls]


def is_finish(reason: object) -> bool:
    """Whether a finish_reason says that its choice has ended: some servers send "" or "null" with each chunk."""
    return is_text(reason) and reason != "null"


def _part(choice: Any) -> Part | None:
    """The text of a choice, in its delta or (completions) in itself."""
    if not isinstance(choice, dict) or type(choice.get("index")) is not int:
        return None
    if is_finish(choice.get("finish_reason")) or choice.get("logprobs") is not None:
        return None
    delta = choice.get("delta")
    if delta is None:
        return Part(choice, choice["index"], choice, ("text",)) if is_text(choice.get("text")) else None
    if not isinstance(delta, dict) or "text" in choice:
        return None
    names = tuple(name for name in _DELTA_TEXTS if delta.get(name))
    unknown = delta.keys() - _DELTA_KNOWN
    if not all(is_text(delta[name]) for name in names) or any(delta[name] is not None for name in unknown):
        return None
    calls, role = delta.get("tool_calls"), bool(delta.get("role"))
    if not calls:
        return Part(choice, choice["index"], delta, names, role) if names else None
    function = _arguments_only(calls)
    return Part(choice, choice["index"], function, ("arguments",), role) if function and not names else None


def _arguments_only(calls: Any) -> Json | None:
    """The `function` of the only tool call if it adds nothing but arguments: no id, no name."""
    if not isinstance(calls, list) or len(calls) != 1 or not isinstance(calls[0], dict):
        return None
    call, function = calls[0], calls[0].get("function")
    if type(call.get("index")) is not int or not isinstance(function, dict) or not is_text(function.get("arguments")):
        return None
    if call.keys() - {"index", "function", "type", "id"} or function.keys() - {"arguments", "name"}:
        return None
    return None if call.get("id") or function.get("name") else function
