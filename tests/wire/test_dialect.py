from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamd.wire.dialect import (
    CHOICE_INDEX_MAX,
    Dialect,
    Progress,
    dialect_of,
    error_body,
    error_event,
    gap_event,
    generates,
    reconnect_event,
    sequence_number_of,
)
from streamd.wire.dialects.members import TOKENS_MAX
from streamd.wire.sse import EventSplitter, parse_event


def event(body: Any, name: str | None = None) -> bytes:
    head = b"" if name is None else b"event: %b\n" % name.encode()
    return head + b"data: " + (body if isinstance(body, bytes) else json.dumps(body).encode()) + b"\n\n"


DONE = event(b"[DONE]")


def chunk(*choices: dict[str, Any], **more: Any) -> bytes:
    head = {"id": "c-1", "object": "chat.completion.chunk", "created": 1700000000, "model": "m"}
    return event({**head, "choices": list(choices), **more})


def delta(index: int = 0, finish_reason: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"index": index, "delta": fields, "finish_reason": finish_reason}


def typed(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)


def seen(dialect: Dialect, *events: bytes) -> Progress:
    progress = Progress(dialect.api)
    for each in events:
        progress.see(each)
    return progress


def json_of(event: bytes) -> Any:
    own = re.sub(rb"^retry: [0-9]+\n", b"", event)  # streamd's own line: an upstream's is removed
    assert EventSplitter(event_bytes_max=1 << 20).feed(own) == [own]
    return json.loads(parse_event(event)[1])


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v1/chat/completions", Dialect.CHAT),
        ("/v1/completions", Dialect.COMPLETIONS),
        ("/v1/responses", Dialect.RESPONSES),
        ("/v1/responses/resp_1", Dialect.RESPONSES),
        ("/v1/messages", Dialect.MESSAGES),
        ("/v1/messages/count_tokens", Dialect.MESSAGES),
        ("/v1beta/models/gemini-2.5-flash:streamGenerateContent", Dialect.GEMINI),
        ("/v1beta/models/gemini-2.5-flash%3AgenerateContent", Dialect.GEMINI),
        ("/v1beta/tunedModels/t1:generateContent", Dialect.GEMINI),
        ("/v1beta/models", Dialect.GEMINI),
        ("/v1/models/m:countTokens", Dialect.GEMINI),
        ("/v1/models/m:brew", Dialect.UNKNOWN),
        ("/v1/models/m", Dialect.UNKNOWN),
        ("/v1/models", Dialect.UNKNOWN),
        ("/v1/embeddings", Dialect.UNKNOWN),
        ("/v1/chat/completions/", Dialect.CHAT),
        ("/v1/responsesx", Dialect.UNKNOWN),
        ("", Dialect.UNKNOWN),
    ],
)
def test_the_path_decides_the_dialect(path: str, dialect: Dialect) -> None:
    assert dialect_of(path) is dialect


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/m", "/v1/tunedModels", "/v1/models/m%2Dx"])
@pytest.mark.parametrize(
    ("query", "fields", "dialect"),
    [
        ("", {}, Dialect.UNKNOWN),
        ("pageSize=3&monkey=1", {b"authorization": b"Bearer sk-x", b"user-agent": b"OpenAI/Python"}, Dialect.UNKNOWN),
        ("", {b"x-goog-api-key": b"AIza"}, Dialect.GEMINI),
        ("", {b"x-goog-api-client": b"google-genai-sdk/3.6.0 gl-python/3.11"}, Dialect.GEMINI),
        ("a=1&k%65y=AIza", {}, Dialect.GEMINI),
    ],
)
def test_the_client_decides_the_dialect_of_a_list_of_models(
    path: str, query: str, fields: dict[bytes, bytes], dialect: Dialect
) -> None:
    assert dialect_of(path, query, fields.get) is dialect


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/chat/completions", "/v1/models/m/x", "/v1/files"])
def test_googles_key_makes_no_other_path_gemini(path: str) -> None:
    assert dialect_of(path, "key=AIza", {b"x-goog-api-key": b"AIza"}.get) is not Dialect.GEMINI


