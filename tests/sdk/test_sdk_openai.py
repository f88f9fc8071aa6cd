"""The openai SDK, unmodified, through streamd. run_matrix.sh also runs it with the previous major version."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from inprocess import Live, live, scripted

from streamd.config import UpstreamSettings
from streamd.mockllm import MockOptions

PROMPT: Any = [{"role": "user", "content": "Tell me about rivers."}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "depth": {"type": "integer"}}},
        },
    }
]
ROUTES = ("chat", "completions", "responses")
HEARTBEATS = (b": hb\n", b"event: keepalive\n")  # Responses have an event for it

# Oddities that a reader must not notice: all are unusual, and allowed by the standard.
ODDITIES = ("comments", "ids", "retry", "comments;ids;retry;bom;crlf;cuts=5", "cr;bytewise", "content-length;comments")


@pytest.fixture
def served() -> Iterator[Live]:
    with live(retry_min_s=1, retry_max_s=1) as running:  # streamd's own `retry:` lines differ from the upstream's
        yield running


def client(url: str, **options: Any) -> openai.OpenAI:
    # Why a separate client: reading the system's certificates takes longer than most of these tests.
    http_client = openai.DefaultHttpxClient(verify=False)
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key="sk-none", http_client=http_client, **({"max_retries": 0} | options)
    )


def open_stream(route: str, sdk: openai.OpenAI, **options: Any) -> Any:
    """The raw stream of a route, as `create(stream=True)` gives it."""
    if route == "chat":
        return sdk.chat.completions.create(model="m", messages=PROMPT, stream=True, **options)
    if route == "completions":
        return sdk.completions.create(model="m", prompt="Rivers", stream=True, **options)
    return sdk.responses.create(model="m", input="Rivers", stream=True, **options)


def text_of(route: str, event: Any) -> str:
    """The text in an event of a route's stream."""
    if route == "responses":
        return event.delta if event.type == "response.output_text.delta" else ""
    if not event.choices:
        return ""
    return (event.choices[0].delta.content if route == "chat" else event.choices[0].text) or ""


def streamed(route: str, sdk: openai.OpenAI, **options: Any) -> str:
    with open_stream(route, sdk, **options) as stream:
        return "".join(text_of(route, event) for event in stream)


def whole(route: str, sdk: openai.OpenAI) -> str:
    if route == "chat":
        return sdk.chat.completions.create(model="m", messages=PROMPT).choices[0].message.content or ""
    if route == "completions":
        return sdk.completions.create(model="m", prompt="Rivers").choices[0].text
    return sdk.responses.create(model="m", input="Rivers").output_text


# Text


def test_the_models_are_listed(served: Live) -> None:
    with client(served.url) as sdk:
        assert [model.id for model in sdk.models.list()] == ["mock-llm"]


@pytest.mark.parametrize("route", ROUTES)
def test_a_streamed_answer_has_the_text_of_a_whole_answer(served: Live, route: str) -> None:
    with client(served.url) as sdk:
        text = whole(route, sdk)
        assert text.startswith("This is mock-llm speaking") and streamed(route, sdk) == text
    served.until(completed=2, aborted=0)


def test_the_sdk_accumulates_a_chat(served: Live) -> None:
    with client(served.url) as sdk:
        with sdk.chat.completions.stream(model="m", messages=PROMPT) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion()
        assert final.choices[0].message.content == whole("chat", sdk)
    assert {"chunk", "content.delta", "content.done"} <= kinds


def test_the_sdk_accumulates_a_response(served: Live) -> None:
    with client(served.url) as sdk:
        with sdk.responses.stream(model="m", input="Rivers") as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        assert final.output_text == whole("responses", sdk)
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"


def test_the_asynchronous_client_reads_a_chat(served: Live) -> None:
    async def use() -> str:
        async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="sk-none", max_retries=0) as sdk:
            stream = await sdk.chat.completions.create(model="m", messages=PROMPT, stream=True)
            return "".join([text_of("chat", event) async for event in stream])

    with client(served.url) as sdk:
        assert asyncio.run(use()) == whole("chat", sdk)


