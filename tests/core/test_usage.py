"""The token usage of a whole answer, in whatever pieces it comes."""

from __future__ import annotations

import json

import pytest

from streamd.core.limits import Account
from streamd.core.usage import TAIL_BYTES, UsageTail
from streamd.wire.dialect import Dialect

CHAT = {"id": "1", "choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 3, "completion_tokens": 70}}


def charged(body: bytes, size: int = 0, dialect: Dialect = Dialect.CHAT) -> int:
    account = Account()
    tail = UsageTail(account, dialect.api)
    for start in range(0, len(body), size or len(body) or 1):
        tail.passed(body[start : start + (size or len(body))])
    tail.over()
    tail.over()
    return account.tokens_total


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"promptTokenCount": 3, "candidatesTokenCount": 5, "totalTokenCount": 8}, 5),
        ({"promptTokenCount": 3, "candidatesTokenCount": 5, "thoughtsTokenCount": 100}, 105),
        ({"promptTokenCount": 3}, 0),
    ],
)
def test_geminis_tokens_are_those_of_the_answer_and_of_its_thoughts(usage: dict[str, int], tokens: int) -> None:
    earlier = {"usageMetadata": {"candidatesTokenCount": 2, "thoughtsTokenCount": 100}} if tokens > 5 else {}
    body = json.dumps([earlier, {"candidates": [], "usageMetadata": usage, "modelVersion": "m"}], indent=1).encode()
    assert charged(body, 7, Dialect.GEMINI) == tokens


@pytest.mark.parametrize("size", [0, 1, 7])
@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (json.dumps(CHAT).encode(), 70),
        (json.dumps(CHAT, separators=(",", ":")).encode(), 70),
        (
            json.dumps(
                {**CHAT, "usage": {"input_tokens": 3, "output_tokens": 9}, "metadata": {"a": "b" * 500}}
            ).encode(),
            9,
        ),
        (json.dumps({"data": [], "usage": {"prompt_tokens": 3, "total_tokens": 3}}).encode(), 0),
        (json.dumps({"choices": [{"message": {"content": '"completion_tokens": 999'}}]}).encode(), 0),
        (b'{"usage": {"completion_tokens": 70', 70),
        (b'{"usage": {"completion_tokens": "70"}}', 0),
        (b'{"usage": {"completion_tokens": 99999999999999}}', 0),
        (b"", 0),
    ],
)
def test_the_usage_of_an_answer_is_charged_in_any_cut(body: bytes, tokens: int, size: int) -> None:
    assert charged(body, size) == tokens


def test_only_the_end_of_an_answer_is_held() -> None:
    tail = UsageTail(Account(), Dialect.UNKNOWN.api)
    for _ in range(100):
        tail.passed(b"x" * 5000)
        assert len(tail._tail) <= TAIL_BYTES