def google(*texts: str, finish: str | None = None, index: int | None = 0, **more: Any) -> bytes:
    candidate: dict[str, Any] = {"content": {"parts": [{"text": text} for text in texts], "role": "model"}}
    candidate |= {} if index is None else {"index": index}
    candidate |= {} if finish is None else {"finishReason": finish}
    return event({"candidates": [candidate], **more})


@pytest.mark.parametrize(
    ("path", "query", "asked"),
    [
        ("/v1beta/models/m:streamGenerateContent", "alt=sse", True),
        ("/v1/models/m:streamGenerateContent", "x=1&alt=sse", True),
        ("/v1beta/models/m%3AstreamGenerateContent", "%24alt=s%73e", True),
        ("/v1beta/models/m:streamGenerateContent", "alt=json", False),
        ("/v1beta/models/m:streamGenerateContent", "", False),
        ("/v1beta/models/m:generateContent", "alt=sse", False),
    ],
)
def test_geminis_path_and_query_ask_for_a_stream(path: str, query: str, asked: bool) -> None:
    assert Dialect.GEMINI.api.wants_stream(path, query, {"stream": not asked}) is asked


@pytest.mark.parametrize(
    ("value", "asked"),
    [
        *((value, True) for value in (True, 1, 1.0, 2, "1", "true", "True", "TRUE", " true ", "t", "on", "yes", "y")),
        *((value, True) for value in ("anything", [0], {"a": 1})),
        *((value, False) for value in (False, None, 0, 0.0, "", "0", "false", "False", "f", "off", "no", "n", [], {})),
    ],
)
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/chat/completions/", "/v1/completions", "/v1/responses", "/v1/messages"]
)
def test_every_value_that_a_server_takes_for_true_asks_for_a_stream(path: str, value: object, asked: bool) -> None:
    assert dialect_of(path).api.wants_stream(path, "", {"stream": value}) is asked


@pytest.mark.parametrize(
    ("method", "path", "made"),
    [
        ("POST", "/v1/chat/completions", True),
        ("POST", "/v1/chat/completions/", True),
        ("POST", "/v1/responses", True),
        ("POST", "/v1/other", True),
        ("POST", "/v1beta/models/m:generateContent", True),
        ("PUT", "/v1/messages", True),
        ("GET", "/v1/responses/r1", False),
        ("HEAD", "/v1/responses/r1", False),
        ("DELETE", "/v1/chat/completions/c1", False),
        ("POST", "/v1/responses/r1/cancel", False),
        ("POST", "/v1/chat/completions/c1", False),
        ("GET", "/v1/anything", False),
    ],
)
def test_an_answer_that_a_server_keeps_was_not_made_for_the_request(method: str, path: str, made: bool) -> None:
    assert generates(method, path) is made


def test_usage_is_found_in_the_shape_of_any_api_where_a_path_may_lead_to_any() -> None:
    vertex = google("a", usageMetadata={"promptTokenCount": 8, "candidatesTokenCount": 1})
    assert seen(Dialect.UNKNOWN, vertex).usage == (8, 1)
    assert seen(Dialect.GEMINI, chunk(usage={"prompt_tokens": 3, "completion_tokens": 4})).usage == (3, 4)


@pytest.mark.parametrize(
    ("events", "complete"),
    [
        ([], False),
        ([google("a")], False),
        ([google("a"), google("b", finish="STOP")], True),
        ([google("a", index=None), google(finish="MAX_TOKENS", index=None)], True),
        ([google("a", finish="FINISH_REASON_UNSPECIFIED")], False),
        ([google("a", finish="")], False),
        ([google("a"), google("b", index=1), google(finish="STOP")], False),
        ([google("a"), google("b", index=1), google(finish="STOP"), google(index=1, finish="SAFETY")], True),
        ([event({"promptFeedback": {"blockReason": "SAFETY"}})], True),
        ([event({"promptFeedback": {"blockReason": "SAFETY"}}), event({"usageMetadata": {}})], True),
        ([event({"promptFeedback": {"safetyRatings": []}})], False),
        ([event({"usageMetadata": {"promptTokenCount": 1}})], False),
        ([DONE], False),
    ],
)
def test_gemini_is_complete_with_every_candidates_reason_or_a_blocked_prompt(
    events: list[bytes], complete: bool
) -> None:
    progress = seen(Dialect.GEMINI, *events)
    assert (progress.complete, progress.terminal) == (complete, False)


