"""Facts of an answer, in the shapes of each API."""

from __future__ import annotations

from typing import Any

import pytest

from streamd.wire.answer_facts import FACT_CHARS_MAX, REASONS_MAX, AnswerFacts, facts_in

Json = dict[str, Any]


def chunk(**more: Any) -> Json:
    return {"id": "c1", "model": "m1", "choices": [{"index": 0, "delta": {}, **more}]}


@pytest.mark.parametrize(
    ("bodies", "facts"),
    [
        (
            [
                chunk(finish_reason=None),
                chunk(finish_reason=""),
                chunk(finish_reason="null"),
                chunk(finish_reason="stop"),
            ],
            AnswerFacts("c1", "m1", ("stop",)),
        ),
        (
            [{"id": "c1", "model": "m1", "choices": [{"finish_reason": "stop"}, {"finish_reason": "length"}]}],
            AnswerFacts("c1", "m1", ("stop", "length")),
        ),
        (
            [
                {"type": "message_start", "message": {"id": "msg_1", "model": "claude", "stop_reason": None}},
                {"type": "content_block_start", "index": 1, "content_block": {"type": "tool_use", "id": "toolu_1"}},
                {"type": "message_delta", "delta": {"stop_reason": "tool_use"}},
            ],
            AnswerFacts("msg_1", "claude", ("tool_use",)),
        ),
        (
            [
                {
                    "id": "msg_1",
                    "type": "message",
                    "model": "claude",
                    "content": [{"id": "x"}],
                    "stop_reason": "end_turn",
                }
            ],
            AnswerFacts("msg_1", "claude", ("end_turn",)),
        ),
        (
            [
                {
                    "type": "response.created",
                    "response": {"id": "resp_1", "object": "response", "status": "in_progress"},
                },
                {"type": "response.output_item.added", "item": {"id": "item_1", "status": "completed"}},
                {
                    "type": "response.incomplete",
                    "response": {
                        "id": "resp_1",
                        "object": "response",
                        "model": "gpt",
                        "status": "incomplete",
                        "incomplete_details": {"reason": "max_output_tokens"},
                    },
                },
            ],
            AnswerFacts("resp_1", "gpt", ("max_output_tokens",)),
        ),
        (
            [{"id": "resp_1", "object": "response", "model": "gpt", "status": "completed", "metadata": {"id": "mine"}}],
            AnswerFacts("resp_1", "gpt", ("completed",)),
        ),
        (
            [{"responseId": "r1", "modelVersion": "gemini-2", "candidates": [{"finishReason": "STOP"}]}],
            AnswerFacts("r1", "gemini-2", ("STOP",)),
        ),
        ([], AnswerFacts()),
        ([{"error": {"message": "no"}}], AnswerFacts()),
        ([{"id": 1, "model": None, "choices": {"finish_reason": "stop"}}], AnswerFacts()),
    ],
)
def test_the_facts_of_an_answer_are_found(bodies: list[Json], facts: AnswerFacts) -> None:
    assert facts_in(bodies) == facts


def test_facts_are_bounded() -> None:
    long = "x" * (FACT_CHARS_MAX + 1)
    choices = [{"finish_reason": "stop"}, {"finish_reason": long}] * 20
    assert facts_in([{"id": long, "model": long, "choices": choices}]) == AnswerFacts("", "", ("stop",) * REASONS_MAX)
