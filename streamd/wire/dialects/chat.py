"""OpenAI's chat completions, which most inference servers speak.

Complete with `[DONE]`, or with a finish_reason (not "" or "null") on every choice begun: some servers never send
`[DONE]`. The SDK looks
at an `error` member of the JSON, never at the event's type.

A chunk is pure text if it adds nothing but text: a text in the delta, no finish_reason, no usage. Some members look
mergeable and are not: a `role` beside the text, or Groq's `channel` (servers repeat them; the SDK *concatenates* them),
and `logprobs` or `token_ids`, each token's own. Such chunks get a template and are never merged. So are members that
aren't in the table, which that SDK concatenates or adds up; their chunks are kept whole.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Final

import orjson

from streamd.wire.dialects.api import Api, NamedEvent, Part, Progress, is_error, tokens_of
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
from streamd.wire.dialects.merging import Merge, Merging, merges
from streamd.wire.json_scan import Watched
from streamd.wire.kept_objects import STORE

_DELTA_TEXTS: Final = ("content", "reasoning_content", "reasoning", "refusal")
# Texts in OpenRouter's `reasoning_details`, which repeat that of `reasoning`.
_DETAIL_TEXTS: Final = ("text", "summary")

_DELTA: Final = "choices[].delta."
_CALL: Final = _DELTA + "tool_calls[]."
# The members of the chunks of vLLM, SGLang, llama.cpp, Ollama, OpenRouter, Groq, OpenAI and Azure.
_MERGING: Final = Merging(
    {
        "id": Merge.EQUAL,
        "object": Merge.EQUAL,
        "created": Merge.FIRST,  # as SDKs take it from the first chunk that they see
        "model": Merge.EQUAL,
        "system_fingerprint": Merge.EQUAL,
        "service_tier": Merge.EQUAL,
        "provider": Merge.EQUAL,  # OpenRouter
        "obfuscation": Merge.LAST,  # OpenAI
        "usage": Merge.COUNT,  # in each chunk: vLLM and SGLang with continuous_usage_stats
        "timings": Merge.COUNT,  # llama.cpp with timings_per_token
        "x_groq": Merge.APART,
        "prompt_progress": Merge.APART,  # llama.cpp
        "__verbose": Merge.APART,  # llama.cpp
        "prompt_token_ids": Merge.APART,  # vLLM
        "prompt_logprobs": Merge.APART,  # vLLM
        "kv_transfer_params": Merge.APART,  # vLLM
        "sglext": Merge.APART,  # SGLang
        "usage_breakdown": Merge.APART,  # Groq
        "choices[].index": Merge.EQUAL,
        "choices[].text": Merge.TEXT,
        "choices[].finish_reason": Merge.EQUAL,  # while it says nothing: null, "" or "null"
        "choices[].native_finish_reason": Merge.APART,  # OpenRouter
        "choices[].stop_reason": Merge.APART,  # vLLM
        "choices[].matched_stop": Merge.APART,  # SGLang
        "choices[].logprobs": Merge.VARIED,
        "choices[].token_ids": Merge.VARIED,  # vLLM, SGLang
        "choices[].prompt_token_ids": Merge.APART,  # vLLM
        "choices[].prompt_logprobs": Merge.APART,  # vLLM
        "choices[].content_filter_results": Merge.EQUAL,  # Azure
        "choices[].content_filter_offsets": Merge.APART,  # Azure
        _DELTA + "content": Merge.TEXT,
        _DELTA + "reasoning": Merge.TEXT,  # vLLM, Ollama, OpenRouter, Groq
        _DELTA + "reasoning_content": Merge.TEXT,  # vLLM, SGLang, llama.cpp
        _DELTA + "refusal": Merge.TEXT,
        _DELTA + "role": Merge.REPEATED,  # in each chunk: Ollama, OpenRouter
        _DELTA + "channel": Merge.REPEATED,  # Groq
        _DELTA + "reasoning_details": Merge.REPEATED,  # OpenRouter
        _DELTA + "annotations": Merge.APART,
        _DELTA + "audio": Merge.APART,
        _DELTA + "images": Merge.APART,  # OpenRouter
        _DELTA + "function_call": Merge.APART,
        _DELTA + "executed_tools": Merge.APART,  # Groq
        _DELTA + "hidden_states": Merge.APART,  # SGLang
        _CALL + "index": Merge.EQUAL,
        _CALL + "type": Merge.EQUAL,
        _CALL + "id": Merge.APART,
        _CALL + "function.name": Merge.APART,
        _CALL + "function.arguments": Merge.TEXT,
    },
    listed="choices",
)
_CHOICE_RULES: Final = _MERGING.at("choices[]")
_DELTA_RULES: Final = _MERGING.at("choices[].delta")
_CALL_RULES: Final = _MERGING.at("choices[].delta.tool_calls[]")
_FUNCTION_RULES: Final = _MERGING.at("choices[].delta.tool_calls[].function")
# Longest `id` and `model` that are kept for gap events: servers' ids have 20 to 60 characters, paths of models 100. The
# members stay in memory for as long as the stream, outside of its log.
_MEMBER_CHARS_MAX: Final = 256
# Members that each chunk of an answer repeats, and those of a choice that hold its message.
_CHUNK_MEMBERS: Final = ("id", "object", "created", "model", "system_fingerprint", "service_tier", "provider")
_MESSAGES: Final = ("message", "delta", "text")


class Chat(Api):
    """`/v1/chat/completions`."""

    paths: ClassVar = ("/v1/chat/completions",)
    chunk: ClassVar[str] = "chat.completion.chunk"  # the `object` of a chunk that has none
    watched: ClassVar = Watched({"model": None, "stream": None, STORE: None})
    done_ends: ClassVar = True
    text_keys: ClassVar = (*_DELTA_TEXTS, *_DETAIL_TEXTS, "arguments")
    listed: ClassVar = "choices"
    merging: ClassVar = _MERGING
    # vLLM's continuous_usage_stats and SGLang state the usage so far in each chunk.
    counts: ClassVar = re.compile(rb'"[a-z_]*tokens"\s*:\s*')

    def see(self, progress: Progress, body: Json, name: str | None) -> None:
        if not progress.chunk_head:
            progress.chunk_head = self._chunk_head(body)
        for choice in objects_of(body, "choices"):
            progress.see_choice(choice.get("index", 0), is_finish(choice.get("finish_reason")))
        progress.weigh_choices()

    def see_usual(self, progress: Progress, body: Json) -> bool:
        """A chunk with a single choice, without usage, calls of tools, or any sign of an error."""
        choices = body.get("choices")
        if type(choices) is not list or len(choices) != 1 or body.get("object") != self.chunk:
            return False
        choice = choices[0]
        if type(choice) is not dict or body.get("usage") or body.get("error") or "x_groq" in body:
            return False
        delta, reason = choice.get("delta"), choice.get("finish_reason")
        if type(delta) is not dict or delta.get("tool_calls") or reason == "error" or _may_be_error(choice):
            return False
        text_bytes = 0
        reasoning = delta.get("reasoning_content")
        for text in (delta.get("content"), reasoning or delta.get("reasoning"), delta.get("refusal")):
            if type(text) is str:
                text_bytes += len(text.encode())
            elif text is not None:
                return False
        progress.count_text(text_bytes)
        if not progress.chunk_head:
            progress.chunk_head = self._chunk_head(body)
        progress.see_choice(choice.get("index", 0), is_finish(reason))
        progress.weigh_choices()
        return True

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

    def usage(self, body: Json, before: Usage | None) -> Usage | None:
        """OpenAI's, or Groq's, which stands apart in the last chunk unless the client asked for usage."""
        return super().usage(body, tokens_of(object_of(object_of(body, "x_groq"), "usage"), before))

    def gap_event(self, progress: Progress, gap: bytes) -> tuple[str | None, bytes]:
        """A chunk without choices."""
        return "gap", b'{%b,"choices":[],%b}' % (progress.chunk_head or self._chunk_head({}), gap)

    def as_events(self, body: Json) -> list[NamedEvent] | None:
        """A chunk with the message of each choice, and behind these a chunk with the end of each."""
        if not isinstance(body.get("choices"), list):
            return None
        choices = objects_of(body, "choices")
        if not any(choice.keys() & {"message", "text"} for choice in choices):
            return [(None, body)]  # it is a chunk already
        del body["choices"]
        head = {name: body.pop(name) for name in _CHUNK_MEMBERS if name in body} | {"object": self.chunk}
        chunks = [self._opened(place, choice) for place, choice in enumerate(choices)]
        chunks += [self._ended(place, choice) for place, choice in enumerate(choices)]
        events = [{**head, "choices": [chunk]} for chunk in chunks]
        events[-1].update(body)  # the usage, and all that isn't known
        return [(None, event) for event in events]

    def _opened(self, place: int, choice: Json) -> Json:
        opened = {"index": choice.get("index", place), "delta": _delta_of(choice), "finish_reason": None}
        if "logprobs" in choice:
            opened["logprobs"] = choice.pop("logprobs")
        return opened

    def _ended(self, place: int, choice: Json) -> Json:
        rest = {name: value for name, value in choice.items() if name not in _MESSAGES}
        return {"index": place, "finish_reason": None, **rest, "delta": {}}

    def parts(self, parsed: Json) -> list[Part] | None:
        choices = parsed.get("choices")
        if not isinstance(choices, list):
            return None
        known = [part for choice in choices if (part := _part(choice))]
        return known if len({part.index for part in known}) == len(choices) else []


def _may_be_error(choice: Json) -> bool:
    return bool(choice.get("error")) or "detail" in choice or "object" in choice


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


def _delta_of(choice: Json) -> Json:
    """The message of a whole answer's choice as a delta. Calls of tools get the index by which SDKs join their deltas,
    and their arguments are a text.
    """
    message = object_of(choice, "message") or object_of(choice, "delta") or {"content": choice.get("text")}
    delta = {"role": "assistant", **message}
    parts = delta.get("content")
    if isinstance(parts, list) and parts and all(_is_text_part(part) for part in parts):
        delta["content"] = "".join(part["text"] for part in parts)  # SDKs add up texts
    calls = objects_of(delta, "tool_calls")
    if calls:
        delta["tool_calls"] = [_indexed(place, call) for place, call in enumerate(calls)]
    else:
        delta.pop("tool_calls", None)  # null, or empty: a delta without calls leaves it out
    return delta


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _indexed(place: int, call: Json) -> Json:
    function = object_of(call, "function")
    if function and not isinstance(function.get("arguments", ""), str):
        call = {**call, "function": {**function, "arguments": orjson.dumps(function["arguments"]).decode()}}
    return {"index": place, **call}


def _part(choice: Any) -> Part | None:
    """The text of a choice, in its delta or (completions) in itself."""
    if not isinstance(choice, dict) or type(choice.get("index")) is not int or is_finish(choice.get("finish_reason")):
        return None
    delta = choice.get("delta")
    own = merges(choice, _CHOICE_RULES)
    if own is None:
        return None
    if delta is None:
        places = [(choice, "text")] if is_text(choice.get("text")) else []
        return Part(choice, choice["index"], places, merges=own) if places else None
    if not isinstance(delta, dict) or "text" in choice:
        return None
    may_merge = merges(delta, _DELTA_RULES)
    names = [name for name in _DELTA_TEXTS if delta.get(name)]
    if may_merge is None or not all(is_text(delta[name]) for name in names):
        return None
    places = [(delta, name) for name in names]
    if delta.get("tool_calls"):
        function = _arguments_only(delta["tool_calls"])
        if function is None or names:
            return None
        places = [(function, "arguments")]
    elif names:
        details = objects_of(delta, "reasoning_details")
        places += [(detail, name) for detail in details for name in _DETAIL_TEXTS if is_text(detail.get(name))]
    return Part(choice, choice["index"], places, merges=own and may_merge) if places else None


def _arguments_only(calls: Any) -> Json | None:
    """The `function` of the only tool call if it adds nothing but arguments: no id, no name."""
    if not isinstance(calls, list) or len(calls) != 1 or not isinstance(calls[0], dict):
        return None
    call, function = calls[0], calls[0].get("function")
    if type(call.get("index")) is not int or not isinstance(function, dict) or not is_text(function.get("arguments")):
        return None
    return function if merges(call, _CALL_RULES) and merges(function, _FUNCTION_RULES) else None