CHUNKED = [Dialect.CHAT, Dialect.COMPLETIONS]


@pytest.mark.parametrize("dialect", CHUNKED)
@pytest.mark.parametrize(
    ("events", "complete", "terminal"),
    [
        ([], False, False),
        ([chunk(delta(content="a"))], False, False),
        ([chunk(delta(content="a")), chunk(delta(finish_reason="stop"))], True, False),
        ([chunk(delta(content="a")), DONE], True, True),
        ([DONE], True, True),
        ([chunk(delta(0)), chunk(delta(1)), chunk(delta(0, "stop"))], False, False),
        ([chunk(delta(0)), chunk(delta(1)), chunk(delta(0, "stop")), chunk(delta(1, "length"))], True, False),
        ([chunk(delta(0, "stop"), delta(1))], False, False),
        ([chunk(delta(0, "stop")), chunk(delta(1))], False, False),
        ([chunk(delta(0, "stop")), chunk(usage={"prompt_tokens": 1, "completion_tokens": 2})], True, False),
        ([chunk(usage={"prompt_tokens": 1})], False, False),
        ([chunk(delta(0, "stop"), delta(CHOICE_INDEX_MAX, "stop"), delta(10**12))], True, False),
        ([DONE, chunk(delta(0))], True, True),
        ([chunk(delta(finish_reason=""))], False, False),
        ([chunk(delta(finish_reason="null"))], False, False),
    ],
)
def test_chunks_are_complete_with_done_or_every_choice_finished(
    dialect: Dialect, events: list[bytes], complete: bool, terminal: bool
) -> None:
    progress = seen(dialect, *events)
    assert (progress.complete, progress.terminal) == (complete, terminal)


@pytest.mark.parametrize(
    "half", ["\\ud83d", "\\ude00", "a\\uD83Db", "\\\\\\ud83d", "\\ude00\\ud83d", "\\ud83d\\ud83d\\ude00"]
)
def test_an_event_with_half_a_surrogate_pair_is_read_for_its_end_and_its_usage(half: str) -> None:
    text = f'{{"choices":[{{"index":0,"delta":{{"content":"{half}"}},"finish_reason":"stop"}}]'
    progress = seen(Dialect.CHAT, event(f'{text},"usage":{{"completion_tokens":7}}}}'.encode()))
    assert progress.complete and progress.usage == (0, 7) and progress.text_events == 1


def test_half_a_surrogate_pair_excuses_nothing_else() -> None:
    progress = seen(Dialect.CHAT, event(b'{"error":{"message":"\\ud83d"'), event(b"\\ud83d"), event(b'"\\ud83d"'))
    assert not progress.terminal


ERRORS = [
    event({"error": {"message": "slow down", "code": 429}}),
    event({"error": "slow down"}),
    event({"error": {"code": 503, "status": "UNAVAILABLE"}}),
    event({"detail": "slow down"}),
    event({"detail": [{"loc": ["body"], "msg": "slow down"}]}),
    event({"object": "error", "message": "slow down", "code": 400}),
]


@pytest.mark.parametrize(
    ("dialect", "error"),
    [
        *[(dialect, error) for dialect in (*CHUNKED, Dialect.GEMINI) for error in ERRORS],
        (Dialect.CHAT, chunk(delta(finish_reason="error"), error={"message": "slow down"})),
        (Dialect.RESPONSES, typed("error", code="rate_limit_exceeded", message="slow down")),
        (Dialect.RESPONSES, typed("response.failed", response={"error": {"message": "slow down"}})),
        (Dialect.RESPONSES, ERRORS[0]),
        (Dialect.MESSAGES, typed("error", error={"type": "overloaded_error", "message": "slow down"})),
        (Dialect.MESSAGES, event({"message": "slow down"}, "error")),
        (Dialect.MESSAGES, ERRORS[3]),
    ],
)
def test_an_upstreams_own_error_is_the_end_in_each_of_its_shapes(dialect: Dialect, error: bytes) -> None:
    progress = seen(dialect, error)
    assert (progress.failed, progress.complete, progress.terminal) == (True, True, True)
    progress.see(DONE)
    assert progress.failed


