"""The anthropic SDK, unmodified, through streamd."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from inprocess import Live, live, scripted

from streamd.config import UpstreamSettings
from streamd.mockllm import MockOptions

ENDLESS = MockOptions(interval_s=0.005, ttft_s=0, tokens=1_000_000)
ASK: Any = {"model": "m", "max_tokens": 20_000, "messages": [{"role": "user", "content": "Tell me about rivers."}]}
DELTA = (
    b"event: content_block_delta\n"
    b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"%s"}}\n\n'
)
TOOLS: Any = [{"name": "look_up", "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}}}]


@pytest.fixture
def served() -> Iterator[Live]:
    with live() as running:
        yield running


def client(url: str, **options: Any) -> anthropic.Anthropic:
    http_client = anthropic.DefaultHttpxClient(verify=False)  # Why: see the other SDK's tests
    return anthropic.Anthropic(
        base_url=url, api_key="sk-none", http_client=http_client, **({"max_retries": 0} | options)
    )


def whole(sdk: anthropic.Anthropic) -> str:
    return sdk.messages.create(**ASK).content[0].text


def text_of(event: Any) -> str:
    return event.delta.text if event.type == "content_block_delta" else ""


def test_create_and_stream_give_the_same_text_as_a_whole_answer(served: Live) -> None:
    with client(served.url) as sdk:
        text = whole(sdk)
        created = "".join(map(text_of, sdk.messages.create(**ASK, stream=True)))
        with sdk.messages.stream(**ASK) as stream:
            streamed = "".join(stream.text_stream)
            final = stream.get_final_message()
    assert text.startswith("This is mock-llm speaking") and created == streamed == final.content[0].text == text
    assert final.stop_reason == "end_turn" and final.usage.output_tokens == 20


def test_the_asynchronous_client_reads_a_stream(served: Live) -> None:
    async def use() -> str:
        sdk = anthropic.AsyncAnthropic(base_url=served.url, api_key="sk-none", max_retries=0)
        async with sdk, sdk.messages.stream(**ASK) as stream:
            return "".join([text async for text in stream.text_stream])

    with client(served.url) as sdk:
        assert asyncio.run(use()) == whole(sdk)


def test_a_streamed_tool_use_has_its_input(served: Live) -> None:
    with client(served.url) as sdk, sdk.messages.stream(**ASK, tools=TOOLS, tool_choice={"type": "any"}) as stream:
        called = stream.get_final_message().content[0]
    assert called.type == "tool_use" and called.name == "look_up" and set(called.input) == {"place"}


@pytest.mark.parametrize("oddity", ["comments;ids;retry;bom;crlf;cuts=5", "cr;bytewise;comments"])
def test_the_anthropic_sdk_does_not_notice_an_upstreams_oddities(served: Live, oddity: str) -> None:
    with client(served.url) as sdk:
        expected = whole(sdk)
        served.fault(oddity)
        with sdk.messages.stream(**ASK) as stream:
            assert "".join(stream.text_stream) == expected


def test_the_sdk_ignores_heartbeats_between_events() -> None:
    def answer() -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
        for number, text in enumerate((b"One ", b"two ", b"three.")):
            front.until(lambda number=number: b"".join(front.down).count(b"event: ping\n") > number)  # type: ignore[misc]
            yield DELTA % text
        yield b'event: message_stop\ndata: {"type":"message_stop"}\n\n'

    with scripted(answer) as url, live(upstreams=(UpstreamSettings(name="s", url=url),), heartbeat_s=0.01) as slow:
        front = slow.relay()
        with client(front.url) as sdk:
            assert "".join(map(text_of, sdk.messages.create(**ASK, stream=True))) == "One two three."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
def test_an_error_status_reaches_the_anthropic_sdk_unchanged(served: Live, status: int, stream: bool) -> None:
    served.fault(f"status={status}")
    with client(served.url) as sdk, pytest.raises(anthropic.APIStatusError) as raised:
        sdk.messages.create(**ASK, stream=stream)
    assert raised.value.status_code == status
    body: Any = raised.value.body
    assert body["type"] == "error" and body["error"]["message"] == f"mock-llm was told to answer {status}."
    assert raised.value.response.headers.get("retry-after") == ("7" if status in (429, 503) else None)
    assert served.mock.stats.requests_total == 1


@pytest.mark.parametrize("fault", ["break-fin=5", "break-rst=5;half", "bad-chunk=5", "no-finish", "stall=5"])
def test_a_truncation_raises_in_the_anthropic_sdk_after_the_received_text(fault: str) -> None:
    with live(idle_timeout_s=1.0 if fault.startswith("stall") else 120.0) as running, client(running.url) as sdk:
        expected = whole(sdk)
        running.fault(fault)
        text = ""
        with pytest.raises(anthropic.APIStatusError) as raised, sdk.messages.create(**ASK, stream=True) as stream:
            for event in stream:
                text += text_of(event)
        assert expected.startswith(text) and (text == expected) == (fault == "no-finish")
        assert "upstream" in raised.value.message


def test_an_answer_without_its_message_stop_is_whole_by_its_stop_reason(served: Live) -> None:
    with client(served.url) as sdk:
        expected = whole(sdk)
        served.fault("no-done")
        with sdk.messages.create(**ASK, stream=True) as stream:
            events = list(stream)
    assert "".join(map(text_of, events)) == expected and events[-1].type == "message_delta"


def test_delete_raises_in_the_anthropic_sdk() -> None:
    with live(ENDLESS) as running, client(running.url) as sdk:
        with pytest.raises(anthropic.APIStatusError), sdk.messages.create(**ASK, stream=True) as stream:
            next(iter(stream))
            url = f"{running.url}/v1/streams/{stream.response.headers['x-stream-id']}"
            urllib.request.urlopen(urllib.request.Request(url, method="DELETE")).close()
            for _ in stream:
                pass
        running.until(aborted=1, open=0)


def test_closing_the_anthropic_stream_aborts_the_upstream() -> None:
    with live(ENDLESS) as running, client(running.url) as sdk:
        with sdk.messages.stream(**ASK) as stream:
            next(iter(stream.text_stream))
        running.until(aborted=1, open=0)


def test_the_anthropic_sdk_resumes_with_last_event_id(served: Live) -> None:
    with client(served.url) as sdk:
        expected = whole(sdk)
        first = sdk.messages.create(**ASK, stream=True, extra_headers={"X-Stream-Detach-Grace": "60"})
        # Why 8: the SDK doesn't show pings, and the third event is a ping: counting shown events doesn't give the seq.
        position = f"{first.response.headers['x-stream-id']}:8"
        text = "".join(text_of(next(iter(first))) for _ in range(7))
        first.close()
        rest = sdk.messages.create(**ASK, stream=True, extra_headers={"Last-Event-ID": position})
        text += "".join(map(text_of, rest))
    assert text == expected
    assert served.mock.stats.requests_total == 2
