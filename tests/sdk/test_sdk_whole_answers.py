"""A whole answer in place of a stream, through streamd to the real SDKs: they yield its text, and raise its error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from inprocess import live, scripted

from streamd.config import UpstreamSettings

sys.path.insert(0, str(Path(__file__).parent.parent / "wire"))

from test_dialect_sdks import (
    anthropic,
    chat_accumulated,
    chat_text,
    completions_text,
    errors,
    gemini_text,
    messages_accumulated,
    openai,
    responses_accumulated,
    responses_text,
)
from test_whole_events import CHAT, COMPLETION, GEMINI, MESSAGE, RESPONSE

TEXT = "Grüße"
PLAIN_CHAT = {**CHAT, "choices": [{"index": 0, "message": {"content": TEXT}, "finish_reason": "stop"}]}
PLAIN_MESSAGE = {**MESSAGE, "content": [{"type": "text", "text": TEXT}], "stop_reason": "end_turn"}
ASKS: list[tuple[Callable[[str], str], dict[str, Any]]] = [
    (chat_text, PLAIN_CHAT),
    (chat_accumulated, PLAIN_CHAT),
    (completions_text, COMPLETION),
    (responses_text, RESPONSE),
    (responses_accumulated, RESPONSE),
    (messages_accumulated, PLAIN_MESSAGE),
    (gemini_text, GEMINI),
]
ERROR = {"error": {"message": "slow down", "type": "rate_limit_error", "param": None, "code": "rate_limit"}}


@contextmanager
def answering(body: dict[str, Any]) -> Iterator[str]:
    """streamd before a server that sends JSON under the type of a stream, so that the reader has a stream's head."""
    data = json.dumps(body).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(data)
    with (
        scripted(lambda: iter((head, data))) as upstream,
        live(upstreams=(UpstreamSettings(name="up", url=upstream),)) as served,
    ):
        yield served.url


@pytest.mark.parametrize(("ask", "body"), ASKS, ids=lambda given: getattr(given, "__name__", ""))
def test_the_sdk_yields_the_text_of_a_whole_answer(ask: Callable[[str], str], body: dict[str, Any]) -> None:
    with answering(body) as url:
        assert ask(url) == TEXT


@pytest.mark.parametrize(
    ("ask", "raised"),
    [
        (chat_text, openai.APIError),
        (completions_text, openai.APIError),
        (responses_text, openai.APIError),
        (messages_accumulated, anthropic.APIStatusError),
        (gemini_text, errors.APIError),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_the_sdk_raises_an_error_that_comes_in_place_of_a_stream(
    ask: Callable[[str], str], raised: type[Exception]
) -> None:
    with answering(ERROR) as url, pytest.raises(raised, match="slow down"):
        ask(url)
