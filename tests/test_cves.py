"""Vulnerabilities of comparable servers, replayed against a live daemon: each class of CVE by its name.

All smuggling has the same shape: a parser takes bytes for a body, and the next parser takes them for a request. So
each case carries a second request inside or after the first, and afterwards three things hold: the first was answered
as this file says, the hidden request was neither answered here nor seen upstream, and the next client is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from fakes import answers_in, events_in, get, post
from loopback import Conn, Daemon, RawUpstream, raw_upstream, run, serving

from streamd.config import UpstreamSettings
from streamd.reasons import CloseReason
from streamd.wire.http1 import RemoteProtocolError

HIDDEN = b"GET /v1/hidden HTTP/1.1\r\nHost: streamd.localhost\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def chunked(body: bytes, *fields: bytes) -> bytes:
    """A POST to an upstream's route with that raw body."""
    head = (b"POST /v1/embeddings HTTP/1.1", b"Host: streamd.localhost", b"Transfer-Encoding: chunked", *fields)
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def with_fields(*lines: bytes) -> bytes:
    return b"\r\n".join((b"POST /v1/embeddings HTTP/1.1", b"Host: streamd.localhost", *lines)) + b"\r\n\r\n"


@contextlib.asynccontextmanager
async def behind(*pieces: bytes) -> AsyncIterator[tuple[Daemon, RawUpstream]]:
    """A daemon with an upstream that answers each request with these pieces and leaves the connection open."""

    async def script(upstream: RawUpstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"".join(pieces))
        await upstream.go.wait()

    async with (
        raw_upstream(script) as upstream,
        serving(upstreams=(UpstreamSettings(name="up", url=upstream.url),)) as daemon,
    ):
        yield daemon, upstream
        upstream.go.set()


async def settled(conn: Conn, count: int) -> list[int]:
    """The statuses of the first `count` answers, or of all answers before the end."""
    while True:
        try:
            statuses = [answer.status for answer in answers_in(conn.received, at_end=conn.closed) if answer.whole]
        except (AssertionError, RemoteProtocolError):
            statuses = []
        if len(statuses) >= count or not await conn.read():
            return statuses


Attack = Callable[[Daemon, RawUpstream], Awaitable[None]]


def against(attack: Attack) -> None:
    """Run an attack; check that no hidden request got through and that the next client is served."""

    async def main() -> None:
        async with behind(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}") as (daemon, upstream):
            await attack(daemon, upstream)
            assert not [path for path, _ in daemon.ended if "hidden" in path]
            assert not [request for request in upstream.requests if b"hidden" in request]
            assert (await daemon.ask(get("/v1/embeddings"))).status == 200
            assert daemon.bugs == []

    run(main)


def refused(wire: bytes, status: int) -> None:
    """The first request is refused and the connection ends: the start of a second request is unknown."""

    async def attack(daemon: Daemon, upstream: RawUpstream) -> None:
        for size in (len(wire), 1):
            conn = await daemon.connect()
            for start in range(0, len(wire), size):
                if conn.closed:
                    break
                await conn.send(wire[start : start + size])
            assert await settled(conn, 2) == [status]
            assert conn.closed
            conn.close()
        assert upstream.requests == []

    against(attack)


# h11 CVE-2025-43859 (and the same in a response): any two bytes were taken for the line end after a chunk's data, so
# the length of a body depended on the parser.
@pytest.mark.parametrize("behind", [b"XX", b"\n\r", b"\r\r", b"\n\n", b"0\r", b"  "])
def test_h11_cve_2025_43859_a_wrong_line_end_after_a_chunk_is_refused(behind: bytes) -> None:
    refused(chunked(b"2\r\n{}" + behind + b"0\r\n\r\n" + HIDDEN), 400)


def test_h11_cve_2025_43859_a_wrong_line_end_in_a_response_is_a_502() -> None:
    wire = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}XX0\r\n\r\n"

    async def main() -> None:
        async with behind(wire, OK) as (daemon, upstream):
            for _ in range(2):
                conn = await daemon.connect(get("/v1/embeddings"))
                await conn.to_the_end()
                (answer,) = answers_in(conn.received)
                assert answer.status == 502 or not answer.whole
            assert upstream.connections == 2, "never used again"

    run(main)


