"""The google-genai SDK, unmodified, through streamd."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from inprocess import Live, live, scripted

from streamd.config import UpstreamSettings
from streamd.mockllm import MockOptions

genai = pytest.importorskip("google.genai")
errors = pytest.importorskip("google.genai.errors")

ENDLESS = MockOptions(interval_s=0.005, ttft_s=0, tokens=1_000_000)
ASK: Any = {"model": "m", "contents": "Tell me about rivers."}
EVENT = b'data: {"candidates":[{"content":{"parts":[{"text":"%s"}],"role":"model"},"index":0%s}]}\r\n\r\n'
TOOLS: Any = {
    "tools": [{"function_declarations": [{"name": "look_up", "parameters": {"type": "OBJECT", "properties": {}}}]}],
    "tool_config": {"function_calling_config": {"mode": "ANY"}},
    "automatic_function_calling": {"disable": True},
}


@pytest.fixture
def served() -> Iterator[Live]:
    with live() as running:
        yield running


def client(url: str, version: str = "v1beta", **headers: str) -> Any:
    return genai.Client(
        api_key="sk-none", http_options={"base_url": url, "api_version": version, "headers": headers}, vertexai=False
    )


def whole(sdk: Any) -> str:
    text = sdk.models.generate_content(**ASK).text
    assert isinstance(text, str)
    return text


def streamed(sdk: Any) -> str:
    return "".join(part.text or "" for part in sdk.models.generate_content_stream(**ASK))


@pytest.mark.parametrize("version", ["v1beta", "v1"])
def test_whole_and_streamed_answers_say_the_same(served: Live, version: str) -> None:
    with client(served.url, version) as sdk:
        text = whole(sdk)
        parts = list(sdk.models.generate_content_stream(**ASK))
    assert text.startswith("This is mock-llm speaking") and "".join(part.text or "" for part in parts) == text
    assert len(parts) > 10 and parts[-1].candidates[0].finish_reason == "STOP"
    assert parts[-1].usage_metadata.candidates_token_count == 20


def test_asynchronous(served: Live) -> None:
    async def use() -> str:
        sdk = client(served.url).aio
        parts = await sdk.models.generate_content_stream(**ASK)
        return "".join([part.text or "" async for part in parts])

    with client(served.url) as sdk:
        assert asyncio.run(use()) == whole(sdk)


def test_a_function_call_stays_whole(served: Live) -> None:
    with client(served.url) as sdk:
        parts = list(sdk.models.generate_content_stream(**ASK, config=TOOLS))
    assert [call.name for part in parts for call in part.function_calls or ()] == ["look_up"]


@pytest.mark.parametrize("version", ["v1beta", "v1"])
def test_the_other_operations_pass(served: Live, version: str) -> None:
    with client(served.url, version) as sdk:
        assert sdk.models.count_tokens(**ASK).total_tokens > 0
        embedded = sdk.models.embed_content(model="m", contents=["a", "b"]).embeddings
        assert len(embedded) == 2 and embedded[0].values != embedded[1].values
        assert [model.name for model in sdk.models.list()] == ["models/mock-llm"]
        assert sdk.models.get(model="m").name == "models/m"


@pytest.mark.parametrize("oddity", ["comments;ids;retry;bom;cuts=5", "cr;bytewise;comments", "lf"])
def test_lines_that_the_sdk_breaks_on_never_reach_it(served: Live, oddity: str) -> None:
    with client(served.url) as sdk:
        expected = whole(sdk)
        if oddity != "lf":
            served.fault(oddity)
        assert streamed(sdk) == expected


def test_a_long_pause_brings_no_heartbeat() -> None:
    def answer() -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
        yield EVENT % (b"One ", b"")
        other = urllib.request.urlopen(f"{slow.url}/v1/streams/{stream_id()}")
        while other.readline() != b": hb\n":  # a reader of ids beside it gets its heartbeats
            pass
        yield EVENT % (b"two.", b',"finishReason":"STOP"')

    def stream_id() -> str:
        return next(iter(slow.worker.runtime.hub)).id

    with (
        scripted(answer) as url,
        live(upstreams=(UpstreamSettings(name="s", url=url),), heartbeat_s=0.01) as slow,
        client(slow.url) as sdk,
    ):
        assert streamed(sdk) == "One two."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
def test_an_error_status_arrives_as_it_was(served: Live, status: int, stream: bool) -> None:
    served.fault(f"status={status}")
    with client(served.url) as sdk, pytest.raises(errors.APIError) as raised:
        streamed(sdk) if stream else whole(sdk)
    assert raised.value.code == status and raised.value.message == f"mock-llm was told to answer {status}."
    assert served.mock.stats.requests_total == 1


@pytest.mark.parametrize("fault", ["break-fin=5", "break-rst=5;half", "bad-chunk=5", "stall=5"])
def test_a_truncation_raises_after_the_text_that_came(fault: str) -> None:
    with live(idle_timeout_s=1.0 if fault.startswith("stall") else 120.0) as running, client(running.url) as sdk:
        expected = whole(sdk)
        running.fault(fault)
        text = ""
        with pytest.raises(errors.ServerError) as raised:
            for part in sdk.models.generate_content_stream(**ASK):
                text += part.text or ""
        assert text and expected.startswith(text) and text != expected
        assert "upstream" in raised.value.message and raised.value.code in (503, 504)
        assert raised.value.details["error"]["details"][0]["domain"] == "streamd"


def test_an_upstreams_own_error_in_the_stream_raises() -> None:
    def answer() -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + EVENT % (b"One ", b"")
        yield b'data: {"error":{"code":503,"message":"overloaded","status":"UNAVAILABLE"}}\r\n\r\n'

    with scripted(answer) as url, live(upstreams=(UpstreamSettings(name="s", url=url),)) as running:
        with client(running.url) as sdk, pytest.raises(errors.ServerError) as raised:
            streamed(sdk)
        assert raised.value.message == "overloaded"


def test_delete_raises_in_the_reader() -> None:
    with live(ENDLESS) as running, client(running.url) as sdk:
        with pytest.raises(errors.ClientError) as raised:
            for count, part in enumerate(sdk.models.generate_content_stream(**ASK)):
                if count == 0:
                    url = f"{running.url}/v1/streams/{part.sdk_http_response.headers['x-stream-id']}"
                    urllib.request.urlopen(urllib.request.Request(url, method="DELETE")).close()
        assert raised.value.code == 499 and raised.value.status == "CANCELLED"
        running.until(aborted=1, open=0)


def test_close_in_mid_stream_aborts_the_upstream() -> None:
    with live(ENDLESS) as running:
        with client(running.url) as sdk:
            parts = sdk.models.generate_content_stream(**ASK)
            next(parts)
            parts.close()
        running.until(aborted=1, open=0)


def test_the_same_request_resumes_with_last_event_id(served: Live) -> None:
    with client(served.url, **{"X-Stream-Detach-Grace": "60"}) as sdk:
        expected = whole(sdk)
        parts = sdk.models.generate_content_stream(**ASK)
        first = next(parts)
        position = f"{first.sdk_http_response.headers['x-stream-id']}:1"
        parts.close()
    with client(served.url, **{"Last-Event-ID": position}) as sdk:
        assert (first.text or "") + streamed(sdk) == expected
    assert served.mock.stats.requests_total == 2
