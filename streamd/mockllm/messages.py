"""Anthropic's messages, as a script: named events, pings, a single content block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import orjson

from streamd.mockllm.ask import MockAsk
from streamd.mockllm.script import MARK, around, named

PING: Final = named({"type": "ping"})
PING_TOKENS: Final = 50  # tokens between two pings: a stream of the usual length has some pings in its middle


class MockAnthropic:
    """`/v1/messages`. A single content block, text or tool use."""

    __slots__ = ("_ask",)

    def __init__(self, ask: MockAsk) -> None:
        self._ask = ask

    def _envelope(self, content: list[dict[str, Any]], reason: str | None, output_tokens: int) -> dict[str, Any]:
        return {
            "id": f"msg_mock_{self._ask.serial:06d}",
            "type": "message",
            "role": "assistant",
            "model": self._ask.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": None,
            "usage": {"input_tokens": self._ask.prompt_tokens, "output_tokens": output_tokens},
        }

    def _reason(self) -> str:
        if self._ask.tool is not None:
            return "tool_use"
        return "max_tokens" if self._ask.cut else "end_turn"

    def _block(self, said: str, given: Any) -> dict[str, Any]:
        tool = self._ask.tool
        if tool is None:
            return {"type": "text", "text": said}
        return {"type": "tool_use", "id": f"toolu_mock_{self._ask.serial:06d}", "name": tool.name, "input": given}

    def preamble(self) -> bytes:
        start = {"type": "message_start", "message": self._envelope([], None, 1)}
        block = {"type": "content_block_start", "index": 0, "content_block": self._block("", {})}
        return named(start) + named(block) + PING

    def _delta(self) -> bytes:
        delta = (
            {"type": "text_delta", "text": MARK}
            if self._ask.tool is None
            else {"type": "input_json_delta", "partial_json": MARK}
        )
        return named({"type": "content_block_delta", "index": 0, "delta": delta})

    def tokens(self) -> Iterator[bytes]:
        before, after = around(self._delta(), MARK.encode())
        for count, piece in enumerate(self._ask.pieces(), 1):
            event = before + piece + after
            yield event if count % PING_TOKENS else PING + event

    def finish(self) -> bytes:
        delta = {"stop_reason": self._reason(), "stop_sequence": None}
        usage = {"output_tokens": self._ask.completion_tokens}
        stop = {"type": "content_block_stop", "index": 0}
        return named(stop) + named({"type": "message_delta", "delta": delta, "usage": usage})

    def terminal(self) -> bytes:
        return named({"type": "message_stop"})

    def whole(self) -> bytes:
        tool = self._ask.tool
        block = self._block(self._ask.text(), orjson.loads(tool.arguments) if tool is not None else None)
        return orjson.dumps(self._envelope([block], self._reason(), self._ask.completion_tokens))
