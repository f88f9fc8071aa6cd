"""The parts of a stream that streamd adds, through the real, unmodified SDKs over a real socket."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from streamd.wire.dialect import Dialect, Progress, error_event, gap_event, reconnect_event
from streamd.wire.sse import HEARTBEAT, frame

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")
genai = pytest.importorskip("google.genai")
errors = pytest.importorskip("google.genai.errors")

PREFIX = b"id: s_" + b"x" * 27 + b":"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(body: Any, name: str | None = None) -> bytes:
    head = b"" if name is None else b"event: %b\n" % name.encode()
    return head + b"data: " + (body if isinstance(body, bytes) else json.dumps(body).encode()) + b"\n\n"


def typed(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)


def answer_once(listener: socket.socket, body: bytes) -> None:
    connection, _ = listener.accept()
    with connection:
        request = connection.makefile("rb")
        length = 0
        while (line := request.readline()) not in (b"\r\n", b""):
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        request.read(length)
        with suppress(ConnectionError):  # an SDK that has read enough resets the connection
            connection.sendall(HEAD + body)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)


@contextmanager
def upstream(body: bytes) -> Iterator[str]:
    """A server for a single request; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer_once, args=(listener, body), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def on_the_wire(dialect: Dialect, events: list[bytes], *, clean_end: bool) -> bytes:
    """The events as a reader gets them at worst: ids, heartbeats, comments, retry lines and gaps between them."""
    progress = Progress(dialect.api)
    if dialect.api.data_only:
        return data_on_the_wire(dialect, events, clean_end=clean_end)
    noise = HEARTBEAT + b": upstream comment\nretry: 1500\n"
    wire = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (HEARTBEAT, noise))
    for at, each in enumerate(events):
        progress.see(each)
        wire += frame(PREFIX, 2 * at + 1, noise + each, chunked=True)
        heartbeat = dialect.api.heartbeat
        wire += b"%x\r\n%b\r\n" % (len(heartbeat), heartbeat)
        if clean_end:  # a gap may come everywhere, after [DONE] too
            wire += frame(PREFIX, 2 * at + 2, gap_event(dialect, progress, at, at), chunked=True)
    return wire + b"%x\r\n%b\r\n" % (len(HEARTBEAT), HEARTBEAT) + (b"0\r\n\r\n" if clean_end else b"")


def data_on_the_wire(dialect: Dialect, events: list[bytes], *, clean_end: bool) -> bytes:
    """The same for readers of a dialect whose SDK takes nothing but data: gaps are all that comes between."""
    gap = gap_event(dialect, Progress(dialect.api), 1, 1)
    pieces = [piece for each in events for piece in ((each, gap) if clean_end else (each,))]
    wire = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return wire + (b"0\r\n\r\n" if clean_end else b"")


def openai_client(url: str) -> Any:
    return openai.OpenAI(base_url=url + "/v1", api_key="k", max_retries=0)


def chunk(content: str | None, finish_reason: str | None = None) -> bytes:
    delta = {} if content is None else {"content": content}
    choice = {"index": 0, "delta": {"role": "assistant", **delta}, "finish_reason": finish_reason}
    head = {"id": "c-1", "object": "chat.completion.chunk", "created": 1700000000, "model": "m"}
    return event({**head, "choices": [choice]})


def chat_text(url: str) -> str:
    with openai_client(url) as client:
        stream = client.chat.completions.create(model="m", messages=[], stream=True)
        return "".join(part.choices[0].delta.content or "" for part in stream if part.choices)


def chat_accumulated(url: str) -> str:
    with openai_client(url) as client, client.chat.completions.stream(model="m", messages=[]) as stream:
        return stream.get_final_completion().choices[0].message.content


def completions_text(url: str) -> str:
    with openai_client(url) as client:
        stream = client.completions.create(model="m", prompt="", stream=True)
        return "".join(part.choices[0].text for part in stream if part.choices)


def responses_text(url: str) -> str:
    with openai_client(url) as client:
        stream = client.responses.create(model="m", input="", stream=True)
        return "".join(part.delta for part in stream if part.type == "response.output_text.delta")


def responses_accumulated(url: str) -> str:
    with openai_client(url) as client, client.responses.stream(model="m", input="") as stream:
        return stream.get_final_response().output_text


def messages_text(url: str) -> str:
    with anthropic.Anthropic(base_url=url, api_key="k", max_retries=0) as client:
        stream = client.messages.create(model="m", max_tokens=9, messages=[], stream=True)
        return "".join(part.delta.text for part in stream if part.type == "content_block_delta")


def messages_accumulated(url: str) -> str:
    with (
        anthropic.Anthropic(base_url=url, api_key="k", max_retries=0) as client,
        client.messages.stream(model="m", max_tokens=9, messages=[]) as stream,
    ):
        return stream.get_final_text()


def gemini_text(url: str) -> str:
    with genai.Client(api_key="k", http_options={"base_url": url}, vertexai=False) as client:
        return "".join(part.text or "" for part in client.models.generate_content_stream(model="m", contents="x"))


CHAT = [chunk("Hel"), chunk("lo"), chunk(None, "stop"), event(b"[DONE]")]

COMPLETIONS = [
    event({"id": "c-1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]})
    for choice in (
        {"index": 0, "text": "Hel", "finish_reason": None},
        {"index": 0, "text": "lo", "finish_reason": "stop"},
    )
] + [event(b"[DONE]")]


def response(status: str, output: list[Any]) -> dict[str, Any]:
    settings = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "model": "m",
        "status": status,
        "output": output,
        **settings,
    }


def output(status: str, content: list[Any]) -> dict[str, Any]:
    return {"id": "msg_1", "type": "message", "role": "assistant", "status": status, "content": content}


def part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}