def test_several_choices_and_the_usage_arrive(served: Live) -> None:
    with client(served.url) as sdk:
        reply = sdk.chat.completions.create(model="m", messages=PROMPT, n=3)
        texts, usage = ["", "", ""], None
        options: Any = {"include_usage": True}
        stream = sdk.chat.completions.create(model="m", messages=PROMPT, n=3, stream=True, stream_options=options)
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in reply.choices] and len(set(texts)) == 3
    assert usage == reply.usage and usage is not None and usage.completion_tokens == 60


def test_a_streamed_tool_call_has_its_arguments(served: Live) -> None:
    with client(served.url) as sdk:
        ask: Any = {"model": "m", "messages": PROMPT, "tools": TOOLS, "tool_choice": "required"}
        reply = sdk.chat.completions.create(**ask).choices[0]
        with sdk.chat.completions.stream(**ask) as stream:
            final = stream.get_final_completion().choices[0]
    assert reply.message.tool_calls and final.message.tool_calls and final.finish_reason == "tool_calls"
    called = final.message.tool_calls[0].function
    assert called.name == "look_up" and called.arguments == reply.message.tool_calls[0].function.arguments
    assert set(json.loads(called.arguments)) == {"place", "depth"}


# Lines between the events


@pytest.mark.parametrize("oddity", ODDITIES)
@pytest.mark.parametrize("route", ROUTES)
def test_the_openai_sdk_does_not_notice_an_upstreams_oddities(served: Live, route: str, oddity: str) -> None:
    with client(served.url) as sdk:
        expected = whole(route, sdk)
        served.fault(oddity)
        relay = served.relay()
        with client(relay.url) as through:
            assert streamed(route, through) == expected
    received = bytes(relay.down[0])
    assert b"\nid: s_" in received and b"\nid: mock-" not in received
    assert (b": mock comment" in received) == ("comments" in oddity)
    assert b"retry: 3000" not in received


@pytest.mark.parametrize("route", ROUTES)
def test_the_sdk_ignores_heartbeats_before_and_between_events(route: str) -> None:
    """Beside ids, comments and retry lines, and while the upstream is silent: before its head, and after each event."""
    with live() as plain, client(plain.url) as sdk:
        relay = plain.relay()
        with client(relay.url) as through:
            expected = streamed(route, through)
    events = events_on(bytes(relay.down[0]))

    def answer() -> Iterator[bytes]:
        front.until(lambda: beats() >= 1)
        yield b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n: hello\n\nretry: 2000\n\n"
        for number, event in enumerate(events):
            yield b": a comment\nretry: 1000\nid: theirs\n" + event + b": and one alone\n\n"
            if number in (0, 3, len(events) - 2):
                before = beats()
                front.until(lambda before=before: beats() > before)  # type: ignore[misc]

    with scripted(answer) as url:
        upstream = UpstreamSettings(name="scripted", url=url)
        with live(upstreams=(upstream,), heartbeat_s=0.01, commit_after_s=0.01) as slow:
            front = slow.relay()

            def beats() -> int:
                return sum(map(bytes(front.down[0]).count, HEARTBEATS)) if front.down else 0

            with client(front.url) as sdk:
                assert streamed(route, sdk) == expected


def events_on(received: bytes) -> list[bytes]:
    """The events that streamd sent, freed of chunk framing, ids, comments and retry lines."""
    lines = received.partition(b"\r\n\r\n")[2].replace(b"\r\n", b"\n").split(b"\n")
    kept = [line for line in lines if line.startswith((b"data:", b"event:"))]
    joined = b"\n".join(line + b"\n" if line.startswith(b"data:") else line for line in kept)
    return [event + b"\n\n" for event in joined.split(b"\n\n") if event.strip()]


# Errors keep their own status


REFUSALS = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
    503: openai.InternalServerError,
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "kind"), REFUSALS.items())
def test_an_error_status_reaches_the_openai_sdk_unchanged(served: Live, status: int, kind: Any, stream: bool) -> None:
    served.fault(f"status={status}")
    with client(served.url) as sdk, pytest.raises(kind) as raised:
        sdk.chat.completions.create(model="m", messages=PROMPT, stream=stream)
    assert raised.value.status_code == status
    assert raised.value.body["message"] == f"mock-llm was told to answer {status}."
    assert raised.value.response.headers.get("retry-after") == ("7" if status in (429, 503) else None)
    assert raised.value.response.headers["x-upstream"] == "mock"
    assert served.mock.stats.requests_total == 1


