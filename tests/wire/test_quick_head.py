"""The quick path reads a usual head as the gates and h11 do, and leaves every other head to them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamd.wire.heads import HEAD_LIMITS, HeadLimits, RequestHead, ResponseHead, joined
from streamd.wire.http1 import RESPONSE_OPENING, HeadReader, RemoteProtocolError, judged_request, judged_response
from streamd.wire.quick_head import quick_request, quick_response, whole_head

CORPUS = Path(__file__).parent.parent / "corpus"


def lines(*each: str) -> bytes:
    return "\r\n".join([*each, "", ""]).encode("latin-1")


OPENAI_SDK = lines(
    "POST /v1/chat/completions HTTP/1.1",
    "Host: 127.0.0.1:8080",
    "Accept-Encoding: gzip, deflate",
    "Connection: keep-alive",
    "Accept: application/json",
    "User-Agent: OpenAI/Python 2.8.1",
    "X-Stainless-Lang: python",
    "Authorization: Bearer sk-0123456789abcdef",
    "Content-Type: application/json",
    "Content-Length: 81",
)
ANTHROPIC_SDK = lines(
    "POST /v1/messages?beta=true HTTP/1.1",
    "host: llm.example.org",
    "connection: Keep-Alive",
    "anthropic-version: 2023-06-01",
    "content-type: application/json",
    "x-api-key: sk-ant-api03-x",
    "transfer-encoding: chunked",
)
CURL = lines("GET /v1/streams/a-b_c~d HTTP/1.1", "Host: localhost", "User-Agent: curl/8.5.0", "Accept: */*", "X-Empty:")
BROWSER = lines(
    "GET /v1/streams?limit=5&x=%41 HTTP/1.1",
    "Host: llm.example.org:65535",
    "Connection: close",
    "Accept-Language: de,en;q=0.5",
    "Cookie: a=b; c=d",
    "Cookie: \xe4=\xff",
    "Sec-Fetch-Site: same-origin",
)
VLLM = lines(
    "HTTP/1.1 200 OK",
    "date: Sun, 30 Nov 2025 09:00:00 GMT",
    "server: uvicorn",
    "content-type: text/event-stream; charset=utf-8",
    "transfer-encoding: chunked",
)
CLOUDFLARE = lines(
    "HTTP/1.1 429 Too Many Requests",
    "Content-Type: application/json",
    "Content-Length: 0123",
    "Connection: close",
    "set-cookie: a=b; path=/",
    "set-cookie: c=d; path=/",
    "Vary: Origin",
)
BARE = lines("HTTP/1.1 200", "Content-Type: text/event-stream")
ASKED = [OPENAI_SDK, ANTHROPIC_SDK, CURL, BROWSER]
ANSWERED = [VLLM, CLOUDFLARE, BARE, lines("HTTP/1.1 204 No Content"), lines("HTTP/1.1 304 Not Modified", "ETag: a")]


@pytest.mark.parametrize("head", ASKED)
def test_the_heads_of_real_clients_take_the_quick_path(head: bytes) -> None:
    assert quick_request(head, HEAD_LIMITS) == judged_request(head)


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
@pytest.mark.parametrize("head", ANSWERED)
def test_the_heads_of_real_servers_take_the_quick_path(head: bytes, method: str) -> None:
    assert quick_response(head, method, HEAD_LIMITS) == judged_response(head, method)


USUAL = "Host: a"

DOUBTFUL = {
    "an unknown method": lines("BREW /a HTTP/1.1", USUAL),
    "CONNECT": lines("CONNECT a:1 HTTP/1.1", USUAL),
    "a method in small letters": lines("get /a HTTP/1.1", USUAL),
    "absolute-form": lines("GET http://a/b HTTP/1.1", USUAL),
    "asterisk-form": lines("OPTIONS * HTTP/1.1", USUAL),
    "an escape in the path": lines("GET /a%41 HTTP/1.1", USUAL),
    "an empty segment": lines("GET /a//b HTTP/1.1", USUAL),
    "a fragment": lines("GET /a#b HTTP/1.1", USUAL),
    "a fragment behind the query": lines("GET /a?b#c HTTP/1.1", USUAL),
    "a quote in the path": lines('GET /a"b HTTP/1.1', USUAL),
    "HTTP/1.0": lines("GET /a HTTP/1.0", USUAL),
    "HTTP/1.2": lines("GET /a HTTP/1.2", USUAL),
    "two spaces in the line": lines("GET  /a HTTP/1.1", USUAL),
    "no Host": lines("GET /a HTTP/1.1"),
    "an empty Host": lines("GET /a HTTP/1.1", "Host:"),
    "two Hosts": lines("GET /a HTTP/1.1", USUAL, USUAL),
    "an IPv6 Host": lines("GET /a HTTP/1.1", "Host: [::1]:80"),
    "a Host with a user": lines("GET /a HTTP/1.1", "Host: b@a"),
    "a port that is none": lines("GET /a HTTP/1.1", "Host: a:65536"),
    "an obs-fold": lines("GET /a HTTP/1.1", USUAL, "X: a", " b"),
    "a space in front of the colon": lines("GET /a HTTP/1.1", USUAL, "X : a"),
    "two spaces in front of the value": lines("GET /a HTTP/1.1", USUAL, "X:  a"),
    "a space behind the value": lines("GET /a HTTP/1.1", USUAL, "X: a "),
    "a tab": lines("GET /a HTTP/1.1", USUAL, "X: a\tb"),
    "a name that is no token": lines("GET /a HTTP/1.1", USUAL, "X(y): a"),
    "no name": lines("GET /a HTTP/1.1", USUAL, ": a"),
    "no colon": lines("GET /a HTTP/1.1", USUAL, "X"),
    "a control byte": lines("GET /a HTTP/1.1", USUAL, "X: \x01"),
    "NUL": lines("GET /a HTTP/1.1", USUAL, "X: a\0b"),
    "a bare LF": lines("GET /a HTTP/1.1", USUAL, "X: a\nY: b"),
    "a bare CR": lines("GET /a HTTP/1.1", USUAL, "X: a\rY: b"),
    "a bare LF behind the line": b"GET /a HTTP/1.1\nHost: a\r\n\r\n",
    "an empty line between": lines("GET /a HTTP/1.1", USUAL, "", "X: a"),
    "bytes behind the head": lines("GET /a HTTP/1.1", USUAL) + b"X: a",
    "no blank line": b"GET /a HTTP/1.1\r\nHost: a\r\n",
    "two Content-Lengths": lines("POST /a HTTP/1.1", USUAL, "Content-Length: 1", "Content-Length: 1"),
    "a list of Content-Lengths": lines("POST /a HTTP/1.1", USUAL, "Content-Length: 1, 1"),
    "a signed Content-Length": lines("POST /a HTTP/1.1", USUAL, "Content-Length: +1"),
    "an empty Content-Length": lines("POST /a HTTP/1.1", USUAL, "Content-Length:"),
    "a Content-Length of 19 digits": lines("POST /a HTTP/1.1", USUAL, "Content-Length: " + "1" * 19),
    "a length and a coding": lines("POST /a HTTP/1.1", USUAL, "Content-Length: 1", "Transfer-Encoding: chunked"),
    "two codings": lines("POST /a HTTP/1.1", USUAL, "Transfer-Encoding: gzip, chunked"),
    "chunked twice": lines("POST /a HTTP/1.1", USUAL, "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
    "chunked in capitals": lines("POST /a HTTP/1.1", USUAL, "Transfer-Encoding: Chunked"),
    "two Content-Types": lines("POST /a HTTP/1.1", USUAL, "Content-Type: a/b", "Content-Type: a/b"),
    "another option of Connection": lines("GET /a HTTP/1.1", USUAL, "Connection: keep-alive, TE"),
    "Connection twice": lines("GET /a HTTP/1.1", USUAL, "Connection: close", "Connection: close"),
    "Expect": lines("POST /a HTTP/1.1", USUAL, "Expect: 100-continue"),
    "Upgrade": lines("GET /a HTTP/1.1", USUAL, "Upgrade: websocket"),
    "too many fields": lines("GET /a HTTP/1.1", USUAL, *["X: a"] * 100),
    "too long a target": lines("GET /" + "a" * 8192 + " HTTP/1.1", USUAL),
    "too large a head": lines("GET /a HTTP/1.1", USUAL, "X: " + "a" * 16384),
}


@pytest.mark.parametrize("head", DOUBTFUL.values(), ids=DOUBTFUL)
def test_a_request_with_anything_unusual_is_left_to_the_gates(head: bytes) -> None:
    assert quick_request(head, HEAD_LIMITS) is None


@pytest.mark.parametrize(
    "head",
    [
        lines("HTTP/1.0 200 OK"),
        lines("HTTP/1.1 100 Continue"),
        lines("HTTP/1.1 101 Switching Protocols"),
        lines("HTTP/1.1 600 Odd"),
        lines("HTTP/1.1  200 OK"),
        lines("HTTP/1.1 200 OK "),
        lines("HTTP/1.1 200  OK"),
        lines("HTTP/1.1 200 O\tK"),
        lines("HTTP/1.1 200OK"),
        lines("HTTP/1.1 200 OK", "X: a", " b"),
        lines("HTTP/1.1 200 OK", "X : a"),
        lines("HTTP/1.1 200 OK", "Content-Length: 1", "Content-Length: 1"),
        lines("HTTP/1.1 200 OK", "Content-Length: 1", "Transfer-Encoding: chunked"),
        lines("HTTP/1.1 200 OK", "Transfer-Encoding: identity"),
        lines("HTTP/1.1 200 OK", "Connection: upgrade"),
        lines("HTTP/1.1 200 OK", *["X: a"] * 101),
        lines("HTTP/1.1 200 OK", "X: " + "a" * 16384),
    ],
)
def test_an_answer_with_anything_unusual_is_left_to_the_gates(head: bytes) -> None:
    assert quick_response(head, "GET", HEAD_LIMITS) is None


def agrees_on_request(head: bytes) -> bool:
    """Whether the quick path took the head, and then as the gates do."""
    quick: RequestHead | None = quick_request(head, HEAD_LIMITS)
    if quick is None:
        return False
    judged = judged_request(head)
    assert quick == judged and quick.by_name == judged.by_name == joined(judged.headers)
    return True


def agrees_on_response(head: bytes, method: str) -> bool:
    """Whether the quick path took the head, and then as the gates do."""
    quick: ResponseHead | None = quick_response(head, method, HEAD_LIMITS)
    if quick is None:
        return False
    judged = judged_response(head, method)
    assert quick == judged and quick.by_name == judged.by_name == joined(judged.headers)
    return True


INSERTS = (
    b"\r\n",
    b"\r",
    b"\n",
    b" ",
    b"\t",
    b":",
    b": ",
    b"\0",
    b"\x7f",
    b"\xff",
    b",",
    b"//",
    b"%2f",
    b"?",
    b"#",
    b"0",
    b"close",
    b"\r\nHost: b",
    b"\r\nContent-Length: 1",
    b"\r\nTransfer-Encoding: chunked",
    b"\r\nConnection: host",
    b"\r\nContent-Type: a",
    b"\r\nExpect: x",
    b"\r\nX: y",
    b"",
)
EDITS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 3), st.sampled_from(INSERTS)), max_size=3)


def edited(head: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """The head after those edits: each replaces some bytes at an offset by others."""
    for at, removed, inserted in edits:
        head = head[:at] + inserted + head[at + removed :]
    return head


@given(st.builds(edited, st.sampled_from(ASKED), EDITS))
@example(lines("GET / HTTP/1.1", "Host: a:", "x: "))
@settings(max_examples=1500, deadline=None)
def test_a_request_on_the_quick_path_is_read_as_h11_and_the_gates_read_it(head: bytes) -> None:
    agrees_on_request(head)


@given(st.builds(edited, st.sampled_from(ANSWERED), EDITS), st.sampled_from(["GET", "HEAD", "POST"]))
@settings(max_examples=1500, deadline=None)
def test_an_answer_on_the_quick_path_is_read_as_h11_and_the_gates_read_it(head: bytes, method: str) -> None:
    agrees_on_response(head, method)


def test_the_corpus_of_odd_heads_is_read_alike() -> None:
    wires = [row[1] for row in runpy.run_path(str(CORPUS / "http_requests.py"))["ROWS"]]
    answers = [row[2] for row in runpy.run_path(str(CORPUS / "http_responses.py"))["ROWS"]]
    taken = [agrees_on_request(wire[: whole_head(wire, HEAD_LIMITS)]) for wire in wires]
    taken += [agrees_on_response(wire[: whole_head(wire, HEAD_LIMITS)], "GET") for wire in answers]
    assert 0 < sum(taken) < len(taken)


@given(st.builds(edited, st.sampled_from([*ASKED, b"\r\n" + CURL, CURL + CURL]), EDITS), st.integers(0, 400))
@example(b"\r\n\r\n", 400)
@example(b"", 400)
@settings(max_examples=500, deadline=None)
def test_a_head_that_is_all_there_ends_where_a_reader_of_heads_says(wire: bytes, most: int) -> None:
    limits = HeadLimits(head_bytes_max=most)
    size = whole_head(wire, limits)
    if size:
        for opening in (b"", RESPONSE_OPENING):
            assert HeadReader(limits, opening=opening).feed(wire) == (wire[:size], wire[size:])
        return
    try:
        found = HeadReader(limits).feed(wire)
    except RemoteProtocolError:
        return
    assert found is None or wire.startswith(b"\r")


def test_the_values_of_fields_with_a_name_are_joined() -> None:
    fields = ((b"a", b"1"), (b"b", b"2"), (b"a", b"3"), (b"a", b""))
    assert joined(fields) == {b"a": b"1, 3, ", b"b": b"2"}
    assert joined(()) == {}