@pytest.mark.parametrize(
    ("dialect", "seen_event"),
    [
        *[(dialect, event({"choices": [], "error": none})) for dialect in CHUNKED for none in (None, False, "", {}, 0)],
        (Dialect.CHAT, event({"choices": [], "detail": "more"})),
        (Dialect.RESPONSES, typed("response.created", response={"error": None}, error={"message": "x"})),
        (Dialect.MESSAGES, typed("content_block_delta", delta={"type": "text_delta", "text": "a"}, error={"x": 1})),
        (Dialect.UNKNOWN, event({"jsonrpc": "2.0", "id": 1, "error": {"code": -32601, "message": "no"}})),
    ],
)
def test_a_member_named_error_is_no_error_where_it_says_nothing(dialect: Dialect, seen_event: bytes) -> None:
    progress = seen(dialect, seen_event)
    assert (progress.failed, progress.terminal) == (False, False)


@pytest.mark.parametrize("kind", ["response.completed", "response.failed", "response.incomplete", "response.done"])
def test_a_response_ends_with_an_event_that_says_so(kind: str) -> None:
    progress = seen(Dialect.RESPONSES, typed("response.created", response={"id": "resp_1"}, sequence_number=0))
    assert (progress.complete, progress.terminal, progress.response_id) == (False, False, "resp_1")
    progress.see(DONE)
    assert not progress.complete
    progress.see(typed(kind, response={"id": "resp_1"}, sequence_number=7))
    assert (progress.complete, progress.terminal, progress.sequence_number) == (True, True, 7)


@pytest.mark.parametrize("end", [typed("message_stop"), event(b"{}", "message_stop"), event({"type": "message_stop"})])
def test_messages_end_with_message_stop(end: bytes) -> None:
    stop_reason = typed("message_delta", delta={"stop_reason": "end_turn"})
    progress = seen(Dialect.MESSAGES, typed("message_start", message={}), stop_reason, DONE)
    assert (progress.complete, progress.terminal) == (True, False), "complete only if the framing ends properly"
    progress.see(end)
    assert (progress.complete, progress.terminal) == (True, True)


def test_a_stream_of_an_unknown_dialect_is_complete_by_its_framing() -> None:
    progress = seen(Dialect.UNKNOWN, event(b"anything"))
    assert (progress.complete, progress.terminal) == (True, False)
    progress.see(DONE)
    assert (progress.complete, progress.terminal) == (True, True)


@pytest.mark.parametrize(
    ("dialect", "events", "usage"),
    [
        (Dialect.CHAT, [chunk(delta(content="a"))], None),
        (Dialect.CHAT, [chunk(usage=None)], None),
        (Dialect.CHAT, [chunk(usage={})], None),
        (Dialect.CHAT, [chunk(usage={"prompt_tokens": "3", "completion_tokens": True, "input_tokens": -1})], None),
        (Dialect.CHAT, [chunk(usage={"prompt_tokens": 3, "completion_tokens": 4})], (3, 4)),
        (
            Dialect.CHAT,
            [chunk(usage={"prompt_tokens": 3, "completion_tokens": n}) for n in (1, 2, 9)] + [chunk(usage=None)],
            (3, 9),
        ),
        (Dialect.COMPLETIONS, [chunk(usage={"prompt_tokens": 0, "completion_tokens": 4})], (0, 4)),
        (Dialect.CHAT, [chunk(x_groq={"id": "r"}), chunk(x_groq={"usage": {"completion_tokens": 4}})], (0, 4)),
        (
            Dialect.CHAT,
            [chunk(usage={"completion_tokens": 5}, x_groq={"usage": {"prompt_tokens": 1, "completion_tokens": 4}})],
            (1, 5),
        ),
        (
            Dialect.RESPONSES,
            [typed("response.completed", response={"usage": {"input_tokens": 5, "output_tokens": 6}})],
            (5, 6),
        ),
        (Dialect.RESPONSES, [typed("response.created", response={"usage": None})], None),
        (
            Dialect.MESSAGES,
            [
                typed("message_start", message={"usage": {"input_tokens": 25, "output_tokens": 1}}),
                typed("message_delta", delta={}, usage={"output_tokens": 15}),
            ],
            (25, 15),
        ),
        (Dialect.GEMINI, [google("a")], None),
        (
            Dialect.GEMINI,
            [
                google("a", usageMetadata={"promptTokenCount": 8, "candidatesTokenCount": 1}),
                google("b", usageMetadata={"candidatesTokenCount": 5, "thoughtsTokenCount": 90}),
            ],
            (8, 95),
        ),
        (Dialect.UNKNOWN, [event({"usage": {"input_tokens": 1}})], (1, 0)),
    ],
)
def test_the_last_usage_wins(dialect: Dialect, events: list[bytes], usage: tuple[int, int] | None) -> None:
    assert seen(dialect, *events).usage == usage


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (0, 0),
        (5.0, 5),  # as Lua's cjson writes a whole number
        (TOKENS_MAX, TOKENS_MAX),
        (TOKENS_MAX + 1, None),
        (2**53 + 1, None),
        (2**63, None),
        (2**64 - 1, None),
        (1e30, None),
        (-1, None),
        (5.5, None),
        (True, None),
        ("5", None),
        (None, None),
        ([5], None),
    ],
)
def test_a_number_that_is_no_count_is_as_if_it_were_missing(value: object, count: int | None) -> None:
    of_openai = {"completion_tokens": value}
    for dialect, told in (
        (Dialect.CHAT, chunk(usage=of_openai)),
        (Dialect.COMPLETIONS, chunk(usage=of_openai)),
        (Dialect.RESPONSES, typed("response.completed", response={"usage": {"output_tokens": value}})),
        (Dialect.MESSAGES, typed("message_delta", delta={}, usage={"output_tokens": value})),
        (Dialect.GEMINI, google("a", usageMetadata={"candidatesTokenCount": value})),
        (Dialect.UNKNOWN, event({"message": {"usage": of_openai}})),
    ):
        assert seen(dialect, told).usage == (None if count is None else (0, count)), dialect