def test_a_refusal_of_streamd_raises_the_sdks_error(served: Live) -> None:
    with client(served.url) as sdk, pytest.raises(openai.BadRequestError) as raised:
        sdk.chat.completions.create(
            model="m", messages=PROMPT, stream=True, extra_headers={"X-Stream-Policy": "whatever"}
        )
    body: Any = raised.value.body
    assert body["code"] == "bad_policy" and body["param"] == "x-stream-policy"
    assert raised.value.request_id is not None


def test_an_unreachable_upstream_raises_the_sdks_error() -> None:
    nobody = UpstreamSettings(name="gone", url="http://127.0.0.1:1")
    with (
        live(upstreams=(nobody,)) as running,
        client(running.url) as sdk,
        pytest.raises(openai.InternalServerError) as raised,
    ):
        sdk.chat.completions.create(model="m", messages=PROMPT, stream=True)
    assert raised.value.status_code == 502 and raised.value.response.headers["x-should-retry"] == "true"


# Ends that are cuts


TRUNCATIONS = ("break-fin=5", "break-fin=5;half", "break-rst=5", "bad-chunk=5", "no-finish", "stall=5")


def idle_s(fault: str) -> float:
    """A second for the fault that the idle time detects; on a busy machine less would trip without a fault."""
    return 1.0 if fault.startswith("stall") else 120.0


@pytest.mark.parametrize("fault", TRUNCATIONS)
@pytest.mark.parametrize("route", ROUTES)
def test_a_truncation_raises_in_the_openai_sdk_after_the_received_text(route: str, fault: str) -> None:
    with live(idle_timeout_s=idle_s(fault)) as running, client(running.url) as sdk:
        expected = whole(route, sdk)
        running.fault(fault)
        text = ""
        with pytest.raises(openai.APIError) as raised, open_stream(route, sdk) as stream:
            for event in stream:
                text += text_of(route, event)
        assert expected.startswith(text) and (text == expected) == (fault == "no-finish")
        code = "upstream_idle_timeout" if fault.startswith("stall") else "upstream_"
        assert str(raised.value.code).startswith(code), raised.value.body
        assert running.mock.stats.requests_total == 2


def test_no_done_after_a_finish_reason_is_complete(served: Live) -> None:
    with client(served.url) as sdk:
        expected = whole("chat", sdk)
        served.fault("no-done")
        assert streamed("chat", sdk) == expected


@pytest.mark.parametrize("route", ROUTES)
def test_delete_raises_in_the_openai_sdk(route: str) -> None:
    with live(MockOptions(interval_s=0.005, ttft_s=0, tokens=1_000_000)) as running, client(running.url) as sdk:
        with pytest.raises(openai.APIError) as raised, open_stream(route, sdk) as stream:
            next(iter(stream))
            assert stop(running.url, stream.response.headers["x-stream-id"]) == 204
            for _ in stream:
                pass
        assert raised.value.code == "cancelled"
        running.until(aborted=1)


def stop(url: str, stream_id: str) -> int:
    request = urllib.request.Request(f"{url}/v1/streams/{stream_id}", method="DELETE")
    with urllib.request.urlopen(request) as response:
        return int(response.status)


# A reader that leaves


@pytest.mark.parametrize("route", ROUTES)
def test_closing_the_openai_stream_aborts_the_upstream(route: str) -> None:
    with live(MockOptions(interval_s=0.005, ttft_s=0, tokens=1_000_000)) as running, client(running.url) as sdk:
        stream = open_stream(route, sdk)
        for _ in range(5):
            next(iter(stream))
        stream.close()
        running.until(aborted=1, open=0)


