"""OpenAI's chat completions and the older completions, as scripts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import orjson

from streamd.mockllm.ask import MockAsk
from streamd.mockllm.script import MARK, around, data, usage

FINGERPRINT: Final = "fp_mock_llm"
DONE: Final = b"data: [DONE]\n\n"


class MockChat:
    """`/v1/chat/completions`."""

    __slots__ = ("_ask",)

    def __init__(self, ask: MockAsk) -> None:
        self._ask = ask

    def _head(self, kind: str) -> dict[str, Any]:
        ask = self._ask
        return {
            "id": f"chatcmpl-mock-{ask.serial:06d}",
            "object": kind,
            "created": ask.created,
            "model": ask.model,
            "system_fingerprint": FINGERPRINT,
        }

    def _chunk(self, choice: int, delta: dict[str, Any], reason: str | None = None) -> bytes:
        payload = self._head("chat.completion.chunk")
        payload["choices"] = [{"index": choice, "delta": delta, "logprobs": None, "finish_reason": reason}]
        if self._ask.include_usage:
            payload["usage"] = None
        return data(payload)

    def _call(self, choice: int, arguments: str) -> dict[str, Any]:
        assert self._ask.tool is not None
        return {
            "id": f"call_mock_{self._ask.serial:06d}_{choice}",
            "type": "function",
            "function": {"name": self._ask.tool.name, "arguments": arguments},
        }

    def preamble(self) -> bytes:
        if self._ask.tool is None:
            return b"".join(self._chunk(c, {"role": "assistant", "content": ""}) for c in range(self._ask.choices))
        return b"".join(
            self._chunk(c, {"role": "assistant", "content": None, "tool_calls": [{"index": 0, **self._call(c, "")}]})
            for c in range(self._ask.choices)
        )

    def _delta(self, text: str) -> dict[str, Any]:
        if self._ask.tool is None:
            return {"content": text}
        return {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}

    def tokens(self) -> Iterator[bytes]:
        patterns = [around(self._chunk(c, self._delta(MARK)), MARK.encode()) for c in range(self._ask.choices)]
        return in_turn(self._ask, patterns)

    def _reason(self) -> str:
        if self._ask.tool is not None:
            return "tool_calls"
        return "length" if self._ask.cut else "stop"

    def finish(self) -> bytes:
        events = [self._chunk(choice, {}, self._reason()) for choice in range(self._ask.choices)]
        if self._ask.include_usage:
            events.append(data(self._head("chat.completion.chunk") | {"choices": [], "usage": usage(self._ask)}))
        return b"".join(events)

    def terminal(self) -> bytes:
        return DONE

    def _said(self, choice: int) -> dict[str, Any]:
        if self._ask.tool is None:
            return {"role": "assistant", "content": self._ask.text(choice), "refusal": None}
        call = self._call(choice, self._ask.tool.arguments)
        return {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}

    def whole(self) -> bytes:
        choices = [
            {"index": c, "message": self._said(c), "logprobs": None, "finish_reason": self._reason()}
            for c in range(self._ask.choices)
        ]
        return orjson.dumps(self._head("chat.completion") | {"choices": choices, "usage": usage(self._ask)})


class MockCompletion:
    """`/v1/completions`: no role, no tools, text in place of the delta."""

    __slots__ = ("_ask",)

    def __init__(self, ask: MockAsk) -> None:
        self._ask = ask

    def _payload(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        ask = self._ask
        return {
            "id": f"cmpl-mock-{ask.serial:06d}",
            "object": "text_completion",
            "created": ask.created,
            "model": ask.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        }

    def _choice(self, choice: int, text: str, reason: str | None) -> dict[str, Any]:
        return {"text": text, "index": choice, "logprobs": None, "finish_reason": reason}

    def _chunk(self, choice: int, text: str, reason: str | None) -> bytes:
        payload = self._payload([self._choice(choice, text, reason)])
        if self._ask.include_usage:
            payload["usage"] = None
        return data(payload)

    def _reason(self) -> str:
        return "length" if self._ask.cut else "stop"

    def preamble(self) -> bytes:
        return b""

    def tokens(self) -> Iterator[bytes]:
        patterns = [around(self._chunk(c, MARK, None), MARK.encode()) for c in range(self._ask.choices)]
        return in_turn(self._ask, patterns)

    def finish(self) -> bytes:
        events = [self._chunk(choice, "", self._reason()) for choice in range(self._ask.choices)]
        if self._ask.include_usage:
            events.append(data(self._payload([]) | {"usage": usage(self._ask)}))
        return b"".join(events)

    def terminal(self) -> bytes:
        return DONE

    def whole(self) -> bytes:
        choices = [self._choice(c, self._ask.text(c), self._reason()) for c in range(self._ask.choices)]
        return orjson.dumps(self._payload(choices) | {"usage": usage(self._ask)})


def in_turn(ask: MockAsk, patterns: list[tuple[bytes, bytes]]) -> Iterator[bytes]:
    """The events of all tokens, each put into the pattern of its choice; the choices take turns, as in a batch."""
    if len(patterns) == 1:
        before, after = patterns[0]
        for piece in ask.pieces():
            yield before + piece + after
        return
    texts = [ask.pieces(choice) for choice in range(len(patterns))]
    for together in zip(*texts, strict=True):
        yield b"".join(before + piece + after for (before, after), piece in zip(patterns, together, strict=True))