# Kestrel CVE-2025-55315: a bare CR or LF inside a chunk extension: some parsers skip it, and others take it for the
# end of the line.
@pytest.mark.parametrize("extension", [b";\n", b";a\nb", b";\r", b";a\rb", b';a="\n"', b';a="\r\n"', b"\n", b";\x00"])
def test_kestrel_cve_2025_55315_a_line_end_in_a_chunk_extension_is_refused(extension: bytes) -> None:
    refused(chunked(b"2" + extension + b"\r\n{}\r\n0\r\n\r\n" + HIDDEN), 400)


def test_kestrel_cve_2025_55315_chunk_extensions_are_bounded() -> None:
    refused(chunked(b"2;" + b"a" * 5000 + b"\r\n{}\r\n0\r\n\r\n" + HIDDEN), 400)


# Go CVE-2025-22871: a bare LF ended a chunk-size line.
@pytest.mark.parametrize(
    "body",
    [
        b"2\n{}\r\n0\r\n\r\n",
        b"2;a\n{}\r\n0\r\n\r\n",
        b"2\r\n{}\r\n0\n\r\n",
        b"2\r\n{}\r\n0\r\n\n",
        b"2\r\n{}\n0\r\n\r\n",
    ],
)
def test_go_cve_2025_22871_a_bare_lf_in_a_chunk_is_refused(body: bytes) -> None:
    refused(chunked(body + HIDDEN), 400)


# llhttp CVE-2024-27982: a space before Content-Length hid it from the first of two parsers.
@pytest.mark.parametrize("prefix", [b" ", b"\t", b"\x0b", b"\xa0", b"\x00"])
@pytest.mark.parametrize("first", [(), (b"A: b",)])
def test_llhttp_cve_2024_27982_a_space_before_content_length_is_refused(
    prefix: bytes, first: tuple[bytes, ...]
) -> None:
    refused(with_fields(*first, prefix + b"Content-Length: %d" % len(HIDDEN)) + HIDDEN, 400)


# llhttp CVE-2023-30589: a CR without LF ended a field.
@pytest.mark.parametrize(
    "lines",
    [b"A: b\rContent-Length: 48", b"\rContent-Length: 48", b"A: b\r\rContent-Length: 48", b"Content-Length\r: 48"],
)
def test_llhttp_cve_2023_30589_a_bare_cr_ends_no_field(lines: bytes) -> None:
    refused(with_fields(lines) + HIDDEN, 400)


# Content-Length and Transfer-Encoding together: all of the above are ways to hide this pair.
@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ((b"Content-Length: 48", b"Transfer-Encoding: chunked"), 400),
        ((b"Transfer-Encoding: chunked", b"Content-Length: 48"), 400),
        ((b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"), 400),
        ((b"Transfer-Encoding: xchunked",), 400),
        ((b"Transfer-Encoding:\x0bchunked",), 400),
        ((b"Content-Length: 0", b"Content-Length: 48"), 400),
        ((b"Content-Length: 48, 48",), 400),
        ((b"Content-Length: +48",), 400),
        ((b"Content-Length: 0x30",), 400),
        ((b"Content-Length : 48",), 400),
    ],
)
def test_content_length_with_transfer_encoding_is_refused(lines: tuple[bytes, ...], status: int) -> None:
    refused(with_fields(*lines) + b"0\r\n\r\n" + HIDDEN, status)


# aiohttp CVE-2025-53643: trailers were not parsed, so their bytes were taken for the next request.
@pytest.mark.parametrize(
    "trailers", [HIDDEN.partition(b"\r\n\r\n")[0] + b"\r\n", b"A: b\nGET /v1/hidden HTTP/1.1\r\n", b" folded\r\n"]
)
def test_aiohttp_cve_2025_53643_a_request_in_the_trailers_is_refused(trailers: bytes) -> None:
    refused(chunked(b"0\r\n" + trailers + b"\r\n"), 400)


def test_aiohttp_cve_2025_53643_trailers_never_become_fields() -> None:
    async def attack(daemon: Daemon, upstream: RawUpstream) -> None:
        trailers = b"Authorization: Bearer sk-x\r\nX-Secret: 1\r\nContent-Length: 48\r\nHost: evil\r\n"
        conn = await daemon.connect(chunked(b"2\r\n{}\r\n0\r\n" + trailers + b"\r\n") + get("/healthz"))
        assert await settled(conn, 2) == [200, 200]
        (request,) = upstream.requests
        assert b"x-secret" not in request.lower() and b"evil" not in request and b"sk-x" not in request
        conn.close()

    against(attack)


