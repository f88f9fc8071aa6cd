"""The ends of a whole answer, for its facts."""

from __future__ import annotations

import json

import pytest

from streamd.core.answer_edges import AnswerEdges
from streamd.wire.answer_facts import AnswerFacts


def answer(text: str) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 7}
    return json.dumps({"id": "c1", "model": "m1", "choices": [choice], "usage": usage}).encode()


@pytest.mark.parametrize("size", [1, 16_000, 40_000, 300_000])
@pytest.mark.parametrize("piece", [1000, 65_536, 1 << 20])
def test_an_answer_of_any_size_states_its_facts_and_usage(size: int, piece: int) -> None:
    edges, data = AnswerEdges(), answer("a word " * (size // 7))
    for start in range(0, len(data), piece):
        edges.passed(data[start : start + piece])
    assert edges.over() == edges.usage == (3, 7)
    assert edges.facts == AnswerFacts("c1", "m1", ("stop",))
    assert edges._front == edges._back == b""


def test_an_answer_byte_by_byte() -> None:
    edges, data = AnswerEdges(), answer("é")
    for at in range(len(data)):
        edges.passed(data[at : at + 1])
    edges.over()
    assert edges.facts == AnswerFacts("c1", "m1", ("stop",))


@pytest.mark.parametrize("data", [b"", b"[1,2]", b'{"id": "c1"', b"\xff" * 100_000])
def test_an_answer_that_is_no_object_has_no_facts(data: bytes) -> None:
    edges = AnswerEdges()
    edges.passed(data)
    edges.over()
    assert edges.facts == AnswerFacts()
