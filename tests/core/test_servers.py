"""Answers as the servers in front of models send them: their logs are small, and a late reader misses no member."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from streamd.core.replay import ReplayLog

CHUNKS = 500
WORDS = [" the", " a", ", ", " token", "ing", "\n", " is", " 7", '"', "é", " of", "."]
Body = dict[str, Any]


def chunk(delta: Body, *, top: Body | None = None, **choice: Any) -> Body:
    head = {"id": "chatcmpl-8f3a6c1d9e", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "m"}
    return head | (top or {}) | {"choices": [{"index": 0, "delta": delta} | choice]}


def words() -> Iterator[tuple[int, str]]:
    return ((k, WORDS[k * 7 % len(WORDS)]) for k in range(CHUNKS))


def vllm() -> Iterator[Body]:
    nothing = {"logprobs": None, "finish_reason": None, "token_ids": None}
    yield chunk({"role": "assistant", "content": ""}, top={"prompt_token_ids": None}, **nothing)
    for _, word in words():
        yield chunk({"content": word}, **nothing)
    yield chunk({"content": ""}, logprobs=None, finish_reason="stop", stop_reason=None, token_ids=None)


def vllm_thinks() -> Iterator[Body]:
    for _, word in words():
        yield chunk({"reasoning": word, "reasoning_content": word}, logprobs=None, finish_reason=None)
    yield chunk({"content": ""}, finish_reason="stop")


def sglang() -> Iterator[Body]:
    nulls = {"reasoning_content": None, "tool_calls": None}
    for _, word in words():
        yield chunk(
            {"role": None, "content": word} | nulls,
            top={"usage": None},
            logprobs=None,
            finish_reason=None,
            matched_stop=None,
        )
    yield chunk({"content": None}, finish_reason="stop", matched_stop=2)


def sglang_calls_tools() -> Iterator[Body]:
    function: Body = {"name": "look_up", "arguments": ""}
    yield chunk({"tool_calls": [{"id": "call_1", "index": 0, "type": "function", "function": function}]})
    for _, word in words():
        call = {"id": None, "index": 0, "type": "function", "function": {"name": None, "arguments": word}}
        yield chunk({"role": None, "content": None, "tool_calls": [call]}, logprobs=None, finish_reason=None)
    yield chunk({}, finish_reason="tool_calls")


def llama_cpp() -> Iterator[Body]:
    yield chunk({"role": "assistant", "content": None}, finish_reason=None)
    for _, word in words():
        yield chunk({"content": word}, top={"system_fingerprint": "b6500-abc"}, finish_reason=None)
    timings = {"prompt_n": 9, "predicted_n": CHUNKS, "predicted_per_second": 41.5}
    yield chunk({}, top={"timings": timings}, finish_reason="stop")


def ollama() -> Iterator[Body]:
    for _, word in words():
        yield chunk({"role": "assistant", "content": word}, top={"system_fingerprint": "fp_ollama"}, finish_reason=None)
    yield chunk({"role": "assistant", "content": ""}, finish_reason="stop")


def ollama_thinks() -> Iterator[Body]:
    for _, word in words():
        yield chunk({"role": "assistant", "content": "", "reasoning": word}, finish_reason=None)
    yield chunk({"role": "assistant", "content": ""}, finish_reason="stop")


def openrouter() -> Iterator[Body]:
    for _, word in words():
        yield chunk(
            {"role": "assistant", "content": word},
            top={"provider": "Venice"},
            finish_reason=None,
            native_finish_reason=None,
            logprobs=None,
        )
    yield chunk({"role": "assistant", "content": ""}, finish_reason="stop", native_finish_reason="end_turn")


def openrouter_thinks() -> Iterator[Body]:
    for _, word in words():
        detail = {"type": "reasoning.text", "text": word, "format": "anthropic-claude-v1", "index": 0}
        delta = {"role": "assistant", "content": "", "reasoning": word, "reasoning_details": [detail]}
        yield chunk(delta, top={"provider": "Anthropic"}, finish_reason=None, native_finish_reason=None)
    yield chunk({"role": "assistant", "content": ""}, finish_reason="stop", native_finish_reason="end_turn")


def groq() -> Iterator[Body]:
    group = {"system_fingerprint": "fp_3bc1b5746c", "service_tier": "on_demand"}
    yield chunk({"role": "assistant", "content": ""}, top=group | {"x_groq": {"id": "req_01", "seed": 7}})
    for _, word in words():
        yield chunk({"content": word}, top=group, logprobs=None, finish_reason=None)
    usage = {"prompt_tokens": 9, "completion_tokens": CHUNKS}
    yield chunk({}, top=group | {"x_groq": {"id": "req_01", "usage": usage}}, finish_reason="stop")


def groq_thinks() -> Iterator[Body]:
    for _, word in words():
        yield chunk({"reasoning": word, "channel": "analysis"}, logprobs=None, finish_reason=None)
    yield chunk({}, finish_reason="stop")


def empty_finish_reasons() -> Iterator[Body]:
    for _, word in words():
        yield chunk({"content": word}, finish_reason="")
    yield chunk({}, finish_reason="stop")


def finish_reasons_named_null() -> Iterator[Body]:
    for _, word in words():
        yield chunk({"content": word}, finish_reason="null")
    yield chunk({}, finish_reason="stop")


# Bytes of the log of 500 chunks of 4 bytes of text, and the most events in which a late reader gets them. Servers that
# repeat a role, a channel or details get a small log as well, but none of their events merged.
ALL = CHUNKS + 2
SERVERS = {
    vllm: (5_500, 4),
    vllm_thinks: (5_500, 3),
    sglang: (5_500, 3),
    sglang_calls_tools: (5_800, 4),
    llama_cpp: (5_500, 4),
    ollama: (5_500, ALL),
    ollama_thinks: (5_500, ALL),
    openrouter: (5_500, ALL),
    openrouter_thinks: (5_800, ALL),
    groq: (6_000, 4),
    groq_thinks: (5_500, ALL),
    empty_finish_reasons: (5_500, 3),
    finish_reasons_named_null: (5_500, 3),
}


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")], ids=["compact", "spaced"])
@pytest.mark.parametrize("server", SERVERS, ids=lambda server: server.__name__)
def test_the_log_of_every_servers_answer_is_small_and_whole(server: Any, separators: tuple[str, str]) -> None:
    bodies = [*server()]
    events = [b"data: %b\n\n" % json.dumps(body, separators=separators).encode() for body in bodies]
    log = ReplayLog(bytes_max=1 << 20, events_max=1 << 20)
    for event in events:
        log.append(event)
    bytes_max, events_max = SERVERS[server]
    assert log.bytes_held < bytes_max < sum(map(len, events)) / 10
    assert [event for _, event in log.read(log.seek(1), bytes_max=1 << 20)] == events
    cursor, late = log.seek(1), []
    while some := log.read_coalesced(cursor):
        late += [json.loads(event[6:]) for _, event in some]
    assert len(late) <= events_max
    assert held_by_an_sdk(late) == held_by_an_sdk(bodies)


def held_by_an_sdk(bodies: list[Body]) -> Body:
    """What the OpenAI SDK's accumulator has after the deltas: it concatenates each string and list."""
    held: Body = {}
    for body in bodies:
        (choice,) = body["choices"]
        add(held, choice["delta"])
        held["finish_reason"] = choice.get("finish_reason")
    return held


def add(held: Body, delta: Body) -> None:
    for name, value in delta.items():
        if isinstance(value, dict):
            add(held.setdefault(name, {}), value)
        elif name == "tool_calls" and value:
            add(held.setdefault(name, {}), value[0])
        elif isinstance(value, str | list) and name not in ("index", "type"):
            held[name] = held[name] + value if name in held else value