@pytest.mark.parametrize(
    ("number", "next_number"), [(7, 8), (2**53 - 2, 2**53 - 1), (2**53 - 1, 0), (2**53, 0), (2**64 - 1, 0), (-3, 0)]
)
def test_a_sequence_number_is_one_that_can_be_counted_on(number: int, next_number: int) -> None:
    numbered = typed("response.created", sequence_number=number)
    known = next_number - 1 if next_number else None
    assert (sequence_number_of(numbered), seen(Dialect.RESPONSES, numbered).sequence_number) == (known, known)


@pytest.mark.parametrize(
    ("dialect", "text_event", "text_bytes"),
    [
        (Dialect.CHAT, chunk(delta(content="aé")), 3),
        (Dialect.CHAT, chunk(delta(content="", role="assistant")), 0),
        (Dialect.CHAT, chunk(delta(reasoning_content="abc", content=None)), 3),
        (Dialect.CHAT, chunk(delta(reasoning_content="abc", reasoning="abc")), 3),
        (Dialect.CHAT, chunk(delta(reasoning="abcd")), 4),
        (Dialect.CHAT, chunk(delta(tool_calls=[{"function": {"arguments": "{}"}}, {"index": 1}, 5])), 2),
        (Dialect.CHAT, chunk(delta(0, content="a"), delta(1, content="bb")), 3),
        (Dialect.COMPLETIONS, chunk({"index": 0, "text": "abcd"}), 4),
        (Dialect.RESPONSES, typed("response.output_text.delta", delta="abc"), 3),
        (Dialect.RESPONSES, typed("response.output_text.done", text="abc"), 0),
        (Dialect.MESSAGES, typed("content_block_delta", delta={"type": "text_delta", "text": "ab"}), 2),
        (Dialect.MESSAGES, typed("content_block_delta", delta={"partial_json": "{"}), 1),
        (Dialect.MESSAGES, typed("content_block_delta", delta={"thinking": "hm"}), 2),
        (Dialect.GEMINI, google("ab", "cd"), 4),
        (Dialect.GEMINI, event({"candidates": [{"content": {"parts": [{"functionCall": {}}]}}, 1]}), 0),
        (Dialect.UNKNOWN, event({"delta": "published"}), 9),
        (Dialect.UNKNOWN, event(b"[1]"), 0),
    ],
)
def test_text_is_counted(dialect: Dialect, text_event: bytes, text_bytes: int) -> None:
    progress = seen(dialect, text_event, text_event)
    assert (progress.text_events, progress.text_bytes) == (2 * (text_bytes > 0), 2 * text_bytes)