PLACE = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "logprobs": []}
DONE_OUTPUT = output("completed", [part("Hello")])
RESPONSES = [
    typed("response.created", sequence_number=0, response=response("in_progress", [])),
    typed("response.output_item.added", sequence_number=1, output_index=0, item=output("in_progress", [])),
    typed("response.content_part.added", sequence_number=2, part=part(""), **PLACE),
    typed("response.output_text.delta", sequence_number=3, delta="Hel", **PLACE),
    typed("response.output_text.delta", sequence_number=4, delta="lo", **PLACE),
    typed("response.output_item.done", sequence_number=5, output_index=0, item=DONE_OUTPUT),
    typed("response.completed", sequence_number=6, response=response("completed", [DONE_OUTPUT])),
]

START = {"id": "msg_1", "type": "message", "role": "assistant", "content": [], "model": "m", "stop_reason": None}
MESSAGES = [
    typed("message_start", message={**START, "usage": {"input_tokens": 1, "output_tokens": 1}}),
    typed("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    typed("content_block_delta", index=0, delta={"type": "text_delta", "text": "Hel"}),
    typed("content_block_delta", index=0, delta={"type": "text_delta", "text": "lo"}),
    typed("content_block_stop", index=0),
    typed("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 2}),
    typed("message_stop"),
]

GEMINI = [
    event({"candidates": [{"content": {"parts": [{"text": text}], "role": "model"}, "index": 0} | finish]})
    for text, finish in (("Hel", {}), ("l", {}), ("o", {"finishReason": "STOP"}))
]

READERS = [
    (Dialect.CHAT, CHAT, chat_text),
    (Dialect.CHAT, CHAT, chat_accumulated),
    (Dialect.COMPLETIONS, COMPLETIONS, completions_text),
    (Dialect.RESPONSES, RESPONSES, responses_text),
    (Dialect.RESPONSES, RESPONSES, responses_accumulated),
    (Dialect.MESSAGES, MESSAGES, messages_text),
    (Dialect.MESSAGES, MESSAGES, messages_accumulated),
    (Dialect.GEMINI, GEMINI, gemini_text),
]
assert {dialect for dialect, _, _ in READERS} == set(Dialect) - {Dialect.UNKNOWN}, "each API's own SDK reads here"
NAMES = [read.__name__ for _, _, read in READERS]

readers = pytest.mark.parametrize(("dialect", "events", "read"), READERS, ids=NAMES)


@readers
def test_the_sdks_survive_ids_heartbeats_retries_and_gaps(dialect: Dialect, events: list[bytes], read: Any) -> None:
    with upstream(on_the_wire(dialect, events, clean_end=True)) as url:
        assert read(url) == "Hello"


@readers
def test_the_sdks_survive_a_gap_as_the_first_event(dialect: Dialect, events: list[bytes], read: Any) -> None:
    if read is responses_accumulated:
        pytest.skip("it takes nothing in front of response.created, whatever its shape")
    gap = frame(PREFIX, 1, gap_event(dialect, Progress(dialect.api), 1, 1, reset=True), chunked=True)
    if dialect.api.data_only:
        gap = data_on_the_wire(dialect, [], clean_end=True)[:-5]
    with upstream(gap + on_the_wire(dialect, events, clean_end=True)) as url:
        assert read(url) == "Hello"


def last_words(dialect: Dialect) -> list[bytes]:
    broken = error_event(dialect, message="upstream broke", type="api_error", code="truncated", sequence_number=9)
    return [broken, reconnect_event(dialect, message="upstream broke", last_id="s_x:2", retry_ms=100)]


@readers
@pytest.mark.parametrize("which", [0, 1], ids=["error", "reconnect"])
def test_errors_and_farewells_raise_in_the_sdks(dialect: Dialect, events: list[bytes], read: Any, which: int) -> None:
    sdk = {Dialect.MESSAGES: anthropic, Dialect.GEMINI: errors}.get(dialect, openai)
    wire = on_the_wire(dialect, [*events[:2], last_words(dialect)[which]], clean_end=False)
    with upstream(wire) as url, pytest.raises(sdk.APIError) as raised:
        read(url)
    assert "upstream broke" in str(raised.value)
    if dialect is not Dialect.GEMINI:
        assert not isinstance(raised.value, sdk.APIConnectionError)
    if which == 1:
        body = raised.value.details["error"] if dialect is Dialect.GEMINI else raised.value.body
        assert (body["last_id"], body["retry_ms"]) == ("s_x:2", 100)


@pytest.mark.parametrize("line", ["id: s_x:1", ": hb", "retry: 1500", "event: gap"])
def test_any_line_but_data_would_break_the_google_genai_sdk(line: str) -> None:
    """The reason for answers of data lines only. If it fails, the SDK has changed and the rule may be looked at."""
    wire = line.encode() + b"\n" + GEMINI[0]
    with (
        upstream(b"%x\r\n%b\r\n0\r\n\r\n" % (len(wire), wire)) as url,
        pytest.raises(errors.UnknownApiResponseError),
    ):
        gemini_text(url)


def test_a_blank_line_after_a_comment_would_break_the_openai_sdk() -> None:
    """The reason for the rule of loose lines. If it fails, the SDK has changed and the rule may be looked at again."""
    wire = frame(PREFIX, 1, CHAT[0], chunked=True) + b"6\r\n: hb\n\n\r\n" + frame(PREFIX, 2, CHAT[-1], chunked=True)
    with upstream(wire + b"0\r\n\r\n") as url, pytest.raises(json.JSONDecodeError):
        chat_text(url)
