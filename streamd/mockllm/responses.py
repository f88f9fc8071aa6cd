"""OpenAI's responses, as a script: named events with a sequence number, and the whole response at both ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import orjson

from streamd.mockllm.ask import MockAsk
from streamd.mockllm.script import MARK, around, named

_SEQUENCE: Final = 9_999_999_999  # stands for the sequence number in the pattern of a token


class MockResponses:
    """`/v1/responses`. A single output, a message or a function call; this dialect has no `n`."""

    __slots__ = ("_ask", "_sequence")

    def __init__(self, ask: MockAsk) -> None:
        self._ask = ask
        self._sequence = 0  # of the next event, from 0

    def _event(self, kind: str, **members: Any) -> bytes:
        self._sequence += 1
        return named({"type": kind, "sequence_number": self._sequence - 1, **members})

    @property
    def _output_id(self) -> str:
        return f"{'msg' if self._ask.tool is None else 'fc'}_mock_{self._ask.serial:06d}"

    def _output(self, said: str, status: str) -> dict[str, Any]:
        tool = self._ask.tool
        if tool is not None:
            call_id = f"call_mock_{self._ask.serial:06d}"
            return {
                "id": self._output_id,
                "type": "function_call",
                "status": status,
                "call_id": call_id,
                "name": tool.name,
                "arguments": said,
            }
        content = [self._part(said)] if said else []
        return {"id": self._output_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _part(self, said: str) -> dict[str, Any]:
        return {"type": "output_text", "text": said, "annotations": [], "logprobs": []}

    def _said(self) -> str:
        return self._ask.text() if self._ask.tool is None else self._ask.tool.arguments

    @property
    def _status(self) -> str:
        return "incomplete" if self._ask.cut and self._ask.tool is None else "completed"

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        ask = self._ask
        return {
            "id": f"resp_mock_{ask.serial:06d}",
            "object": "response",
            "created_at": ask.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": None,
            "metadata": {},
            "model": ask.model,
            "output": output,
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "usage": None if status == "in_progress" else self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        ask = self._ask
        return {
            "input_tokens": ask.prompt_tokens,
            "input_tokens_details": {"cache_write_tokens": 0, "cached_tokens": 0},
            "output_tokens": ask.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": ask.prompt_tokens + ask.completion_tokens,
        }

    def preamble(self) -> bytes:
        begun = self._response("in_progress", [])
        events = [
            self._event("response.created", response=begun),
            self._event("response.in_progress", response=begun),
            self._event("response.output_item.added", output_index=0, item=self._output("", "in_progress")),
        ]
        if self._ask.tool is None:
            events.append(self._event("response.content_part.added", **self._place(), part=self._part("")))
        return b"".join(events)

    def _place(self) -> dict[str, Any]:
        place = {"item_id": self._output_id, "output_index": 0}
        return place if self._ask.tool is not None else place | {"content_index": 0}

    def _delta(self) -> bytes:
        members = {"sequence_number": _SEQUENCE, **self._place(), "delta": MARK}
        if self._ask.tool is not None:
            return named({"type": "response.function_call_arguments.delta", **members})
        return named({"type": "response.output_text.delta", **members, "logprobs": []})

    def tokens(self) -> Iterator[bytes]:
        before, after = around(self._delta(), MARK.encode())
        opening, place = around(before, b"%d" % _SEQUENCE)
        for piece in self._ask.pieces():
            self._sequence += 1
            yield b"%b%d%b%b%b" % (opening, self._sequence - 1, place, piece, after)

    def finish(self) -> bytes:
        said = self._said()
        if self._ask.tool is None:
            ends = [
                self._event("response.output_text.done", **self._place(), text=said, logprobs=[]),
                self._event("response.content_part.done", **self._place(), part=self._part(said)),
            ]
        else:
            name = self._ask.tool.name
            ends = [self._event("response.function_call_arguments.done", **self._place(), name=name, arguments=said)]
        ends.append(self._event("response.output_item.done", output_index=0, item=self._output(said, self._status)))
        return b"".join(ends)

    def terminal(self) -> bytes:
        response = self._response(self._status, [self._output(self._said(), self._status)])
        return self._event(f"response.{self._status}", response=response)

    def whole(self) -> bytes:
        return orjson.dumps(self._response(self._status, [self._output(self._said(), self._status)]))