@pytest.mark.parametrize("table", [test_the_last_usage_wins, test_text_is_counted])
def test_every_dialect_has_rows_in_the_tables_above(table: Any) -> None:
    """A dialect without its own usage() or texts() would be charged for nothing."""
    (rows,) = (mark.args[1] for mark in table.pytestmark)
    assert {row[0] for row in rows} == set(Dialect)


numbers = ["created", "index", "prompt_tokens", "output_tokens", "sequence_number"]
strings = ["id", "object", "model", "content", "finish_reason", "type", "arguments", "text"]
nested = ["choices", "delta", "usage", "response", "message", "tool_calls", "function"]
keys = st.sampled_from(numbers + strings + nested)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3) | st.just("stop")
trees = st.recursive(leaves, lambda below: st.lists(below, max_size=3) | st.dictionaries(keys, below, max_size=5))
kinds = st.sampled_from(["response.created", "response.completed", "message_stop", "ping"])
bodies = st.binary(max_size=30) | st.dictionaries(keys, trees, max_size=6) | kinds.map(lambda kind: {"type": kind})


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(Dialect), st.lists(bodies, max_size=5))
def test_progress_tolerates_anything_and_only_ever_ends_complete(dialect: Dialect, bodies: list[Any]) -> None:
    progress = Progress(dialect.api)
    for body in bodies:
        ended = progress.terminal
        progress.see(event(body.replace(b"\n", b"").replace(b"\r", b"") if isinstance(body, bytes) else body))
        assert progress.terminal >= ended
        assert progress.complete or not progress.terminal
    gap = json_of(gap_event(dialect, progress, 1, 2))
    assert gap["gap"] == {"from": 1, "to": 2}


@pytest.mark.parametrize("bad", [b"", b"{", b"[" * 5000, b"null", b'"x"', b'{"a": "\xff"}', b'{"choices": {"a": 1}}'])
@pytest.mark.parametrize("dialect", Dialect)
def test_data_that_is_no_json_object_is_ignored(dialect: Dialect, bad: bytes) -> None:
    progress = seen(dialect, event(bad))
    assert progress.complete == (dialect is Dialect.UNKNOWN)
    assert (progress.usage, progress.text_events) == (None, 0)


def test_progress_is_small() -> None:
    """Each stream has a Progress: it owns only its slots and the first chunk's head."""
    progress = seen(Dialect.CHAT, chunk(delta(content="a")), chunk(delta(finish_reason="stop")))
    assert not hasattr(progress, "__dict__")
    assert sys.getsizeof(progress) + sys.getsizeof(progress.chunk_head) <= 256


def test_error_events_have_their_dialects_shape() -> None:
    said = {"message": 'it "broke"\r\n', "type": "upstream_error", "code": "truncated", "param": None}
    for dialect in (Dialect.CHAT, Dialect.COMPLETIONS, Dialect.UNKNOWN):
        made = error_event(dialect, message='it "broke"\r\n', type="upstream_error", code="truncated")
        assert (parse_event(made)[0], json_of(made)) == (None, {"error": said})
    made = error_event(
        Dialect.RESPONSES, message='it "broke"\r\n', type="upstream_error", code="truncated", sequence_number=8
    )
    top = {"type": "error", "code": "truncated", "message": 'it "broke"\r\n', "param": None, "sequence_number": 8}
    assert (parse_event(made)[0], json_of(made)) == ("error", {**top, "error": said})
    made = error_event(Dialect.MESSAGES, message="it broke", type="api_error", code="truncated")
    shape = {"type": "error", "error": {"type": "api_error", "message": "it broke"}}
    assert (parse_event(made)[0], json_of(made)) == ("error", shape)


def test_an_undecodable_byte_in_an_error_text_is_replaced() -> None:
    said = json.loads(error_body(message="bad \udcff", type="t", code="c", param="\udc80"))
    assert said["error"] == {"message": "bad ?", "type": "t", "code": "c", "param": "?"}


