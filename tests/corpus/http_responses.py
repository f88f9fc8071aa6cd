"""Responses of upstreams, each with its required outcome; README.md beside this file explains a row."""

from __future__ import annotations

POLICY = "docs/PROTOCOL.md 7"  # stricter than the RFCs by choice


def ok(body: bytes, *fields: bytes) -> bytes:
    """A 200 with those fields, each given without its CRLF, and that raw body."""
    return b"\r\n".join((b"HTTP/1.1 200 OK", *fields)) + b"\r\n\r\n" + body


def status(line: bytes, *fields: bytes) -> bytes:
    """A response with that status line, and a length of 0."""
    return b"\r\n".join((line, *fields, b"Content-Length: 0")) + b"\r\n\r\n"


def chunked(body: bytes, *fields: bytes) -> bytes:
    """A 200 with a raw body in chunked coding."""
    return ok(body, b"Transfer-Encoding: chunked", *fields)


NEXT = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"

Row = tuple[str, str, bytes, str, "int | str"]


def answers(rows: list[tuple[str, bytes, str, int | str]]) -> list[Row]:
    """Rows for the answer to a GET, which most are."""
    return [(name, "GET", wire, source, expected) for name, wire, source, expected in rows]


STATUS_LINES: list[Row] = answers(
    [
        ("a plain answer", status(b"HTTP/1.1 200 OK"), "RFC 9112 4", "accept"),
        ("no reason", status(b"HTTP/1.1 200 "), "RFC 9112 4", "accept"),
        ("no reason and no space", status(b"HTTP/1.1 200"), "RFC 9112 4", "accept"),
        ("a reason of many words", status(b"HTTP/1.1 429 Too Many Requests"), "RFC 9112 4", "accept"),
        ("Latin-1 in the reason", status(b"HTTP/1.1 200 tr\xe8s bien"), "RFC 9112 4", "accept"),
        ("HTTP/1.0", status(b"HTTP/1.0 200 OK"), "RFC 9110 2.5", "accept"),
        ("a status nobody knows", status(b"HTTP/1.1 299 Odd"), "RFC 9110 15", "accept"),
        ("garbage", b"lorem ipsum dolor\r\n\r\n", "RFC 9112 4", 502),
        ("a body without a head (HTTP/0.9)", b"<html>hello</html>", "RFC 9112 4", 502),
        ("an SSH banner", b"SSH-2.0-OpenSSH_9.2\r\n", "RFC 9112 4", 502),
        ("a TLS alert", b"\x15\x03\x01\x00\x02\x02\x46", "RFC 9112 4", 502),
        ("HTTP/2 settings frame", b"\x00\x00\x12\x04\x00\x00\x00\x00\x00", "RFC 9113 3.4", 502),
        ("nothing", b"", "RFC 9112 8", 502),
        ("a CRLF in front", b"\r\n" + status(b"HTTP/1.1 200 OK"), "RFC 9112 4", 502),
        ("a space in front", b" " + status(b"HTTP/1.1 200 OK"), "RFC 9112 4", 502),
        ("lower-case http", status(b"http/1.1 200 OK"), "RFC 9112 2.3", 502),
        ("HTTP/2.0", status(b"HTTP/2.0 200 OK"), "RFC 9112 2.3", 502),
        ("HTTP/9.9", status(b"HTTP/9.9 200 OK"), "RFC 9112 2.3", 502),
        ("HTTP/1.10", status(b"HTTP/1.10 200 OK"), "RFC 9112 2.3", 502),
        ("ICY", status(b"ICY 200 OK"), "RFC 9112 4", 502),
        ("no status", status(b"HTTP/1.1 OK"), "RFC 9112 4", 502),
        ("two spaces before the status", status(b"HTTP/1.1  200 OK"), "RFC 9112 4", 502),
        ("TAB before the status", status(b"HTTP/1.1\t200 OK"), "RFC 9112 4", 502),
        ("status of two digits", status(b"HTTP/1.1 20 OK"), "RFC 9112 4", 502),
        ("status of four digits", status(b"HTTP/1.1 2000 OK"), "RFC 9112 4", 502),
        ("status 000", status(b"HTTP/1.1 000 OK"), "RFC 9110 15", 502),
        ("status 099", status(b"HTTP/1.1 099 OK"), "RFC 9110 15", 502),
        ("status 600", status(b"HTTP/1.1 600 OK"), "RFC 9110 15", 502),
        ("status 999", status(b"HTTP/1.1 999 OK"), "RFC 9110 15", 502),
        ("status -20", status(b"HTTP/1.1 -20 OK"), "RFC 9112 4", 502),
        ("status 2OO in letters", status(b"HTTP/1.1 2OO OK"), "RFC 9112 4", 502),
        ("NUL in the reason", status(b"HTTP/1.1 200 O\x00K"), "RFC 9112 4", 502),
        ("bare CR in the reason", status(b"HTTP/1.1 200 O\rK"), "RFC 9112 2.2", 502),
        ("bare LF behind the reason", b"HTTP/1.1 200 OK\nContent-Length: 0\r\n\r\n", POLICY, 502),
        (
            "101 that nobody asked for",
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
            "RFC 9110 15.2.2",
            502,
        ),
        (
            "100, then the answer",
            b"HTTP/1.1 100 Continue\r\n\r\n" + status(b"HTTP/1.1 200 OK"),
            "RFC 9110 15.2",
            "accept",
        ),
        (
            "103 with fields, then the answer",
            b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + status(b"HTTP/1.1 200 OK"),
            "RFC 9110 15.2",
            "accept",
        ),
        ("100 and nothing else", b"HTTP/1.1 100 Continue\r\n\r\n", "RFC 9110 15.2", 502),
    ]
)

