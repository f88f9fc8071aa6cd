"""Whole answers and heads as servers have been seen to send them (README.md has the reports)."""

from __future__ import annotations

import gzip
from typing import Any

import pytest
from fakes import DONE, LAST, SSE_HEAD, WHOLE, Rig, chunk, event, get, post, rig, whole_answer

OK = whole_answer(b'{"ok": true}', "200 OK", "content-type: application/json")
CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"


def failures(r: Rig) -> dict[Any, int]:
    return {key: count for key, count in r.runtime.counters.upstream_failures.items() if count}


STRAY = {
    "a 408 of a balancer": b"HTTP/1.0 408 Request Time-out\r\nConnection: close\r\n\r\n<html>",
    "an end of chunks": b"0\r\n\r\n",
    "an empty line": b"\r\n",
    "a second answer": OK,
}


@pytest.mark.parametrize("stray", STRAY.values(), ids=list(STRAY))
@pytest.mark.parametrize("together", [True, False])
def test_bytes_that_answer_no_request_end_their_connection_and_nothing_else(stray: bytes, together: bool) -> None:
    with rig() as r:
        first = r.client(post(WHOLE))
        r.reply(OK + stray if together else OK)
        if not together:
            r.reply(stray)
        assert first.answer.body == b'{"ok": true}' and r.link.closed
        second = r.client(post(WHOLE))
        assert len(r.links) == 2
        r.reply(OK)
        assert second.answer.body == b'{"ok": true}' and failures(r) == {}


def test_blank_lines_that_keep_a_whole_answer_alive_pass_as_they_come() -> None:
    with rig(ttft_timeout_s=60.0, idle_timeout_s=60.0) as r:
        client = r.client(post(WHOLE))
        r.reply(CHUNKED)
        for count in range(1, 4):
            r.reply(chunk(b"\n"))
            assert client.raw.count(b"1\r\n\n\r\n") == count
            r.pass_time(50)
        r.reply(chunk(b'{"ok": true}') + LAST)
        assert client.answer.body == b'\n\n\n{"ok": true}' and client.answer.whole


def test_the_answer_to_an_offer_of_webrtc_keeps_its_status_type_and_location() -> None:
    with rig() as r:
        client = r.client(post(b"v=0\r\n", "Content-Type: application/sdp", path="/v1/realtime/calls?model=m"))
        assert bytes(r.link.sent).endswith(b"\r\n\r\nv=0\r\n")
        r.reply(
            whole_answer(b"v=0", "201 Created", "content-type: application/sdp", "location: /v1/realtime/calls/rtc_1")
        )
        answer = client.answer
        assert (answer.status, answer.body) == (201, b"v=0")
        assert (answer.get("content-type"), answer.get("location")) == ("application/sdp", "/v1/realtime/calls/rtc_1")


@pytest.mark.parametrize("status", ["304 Not Modified", "204 No Content"])
def test_an_answer_without_a_body_that_says_chunked_has_no_body(status: str) -> None:
    with rig() as r:
        client = r.client(get("/v1/files/a") + get("/v1/files/b"))
        r.reply(f'HTTP/1.1 {status}\r\ntransfer-encoding: chunked\r\netag: "x"\r\n\r\n'.encode())
        r.reply(OK)
        first, second = client.answers
        assert first.status == int(status[:3]) and first.body == b"" and first.get("transfer-encoding") is None
        assert second.body == b'{"ok": true}'


@pytest.mark.parametrize("status", ["500 Internal Server Error", "400 Bad Request", "520 "])
def test_an_error_in_chunks_on_a_connection_that_closes_arrives_whole(status: str) -> None:
    head = CHUNKED.replace(b"200 OK", status.encode()).replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
    with rig() as r:
        client = r.client(post(WHOLE) + get("/healthz"))
        r.reply(head + chunk(b'{"error": ', b'{"message": "x"}}') + LAST)
        r.link.fin()
        r.turn()
        error, health = client.answers
        assert error.status == int(status[:3]) and error.error == {"message": "x"} and health.status == 200
        assert error.get("connection") is None, "the client's own connection stays"