def test_leaving_the_accumulating_stream_aborts_the_upstream() -> None:
    with live(MockOptions(interval_s=0.005, ttft_s=0, tokens=1_000_000)) as running, client(running.url) as sdk:
        with sdk.chat.completions.stream(model="m", messages=PROMPT) as stream:
            next(iter(stream))
        running.until(aborted=1, open=0)


def test_a_cancelled_task_aborts_the_upstream() -> None:
    async def use(url: str) -> None:
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="sk-none", max_retries=0) as sdk:
            stream = await sdk.chat.completions.create(model="m", messages=PROMPT, stream=True)
            begun = asyncio.Event()
            task = asyncio.ensure_future(read(stream, begun))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    async def read(stream: Any, begun: asyncio.Event) -> None:
        async with stream:
            async for _ in stream:
                begun.set()

    with live(MockOptions(interval_s=0.005, ttft_s=0, tokens=1_000_000)) as running:
        asyncio.run(use(running.url))
        running.until(aborted=1, open=0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_time_out_before_the_first_byte_aborts_the_upstream(served: Live, stream: bool) -> None:
    served.fault("stall=0")
    with client(served.url, timeout=0.3) as sdk, pytest.raises(openai.APITimeoutError):
        sdk.chat.completions.create(model="m", messages=PROMPT, stream=stream)
    served.until(aborted=1, open=0)


# Coming back


def test_the_openai_sdk_resumes_with_last_event_id(served: Live) -> None:
    with client(served.url) as sdk:
        expected = streamed("chat", sdk)
        first = open_stream("chat", sdk, extra_headers={"X-Stream-Detach-Grace": "60"})
        stream_id = first.response.headers["x-stream-id"]
        text = "".join(text_of("chat", next(iter(first))) for _ in range(7))
        first.close()
        rest = streamed("chat", sdk, extra_headers={"Last-Event-ID": f"{stream_id}:7"})
        assert text and rest and text + rest == expected
    assert served.mock.stats.requests_total == 2


def test_a_resume_of_a_gone_stream_starts_no_generation(served: Live) -> None:
    with client(served.url) as sdk, pytest.raises(openai.APIStatusError) as raised:
        open_stream("chat", sdk, extra_headers={"Last-Event-ID": "s_" + "A" * 27 + ":7"})
    assert raised.value.status_code in (404, 410)
    assert served.mock.stats.requests_total == 0


@pytest.mark.parametrize("route", ROUTES)
def test_the_same_idempotency_key_joins_the_finished_stream(served: Live, route: str) -> None:
    key = {"Idempotency-Key": f"once-{route}"}
    with client(served.url) as sdk:
        first = streamed(route, sdk, extra_headers=key)
        assert streamed(route, sdk, extra_headers=key) == first
    assert served.mock.stats.requests_total == 1


def cut_first(bytes_max: int) -> Callable[[int], int | None]:
    return lambda number: bytes_max if number == 0 else None


def test_a_retry_of_the_sdk_joins_the_running_stream(served: Live) -> None:
    """The connection is lost before the head arrives; the SDK asks again by itself, and one generation is paid for."""
    with client(served.url) as sdk:
        expected = streamed("chat", sdk)
    relay = served.relay(cut_first(0))
    headers = {"Idempotency-Key": "again", "X-Stream-Detach-Grace": "60"}
    with client(relay.url, max_retries=2) as sdk:
        assert streamed("chat", sdk, extra_headers=headers) == expected
    assert len(relay.down) == 2 and served.mock.stats.requests_total == 2


def test_a_coalesced_prefix_accumulates_to_the_same_text(served: Live) -> None:
    """A late joiner gets hundreds of tokens in a few events."""
    served.fault("", tokens=600)
    with client(served.url) as sdk:
        key = {"Idempotency-Key": "long"}
        with sdk.chat.completions.stream(model="m", messages=PROMPT, extra_headers=key) as stream:
            first = stream.get_final_completion()
        with sdk.chat.completions.stream(model="m", messages=PROMPT, extra_headers=key) as stream:
            chunks = [event.chunk for event in stream if event.type == "chunk"]
            again = stream.get_final_completion()
    assert again.choices[0].message == first.choices[0].message
    assert len(chunks) < 20
    assert served.mock.stats.requests_total == 1