FIELDS: list[Row] = answers(
    [
        ("space before the colon", ok(b"hi", b"Content-Length : 2"), "RFC 9112 5.1", 502),
        ("fold", ok(b"", b"Content-Length: 0", b"X: a", b" b"), POLICY, 502),
        ("fold in front", ok(b"", b" X: a", b"Content-Length: 0"), POLICY, 502),
        ("no colon", ok(b"", b"Content-Length: 0", b"X"), "RFC 9112 5", 502),
        ("empty name", ok(b"", b"Content-Length: 0", b": a"), "RFC 9110 5.1", 502),
        ("space in a name", ok(b"", b"Content-Length: 0", b"X A: a"), "RFC 9110 5.1", 502),
        ("Latin-1 in a name", ok(b"", b"Content-Length: 0", b"\xc4: a"), "RFC 9110 5.1", 502),
        ("NUL in a value", ok(b"", b"Content-Length: 0", b"X: \x00"), "RFC 9110 5.5", 502),
        ("ESC in a value", ok(b"", b"Content-Length: 0", b"X: \x1b"), "RFC 9110 5.5", 502),
        ("DEL in a value", ok(b"", b"Content-Length: 0", b"X: \x7f"), "RFC 9110 5.5", 502),
        ("bare CR in a value", ok(b"", b"Content-Length: 0", b"X: a\rSet-Cookie: b"), "RFC 9112 2.2", 502),
        ("bare LF in a value", ok(b"", b"Content-Length: 0", b"X: a\nSet-Cookie: b"), POLICY, 502),
        ("blank line is a bare LF", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\n", POLICY, 502),
        ("obs-text in a value", ok(b"", b"Content-Length: 0", b"X: caf\xe9"), "RFC 9110 5.5", "accept"),
        ("101 fields", ok(b"", *[b"X: a"] * 101), POLICY, 502),
        ("head of 100 KB", ok(b"", b"X: " + b"a" * 100_000), POLICY, 502),
        ("field that never ends", b"HTTP/1.1 200 OK\r\nX: " + b"a" * 17_000, POLICY, 502),
        ("head cut in the status line", b"HTTP/1.1 200", "RFC 9112 8", 502),
        ("head cut in a field", b"HTTP/1.1 200 OK\r\nContent-Le", "RFC 9112 8", 502),
        ("head cut before its blank line", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n", "RFC 9112 8", 502),
        (
            "Connection names Content-Length",
            ok(b"", b"Content-Length: 0", b"Connection: content-length"),
            "RFC 9110 7.6.1",
            502,
        ),
    ]
)

FRAMING: list[Row] = answers(
    [
        ("a length", ok(b"hello", b"Content-Length: 5"), "RFC 9112 6.2", "accept"),
        ("two equal lengths", ok(b"hello", b"Content-Length: 5", b"Content-Length: 5"), "RFC 9110 8.6", "accept"),
        ("until the close", ok(b"hello"), "RFC 9112 6.3", "accept"),
        ("until the close, no byte", ok(b""), "RFC 9112 6.3", "accept"),
        ("chunked", chunked(b"5\r\nhello\r\n0\r\n\r\n"), "RFC 9112 7.1", "accept"),
        ("length and chunked", chunked(b"0\r\n\r\n", b"Content-Length: 5"), "RFC 9112 6.1", 502),
        ("two lengths", ok(b"hello", b"Content-Length: 5", b"Content-Length: 6"), "RFC 9112 6.3", 502),
        ("list of different lengths", ok(b"hello", b"Content-Length: 5, 6"), "RFC 9112 6.3", 502),
        ("signed length", ok(b"hello", b"Content-Length: +5"), "RFC 9110 8.6", 502),
        ("negative length", ok(b"hello", b"Content-Length: -1"), "RFC 9110 8.6", 502),
        ("hexadecimal length", ok(b"hello", b"Content-Length: 0x5"), "RFC 9110 8.6", 502),
        ("length with an underscore", ok(b"hello", b"Content-Length: 1_0"), "RFC 9110 8.6", 502),
        ("empty length", ok(b"hello", b"Content-Length:"), "RFC 9110 8.6", 502),
        ("length over 64 bits", ok(b"hello", b"Content-Length: 18446744073709551621"), "RFC 9110 8.6", 502),
        ("coding gzip", ok(b"hello", b"Transfer-Encoding: gzip"), "RFC 9112 6.3", 502),
        ("coding gzip, chunked", ok(b"0\r\n\r\n", b"Transfer-Encoding: gzip, chunked"), "RFC 9112 7", 502),
        ("coding identity", ok(b"hello", b"Transfer-Encoding: identity"), "RFC 9112 7", 502),
        ("chunked twice", chunked(b"0\r\n\r\n", b"Transfer-Encoding: chunked"), "RFC 9112 6.1", 502),
        ("coding xchunked", ok(b"0\r\n\r\n", b"Transfer-Encoding: xchunked"), "RFC 9112 7", 502),
        ("coding and vertical TAB", ok(b"0\r\n\r\n", b"Transfer-Encoding: \x0bchunked"), "RFC 9110 5.5", 502),
        (
            "coding in HTTP/1.0",
            b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "RFC 9112 6.1",
            502,
        ),
        ("fewer bytes than the length", ok(b"hell", b"Content-Length: 5"), "RFC 9112 8", "close"),
        ("no byte of the length", ok(b"", b"Content-Length: 5"), "RFC 9112 8", "close"),
        ("more bytes than the length", ok(b"hello!", b"Content-Length: 5"), "RFC 9112 6.3", "surplus"),
        ("a second answer that nobody asked for", ok(b"hello", b"Content-Length: 5") + NEXT, "RFC 9112 6.3", "surplus"),
        ("a second answer behind the last chunk", chunked(b"0\r\n\r\n") + NEXT, "RFC 9112 6.3", "surplus"),
        ("a CRLF behind the last chunk", chunked(b"0\r\n\r\n\r\n"), "RFC 9112 6.3", "surplus"),
        (
            "204 with a length has no body",
            b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n",
            "RFC 9112 6.3",
            "accept",
        ),
        ("204 with a body", b"HTTP/1.1 204 No Content\r\n\r\nhello", "RFC 9112 6.3", "surplus"),
        (
            "304 with a length has no body",
            b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
            "RFC 9112 6.3",
            "accept",
        ),
        ("304 with a body", b"HTTP/1.1 304 Not Modified\r\n\r\n" + NEXT, "RFC 9112 6.3", "surplus"),
    ]
)

HEAD_ANSWERS: list[Row] = [
    ("HEAD: length without a body", "HEAD", ok(b"", b"Content-Length: 5"), "RFC 9112 6.3", "accept"),
    ("HEAD: chunked without a body", "HEAD", chunked(b""), "RFC 9112 6.3", "accept"),
    ("HEAD: a body all the same", "HEAD", ok(b"hello", b"Content-Length: 5"), "RFC 9112 6.3", "surplus"),
    ("HEAD: length and chunked", "HEAD", chunked(b"", b"Content-Length: 5"), "RFC 9112 6.1", 502),
]

CHUNKS: list[Row] = answers(
    [
        ("chunk extension", chunked(b'5;a="b"\r\nhello\r\n0\r\n\r\n'), "RFC 9112 7.1.1", "accept"),
        ("trailers", chunked(b"5\r\nhello\r\n0\r\nX: y\r\n\r\n"), "RFC 9112 7.1.2", "accept"),
        ("cut in the data", chunked(b"5\r\nhel"), "RFC 9112 8", "close"),
        ("cut between chunks", chunked(b"5\r\nhello\r\n"), "RFC 9112 8", "close"),
        ("cut before the blank line at the end", chunked(b"5\r\nhello\r\n0\r\n"), "RFC 9112 8", "close"),
        ("no chunk at all", chunked(b""), "RFC 9112 8", "close"),
        ("not chunked at all", chunked(b"data: hello\n\n"), "RFC 9112 7.1", "close"),
        ("size 0x5", chunked(b"0x5\r\nhello\r\n0\r\n\r\n"), "RFC 9112 7.1", "close"),
        ("size +5", chunked(b"+5\r\nhello\r\n0\r\n\r\n"), "RFC 9112 7.1", "close"),
        ("size with a space behind", chunked(b"5 \r\nhello\r\n0\r\n\r\n"), POLICY, "accept"),
        ("size over 64 bits", chunked(b"10000000000000005\r\nhello\r\n0\r\n\r\n"), "RFC 9112 7.1", "close"),
        ("bare LF behind the size", chunked(b"5\nhello\r\n0\r\n\r\n"), "RFC 9112 7.1", "close"),
        (
            "h11 CVE-2025-43859: any two bytes behind the data",
            chunked(b"5\r\nhelloXX0\r\n\r\n"),
            "RFC 9112 7.1",
            "close",
        ),
        (
            "Kestrel CVE-2025-55315: bare LF in an extension",
            chunked(b"5;\nx\r\nhello\r\n0\r\n\r\n"),
            "RFC 9112 7.1.1",
            "close",
        ),
        ("bad trailer", chunked(b"0\r\nX y\r\n\r\n"), "RFC 9112 7.1.2", "close"),
        ("trailers without end", chunked(b"0\r\n" + b"X: y\r\n" * 2000), POLICY, "close"),
        ("an answer in the trailers", chunked(b"0\r\n" + NEXT), "RFC 9112 7.1.2", "close"),
    ]
)

ROWS: list[Row] = [*STATUS_LINES, *FIELDS, *FRAMING, *HEAD_ANSWERS, *CHUNKS]
