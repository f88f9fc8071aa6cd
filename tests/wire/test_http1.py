"""Heads: collected, checked, parsed, written; and the same heads through h11 alone."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamd.wire.http1 import (
    HOP_BY_HOP,
    RESPONSE_OPENING,
    Framing,
    HeadLimits,
    HeadReader,
    LocalProtocolError,
    RemoteProtocolError,
    RequestHead,
    encode_request_head,
    encode_response_head,
    end_to_end,
    judged_request,
    judged_response,
    parse_request,
    parse_response,
)

HEAD = b"GET /v1/models?a=b HTTP/1.1\r\nHost: example.org\r\nX-A: 1\r\nx-a: 2\r\n\r\n"
CORPUS = Path(__file__).parent.parent / "corpus"


def request(*fields: bytes, line: bytes = b"POST / HTTP/1.1", host: bytes = b"Host: a\r\n") -> RequestHead:
    """A parsed request of that line and those fields."""
    return parse_request(line + b"\r\n" + host + b"".join(field + b"\r\n" for field in fields) + b"\r\n")


# HeadReader


@pytest.mark.parametrize("behind", [b"", b"body", HEAD])
@pytest.mark.parametrize("front", [b"", b"\r\n", b"\r\n\r\n"])
def test_a_head_is_found_in_any_cut(front: bytes, behind: bytes) -> None:
    wire = front + HEAD
    for at in range(len(wire) + 1):
        reader = HeadReader()
        found = reader.feed(wire[:at])
        if found is None:
            assert at < len(wire)
            assert reader.bytes_held == max(at - len(front), 0) or at < len(front)
            found = reader.feed(wire[at:] + behind)
            assert found == (HEAD, behind)
        else:
            assert (at, found) == (len(wire), (HEAD, b""))
        assert reader.bytes_held == 0


def test_a_head_byte_by_byte_is_scanned_once() -> None:
    reader = HeadReader()
    for _ in range(2):  # afterwards the reader is ready for the next head
        for byte in HEAD[:-1]:
            assert reader.feed(bytes([byte])) is None
            assert reader._scanned == reader.bytes_held
        assert reader.feed(HEAD[-1:]) == (HEAD, b"")


def test_empty_lines_are_skipped_before_each_head() -> None:
    reader = HeadReader()
    assert reader.feed(b"\r\n\r\n") is None
    assert reader.bytes_held == 0
    assert reader.feed(HEAD + b"\r\n\r\n" + HEAD) == (HEAD, b"\r\n\r\n" + HEAD)
    assert reader.feed(b"\r\n\r\n" + HEAD) == (HEAD, b"")


@pytest.mark.parametrize(
    ("wire", "status", "code"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\n", 400, "bare_lf"),
        (b"\n", 400, "bare_lf"),
        (b"\r\n\r\n\r\n", 400, "bad_request_line"),
        (b"\rG", 400, "bad_request_line"),
        (b"\x16\x03\x01", 400, "bad_request_line"),
        (b"GET /" + b"a" * 100, 414, "target_too_long"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 100, 431, "head_too_large"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 100 + b"\r\n\r\n", 431, "head_too_large"),
        (b"GET /" + b"a" * 100 + b" HTTP/1.1\r\n\r\n", 414, "target_too_long"),
    ],
)
def test_bytes_that_cannot_become_a_head_are_refused_before_its_end(wire: bytes, status: int, code: str) -> None:
    limits = HeadLimits(head_bytes_max=80)
    for size in (1, len(wire)):
        reader = HeadReader(limits)
        with pytest.raises(RemoteProtocolError) as caught:
            for start in range(0, len(wire), size):
                reader.feed(wire[start : start + size])
        assert (caught.value.status, caught.value.code) == (
            (status, code) if wire != b"\n" else (400, caught.value.code)
        )


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (b"SSH-2.0", "bad_status_line"),
        (b"HTTP/2", "bad_status_line"),
        (b"\r\nHTTP/1.1 200 OK", "bad_status_line"),
        (b"HTTP/1.1 200 OK\n", "bare_lf"),
        (b"HTTP/1.1 " + b"a" * 100, "head_too_large"),
    ],
)
def test_a_response_must_begin_with_a_status_line(wire: bytes, code: str) -> None:
    for size in (1, len(wire)):
        reader = HeadReader(HeadLimits(head_bytes_max=80), opening=RESPONSE_OPENING)
        with pytest.raises(RemoteProtocolError) as caught:
            for start in range(0, len(wire), size):
                reader.feed(wire[start : start + size])
        assert caught.value.status == 502
        assert size == 1 or caught.value.code == code


def test_an_idle_head_reader_is_small() -> None:
    reader = HeadReader()
    reader.feed(HEAD)
    assert not hasattr(reader, "__dict__")
    assert sys.getsizeof(reader) + sys.getsizeof(reader._held) <= 160


# Requests


def test_a_request_is_parsed_into_its_parts() -> None:
    head = parse_request(HEAD)
    assert (head.method, head.target, head.path, head.query) == ("GET", b"/v1/models?a=b", "/v1/models", "a=b")
    assert head.headers == ((b"host", b"example.org"), (b"x-a", b"1"), (b"x-a", b"2"))
    assert (head.get(b"x-a"), head.get(b"host"), head.get(b"x-b")) == (b"1, 2", b"example.org", None)
    assert (head.authority, head.framing, head.content_length) == (b"example.org", Framing.NONE, 0)
    assert (head.http10, head.keep_alive, head.expect_continue, head.upgrade) == (False, True, False, False)


@pytest.mark.parametrize(
    ("raw", "path", "query", "authority"),
    [
        (b"/a/../b/c%2f", "/a/../b/c%2F", "", b"a"),
        (b"//a///b//?c//d", "/a/b/", "c//d", b"a"),  # slashes in a row are a single slash
        (b"/%76%31/ch%61t/%7e%2D%5f?%61=%62", "/v1/chat/~-_", "%61=%62", b"a"),
        (b"/%2e%2E/%252e%25%32%65%c3%a9", "/../%252e%252e%C3%A9", "", b"a"),  # undone once, never twice
        (b"/a?b?c", "/a", "b?c", b"a"),
        (b"*", "*", "", b"a"),
        (b"http://b.example:81/c?d", "/c", "d", b"b.example:81"),
        (b"HTTPS://B.example", "/", "", b"B.example"),
        (b"http://[::1]?d", "/", "d", b"[::1]"),
    ],
)
def test_a_target_is_parsed_into_path_query_and_authority(raw: bytes, path: str, query: str, authority: bytes) -> None:
    head = request(line=b"OPTIONS " + raw + b" HTTP/1.1")
    assert (head.path, head.query, head.authority) == (path, query, authority)
    assert head.target == (raw if raw[:1] in b"/*" else (path + ("?" + query if query else "")).encode())


@pytest.mark.parametrize(
    ("fields", "framing", "length"),
    [
        ([], Framing.NONE, 0),
        ([b"Content-Length: 5"], Framing.LENGTH, 5),
        ([b"cOnTeNt-LeNgTh:5 "], Framing.LENGTH, 5),
        ([b"Content-Length: 0"], Framing.LENGTH, 0),
        ([b"Transfer-Encoding: Chunked"], Framing.CHUNKED, 0),
        ([b"X-Content-Length: 5", b"Content-Length-X: 6"], Framing.NONE, 0),
    ],
)
def test_the_framing_of_a_request_comes_from_its_fields(fields: list[bytes], framing: Framing, length: int) -> None:
    head = request(*fields)
    assert (head.framing, head.content_length) == (framing, length)


@pytest.mark.parametrize(
    ("version", "fields", "keep_alive"),
    [
        (b"1.1", [], True),
        (b"1.1", [b"Connection: keep-alive, X"], True),
        (b"1.1", [b"Connection: X", b"connection: a ,\tCLOSE"], False),
        (b"1.1", [b"Connection: closed"], True),
        (b"1.0", [], False),
        (b"1.0", [b"Connection: keep-alive"], True),
        (b"1.0", [b"Connection: keep-alive, close"], False),
    ],
)
def test_keep_alive_depends_on_version_and_connection(version: bytes, fields: list[bytes], keep_alive: bool) -> None:
    assert request(*fields, line=b"GET / HTTP/" + version).keep_alive is keep_alive


@pytest.mark.parametrize(
    ("version", "fields", "expects", "upgrades"),
    [
        (b"1.1", [b"Expect: 100-Continue"], True, False),
        (b"1.1", [b"Expect: 100-continue", b"Expect: 100-continue"], True, False),
        (b"1.0", [b"Expect: 100-continue"], False, False),
        (b"1.1", [b"Upgrade: websocket"], False, True),
        (b"1.1", [b"Upgrade: H2C"], False, False),
        (b"1.1", [b"Upgrade: h2c, websocket"], False, True),
        (b"1.1", [b"Upgrade:"], False, False),
        (b"1.0", [b"Upgrade: websocket"], False, False),
    ],
)
def test_expectations_and_upgrades_are_recognized_in_http_1_1_only(
    version: bytes, fields: list[bytes], expects: bool, upgrades: bool
) -> None:
    head = request(*fields, line=b"GET / HTTP/" + version)
    assert (head.expect_continue, head.upgrade) == (expects, upgrades)


def test_an_http10_request_may_lack_the_host() -> None:
    head = request(line=b"GET / HTTP/1.0", host=b"")
    assert (head.http10, head.authority) == (True, b"")


@pytest.mark.parametrize(
    ("wire", "status", "code"),
    [
        (b"GET /\r\n\r\n", 400, "bad_request_line"),
        (b"GET  HTTP/1.1\r\n\r\n", 400, "bad_request_line"),
        (b"GET /a b HTTP/1.1\r\n\r\n", 400, "bad_request_line"),
        (b"G(T / HTTP/1.1\r\n\r\n", 400, "bad_request_line"),
        (b"GET / http/1.1\r\n\r\n", 400, "bad_request_line"),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 400, "bad_target"),
        (b"GET /\x00 HTTP/1.1\r\n\r\n", 400, "control_byte"),
        (b"GET /#a HTTP/1.1\r\nHost: a\r\n\r\n", 400, "bad_target"),
        (b"GET a HTTP/1.1\r\nHost: a\r\n\r\n", 400, "bad_target"),
        (b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400, "bad_target"),
        (b"GET /%0 HTTP/1.1\r\nHost: a\r\n\r\n", 400, "bad_target"),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 501, "connect_unsupported"),
        (b"PRI * HTTP/2.0\r\n\r\n", 505, "bad_version"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "missing_host"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400, "doubled_host"),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400, "bad_host"),
        (b"GET / HTTP/1.1\r\nHost: [1]\r\n\r\n", 400, "bad_host"),
        (b"GET http://a@b/ HTTP/1.1\r\nHost: a\r\n\r\n", 400, "bad_host"),
        (b"GET / HTTP/1.1\nHost: a\r\n\r\n", 400, "bare_lf"),
        (b"GET / HTTP/1.1\r\nHost: a\n\r\n\r\n", 400, "bare_lf"),
        (b"GET / HTTP/1.1\r\nHost: a\r\r\n\r\n", 400, "bare_cr"),
        (b"GET / HTTP/1.1\r\nHost: \x1b\r\n\r\n", 400, "control_byte"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n", 400, "obs_fold"),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400, "space_before_colon"),
        (b"GET / HTTP/1.1\r\nHost\r\n\r\n", 400, "bad_header"),
        (b"GET / HTTP/1.1\r\nH(st: a\r\n\r\n", 400, "bad_header"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 1\r\n\r\n", 400, "bad_content_length"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: x\r\n\r\n", 400, "length_and_encoding"),
        (b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "encoding_in_http10"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 400, "bad_transfer_encoding"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: x, chunked\r\n\r\n", 501, "bad_transfer_encoding"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, x\r\n\r\n", 400, "bad_transfer_encoding"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n", 400, "bad_transfer_encoding"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Host\r\n\r\n", 400, "bad_connection_option"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nExpect: cookies\r\n\r\n", 417, "bad_expectation"),
        (b"GET /" + b"a" * 20 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414, "target_too_long"),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 5 + b"\r\n", 431, "too_many_headers"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 200 + b"\r\n\r\n", 431, "head_too_large"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\nA: b\r\n\r\n", 400, "bad_header"),
    ],
)
def test_each_refusal_has_a_status_a_code_and_a_sentence(wire: bytes, status: int, code: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        parse_request(wire, HeadLimits(head_bytes_max=160, headers_max=4, target_bytes_max=20))
    assert (caught.value.status, caught.value.code) == (status, code)
    assert len(str(caught.value).split()) >= 3


# Responses


@pytest.mark.parametrize(
    ("method", "wire", "framing", "length", "keep_alive"),
    [
        ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", Framing.LENGTH, 5, True),
        ("GET", b"HTTP/1.1 200\r\nContent-Length: 5\r\ncontent-length: 5\r\n\r\n", Framing.LENGTH, 5, True),
        ("GET", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", Framing.CHUNKED, 0, True),
        ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\n", Framing.LENGTH, 5, False),
        ("GET", b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n", Framing.LENGTH, 5, False),
        ("GET", b"HTTP/1.1 200 OK\r\n\r\n", Framing.UNTIL_CLOSE, 0, False),
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", Framing.NONE, 0, True),
        ("HEAD", b"HTTP/1.1 200 OK\r\n\r\n", Framing.NONE, 0, True),
        ("GET", b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n", Framing.NONE, 0, True),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", Framing.NONE, 0, True),
        ("GET", b"HTTP/1.1 103 Early Hints\r\n\r\n", Framing.NONE, 0, True),
    ],
)
def test_the_framing_of_a_response_comes_from_method_status_and_fields(
    method: str, wire: bytes, framing: Framing, length: int, keep_alive: bool
) -> None:
    head = parse_response(wire, method)
    assert (head.framing, head.content_length, head.keep_alive) == (framing, length, keep_alive)


def test_a_response_is_parsed_into_its_parts() -> None:
    head = parse_response(b"HTTP/1.1 429 Slow down, \xe9\r\nRetry-After: 3\r\nx: a\r\nX: b\r\n\r\n", "GET")
    assert (head.status, head.reason) == (429, b"Slow down, \xe9")
    assert head.headers == ((b"retry-after", b"3"), (b"x", b"a"), (b"x", b"b"))
    assert (head.get(b"x"), head.get(b"y")) == (b"a, b", None)


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (b"HTTP/1.1 OK\r\n\r\n", "bad_status_line"),
        (b"HTTP/1.1 200 O\x00K\r\n\r\n", "control_byte"),
        (b"HTTP/2.0 200 OK\r\n\r\n", "bad_status_line"),
        (b"HTTP/1.1 600 OK\r\n\r\n", "bad_status_line"),
        (b"HTTP/1.1 101 Switching\r\n\r\n", "unasked_upgrade"),
        (b"HTTP/1.1 200 OK\r\nX : a\r\n\r\n", "space_before_colon"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", "bad_content_length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", "length_and_encoding"),
        (b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "encoding_in_http10"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", "bad_transfer_encoding"),
        (b"HTTP/1.1 200 OK\r\nConnection: content-length\r\n\r\n", "bad_connection_option"),
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 101 + b"\r\n", "too_many_headers"),
        (b"HTTP/1.1 200 OK\r\na: " + b"b" * 17000 + b"\r\n\r\n", "head_too_large"),
    ],
)
def test_each_fault_of_an_upstream_is_a_502(wire: bytes, code: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        parse_response(wire, "GET")
    assert (caught.value.status, caught.value.code) == (502, code)


# Written heads


def test_a_response_head_is_written() -> None:
    fields = [(b"Content-Type", b"text/event-stream"), (b"X-Empty", b"")]
    wire = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Empty: \r\n\r\n"
    assert encode_response_head(200, fields) == wire
    assert encode_response_head(299, []) == b"HTTP/1.1 299 \r\n\r\n"
    assert encode_response_head(503, [], reason=b"Not now") == b"HTTP/1.1 503 Not now\r\n\r\n"


def test_a_request_head_is_written() -> None:
    assert encode_request_head("POST", b"/v1?a", [(b"host", b"b")]) == b"POST /v1?a HTTP/1.1\r\nhost: b\r\n\r\n"


INJECTIONS = [b"a\r\nX: b", b"a\nb", b"a\rb", b"a\x00b", b"a\x1bb", b"a\x7fb"]


@pytest.mark.parametrize("raw", [*INJECTIONS, b"", b"a b", b"a:", b"\xe4"])
def test_a_field_name_cannot_inject_a_header(raw: bytes) -> None:
    with pytest.raises(LocalProtocolError):
        encode_response_head(200, [(raw, b"a")])
    with pytest.raises(LocalProtocolError):
        encode_request_head("GET", b"/", [(raw, b"a")])


@pytest.mark.parametrize("raw", INJECTIONS)
def test_a_value_a_reason_or_a_target_cannot_inject_a_header(raw: bytes) -> None:
    with pytest.raises(LocalProtocolError):
        encode_response_head(200, [(b"a", raw)])
    with pytest.raises(LocalProtocolError):
        encode_response_head(200, [], reason=raw)
    with pytest.raises(LocalProtocolError):
        encode_request_head("GET", b"/" + raw, [])


@pytest.mark.parametrize(("method", "raw"), [("", b"/"), ("G T", b"/"), ("GÉT", b"/"), ("GET", b""), ("GET", b"/ ")])
def test_no_bad_request_line_is_written(method: str, raw: bytes) -> None:
    with pytest.raises(LocalProtocolError):
        encode_request_head(method, raw, [])


@pytest.mark.parametrize("status", [0, 99, 600, -1])
def test_no_bad_status_is_written(status: int) -> None:
    with pytest.raises(LocalProtocolError):
        encode_response_head(status, [])


@given(st.lists(st.tuples(st.binary(max_size=8), st.binary(max_size=12)), max_size=4))
@settings(max_examples=300, deadline=None)
def test_a_head_that_would_not_read_back_is_not_written(fields: list[tuple[bytes, bytes]]) -> None:
    try:
        wire = encode_response_head(200, [(b"x-" + name, value) for name, value in fields])
    except LocalProtocolError:
        return
    expected = tuple((b"x-" + name.lower(), value.strip(b" \t")) for name, value in fields)
    assert HeadReader(opening=RESPONSE_OPENING).feed(wire) == (wire, b"")
    assert parse_response(wire, "GET").headers == expected


def test_hop_by_hop_headers_are_not_passed_on() -> None:
    kept = [(b"host", b"a"), (b"x-b", b"c"), (b"x-b", b"d")]
    dropped = [(name, b"x") for name in sorted(HOP_BY_HOP - {b"connection"})]
    assert end_to_end([*kept, *dropped]) == kept
    named = [(b"connection", b"close, X-Trace"), (b"x-trace", b"1"), (b"connection", b"X-B")]
    assert end_to_end(iter([*kept, *named])) == [(b"host", b"a")]


# streamd refuses each head that h11 refuses, except these.
DIFFERENCES = {
    "up to two CRLF in front of a request (RFC 9112 2.2)": lambda wire: wire.startswith(b"\r\n"),
}


def through_h11(wire: bytes) -> h11.Request | None:
    """The head as h11 alone reads it; None if h11 refuses it or finds no end."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(wire)
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError:
        return None
    return event if isinstance(event, h11.Request) else None


