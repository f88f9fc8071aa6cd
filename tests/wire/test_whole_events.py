"""A whole answer as the events of a stream: every member arrives, and the real SDKs accumulate the same answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamd.wire.dialect import Dialect, Progress, dialect_named, failure_event, whole_events
from streamd.wire.dialects.failure import failure_of
from streamd.wire.dialects.members import Json
from streamd.wire.sse import is_event, parse_event

sys.path.insert(0, str(Path(__file__).parent))

from test_dialect_sdks import anthropic, gemini_text, genai, on_the_wire, openai_client, upstream

CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CHAT: Json = {
    "id": "c-1",
    "object": "chat.completion",
    "created": 1700000000,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Grüße", "reasoning_content": "hm", "tool_calls": [CALL]},
            "logprobs": {"content": []},
            "finish_reason": "tool_calls",
            "stop_reason": None,
        },
        {"index": 1, "message": {"role": "assistant", "content": "two"}, "finish_reason": "stop"},
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
    "prompt_logprobs": None,
}
COMPLETION: Json = {
    "id": "c-1",
    "object": "text_completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "text": "Grüße", "logprobs": None, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
}
MESSAGE: Json = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [
        {"type": "thinking", "thinking": "hm", "signature": "sig"},
        {"type": "redacted_thinking", "data": "xx"},
        {"type": "text", "text": "Grüße"},
        {"type": "tool_use", "id": "tu_1", "name": "f", "input": {"a": 1}},
    ],
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": {"input_tokens": 3, "output_tokens": 5},
}
RESPONSE: Json = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1700000000.0,
    "status": "completed",
    "error": None,
    "incomplete_details": None,
    "instructions": None,
    "metadata": {},
    "model": "m",
    "output": [
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
        {
            "type": "message",
            "id": "m_1",
            "status": "completed",
            "role": "assistant",
            "content": [
                {"type": "output_text", "text": "Grüße", "annotations": [], "logprobs": []},
                {"type": "refusal", "refusal": "no"},
            ],
        },
        {
            "type": "function_call",
            "id": "fc_1",
            "call_id": "call_1",
            "name": "f",
            "arguments": '{"a": 1}',
            "status": "completed",
        },
    ],
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "usage": {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 8,
    },
}
GEMINI: Json = {
    "candidates": [{"index": 0, "content": {"parts": [{"text": "Grüße"}], "role": "model"}, "finishReason": "STOP"}],
    "usageMetadata": {"promptTokenCount": 3, "candidatesTokenCount": 5, "totalTokenCount": 8},
    "modelVersion": "m",
}
WHOLE = {"chat": CHAT, "completions": COMPLETION, "messages": MESSAGE, "responses": RESPONSE, "gemini": GEMINI}


def bodies_in(events: list[bytes]) -> list[Json]:
    return [json.loads(data) for event in events if (data := parse_event(event)[1]) != b"[DONE]"]


def bare(events: list[bytes]) -> bytes:
    """The wire without anything of streamd's: the SDKs' accumulation takes no gap where it awaits the end."""
    return b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events) + b"0\r\n\r\n"


def progress_after(dialect: Dialect, events: list[bytes]) -> Progress:
    progress = Progress(dialect.api)
    for event in events:
        assert event.endswith(b"\n\n") and event.count(b"\n\n") == 1 and b"data: " in event
        progress.see(event)
    return progress


@pytest.mark.parametrize("form", ["compact", "pretty", "crlf", "done behind it"])
@pytest.mark.parametrize("word", WHOLE)
def test_every_dialects_whole_answer_becomes_a_complete_stream_with_its_usage(word: str, form: str) -> None:
    dialect = dialect_named(word)
    text = json.dumps(WHOLE[word], indent=None if form == "compact" else 1)
    data = text.replace("\n", "\r\n").encode() if form == "crlf" else text.encode()
    data += b"\r\n\r\ndata: [DONE]\r\n\r\n" if form == "done behind it" else b""
    events = whole_events(dialect, data)
    progress = progress_after(dialect, events)
    assert progress.complete and not progress.failed and progress.usage == (3, 5) and progress.text_bytes > 0
    assert sum(parse_event(event)[1] == b"[DONE]" for event in events) == dialect.api.done_ends
    assert progress.terminal is (word != "gemini")


def test_openais_sdk_accumulates_the_same_completion() -> None:
    with (
        upstream(bare(whole_events(Dialect.CHAT, json.dumps(CHAT).encode()))) as url,
        openai_client(url) as client,
        client.chat.completions.stream(model="m", messages=[]) as stream,
    ):
        final = stream.get_final_completion().model_dump()
    for choice, wanted in zip(final["choices"], CHAT["choices"], strict=True):
        assert choice["finish_reason"] == wanted["finish_reason"]
        assert choice["message"]["content"] == wanted["message"]["content"]
    (call,) = final["choices"][0]["message"]["tool_calls"]
    assert (call["id"], call["function"]["arguments"]) == ("call_1", '{"a": 1}')
    assert final["usage"]["completion_tokens"] == 5 and final["id"] == "c-1"


def test_anthropics_sdk_accumulates_the_same_message() -> None:
    wire = on_the_wire(Dialect.MESSAGES, whole_events(Dialect.MESSAGES, json.dumps(MESSAGE).encode()), clean_end=True)
    with (
        upstream(wire) as url,
        anthropic.Anthropic(base_url=url, api_key="k", max_retries=0) as client,
        client.messages.stream(model="m", max_tokens=9, messages=[]) as stream,
    ):
        final = stream.get_final_message().model_dump(exclude_none=True)
    for block, wanted in zip(final["content"], MESSAGE["content"], strict=True):
        assert {name: block[name] for name in wanted} == wanted
    assert final["stop_reason"] == "tool_use" and final["usage"]["output_tokens"] == 5


def test_openais_sdk_accumulates_the_same_response() -> None:
    events = whole_events(Dialect.RESPONSES, json.dumps(RESPONSE).encode())
    with (
        upstream(bare(events)) as url,
        openai_client(url) as client,
        client.responses.stream(model="m", input="") as stream,
    ):
        seen = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == "Grüße" and [item.type for item in final.output] == [
        "reasoning",
        "message",
        "function_call",
    ]
    assert final.output[2].arguments == '{"a": 1}'
    numbers = [body["sequence_number"] for body in bodies_in(events)]
    assert numbers == list(range(len(events)))
    opened = [kind for kind in seen if kind.endswith(".added")]
    assert len(opened) == len([kind for kind in seen if kind in ("response.output_item.done",) or "part.done" in kind])


def test_googles_sdk_reads_the_text() -> None:
    assert genai is not None
    for data in (json.dumps(GEMINI), json.dumps([GEMINI], indent=1)):
        events = whole_events(Dialect.GEMINI, data.encode())
        with upstream(on_the_wire(Dialect.GEMINI, events, clean_end=True)) as url:
            assert gemini_text(url) == "Grüße"


@pytest.mark.parametrize("status", ["completed", "incomplete", "failed"])
def test_a_response_ends_with_the_event_of_its_status(status: str) -> None:
    events = whole_events(Dialect.RESPONSES, json.dumps({**RESPONSE, "status": status}).encode())
    assert bodies_in(events)[-1]["type"] == f"response.{status}"
    progress = Progress(Dialect.RESPONSES.api)
    for event in events:
        progress.see(event)
    assert progress.terminal and progress.failed is (status == "failed")


def test_a_response_that_goes_on_in_the_background_has_no_end() -> None:
    events = whole_events(Dialect.RESPONSES, json.dumps({**RESPONSE, "status": "queued", "output": []}).encode())
    assert [body["type"] for body in bodies_in(events)] == ["response.created", "response.in_progress"]


@pytest.mark.parametrize(
    ("message", "delta"),
    [
        ({"content": None, "tool_calls": None}, {"role": "assistant", "content": None}),
        ({"content": "a", "tool_calls": []}, {"role": "assistant", "content": "a"}),
        (
            {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "ab"},
        ),
        (
            {"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "b"}]},
        ),
        (
            {"tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"a": [1]}}}, {"index": 7, "id": "2"}]},
            {
                "role": "assistant",
                "tool_calls": [
                    {"index": 0, "id": "1", "function": {"name": "f", "arguments": '{"a":[1]}'}},
                    {"index": 7, "id": "2"},
                ],
            },
        ),
        (
            {"role": "model", "refusal": "no", "audio": {"id": "a"}},
            {"role": "model", "refusal": "no", "audio": {"id": "a"}},
        ),
    ],
)
def test_a_chat_message_becomes_a_delta(message: Json, delta: Json) -> None:
    body = {"choices": [{"message": message, "finish_reason": "stop"}]}
    first, last = bodies_in(whole_events(Dialect.CHAT, json.dumps(body).encode()))
    assert first["choices"] == [{"index": 0, "delta": delta, "finish_reason": None}]
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]


def test_every_member_of_a_chat_answer_stands_in_some_chunk() -> None:
    chunks = bodies_in(whole_events(Dialect.CHAT, json.dumps(CHAT).encode()))
    assert set().union(*chunks) == set(CHAT)
    assert {chunk["id"] for chunk in chunks} == {"c-1"} and {chunk["object"] for chunk in chunks} == {
        "chat.completion.chunk"
    }
    members = set().union(*(choice for choice in CHAT["choices"])) - {"message"}
    assert set().union(*(choice for chunk in chunks for choice in chunk["choices"])) - {"delta"} == members


def test_half_a_surrogate_pair_costs_no_answer() -> None:
    data = rb'{"choices": [{"message": {"content": "all \ud83d"}, "finish_reason": "length"}]}'
    first, _ = bodies_in(whole_events(Dialect.CHAT, data))
    assert first["choices"][0]["delta"]["content"] == "all \ufffd"


def test_json_lines_of_chunks_are_events() -> None:
    lines: list[Json] = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in ("a", "b")]
    lines.append({"choices": [], "usage": {"completion_tokens": 2}})
    events = whole_events(Dialect.CHAT, "\n".join(map(json.dumps, lines)).encode() + b"\n")
    assert bodies_in(events) == lines and events[-1] == b"data: [DONE]\n\n"


ERRORS: dict[str, Any] = {
    "openai": {"error": {"message": "slow down", "type": "rate_limit", "param": "p", "code": "c"}},
    "array": [{"error": {"message": "slow down", "code": 429, "status": "RESOURCE_EXHAUSTED"}}],
    "text": {"error": "slow down", "error_type": "overloaded"},
    "fastapi": {"detail": "slow down"},
    "sglang": {"object": "error", "message": "slow down", "type": "BadRequestError", "code": 400},
}


@pytest.mark.parametrize("shape", ERRORS)
@pytest.mark.parametrize("word", WHOLE)
def test_an_error_that_comes_as_an_answer_is_the_dialects_error_event(word: str, shape: str) -> None:
    dialect = dialect_named(word)
    events = whole_events(dialect, json.dumps(ERRORS[shape]).encode())
    progress = progress_after(dialect, events)
    assert progress.failed and b"slow down" in events[-1] and b"[DONE]" not in b"".join(events)


@pytest.mark.parametrize("word", WHOLE)
@pytest.mark.parametrize("data", [b'{"id": 1}', b"[1, 2]", b"{}", b"[]", b'{"a":' * 200 + b"1" + b"}" * 200])
def test_json_that_is_no_answer_stays_in_an_event_and_completes_nothing(word: str, data: bytes) -> None:
    dialect = dialect_named(word)
    (event,) = whole_events(dialect, data)
    progress = Progress(dialect.api)
    progress.see(event)
    assert json.loads(parse_event(event)[1]) == json.loads(data) and not progress.complete


@pytest.mark.parametrize(
    "data", [b"", b"{", b'{"choices": [{"message": {"content": "a"', b"data: {}\n\n", b"<html>", b"1"]
)
def test_bytes_that_are_no_whole_json_have_no_events(data: bytes) -> None:
    assert whole_events(Dialect.CHAT, data) == []


@pytest.mark.parametrize(
    ("body", "message", "type", "code"),
    [
        ({"error": {"message": "m", "type": "t", "code": "c"}}, "m", "t", "c"),
        ({"error": {"message": "m", "type": "t", "code": 429}}, "m", "t", 429),
        ({"error": {"code": 429, "message": "m", "status": "RESOURCE_EXHAUSTED"}}, "m", "RESOURCE_EXHAUSTED", 429),
        ({"type": "error", "error": {"type": "overloaded_error", "message": "m"}}, "m", "overloaded_error", "own"),
        ({"error": "m", "error_type": "t"}, "m", "t", "own"),
        ({"detail": "m"}, "m", "", "own"),
        ({"detail": {"message": "m", "code": "c"}}, "m", "", "c"),
        ({"detail": [{"loc": ["body", "n"], "msg": "too large", "type": "v"}]}, "body.n: too large", "", "own"),
        ({"object": "error", "message": "m", "type": "t", "code": 400}, "m", "t", 400),
        ({"errors": [{"message": "m"}]}, "m", "", "own"),
        ({"title": "m", "type": "about:blank", "status": 403}, "m", "about:blank", "own"),
        ({"Message": "m"}, "m", "", "own"),
    ],
)
def test_type_code_and_text_of_an_error_are_found(body: Json, message: str, type: str, code: object) -> None:
    for data in (
        json.dumps(body),
        json.dumps([body]),
        f"data: {json.dumps(body)}\n\n",
        f"event: error\r\ndata: {json.dumps(body)}",
    ):
        failure = failure_of(data.encode(), 429, "own")
        assert failure is not None
        assert (failure.message, failure.type, failure.code, failure.status) == (message, type, code, 429)


@pytest.mark.parametrize(
    "data", [b"", b"no", b"{}", b'{"error": {}}', b"[1]", b'{"error": 1}', b'{"error": {"message": 1']
)
def test_a_body_without_an_error_tells_none(data: bytes) -> None:
    assert failure_of(data, 500, "own") is None


# Members that some dialect looks at, with any value under each.
WORDS = (
    *(
        "choices",
        "message",
        "delta",
        "text",
        "content",
        "role",
        "tool_calls",
        "function",
        "arguments",
        "index",
        "usage",
    ),
    *(
        "type",
        "input",
        "thinking",
        "signature",
        "citations",
        "output",
        "status",
        "summary",
        "annotations",
        "object",
        "id",
    ),
    *("candidates", "promptFeedback", "error", "detail", "errors", "code", "param", "finish_reason", "output_tokens"),
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
TYPES = st.sampled_from(
    ("message", "response", "text", "tool_use", "output_text", "function_call", "error", "assistant")
)
ANY = st.recursive(
    SCALARS | TYPES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=25,
)


@given(body=st.dictionaries(st.sampled_from(WORDS), ANY, max_size=5) | ANY, word=st.sampled_from(sorted(WHOLE)))
@settings(max_examples=100, deadline=None)
def test_any_json_becomes_whole_events_or_none(body: Any, word: str) -> None:
    dialect = dialect_named(word)
    data = json.dumps(body).encode("utf-8", "replace")
    events = whole_events(dialect, data)
    assert bool(events) is isinstance(body, dict | list)
    for event in events:
        assert is_event(event) and event.count(b"\n\n") == 1 and len(bodies_in([event])) <= 1
    progress_after(dialect, events)
    failure = failure_of(data, 500, "own")
    assert failure is None or json.loads(parse_event(failure_event(dialect, failure))[1])["error"]["message"]
