"""Bytes under the type of a stream that are no events: an error among them reaches the reader, all others the log."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fakes import DONE, LAST, SSE_HEAD, Client, Rig, chunk, event, events_in, post, rig

from streamd.daemon import logs
from streamd.reasons import CloseReason

CHAT_PATH = "/v1/chat/completions"
UNKNOWN_PATH = "/v1/of/no/known/dialect"


def data(body: dict[str, Any], name: str = "") -> bytes:
    return (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(body).encode() + b"\n\n"


# path -> an event of the middle of an answer
MIDDLES = {
    CHAT_PATH: event("half"),
    "/v1/completions": data({"choices": [{"index": 0, "text": "half", "finish_reason": None}]}),
    "/v1/messages": data({"type": "message_start", "message": {}}, "message_start"),
    "/v1/responses": data({"type": "response.created", "response": {"id": "r"}, "sequence_number": 4}),
    "/v1beta/models/m:streamGenerateContent?alt=sse": data({"candidates": [{"content": {"parts": [{"text": "a"}]}}]}),
    UNKNOWN_PATH: data({"x": 1}),
}
INNER = {"message": "slow down", "type": "overloaded", "code": "busy"}
# name -> the object in which servers tell an error
SHAPES: dict[str, dict[str, Any]] = {
    "OpenAI": {"error": INNER},
    "a text": {"error": "slow down"},
    "FastAPI": {"detail": "slow down"},
    "SGLang": {"object": "error", **INNER},
    "Anthropic": {"type": "error", "error": INNER},
    "Google": {"error": {"code": 429, "message": "slow down", "status": "RESOURCE_EXHAUSTED"}},
}
# name -> how these bytes stand in the stream
FRAMINGS = {
    "a bare object": lambda body: json.dumps(body).encode() + b"\n\n",
    "a pretty object": lambda body: json.dumps(body, indent=1).encode() + b"\n\n",
    "an array": lambda body: json.dumps([body]).encode() + b"\n\n",
    "the field error": lambda body: b"error: " + json.dumps(body).encode() + b"\n\n",
    "the field error, without a space": lambda body: b"error:" + json.dumps(body).encode() + b"\r\n\r\n",
    "another field": lambda body: b"failure: " + json.dumps(body).encode() + b"\n\n",
    "behind its type": lambda body: b"event: error\n" + json.dumps(body).encode() + b"\n\n",
    "in front of data": lambda body: json.dumps(body).encode() + b"\ndata: [DONE]\n\n",
    "behind a comment": lambda body: b": hm\n\n" + json.dumps(body).encode() + b"\n\n",
    "JSON lines": lambda body: json.dumps(body).encode() + b"\n" + json.dumps({"x": 1}).encode() + b"\n\n",
}
ENDS = {
    "properly": lambda r: r.reply(LAST),
    "with [DONE]": lambda r: r.reply(chunk(DONE) + LAST),
    "left open": lambda r: None,
    "by a reset": lambda r: (r.link.reset(), r.turn()),
}


def asked(r: Rig, path: str) -> Client:
    return r.client(post({"model": "m", "stream": True}, "Accept: text/event-stream", path=path))


def only_stream(r: Rig) -> Any:
    (stream,) = r.runtime.hub
    return stream


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", MIDDLES)
def test_an_error_in_any_shape_and_framing_is_the_readers_last_event_and_the_stream_failed(
    path: str, shape: str, framing: str
) -> None:
    with rig() as r:
        client = asked(r, path)
        r.reply(SSE_HEAD + chunk(MIDDLES[path], FRAMINGS[framing](SHAPES[shape])))
        r.reply(LAST)
        r.pass_time(2)
        told = [each for each in events_in(client.answer.body) if b"slow down" in each.data]
        assert len(told) == 1, client.answer.body
        error = told[0].json["error"]
        assert error["message"] == "slow down"
        if path == "/v1/messages":
            assert told[0].name == "error" and told[0].json["type"] == "error"
        if path == "/v1/responses":
            assert told[0].name == "error" and told[0].json["sequence_number"] == 5
        if shape in ("OpenAI", "SGLang"):
            assert error["type"] == "overloaded"
        assert client.answer.whole and only_stream(r).reason is CloseReason.UPSTREAM_ERROR
        assert b"upstream_truncated" not in client.answer.body


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("cut", [0, 1, 7])
@pytest.mark.parametrize("framing", ["a bare object", "the field error", "in front of data"])
def test_an_error_is_told_however_the_answer_is_cut_and_ends(framing: str, cut: int, first: bool, end: str) -> None:
    body = (b"" if first else event("half")) + FRAMINGS[framing](SHAPES["OpenAI"])
    with rig() as r:
        client = asked(r, CHAT_PATH)
        r.reply(SSE_HEAD)
        for start in range(0, len(body), cut or len(body)):
            r.reply(chunk(body[start : start + (cut or len(body))]))
        ENDS[end](r)
        r.pass_time(3)
        assert client.answer.body.count(b"slow down") >= 1
        errors = [each for each in events_in(client.answer.body) if b'"error"' in each.data]
        assert len(errors) == 1
        assert only_stream(r).reason in (CloseReason.UPSTREAM_ERROR, CloseReason.UPSTREAM_REFUSED)


@pytest.mark.parametrize("how", ["fin", "reset"])
@pytest.mark.parametrize("last", [b'{"error":{"message":"slow down"}}', b"error: slow down"])
def test_an_error_without_a_line_end_is_told_when_the_connection_breaks_behind_it(last: bytes, how: str) -> None:
    with rig() as r:
        client = asked(r, CHAT_PATH)
        r.reply(SSE_HEAD + chunk(event("half"), last))
        getattr(r.link, how)()
        r.turn()
        r.pass_time(1)
        assert [b"slow down" in each.data for each in events_in(client.answer.body)] == [False, True]
        assert only_stream(r).reason is CloseReason.UPSTREAM_ERROR


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"error: slow down", "slow down"),
        (b"Error: slow down", "slow down"),
        (b'error: {"code": 400}', '{"code": 400}'),
        (b'error: {"code": 400, "message": "the context is full", "type": "t"}', "the context is full"),
    ],
)
def test_the_field_error_is_an_error_whatever_its_text(line: bytes, text: str) -> None:
    with rig() as r:
        client = asked(r, CHAT_PATH)
        r.reply(SSE_HEAD + chunk(line + b"\n\n", DONE) + LAST)
        first, done = events_in(client.answer.body)
        assert first.json["error"]["message"] == text and done.data == b"[DONE]"


@pytest.mark.parametrize("line", [b"error", b"error:", b"error: null", b'x: {"error": null}', b'{"error": null}'])
def test_an_empty_error_is_none(line: bytes) -> None:
    with rig() as r:
        client = asked(r, CHAT_PATH)
        r.reply(SSE_HEAD + chunk(event("all"), line + b"\n\n", DONE) + LAST)
        assert client.answer.whole and only_stream(r).reason is CloseReason.COMPLETE
        assert len(events_in(client.answer.body)) == 2


@pytest.mark.parametrize("lines", [1, 2])
def test_chunks_as_lines_of_json_between_events_are_events(lines: int) -> None:
    bare = event("b").removeprefix(b"data: ").removesuffix(b"\n")
    with rig() as r:
        client = asked(r, CHAT_PATH)
        r.reply(SSE_HEAD + chunk(event("a"), bare * lines + b"\n", DONE) + LAST)
        said = [each.json["choices"][0]["delta"]["content"] for each in events_in(client.answer.body)[:-1]]
        assert said == ["a", *["b"] * lines] and client.answer.whole


def test_events_of_messages_as_bare_json_get_their_type() -> None:
    delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a"}}
    with rig() as r:
        client = asked(r, "/v1/messages")
        r.reply(SSE_HEAD + chunk(MIDDLES["/v1/messages"], json.dumps(delta).encode() + b"\n\n"))
        assert [each.name for each in events_in(client.answer.body)] == ["message_start", "content_block_delta"]
        r.reply(chunk(data({"type": "message_stop"}, "message_stop")) + LAST)


SECRET = "the secret of the prompt"
DROPPED = {
    "a field": (f"meta: {SECRET}\n\n", 1, "meta"),
    "free text": (f"{SECRET}\n{SECRET}: yes\n\n", 2, "(text)"),
    "JSON": (json.dumps({"content": SECRET}) + "\n\n", 1, "(JSON)"),
    "pretty JSON": (json.dumps({"content": SECRET}, indent=1) + "\n\n", 3, "(JSON),(text)"),
    "a type alone": (f"event: {SECRET}\n\n", 1, "event"),
    "beside a comment": (f": c\nmeta: {SECRET}\nid: 7\n\n", 1, "meta"),
    "many": ("".join(f"f{k}: {SECRET}\n\n" for k in range(20)), 20, ",".join(f"f{k}" for k in range(8))),
}


@pytest.mark.parametrize("kind", DROPPED)
def test_lines_that_are_dropped_are_counted_in_the_log_by_their_fields_and_never_quoted(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, lines, fields = DROPPED[kind]
    logged: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(logs, "event", lambda level, name, **found: logged.append((name, found)))
    with rig() as r:
        client = asked(r, CHAT_PATH)
        r.reply(SSE_HEAD + chunk(event("all"), text.encode(), DONE) + LAST)
        r.pass_time(1)
        assert client.answer.whole and SECRET.encode() not in client.answer.body
        ((_, found),) = [each for each in logged if each[0] == "stream"]
        assert (found["stray_lines"], found["stray_fields"]) == (lines, fields)
        assert text.count(SECRET) * len(SECRET) < found["stray_bytes"] < len(text)
        assert SECRET not in repr(logged)


@pytest.mark.parametrize("body", [b"data: x\nmeta: y\n\n", b": c\n\n", b"retry: 5\n\n", b"id: 7\n\n", b"\n\n"])
def test_lines_that_reach_the_reader_or_are_streamds_to_remove_are_no_strays(body: bytes) -> None:
    with rig() as r:
        asked(r, CHAT_PATH)
        r.reply(SSE_HEAD + chunk(event("all"), body, DONE) + LAST)
        assert only_stream(r).progress.strays is None


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    "text", [b"an answer of a kind of its own\n\n", b"<p>502 Bad Gateway</p>\n\n", b"event: x\n\n"]
)
def test_an_answer_that_was_dropped_does_not_look_empty_and_whole(text: bytes, together: bool) -> None:
    with rig() as r:
        client = asked(r, CHAT_PATH)
        for read in [chunk(text, DONE)] if together else [chunk(text), chunk(DONE)]:
            r.reply(SSE_HEAD + read if read.startswith(chunk(text)) else read)
        r.reply(LAST)
        r.pass_time(2)
        first, done = events_in(client.answer.body)
        assert first.json["error"]["code"] == "upstream_not_events" and done.data == b"[DONE]"
        assert only_stream(r).reason is CloseReason.UPSTREAM_ERROR


PLAIN = {
    "free text": (b"Once upon a time\nthere was a server.\n", "2 lines that are no events ((text))"),
    "without a line end": (b"Once upon a time", "1 line that is no event ((text))"),
    "fields": (b"meta: x\nusage: y\n\n", "2 lines that are no events (meta, usage)"),
    "a page": (b"<html>\n<p>502</p>\n</html>\n", "3 lines that are no events ((text))"),
    "JSON of no answer": (b'meta: {"a": 1}\n\n', "1 line that is no event (meta)"),
}


@pytest.mark.parametrize(("framing", "size"), [("chunked", 1), ("length", 7), ("until close", 1000)])
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("path", MIDDLES)
def test_text_in_place_of_events_ends_with_an_error_that_says_so(path: str, kind: str, size: int, framing: str) -> None:
    text, told = PLAIN[kind]
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    fields = {"chunked": "transfer-encoding: chunked\r\n", "length": f"content-length: {len(text)}\r\n"}
    with rig() as r:
        client = asked(r, path)
        r.reply(f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{fields.get(framing, '')}\r\n".encode())
        for part in parts:
            r.reply(chunk(part) if framing == "chunked" else part)
        if framing == "chunked":
            r.reply(LAST)
        elif framing == "until close":
            r.link.fin()
        r.pass_time(1)
        (error,) = events_in(client.answer.body)
        assert told in error.json["error"]["message"] and not client.answer.whole
        if path not in ("/v1/messages", "/v1beta/models/m:streamGenerateContent?alt=sse"):
            assert error.json["error"]["code"] == "upstream_not_events"
        assert only_stream(r).reason is CloseReason.UPSTREAM_TRUNCATED


@pytest.mark.parametrize("how", ["end", "fin", "silence"])
def test_a_cut_behind_lines_that_were_dropped_names_both(how: str) -> None:
    with rig(idle_timeout_s=20.0) as r:
        client = asked(r, CHAT_PATH)
        r.reply(SSE_HEAD + chunk(event("half"), b"meta: x\n\n"))
        if how == "end":
            r.reply(LAST)
        elif how == "fin":
            r.link.fin()
        r.pass_time(25)
        *_, error = events_in(client.answer.body)
        assert error.json["error"]["code"] != "upstream_not_events"
        assert error.json["error"]["message"].endswith("Dropped: 1 line that is no event (meta).")