# aiohttp: Upgrade smuggling. A server that ignored the offer, behind a proxy that had believed it, read the following
# bytes as requests, which the proxy had not checked.
@pytest.mark.parametrize("protocol", [b"websocket", b"tls/1.0", b"h2", b"foo"])
def test_aiohttp_upgrade_smuggling_is_refused(protocol: bytes) -> None:
    offer = (b"Connection: Upgrade", b"Upgrade: " + protocol)
    refused(with_fields(*offer) + HIDDEN, 426)
    refused(with_fields(*offer, b"Content-Length: %d" % len(HIDDEN)) + HIDDEN, 426)


def test_aiohttp_upgrade_smuggling_a_101_of_an_upstream_is_a_502() -> None:
    async def main() -> None:
        switch = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"
        async with behind(switch, OK) as (daemon, _):
            assert (await daemon.ask(get("/v1/embeddings"))).status == 502

    run(main)


# Starlette CVE-2026-48710, LiteLLM CVE-2026-49468: a Host field with more than a host changed the path for which
# access was checked.
POISONED = [
    b"localhost/health?x=",
    b"localhost/health#",
    b"localhost?/health",
    b"localhost:4000/#@evil",
    b"localhost@evil:4000",
    b"localhost\\health",
    b"local host",
    b"localhost, evil",
    b"localhost:80:80",
    b"[::1]/health",
    b"%2fhealth",
]


@pytest.mark.parametrize("host", POISONED)
def test_starlette_cve_2026_48710_litellm_cve_2026_49468_a_poisoned_host_is_refused(host: bytes) -> None:
    refused(b"GET /v1/embeddings HTTP/1.1\r\nHost: " + host + b"\r\n\r\n" + HIDDEN, 400)


def test_the_host_decides_nothing_and_goes_nowhere() -> None:
    async def attack(daemon: Daemon, upstream: RawUpstream) -> None:
        absolute = (
            b"GET http://192.0.2.7/v1/embeddings HTTP/1.1\r\nHost: streamd.localhost\r\nX-Forwarded-Host: evil\r\n\r\n"
        )
        assert (await daemon.ask(absolute)).status == 200
        (request,) = upstream.requests
        assert b"evil" not in request and b"192.0.2.7" not in request
        assert f"host: {upstream.url.removeprefix('http://')}\r\n".encode() in request

    against(attack)


# A client's path must not leave its upstream's base (the class of nginx's alias traversal and its like).
@pytest.mark.parametrize(
    "path",
    [
        "/v1/../hidden",
        "/v1/x/../../hidden",
        "/v1//../hidden",
        "/v1/%2e%2e/hidden",
        "/v1/%2E./hidden",
        "/v1/..%2fhidden",
        "/v1/x%5c..%5chidden",
        "/v1/./hidden",
        "/v1/..",
        "/v1/%252e%252e/../hidden",
    ],
)
def test_a_path_stays_below_its_base(path: str) -> None:
    async def attack(daemon: Daemon, upstream: RawUpstream) -> None:
        assert (await daemon.ask(get(path))).status == 404
        assert upstream.requests == []
        daemon.ended.clear()

    against(attack)


# CR/LF injection through SSE fields and echoed ids (CWE-93): a client that chooses a part of an event writes no other.
@pytest.mark.parametrize(
    "field",
    [
        "Last-Event-ID: s_x:1%0d%0aevent: x",
        "Last-Event-ID: s_x:1\x01",
        "Last-Event-ID: s_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAA:1\tevent",
        "Last-Event-ID: \xff",
    ],
)
def test_no_sse_injection_through_last_event_id(field: str) -> None:
    async def main() -> None:
        async with serving() as daemon:
            wire = get("/v1/streams/room").replace(b"\r\n\r\n", b"\r\n" + field.encode("latin-1") + b"\r\n\r\n")
            answer = await daemon.ask(wire)
            assert answer.status == 400
            assert b"event:" not in answer.body
            answer = await daemon.ask(get("/v1/streams/room?last_event_id=s_x:1%0D%0Adata:%20x"))
            assert answer.status == 400 and b"\r" not in answer.body

    run(main)


def test_no_sse_injection_through_a_request_id() -> None:
    async def main() -> None:
        async with serving() as daemon:
            for given in ("a b", "a\tb", "é", "x" * 129, "<script>", 'a"b', "a\x80"):
                wire = get("/healthz").replace(b"\r\n\r\n", b"\r\nX-Request-Id: " + given.encode() + b"\r\n\r\n")
                answer = await daemon.ask(wire)
                assert (answer.get("x-request-id") or "").startswith("req_"), given
            for given in ("a\rb", "a\nb", "a\0b"):
                wire = get("/healthz").replace(b"\r\n\r\n", b"\r\nX-Request-Id: " + given.encode() + b"\r\n\r\n")
                assert (await daemon.ask(wire)).status == 400

    run(main)