def through_ours(wire: bytes) -> RequestHead | None:
    found = HeadReader().feed(wire)
    return None if found is None else parse_request(found[0])


SEEDS = [row[1] for row in runpy.run_path(str(CORPUS / "http_requests.py"))["ROWS"] if 0 < len(row[1]) < 500]
INSERTS = [
    b"\r\n",
    b"\r",
    b"\n",
    b" ",
    b"\t",
    b":",
    b"\x00",
    b"\x0b",
    b"\xff",
    b",",
    b"/",
    b"#",
    b"0",
    b"chunked",
    b"HTTP/1.1",
]
EDITS = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 3), st.sampled_from([b"", *INSERTS])), max_size=3)


def edited(wire: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """The wire bytes after those edits: each replaces some bytes at an offset by others."""
    for at, removed, inserted in edits:
        wire = wire[:at] + inserted + wire[at + removed :]
    return wire or b"\r"


@given(st.builds(edited, st.sampled_from(SEEDS), EDITS))
@example(b"\r\n" + HEAD)
@settings(max_examples=1500, deadline=None)
def test_a_head_that_h11_refuses_is_refused(wire: bytes) -> None:
    try:
        ours = through_ours(wire)
    except RemoteProtocolError:
        return  # stricter than h11, by the rules tested above
    if ours is None:
        return
    theirs = through_h11(wire)
    if theirs is None:
        assert any(differs(wire) for differs in DIFFERENCES.values())
        return
    assert ours.method.encode() == theirs.method
    assert ours.headers == tuple(theirs.headers)
    assert theirs.target in (ours.target, theirs.target[: -len(ours.target)] + ours.target) or b"://" in theirs.target


def test_a_head_that_only_h11_refuses_is_refused_with_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """No head is known that passes our check and not that of h11; if it occurs, it is a 400 or 501, or a 502."""

    def refuse(self: h11.Connection) -> None:
        raise h11.RemoteProtocolError("no", error_status_hint=501)

    monkeypatch.setattr(h11.Connection, "next_event", refuse)
    with pytest.raises(RemoteProtocolError, match="no") as caught:
        judged_request(HEAD)
    assert caught.value.status == 501
    with pytest.raises(RemoteProtocolError, match="no") as caught:
        judged_response(b"HTTP/1.1 200 OK\r\n\r\n", "GET")
    assert caught.value.status == 502
