"""The SDKs' own retries: behind streamd they do what they do without it."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import openai
import pytest
from inprocess import Live, live

from streamd.config import UpstreamSettings

STATUSES = (408, 409, 425, 429, 500, 502, 503, 504, 529)
PROMPT: Any = [{"role": "user", "content": "Tell me about rivers."}]

CHAT = {
    "id": "c1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Water."}, "finish_reason": "stop"}],
}
CHUNK = {
    "id": "c1",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "delta": {"role": "assistant", "content": "Water."}, "finish_reason": "stop"}],
}
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [{"type": "text", "text": "Water."}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 1, "output_tokens": 1},
}
EVENTS: tuple[dict[str, Any], ...] = (
    {"type": "message_start", "message": {**MESSAGE, "content": [], "stop_reason": None}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Water."}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}},
    {"type": "message_stop"},
)


class Refusing(http.server.ThreadingHTTPServer):
    """An upstream that refuses as many requests as `refusals` says, and answers the later."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = 0
        self.refusals = 0
        self.asked = 0

    def set(self, status: int, refusals: int) -> None:
        self.status, self.refusals, self.asked = status, refusals, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Refusing
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.asked += 1
        if server.asked <= server.refusals:
            body = json.dumps({"error": {"message": "not now", "type": "busy"}}).encode()
            self._answer(server.status, "application/json", body)
        elif not asked.get("stream"):
            body = json.dumps(MESSAGE if self.path.endswith("/messages") else CHAT).encode()
            self._answer(200, "application/json", body)
        elif self.path.endswith("/messages"):
            events = (f"event: {each['type']}\ndata: {json.dumps(each)}\n\n" for each in EVENTS)
            self._answer(200, "text/event-stream", "".join(events).encode())
        else:
            self._answer(200, "text/event-stream", f"data: {json.dumps(CHUNK)}\n\ndata: [DONE]\n\n".encode())

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status, "Said")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if status >= 400:
            self.send_header("retry-after-ms", "1")  # the SDKs take it before Retry-After
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def upstream() -> Iterator[Refusing]:
    with Refusing() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def served(upstream: Refusing) -> Iterator[Live]:
    with live(upstreams=(UpstreamSettings(name="up", url=upstream.url),)) as running:
        yield running


def chat(url: str, *, stream: bool) -> str:
    http_client = openai.DefaultHttpxClient(verify=False)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="sk-none", http_client=http_client) as sdk:
        answer: Any = sdk.chat.completions.create(model="m", messages=PROMPT, stream=stream)
        if not stream:
            return answer.choices[0].message.content or ""
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)


def messages(url: str, *, stream: bool) -> str:
    http_client = anthropic.DefaultHttpxClient(verify=False)
    with anthropic.Anthropic(base_url=url, api_key="sk-none", http_client=http_client) as sdk:
        if not stream:
            return sdk.messages.create(model="m", max_tokens=9, messages=PROMPT).content[0].text
        with sdk.messages.stream(model="m", max_tokens=9, messages=PROMPT) as events:
            return "".join(events.text_stream)


def outcome(ask: Callable[..., str], url: str, upstream: Refusing, status: int, refusals: int, stream: bool) -> Any:
    """The text or the error that the SDK's user sees, and how often the upstream was asked."""
    upstream.set(status, refusals)
    try:
        return ask(url, stream=stream), upstream.asked
    except (openai.APIStatusError, anthropic.APIStatusError) as error:
        return type(error), error.status_code, error.body, upstream.asked


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", [chat, messages])
@pytest.mark.parametrize("status", STATUSES)
def test_a_refusal_is_retried_as_if_streamd_were_not_there(
    served: Live, upstream: Refusing, status: int, ask: Callable[..., str], stream: bool
) -> None:
    alone = outcome(ask, upstream.url, upstream, status, 1, stream)
    assert outcome(ask, served.url, upstream, status, 1, stream) == alone
    assert alone == ("Water.", 2) or status == 425


@pytest.mark.parametrize("status", (400, *STATUSES))
def test_an_upstream_that_always_refuses_is_asked_as_often_as_without_streamd(
    served: Live, upstream: Refusing, status: int
) -> None:
    *alone, asked = outcome(chat, upstream.url, upstream, status, 100, True)
    *behind, asked_behind = outcome(chat, served.url, upstream, status, 100, True)
    assert behind == alone and alone[1] == status
    # A 408 on a reused connection says that the connection is stale: streamd asks again on a fresh connection.
    assert asked_behind == asked or status == 408