MALFORMED = {
    "two lengths of the body": (
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
        b"not both",
    ),
    "line feeds alone": (b"HTTP/1.1 200 OK\ncontent-length: 0\n\n", b"bare LF"),
    "a space in front of a colon": (b"HTTP/1.1 200 OK\r\ncontent-length : 0\r\n\r\n", b"space"),
    "a folded field": (b"HTTP/1.1 200 OK\r\nx-a: b\r\n c\r\ncontent-length: 0\r\n\r\n", b"folded"),
    "a control byte": (b"HTTP/1.1 200 OK\r\nset-cookie: a=\x01\r\ncontent-length: 0\r\n\r\n", b"0x01"),
    "a status beyond 599": (b"HTTP/1.1 999 Denied\r\ncontent-length: 0\r\n\r\n", b"status"),
    "another protocol": (b"ICY 200 OK\r\n\r\n", b"HTTP/1.1"),
}


@pytest.mark.parametrize(("head", "named"), MALFORMED.values(), ids=list(MALFORMED))
def test_a_malformed_head_is_a_502_that_names_the_fault(head: bytes, named: bytes) -> None:
    with rig() as r:
        client = r.client(post(WHOLE))
        r.reply(head)
        assert client.answer.status == 502 and client.answer.error["code"] == "upstream_protocol"
        assert named in client.answer.body and r.link.closed, (
            "the text names the fault; the connection isn't used again"
        )


@pytest.mark.parametrize(
    "error",
    [
        b'[{"error": {"code": 400, "message": "Unknown name", "status": "INVALID_ARGUMENT"}}]',
        b'{"detail": [{"loc": ["body"], "msg": "field required"}]}',
        b'{"message": "no such route", "type": "error"}',
        b"<html>413</html>",
        b"",
    ],
)
def test_a_refusal_of_any_shape_arrives_as_it_is(error: bytes) -> None:
    with rig() as r:
        client = r.client(post({**WHOLE, "stream": True}))
        r.reply(whole_answer(error, "400 Bad Request", "content-type: application/json"))
        assert (client.answer.status, client.answer.body) == (400, error)


def test_a_streams_length_in_bytes_is_never_the_upstreams() -> None:
    body = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    head = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with rig() as r:
        client = r.client(post({**WHOLE, "stream": True}))
        r.reply(head + body)
        r.pass_time(2)
        answer = client.answer
        assert answer.get("content-length") is None and answer.get("transfer-encoding") == "chunked" and answer.whole


def test_the_length_of_an_encoded_answer_belongs_to_its_encoded_bytes() -> None:
    packed = gzip.compress(b'{"ok": true}')
    with rig() as r:
        client = r.client(post(WHOLE, "Accept-Encoding: gzip"))
        r.reply(whole_answer(packed, "200 OK", "content-type: application/json", "content-encoding: gzip"))
        answer = client.answer
        assert answer.body == packed and answer.get("content-encoding") == "gzip"
        assert answer.get("content-length") == str(len(packed))


def test_each_token_goes_on_when_it_comes_however_small() -> None:
    with rig() as r:
        client = r.client(post({**WHOLE, "stream": True}))
        r.reply(SSE_HEAD)
        assert client.raw.startswith(b"HTTP/1.1 200 OK\r\n"), "the head waits for no token"
        for count in range(1, 4):
            before, writes = len(client.raw), client.transport.writes
            r.reply(chunk(event("a")))
            assert client.raw[before:].count(b'"content":"a"') == 1 and client.transport.writes == writes + 1, count
        r.reply(chunk(DONE) + LAST)
        answer = client.answer
        assert answer.whole and answer.get("x-accel-buffering") == "no"
        assert "no-transform" in (answer.get("cache-control") or "")


@pytest.mark.parametrize("stream", [True, False])
def test_an_upstream_that_isnt_there_is_named_with_the_reason(stream: bool) -> None:
    with rig() as r:
        r.refusing.add(1)
        answer = r.client(post({**WHOLE, "stream": stream})).answer
        assert answer.status == 502 and answer.error["code"] == "upstream_unreachable"
        assert "up" in answer.error["message"] and "refused" in answer.error["message"]
        assert answer.get("x-should-retry") in (None, "true")