def test_error_bodies_have_their_dialects_shape() -> None:
    for dialect in (Dialect.CHAT, Dialect.COMPLETIONS, Dialect.RESPONSES, Dialect.UNKNOWN):
        body = error_body(message="m", type="invalid_request_error", code="c", param="model", dialect=dialect)
        assert json.loads(body) == {
            "error": {"message": "m", "type": "invalid_request_error", "code": "c", "param": "model"}
        }
    body = error_body(message="m", type="overloaded_error", code="c", dialect=Dialect.MESSAGES)
    assert json.loads(body) == {"type": "error", "error": {"type": "overloaded_error", "message": "m"}}


@pytest.mark.parametrize("dialect", Dialect)
def test_a_reconnect_event_has_the_position_and_the_wait(dialect: Dialect) -> None:
    made = reconnect_event(dialect, message="restarting", last_id="s_x:12", retry_ms=1500)
    said = json_of(made)
    if dialect is Dialect.GEMINI:
        assert made.startswith(b'data: {"error":') and made.count(b"\n") == 2
    else:
        assert made.startswith(b"retry: 1500\n")
        assert parse_event(made)[0] == ("error" if dialect is Dialect.MESSAGES else "reconnect")
    for where in (said, said["error"]):
        assert (where["last_id"], where["retry_ms"]) == ("s_x:12", 1500)


@pytest.mark.parametrize("dialect", CHUNKED)
def test_a_gap_has_the_shape_of_a_chunk(dialect: Dialect) -> None:
    made = gap_event(dialect, seen(dialect, chunk(delta(content="a")), chunk(delta(content="b"), id="other")), 5, 9)
    head = {"id": "c-1", "object": "chat.completion.chunk", "created": 1700000000, "model": "m"}
    assert parse_event(made)[0] == "gap"
    assert json_of(made) == {**head, "choices": [], "gap": {"from": 5, "to": 9}}
    unseen = json_of(gap_event(dialect, Progress(dialect.api), 1, 1, reset=True))
    assert unseen["gap"] == {"from": 1, "to": 1, "reset": True}
    assert unseen["object"] == ("chat.completion.chunk" if dialect is Dialect.CHAT else "text_completion")


@pytest.mark.parametrize(
    ("code", "status", "word"),
    [
        ("upstream_truncated", 503, "UNAVAILABLE"),
        ("upstream_idle_timeout", 504, "DEADLINE_EXCEEDED"),
        ("cancelled", 499, "CANCELLED"),
    ],
)
def test_geminis_error_events_have_googles_shape(code: str, status: int, word: str) -> None:
    made = error_event(Dialect.GEMINI, message="it broke", type="upstream_error", code=code)
    assert made.startswith(b'data: {"error":') and made.count(b"\n") == 2
    info = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": code, "domain": "streamd"}
    assert json_of(made) == {"error": {"code": status, "message": "it broke", "status": word, "details": [info]}}


def test_geminis_error_bodies_have_the_answers_status() -> None:
    said = {"message": "m", "type": "t", "code": "c", "param": "p"}
    error = json.loads(error_body(**said, status=429, dialect=Dialect.GEMINI))["error"]
    assert (error["code"], error["status"]) == (429, "RESOURCE_EXHAUSTED")
    assert error["details"][0]["metadata"] == {"param": "p"}
    assert json.loads(error_body(**said, status=418, dialect=Dialect.GEMINI))["error"]["status"] == "UNKNOWN"


def test_a_gap_has_a_shape_of_each_other_dialect() -> None:
    gap = {"gap": {"from": 5, "to": 9}}
    assert gap_event(Dialect.GEMINI, Progress(Dialect.GEMINI.api), 5, 9) == b'data: {"gap":{"from":5,"to":9}}\n\n'
    made = gap_event(Dialect.MESSAGES, Progress(Dialect.MESSAGES.api), 5, 9)
    assert (parse_event(made)[0], json_of(made)) == ("ping", {"type": "ping", **gap})
    made = gap_event(Dialect.UNKNOWN, Progress(Dialect.UNKNOWN.api), 5, 9)
    assert (parse_event(made)[0], json_of(made)) == ("gap", gap)
    progress = seen(Dialect.RESPONSES, typed("response.in_progress", sequence_number=3))
    made = gap_event(Dialect.RESPONSES, progress, 5, 9)
    assert (parse_event(made)[0], json_of(made)) == ("gap", {"type": "gap", "sequence_number": 3, **gap})


