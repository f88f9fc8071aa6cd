"""An excerpt of an event says what the whole event says, whichever bulk the event has, and in bounded work."""

from __future__ import annotations

import json
from typing import Any

import pytest

from streamd.core.replay import LARGE_EVENT_BYTES_MIN, ReplayLog
from streamd.wire.dialect import Dialect, Progress
from streamd.wire.dialects import excerpt as module
from streamd.wire.dialects.excerpt import EDGE_BYTES_MAX, READ_BYTES_MAX, excerpt

Json = dict[str, Any]

TOP = {"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "b", "logprob": -1.25, "bytes": [1, 2]}]}
# Each is far above what is read whole.
BULKS: dict[str, Any] = {
    "base64": "QUJD" * 270_000,
    "prose": "so, then [it] ends, " * 9_000,
    "arguments": json.dumps({"rows": [{"a": k, "b": "x, y"} for k in range(6_000)]}),
    "Chinese": "中文" * 180_000,
    "escapes": "\U0001f600é" * 180_000,
    "numbers": list(range(20_000)),
    "words": ["abc"] * 20_000,
    "objects": [{"a": 1, "b": {"c": [2, 3]}}] * 5_000,
    "lists": [[[0]]] * 12_000,
    "log probabilities": [TOP] * 3_000,
    "members": {f"k{k}": k for k in range(20_000)},
}


def chat(bulk: Any) -> Json:
    delta = {"role": "assistant", "content": "a", "bulk": bulk}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": "stop"}
    return {"id": "c", "object": "o", "created": 1, "model": "m", "choices": [choice], "usage": usage("completion")}


def completions(bulk: Any) -> Json:
    choice = {"index": 0, "text": "a", "logprobs": bulk, "finish_reason": "length"}
    return {"id": "c", "object": "o", "created": 1, "model": "m", "choices": [choice], "usage": usage("completion")}


def responses(bulk: Any) -> Json:
    response = {"id": "resp_1", "error": None, "output": [{"type": "message", "bulk": bulk}], "top_p": 1.0}
    response |= {"tools": [{"name": "f"}], "usage": usage("output"), "user": None}
    return {"type": "response.completed", "sequence_number": 41, "response": response}


def messages(bulk: Any) -> Json:
    return {"type": "message_stop", "bulk": bulk, "usage": usage("output")}


def gemini(bulk: Any) -> Json:
    parts = [{"inlineData": {"mimeType": "image/png", "data": bulk}}]
    candidate = {"content": {"parts": parts, "role": "model"}, "finishReason": "STOP", "index": 0}
    return {"candidates": [candidate], "usageMetadata": {"promptTokenCount": 7, "candidatesTokenCount": 9}}


def usage(kind: str) -> Json:
    return {("prompt" if kind == "completion" else "input") + "_tokens": 7, f"{kind}_tokens": 9, "details": {"a": [0]}}


LASTS = {
    Dialect.CHAT: chat,
    Dialect.COMPLETIONS: completions,
    Dialect.RESPONSES: responses,
    Dialect.MESSAGES: messages,
    Dialect.GEMINI: gemini,
}
SPELLINGS: dict[str, dict[str, Any]] = {
    "dense": {"separators": (",", ":"), "ensure_ascii": False},
    "ascii": {},
    "lines": {"indent": 1},
}


def event_of(body: Json, spelling: str) -> bytes:
    text = json.dumps(body, **SPELLINGS[spelling]).encode()
    return b"".join(b"data: %b\n" % line for line in text.split(b"\n")) + b"\n"


def seen(dialect: Dialect, event: bytes) -> tuple[object, ...]:
    progress = Progress(dialect.api)
    progress.see(event)
    return (progress.complete, progress.terminal, progress.failed, progress.usage, progress.sequence_number)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("bulk", BULKS)
@pytest.mark.parametrize("dialect", LASTS)
def test_the_last_event_of_an_answer_is_understood_whatever_its_bulk(
    dialect: Dialect, bulk: str, spelling: str
) -> None:
    event = event_of(LASTS[dialect](BULKS[bulk]), spelling)
    expected = seen(dialect, event_of(LASTS[dialect](""), "dense"))
    assert expected[0] and expected[3] == (7, 9)
    assert not module._is_light(event)
    assert seen(dialect, event) == expected


@pytest.mark.parametrize("bulk", BULKS)
@pytest.mark.parametrize("dialect", LASTS)
def test_an_error_is_an_error_whatever_its_bulk(dialect: Dialect, bulk: str) -> None:
    body = {"type": "error", "error": {"message": "out of memory", "type": "server_error", "details": BULKS[bulk]}}
    assert seen(dialect, event_of(body, "ascii"))[:3] == (True, True, True)


def test_the_type_line_counts_in_front_of_the_data_and_behind_them() -> None:
    data = b"data: " + b"x" * READ_BYTES_MAX + b"\n"
    assert excerpt(b"event: error\n" + data + b"\n").name == excerpt(data + b"event: error\n\n").name == "error"


def test_an_event_whose_edges_make_no_json_still_has_its_type() -> None:
    body = b'{"type":"response.done","a":' + b"[" * 40_000 + b"]" * 40_000 + b"}"
    assert seen(Dialect.RESPONSES, b"data: " + body + b"\n\n")[:2] == (True, True)
    assert seen(Dialect.CHAT, b"data: [" + b"0," * 100_000 + b"0]\n\n") == (False, False, False, None, None)


def test_a_large_done_is_the_end() -> None:
    assert seen(Dialect.CHAT, b"data: [DONE]" + b" " * 2 * READ_BYTES_MAX + b"\n\n")[:2] == (True, True)


@pytest.mark.parametrize("bulk", BULKS)
def test_no_parser_gets_more_than_two_edges_of_a_heavy_event(bulk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = module.readable_object

    def counted(data: bytes) -> Json | None:
        read.append(len(data))
        return original(data)

    monkeypatch.setattr(module, "readable_object", counted)
    for make in LASTS.values():
        excerpt(event_of(make(BULKS[bulk]), "dense"))
    assert max(read) <= 2 * EDGE_BYTES_MAX
    assert len(read) <= 6 * len(LASTS)


def test_a_large_event_is_no_text_of_a_template() -> None:
    """It would be copied for each reader; kept whole, all of them have views of the log's bytes."""
    log = ReplayLog(bytes_max=1 << 22, events_max=100)
    text = b'data: {"choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n'
    assert [log.append(text % b"a"), log.append(text % b"b")] == [False, True]
    assert not log.append(text % (b"c" * LARGE_EVENT_BYTES_MIN))
    assert log.append(text % b"d")
    assert log.large_event(log.seek(3)) is not None
