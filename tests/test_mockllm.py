"""The mock from outside: real SDKs, raw sockets, counters. Its pure parts (text, wheel, cutter) by themselves."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import fields, replace
from typing import Any

import anthropic
import openai
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from streamd.mockllm import MockOptions, MockServer, add_arguments, parse_faults, start_mock, text
from streamd.mockllm.command import from_arguments
from streamd.mockllm.faults import BadOption, Faults
from streamd.mockllm.shape import Cutter
from streamd.mockllm.wheel import Wheel
from streamd.wire.chunked import ChunkedDecoder
from streamd.wire.http1 import RESPONSE_OPENING, Framing, HeadReader, parse_response

QUICK = MockOptions(interval_s=0.0, ttft_s=0.0, tokens=20)
SILENT = replace(QUICK, interval_s=3600.0)  # an event, then silence for longer than a test runs
PROMPT = [{"role": "user", "content": "Say something."}]
TOOL_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}},
}


def with_mock(use: Callable[[MockServer], Coroutine[Any, Any, None]], options: MockOptions = QUICK) -> None:
    """Run `use` against a mock on a loop of its own."""

    async def main() -> None:
        mock = await start_mock(asyncio.get_running_loop(), options=options)
        try:
            await use(mock)
        finally:
            mock.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def with_sdk(use: Callable[[MockServer], None], options: MockOptions = QUICK) -> None:
    """The same for a blocking SDK: it runs in a thread."""

    async def in_thread(mock: MockServer) -> None:
        await asyncio.to_thread(use, mock)

    with_mock(in_thread, options)


def openai_client(mock: MockServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=mock.url + "/v1", api_key="sk-none", max_retries=0)


def anthropic_client(mock: MockServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=mock.url, api_key="sk-none", max_retries=0)


def request_bytes(body: dict[str, Any], path: str = "/v1/chat/completions", **headers: str) -> bytes:
    """A POST as bytes; `x_mock_fault="crlf"` becomes a header."""
    payload = json.dumps(body).encode()
    fields = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"POST {path} HTTP/1.1\r\nHost: mock\r\nContent-Length: {len(payload)}\r\n{fields}\r\n".encode() + payload


STREAM = {"model": "m", "stream": True, "messages": PROMPT}


async def connect(mock: MockServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = mock.url.removeprefix("http://").rsplit(":", 1)
    return await asyncio.open_connection(host, int(port))


async def exchange(mock: MockServer, request: bytes) -> bytes:
    """All bytes that come back until the mock closes, even by a reset."""
    reader, writer = await connect(mock)
    writer.write(request)
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(65536):
            received += piece
    writer.close()
    return received


async def stream_of(mock: MockServer, fault: str = "", body: dict[str, Any] = STREAM) -> bytes:
    """The SSE body of an answer without its framing, which must end properly."""
    received = await exchange(mock, request_bytes(body, connection="close", x_mock_fault=fault))
    found = HeadReader(opening=RESPONSE_OPENING).feed(received)
    assert found is not None
    head = parse_response(found[0], "POST")
    assert head.status == 200
    if head.framing is not Framing.CHUNKED:
        assert head.framing is Framing.UNTIL_CLOSE or head.content_length == len(found[1])
        return found[1]
    decoder = ChunkedDecoder()
    pieces = decoder.feed(found[1])
    assert decoder.done and decoder.rest == b""
    return b"".join(pieces)


def text_of(stream: bytes) -> str:
    """The text of the deltas of a chat stream."""
    datas = re.findall(rb"^data: (\{.*\})$", re.sub(rb"\r\n?", b"\n", stream), re.MULTILINE)
    deltas = [json.loads(data)["choices"] for data in datas]
    return "".join(choice["delta"].get("content") or "" for choices in deltas for choice in choices)


# The SDKs, unmodified.


def test_an_openai_chat_has_the_same_text_streamed_and_whole() -> None:
    def use(mock: MockServer) -> None:
        client = openai_client(mock)
        whole = client.chat.completions.create(model="mock-llm", messages=PROMPT)
        with client.chat.completions.stream(model="mock-llm", messages=PROMPT) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.content == whole.choices[0].message.content
        assert (whole.choices[0].message.content or "").startswith("This is mock-llm speaking")
        assert whole.choices[0].finish_reason == final.choices[0].finish_reason == "stop"
        assert whole.usage is not None and whole.usage.completion_tokens == 20

    with_sdk(use)


def test_an_openai_chat_has_choices_and_usage() -> None:
    def use(mock: MockServer) -> None:
        chunks = list(
            openai_client(mock).chat.completions.create(
                model="m", messages=PROMPT, n=3, stream=True, stream_options={"include_usage": True}
            )
        )
        said = dict.fromkeys(range(3), "")
        for chunk in chunks:
            for choice in chunk.choices:
                said[choice.index] += choice.delta.content or ""
        assert len(set(said.values())) == 3
        assert chunks[-1].choices == [] and chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 3 * 30
        assert all(chunk.usage is None for chunk in chunks[:-1])

    with_sdk(use, replace(QUICK, tokens=30))


def test_an_openai_chat_calls_a_tool_when_told_to() -> None:
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": TOOL_SCHEMA}}

    def use(mock: MockServer) -> None:
        client = openai_client(mock)
        asked: dict[str, Any] = {"model": "m", "messages": PROMPT, "tools": [tool]}
        with client.chat.completions.stream(**asked, tool_choice="required") as stream:
            streamed = stream.get_final_completion().choices[0]
        whole = client.chat.completions.create(
            **asked, tool_choice={"type": "function", "function": {"name": "weather"}}
        )
        for choice in (streamed, whole.choices[0]):
            assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
            call = choice.message.tool_calls[0].function
            assert call.name == "weather"
            assert json.loads(call.arguments) == {"city": 'a mock\'s "string"', "days": 7, "unit": "C"}
        left_to_it = client.chat.completions.create(**asked, tool_choice="auto").choices[0]
        assert left_to_it.message.content and not left_to_it.message.tool_calls

    with_sdk(use)


def test_an_openai_completion_has_the_same_text_streamed_and_whole() -> None:
    def use(mock: MockServer) -> None:
        client = openai_client(mock)
        whole = client.completions.create(model="m", prompt="Once", max_tokens=7)
        chunks = list(client.completions.create(model="m", prompt="Once", max_tokens=7, stream=True))
        assert (
            "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text == "This is mock-llm speaking,"
        )
        assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "length"

    with_sdk(use)


def test_an_openai_response_has_the_same_text_streamed_and_whole() -> None:
    def use(mock: MockServer) -> None:
        client = openai_client(mock)
        with client.responses.stream(model="m", input="Say something.") as stream:
            events = list(stream)
            final = stream.get_final_response()
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[0].type == "response.created" and events[-1].type == "response.completed"
        whole = client.responses.create(model="m", input="Say something.")
        assert final.output_text == whole.output_text != ""
        assert whole.usage is not None and whole.usage.output_tokens == 20
        cut = list(client.responses.create(model="m", input="Say something.", max_output_tokens=3, stream=True))
        assert cut[-1].type == "response.incomplete"

    with_sdk(use)


def test_an_openai_response_calls_a_tool() -> None:
    tool: Any = {"type": "function", "name": "weather", "parameters": TOOL_SCHEMA, "strict": False}

    def use(mock: MockServer) -> None:
        with openai_client(mock).responses.stream(
            model="m", input="Weather?", tools=[tool], tool_choice="required"
        ) as stream:
            call = stream.get_final_response().output[0]
        assert call.type == "function_call" and json.loads(call.arguments)["days"] == 7

    with_sdk(use)


def test_gemini_says_the_same_streamed_whole_and_as_an_array() -> None:
    ask = {"contents": [{"parts": [{"text": "x"}]}], "generationConfig": {"candidateCount": 2, "maxOutputTokens": 9}}

    async def answers(mock: MockServer) -> None:
        said = []
        for operation in ("streamGenerateContent?alt=sse", "streamGenerateContent", "generateContent"):
            path = f"/v1beta/models/m:{operation}"
            _, _, body = (await exchange(mock, request_bytes(ask, path, connection="close"))).partition(b"\r\n\r\n")
            events = re.findall(rb"data: (\{.*\})\r\n\r\n", body)
            whole = json.loads(body) if not events else [json.loads(event) for event in events]
            said.append(whole if isinstance(whole, list) else [whole])
            assert said[-1][-1]["usageMetadata"]["candidatesTokenCount"] == 18
        texts = [["", ""] for _ in said]
        for spoken, events in zip(texts, said, strict=True):
            for candidate in (one for event in events for one in event["candidates"]):
                spoken[candidate["index"]] += candidate["content"]["parts"][0]["text"]
        assert texts[0] == texts[1] == texts[2] and all(texts[0]) and len(said[0]) == 20

    with_mock(answers)


def test_an_anthropic_message_has_the_same_text_streamed_and_whole() -> None:
    def use(mock: MockServer) -> None:
        client = anthropic_client(mock)
        asked: Any = {"model": "m", "max_tokens": 999, "messages": PROMPT}
        with client.messages.stream(**asked) as stream:
            streamed = "".join(stream.text_stream)
            final = stream.get_final_message()
        whole = client.messages.create(**asked)
        assert whole.content[0].type == final.content[0].type == "text"
        assert streamed == final.content[0].text == whole.content[0].text
        assert final.stop_reason == whole.stop_reason == "end_turn"
        assert final.usage.output_tokens == whole.usage.output_tokens == 20

    with_sdk(use)


def test_an_anthropic_message_uses_a_tool() -> None:
    def use(mock: MockServer) -> None:
        tools: Any = [{"name": "weather", "input_schema": TOOL_SCHEMA}]
        with anthropic_client(mock).messages.stream(
            model="m",
            max_tokens=99,
            messages=PROMPT,
            tools=tools,
            tool_choice={"type": "any"},  # type: ignore[arg-type]
        ) as stream:
            final = stream.get_final_message()
        block = final.content[0]
        assert block.type == "tool_use" and block.input == {"city": 'a mock\'s "string"', "days": 7, "unit": "C"}
        assert final.stop_reason == "tool_use"

    with_sdk(use)


def test_models_and_embeddings_are_served() -> None:
    def use(mock: MockServer) -> None:
        client = openai_client(mock)
        assert [model.id for model in client.models.list()] == ["a", "b"]
        packed = client.embeddings.create(model="m", input=["one", "two", "one"]).data
        plain = client.embeddings.create(model="m", input="one", encoding_format="float").data
        assert packed[0].embedding == packed[2].embedding != packed[1].embedding
        assert plain[0].embedding == pytest.approx(packed[0].embedding)

    with_sdk(use, replace(QUICK, models=("a", "b")))


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (429, openai.RateLimitError),
        (503, openai.InternalServerError),
    ],
)
def test_a_status_fault_is_answered_with_that_status(status: int, error: type[openai.APIStatusError]) -> None:
    def use(mock: MockServer) -> None:
        with pytest.raises(error) as caught:
            openai_client(mock).chat.completions.create(
                model="m", messages=PROMPT, stream=True, extra_headers={"X-Mock-Fault": f"status={status}"}
            )
        assert f"was told to answer {status}" in caught.value.message
        assert caught.value.response.headers.get("retry-after") == ("7" if status in (429, 503) else None)

    with_sdk(use)


def test_an_sdk_that_closes_in_mid_stream_is_counted_as_an_abort() -> None:
    async def use(mock: MockServer) -> None:
        def first_chunk() -> None:
            stream = openai_client(mock).chat.completions.create(model="m", messages=PROMPT, stream=True)
            next(iter(stream))
            stream.close()

        await asyncio.to_thread(first_chunk)
        await mock.stats.until(lambda stats: stats.aborted == 1)
        assert len(mock.stats.aborted_at) == 1 and mock.stats.open == 0

    with_mock(use, SILENT)


# The wire.


ODDITIES = [
    "cuts=1",
    "cuts=2",
    "bytewise",
    "crlf",
    "cr",
    "content-length",
    "until-close",
    "comments",
    "ids",
    "retry",
    "bom",
]


@pytest.mark.parametrize(
    "fault", [*ODDITIES, "early-head", "cuts=5;crlf;comments;retry;ids", "bytewise;content-length"]
)
def test_an_oddity_changes_the_form_and_not_the_text(fault: str) -> None:
    async def use(mock: MockServer) -> None:
        plain, odd = await stream_of(mock), await stream_of(mock, fault)
        assert text_of(odd) == text_of(plain) != ""
        assert odd.rstrip().endswith(b"data: [DONE]")

    with_mock(use)


def test_each_oddity_has_its_form_on_the_wire() -> None:
    async def use(mock: MockServer) -> None:
        assert b"\n" not in await stream_of(mock, "cr")
        assert (await stream_of(mock, "crlf")).count(b"\r\n\r\n") == 20 + 3  # tokens; role, finish, [DONE]
        assert (await stream_of(mock, "bom")).startswith(b"\xef\xbb\xbfdata: ")
        assert (await stream_of(mock, "retry")).startswith(b"retry: 2500\n\ndata: ")
        assert b"id: mock-23\ndata: [DONE]" in await stream_of(mock, "ids")
        assert (await stream_of(mock, "no-blank")).endswith(b"data: [DONE]\n")
        assert b": mock comment before event 4\n\n" in await stream_of(mock, "comments")

    with_mock(use)


def test_a_stream_without_its_last_event_ends_the_framing_properly() -> None:
    async def use(mock: MockServer) -> None:
        no_done, no_finish = await stream_of(mock, "no-done"), await stream_of(mock, "no-finish")
        assert b"[DONE]" not in no_done and b'"finish_reason":"stop"' in no_done
        assert b"[DONE]" not in no_finish and b'"finish_reason":"stop"' not in no_finish
        messages = await exchange(
            mock, request_bytes(STREAM, "/v1/messages", connection="close", x_mock_fault="no-done")
        )
        assert b"message_delta" in messages and b"message_stop" not in messages
        responses = await exchange(
            mock,
            request_bytes({"stream": True, "input": "x"}, "/v1/responses", connection="close", x_mock_fault="no-done"),
        )
        assert b"response.output_item.done" in responses and b"response.completed" not in responses

    with_mock(use)


@pytest.mark.parametrize(
    "fault", ["break-fin=3", "break=3", "break-rst=3", "break-fin=3;cuts=4", "break-rst=3;bytewise"]
)
def test_a_break_comes_after_its_tokens(fault: str) -> None:
    async def use(mock: MockServer) -> None:
        received = await exchange(mock, request_bytes(STREAM, x_mock_fault=fault))
        assert b"0\r\n\r\n" not in received
        decoder = ChunkedDecoder()
        events = b"".join(decoder.feed(received.partition(b"\r\n\r\n")[2]))
        assert text_of(events) == "This is mock" and not decoder.done
        assert (mock.stats.broken, mock.stats.aborted, mock.stats.open) == (1, 0, 0)

    with_mock(use)


@pytest.mark.parametrize("reset", [False, True])
def test_a_reset_and_a_fin_are_told_apart(reset: bool) -> None:
    async def use(mock: MockServer) -> None:
        reader, writer = await connect(mock)
        writer.write(request_bytes(STREAM, x_mock_fault="break-rst=0" if reset else "break-fin=0"))
        with pytest.raises(ConnectionResetError) if reset else contextlib.nullcontext():
            assert (await reader.read()).endswith(b"\n\n\r\n")
        writer.close()

    with_mock(use)


def test_a_broken_answer_that_is_not_streamed_lacks_its_second_half() -> None:
    async def use(mock: MockServer) -> None:
        received = await exchange(mock, request_bytes({"messages": PROMPT}, x_mock_fault="break-fin=9"))
        head, _, body = received.partition(b"\r\n\r\n")
        promised = re.search(rb"content-length: (\d+)", head)
        assert promised is not None and len(body) == int(promised[1]) // 2

    with_mock(use)


def test_a_break_may_follow_half_an_event() -> None:
    async def use(mock: MockServer) -> None:
        received = await exchange(mock, request_bytes(STREAM, x_mock_fault="break-fin=1;half"))
        last = b"".join(ChunkedDecoder().feed(received.partition(b"\r\n\r\n")[2])).rpartition(b"\n\n")[2]
        assert last.startswith(b"data: {") and not last.endswith(b"}")

    with_mock(use)


def test_a_fault_may_break_the_head() -> None:
    async def use(mock: MockServer) -> None:
        assert (
            await exchange(mock, request_bytes(STREAM, x_mock_fault="garbage-status"))
            == b"HTTP/1.1 banana split\r\n\r\n"
        )
        cut = await exchange(mock, request_bytes(STREAM, x_mock_fault="reset-in-head"))
        assert cut.startswith(b"HTTP/1.1 200 OK\r\n") and b"\r\n\r\n" not in cut
        assert mock.stats.broken == 2

    with_mock(use)


def test_stalls_and_bad_chunks_leave_the_connection_open() -> None:
    async def use(mock: MockServer) -> None:
        ends = {
            "stall=2": b'"content":" is"},"logprobs":null,"finish_reason":null}]}\n\n\r\n',
            "bad-chunk=2": b"\n\n\r\nzz\r\n",
            "stall=0;early-head": b"\r\n\r\n",
        }
        for fault, end in ends.items():
            reader, writer = await connect(mock)
            writer.write(request_bytes(STREAM, x_mock_fault=fault))
            await reader.readuntil(end)
            assert mock.stats.open == 1
            writer.close()
            await mock.stats.until(lambda stats: stats.open == 0)
        assert mock.stats.aborted == len(ends)

    with_mock(use)


def test_stall_0_takes_the_request_and_is_silent() -> None:
    async def use(mock: MockServer) -> None:
        reader, writer = await connect(mock)
        writer.write(request_bytes(STREAM, x_mock_fault="stall=0"))
        await mock.stats.until(lambda stats: stats.requests_total == 1)
        writer.write_eof()
        await mock.stats.until(lambda stats: stats.aborted == 1)
        assert await reader.read() == b""
        writer.close()

    with_mock(use)


def test_first_limits_the_faults_and_close_on_reuse_waits_for_the_second_request() -> None:
    async def use(mock: MockServer) -> None:
        request = request_bytes({"messages": PROMPT}, connection="close", x_mock_fault="status=503;first=2")
        statuses = [(await exchange(mock, request))[9:12] for _ in range(3)]
        assert statuses == [b"503", b"503", b"200"]
        reused = request_bytes({"messages": PROMPT}, x_mock_fault="close-on-reuse")
        assert (await exchange(mock, reused + reused)).count(b"HTTP/1.1 200 OK") == 1

    with_mock(use)


def test_requests_on_one_connection_are_answered_in_order() -> None:
    async def use(mock: MockServer) -> None:
        received = await exchange(
            mock,
            request_bytes(STREAM, x_mock_tokens="3")
            + b"GET /v1/models HTTP/1.1\r\nHost: mock\r\n\r\n"
            + b"HEAD /v1/models HTTP/1.1\r\nHost: mock\r\nConnection: close\r\n\r\n",
        )
        kinds = re.findall(rb"content-type: ([a-z/-]+)", received)
        assert kinds == [b"text/event-stream", b"application/json", b"application/json"]
        assert received.endswith(b"connection: close\r\n\r\n")
        assert mock.stats.connections == 1 and mock.stats.completed == 3

    with_mock(use)


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (b"GET /nowhere HTTP/1.1\r\nHost: m\r\nConnection: close\r\n\r\n", b"404"),
        (b"GET /v1/chat/completions HTTP/1.1\r\nHost: m\r\nConnection: close\r\n\r\n", b"405"),
        (b"POST /v1/responses HTTP/1.1\r\nHost: m\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{]", b"400"),
        (request_bytes({"stream": True}, connection="close"), b"400"),
        (request_bytes(STREAM | {"n": 0.5}, connection="close"), b"400"),
        (request_bytes(STREAM, connection="close", x_mock_fault="explode"), b"400"),
        (request_bytes(STREAM, connection="close", x_mock_tokens="-1"), b"400"),
        (b"\x16\x03\x01 not HTTP", b"400"),
        (b"GET /v1/models HTTP/1.0\r\n\r\n", b"200"),
    ],
)
def test_a_bad_request_is_refused_with_its_status_and_closed(request_head: bytes, status: bytes) -> None:
    async def use(mock: MockServer) -> None:
        received = await exchange(mock, request_head)
        assert received[9:12] == status
        assert status == b"200" or b'"error"' in received

    with_mock(use)


def test_a_chunked_body_is_read_after_100_continue() -> None:
    async def use(mock: MockServer) -> None:
        reader, writer = await connect(mock)
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: m\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n"
        )
        writer.write(head + b"Connection: close\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        for byte in json.dumps(STREAM).encode():
            writer.write(b"1\r\n%c\r\n" % byte)
        writer.write(b"0\r\n\r\n")
        assert (await reader.read()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        writer.close()

    with_mock(use)


# Pace, stats, options.


def test_a_reader_that_takes_nothing_costs_no_memory() -> None:
    async def use(mock: MockServer) -> None:
        _, writer = await connect(mock)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(request_bytes(STREAM, x_mock_tokens="200000"))
        await mock.stats.until(lambda stats: stats.pauses == 1)
        connection = next(iter(mock._connections))
        assert connection._transport is not None
        assert connection._transport.get_write_buffer_size() < 1024  # less than an event
        writer.transport.abort()
        await mock.stats.until(lambda stats: stats.aborted == 1)

    with_mock(use)


def test_tokens_keep_their_interval() -> None:
    """No token is early; a busy machine may send it late."""

    async def use(mock: MockServer) -> None:
        began = time.monotonic_ns()
        stream = await stream_of(mock, body=STREAM)
        stamps = [int(ns) for ns in re.findall(r"@(\d+) ", text_of(stream))]
        assert len(stamps) == 5
        assert all(stamp - began > k * 20e6 - 6e6 for k, stamp in enumerate(stamps))  # less a slot

    with_mock(use, replace(QUICK, interval_s=0.020, tokens=5, stamp=True))


def test_the_counters_are_served_over_http() -> None:
    async def use(mock: MockServer) -> None:
        await stream_of(mock)
        page = b"GET /mock/%b HTTP/1.1\r\nHost: mock\r\nConnection: close\r\n\r\n"
        stats = json.loads((await exchange(mock, page % b"stats")).partition(b"\r\n\r\n")[2])
        assert stats["requests"] == {"POST /v1/chat/completions": 1}
        assert (stats["completed"], stats["aborted"], stats["connections"]) == (1, 0, 2)
        seen = json.loads((await exchange(mock, page % b"requests")).partition(b"\r\n\r\n")[2])
        assert len(seen) == 1 and json.loads(seen[0]["body"]) == STREAM and ["host", "mock"] in seen[0]["headers"]

    with_mock(use)


def test_waiting_for_a_counter_ends_with_an_error() -> None:
    async def use(mock: MockServer) -> None:
        with pytest.raises(TimeoutError, match="completed"):
            await mock.stats.until(lambda stats: stats.aborted == 1, timeout_s=0.01)

    with_mock(use)


def test_many_streams_run_at_once() -> None:
    async def use(mock: MockServer) -> None:
        streams = await asyncio.gather(*(stream_of(mock) for _ in range(300)))
        assert len({text_of(stream) for stream in streams}) == 1
        assert mock.stats.completed == 300

    with_mock(use, replace(QUICK, interval_s=0.001, jitter_s=0.001))


def parsed(*flags: str) -> MockOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return from_arguments(parser.parse_args(flags))


def test_the_flags_set_the_options() -> None:
    assert parsed() == MockOptions()
    options = parsed("--interval-ms", "1.5", "--ttft-ms", "0", "--tokens", "9", "--fault", "crlf", "--fault", "stall=3")
    assert (options.interval_s, options.ttft_s, options.tokens) == (0.0015, 0.0, 9)
    assert options.faults == Faults(crlf=True, stall=3)


def test_the_help_has_all_faults() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for fault in fields(Faults):
        assert f"  {fault.name.replace('_', '-')}" in parser.format_help()


@pytest.mark.parametrize("words", ["explode", "crlf=1", "stall", "stall=x", "stall=-1"])
def test_an_unknown_fault_is_refused(words: str) -> None:
    with pytest.raises(BadOption):
        parse_faults(words)


def test_the_command_says_where_it_listens_and_stops_on_sigterm() -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "streamd.mockllm", "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child.stdout:
        assert re.fullmatch(r"mock-llm listening on http://127\.0\.0\.1:\d+\n", child.stdout.readline())
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0


# The pure parts.


def test_texts_are_readable_and_repeat_by_seed() -> None:
    assert text.text(1, 400) == text.text(1, 400) != text.text(2, 400)
    assert text.text(7, 400).startswith(text.OPENING)
    whole = text.unescape(text.tokens(3, 2000))
    for awkward in ('"', "\\", "\n", "é", "日", "🚀"):
        assert awkward in whole
    assert text.unescape(text.pieces('{"a": "é\\n"}', 3)) == '{"a": "é\\n"}'


class Entry:
    def __init__(self, due: float) -> None:
        self.due = due


@given(st.lists(st.floats(0, 30), max_size=40), st.lists(st.floats(0.001, 8), min_size=1, max_size=20))
def test_the_wheel_wakes_every_entry_once_and_never_early(dues: list[float], steps: list[float]) -> None:
    wheel: Wheel[Entry] = Wheel(now=0.0, slot_s=0.01, slots=64)
    waiting = {Entry(due) for due in dues}
    for entry in waiting:
        wheel.add(entry)
    now = 0.0
    for step in [*steps, 60.0]:
        now += step
        woken = wheel.turn(now)
        assert len(woken) == len(set(woken)) and set(woken) <= waiting
        assert all(entry.due < now + 0.01 for entry in woken)
        waiting -= set(woken)
        assert all(entry.due > now - 0.02 for entry in waiting)
        assert len(wheel) == len(waiting)
    assert not waiting


@given(st.lists(st.binary(min_size=1, max_size=400), min_size=1, max_size=8), st.integers(0, 2**16), st.booleans())
def test_the_cutter_loses_nothing(steps: list[bytes], seed: int, bytewise: bool) -> None:
    cutter = Cutter(Faults(cuts=seed, bytewise=bytewise), is_chunked=True)
    writes = [write for at, step in enumerate(steps, 1) for write in cutter.step(step, last=at == len(steps))]
    decoder = ChunkedDecoder()
    received = b"".join(piece for write in writes for piece in decoder.feed(write))
    assert received == b"".join(steps) and decoder.done