@pytest.mark.parametrize(
    ("body", "number"),
    [
        ({"sequence_number": 4}, 4),
        ({"sequence_number": "4"}, None),
        ({"sequence_number": True}, None),
        ({"sequence_number": 2**53 - 2}, 2**53 - 2),
        ({"sequence_number": 2**53 - 1}, None),
        ({"sequence_number": 2**64 - 1}, None),
        ({"sequence_number": -1}, None),
        ({}, None),
        ([], None),
    ],
)
def test_the_sequence_number_of_an_event_is_found(body: Any, number: int | None) -> None:
    assert sequence_number_of(event(body)) == number


@pytest.mark.parametrize("name", ["id", "model", "object"])
def test_a_gap_event_repeats_no_member_that_is_too_long_to_keep(name: str) -> None:
    """The members stay in memory outside of the log, which is bounded."""
    short, long = (seen(Dialect.CHAT, event({"choices": [], name: "x" * count})) for count in (256, 257))
    assert json_of(gap_event(Dialect.CHAT, short, 1, 2))[name] == "x" * 256
    assert len(long.chunk_head) < 200
    assert json_of(gap_event(Dialect.CHAT, long, 1, 2))[name] in ("", "chat.completion.chunk")


def test_a_response_with_an_id_too_long_to_keep_has_no_name() -> None:
    short, long = (
        seen(Dialect.RESPONSES, typed("response.created", response={"id": "r" * count}, sequence_number=0))
        for count in (256, 257)
    )
    assert (short.response_id, long.response_id) == ("r" * 256, None)


fields_seen = st.fixed_dictionaries(
    {},
    optional={
        "content": st.none() | st.text(max_size=4) | st.just(1),
        "reasoning": st.none() | st.text(max_size=4) | st.just([]),
        "reasoning_content": st.none() | st.text(max_size=4) | st.just({}),
        "refusal": st.none() | st.text(max_size=4),
        "role": st.just("assistant"),
        "tool_calls": st.sampled_from([None, [], [{"index": 0, "function": {"arguments": "{"}}]]),
    },
)
choices_seen = st.fixed_dictionaries(
    {"delta": fields_seen | st.none()},
    optional={
        "index": st.integers(-1, 2) | st.just("0"),
        "finish_reason": st.sampled_from([None, "", "null", "stop", "error", 1]),
        "error": st.sampled_from([None, "", "bad", {"message": "m"}]),
        "object": st.sampled_from(["error", "x"]),
        "text": st.text(max_size=4),
    },
)
chunks_seen = st.fixed_dictionaries(
    {"choices": st.lists(choices_seen, max_size=2) | st.none()},
    optional={
        "id": st.just("c1"),
        "object": st.sampled_from(["chat.completion.chunk", "text_completion", "error", None]),
        "usage": st.sampled_from([None, {}, {"prompt_tokens": 1, "completion_tokens": 2}, 1]),
        "x_groq": st.just({"usage": {"completion_tokens": 3}}),
        "error": st.sampled_from([None, "", {}, "bad", {"message": "m"}]),
        "detail": st.just("d"),
    },
)


@pytest.mark.parametrize("dialect", [Dialect.CHAT, Dialect.COMPLETIONS])
@given(st.lists(chunks_seen, max_size=3))
def test_usual_events_are_seen_as_all_others(dialect: Dialect, bodies: list[Any]) -> None:
    api = dialect.api
    unusual = type("Unusual", (type(api),), {"see_usual": lambda self, progress, body: False})()
    quick, slow = Progress(api), Progress(unusual)
    for body in bodies:
        quick.see(event(body))
        slow.see(event(body))
        assert quick.state() == slow.state()


def test_the_events_of_an_ordinary_answer_are_usual() -> None:
    progress = Progress(Dialect.CHAT.api)
    for body in ({"role": "assistant", "content": ""}, {"content": "a"}, {"reasoning": "b"}):
        chunk = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": body, "finish_reason": None}]}
        assert Dialect.CHAT.api.see_usual(progress, chunk)
    last = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    assert Dialect.CHAT.api.see_usual(progress, last) and progress.complete and progress.text_events == 2