INJECTIONS = [
    ("text/plain", b"x\n\ndata: evil\n\nid: 9\nevent: gap\n", 200),
    ("text/plain", b"x\r\rdata: evil\r\r", 200),
    ("application/x-ndjson", b'{"a":"\\n\\ndata: evil"}\n', 200),
    ("application/x-ndjson", b'{"a":1}\rdata: evil\n', 400),
    ("text/event-stream", b"id: s_evil:9\ndata: x\n\n", 200),
    ("text/event-stream", b"event: x\rid: 9\rdata: y\r\r", 200),
    ("text/event-stream", b"data: a\x00b\n\n", 400),
]


@pytest.mark.parametrize(("media_type", "body", "status"), INJECTIONS)
def test_no_sse_injection_through_published_bodies(media_type: str, body: bytes, status: int) -> None:
    """Only streamd writes ids, in the order of the events, whatever a publisher sends; a text is a single event."""

    async def main() -> None:
        async with serving() as daemon:
            assert (await daemon.ask(get("/v1/streams/room", method="PUT"))).status == 201
            path = "/v1/streams/room/events?seal=finished"
            answer = await daemon.ask(post(body, f"Content-Type: {media_type}", path=path))
            assert answer.status == status
            if status != 200:
                await daemon.ask(get("/v1/streams/room", method="DELETE"))
                return
            read = await daemon.ask(get("/v1/streams/room"))
            events = events_in(read.body)
            assert [each.seq for each in events] == list(range(1, len(events) + 1))
            assert b"id: s_evil" not in read.body and b"\r" not in read.body
            ids = [line for line in read.body.split(b"\n") if line.startswith(b"id:")]
            assert len(ids) == len(events) and all(line.startswith(b"id: room:") for line in ids)
            if media_type == "text/plain":
                assert [json.loads(each.data)["delta"] for each in events] == [body.decode()]

    run(main)


@pytest.mark.parametrize(
    "name", ["a%0d%0ab", "a%0ab", "a%00b", "a%20b", "a%3Ab", "s_x", "..", "%2e", "a%2fb", "é", "x" * 129]
)
def test_no_sse_injection_through_a_streams_name(name: str) -> None:
    async def main() -> None:
        async with serving() as daemon:
            answer = await daemon.ask(get("/v1/streams/" + name, method="PUT").decode().encode("latin-1"))
            assert answer.status in (400, 404)
            assert list(daemon.runtime.hub) == []

    run(main)


def test_no_header_injection_through_an_upstream() -> None:
    """A line end within a field of an upstream's head is a fault; the answer is a 502."""

    async def main() -> None:
        async with behind(b"HTTP/1.1 200 OK\r\nX: a\rSet-Cookie: evil=1\r\nContent-Length: 2\r\n\r\n{}") as (daemon, _):
            answer = await daemon.ask(get("/v1/embeddings"))
            assert answer.status == 502 and answer.get("set-cookie") is None

    run(main)


# Response queue poisoning: bytes after a response's end must not become the answer to another request.
def test_bytes_after_an_upstreams_answer_reach_no_client() -> None:
    async def main() -> None:
        async with behind(OK, b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged") as (daemon, upstream):
            for _ in range(3):
                answer = await daemon.ask(get("/v1/embeddings"))
                assert (answer.status, answer.body) == (200, b"{}")
            assert upstream.connections == 3

    run(main)


# Slowloris and its kin (CVE-2007-6750): an occasional byte doesn't extend the deadline.
def test_slowloris_cve_2007_6750_a_slow_head_has_an_absolute_deadline() -> None:
    async def main() -> None:
        async with serving(head_timeout_s=0.3) as daemon:
            conn = await daemon.connect()
            await daemon.until(lambda: daemon.runtime.clients)
            sent = 0
            while not daemon.runtime.counters.refused[CloseReason.HEAD_TIMEOUT] and sent < 1000:
                await conn.send(b"G" if not sent else b"ET / HTTP/1.1\r\nX: "[sent - 1 : sent] or b"x")
                sent += 1
                next_at = daemon.loop.time() + 0.02
                await daemon.until(lambda next_at=next_at: daemon.loop.time() > next_at)
            assert sent < 60
            assert await settled(conn, 1) == [408]

    run(main)
