"""UpstreamConnection: successive answers from a connection, and the report of each way to break off."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable
from typing import Any

import pytest
from fakes import (
    CHAT,
    DONE,
    LAST,
    SSE_HEAD,
    WHOLE,
    Client,
    FakeLoop,
    FakeTransport,
    Rig,
    chunk,
    event,
    events_in,
    post,
    rig,
    text_of,
    whole_answer,
)

from streamd import keepalive
from streamd.config import UpstreamSettings
from streamd.net.upstream import TRANSITIONS, Upstream, UpstreamConnection, UpstreamState
from streamd.reasons import CloseReason
from streamd.wire.http1 import ResponseHead


class Asker:
    """An asker that notes its calls and takes every body as bytes."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.body = b""
        self.closes_at_head = False

    def on_head(self, link: UpstreamConnection, head: ResponseHead) -> None:
        self.told.append(f"head {head.status}")
        if self.closes_at_head:
            link.close()
        else:
            link.take_body(head)

    def on_piece(self, piece: bytes) -> None:
        self.body += piece

    def on_end(self, link: UpstreamConnection) -> None:
        self.told.append("end")

    def on_broken(self, link: UpstreamConnection, reason: CloseReason, text: str) -> None:
        self.told.append(reason.word)

    def on_bug(self, where: str, error: Exception) -> None:
        self.told.append(type(error).__name__)


def asked(r: Rig, method: str = "GET") -> tuple[UpstreamConnection, FakeTransport, Asker]:
    """A connection on which a request was sent."""
    upstream = next(iter(r.worker.upstreams))
    link = UpstreamConnection(r.runtime, upstream)
    transport = FakeTransport(r.loop, link)
    link.connection_made(transport)
    asker = Asker()
    link.send(b"GET / HTTP/1.1\r\n\r\n", asker, method=method)
    return link, transport, asker


@pytest.mark.parametrize(
    ("infos", "closing", "told"),
    [({}, False, True), ({"ssl_object": object()}, False, False), ({}, True, False)],
)
def test_a_server_gets_a_fin_for_a_cancel_within_the_same_turn(
    infos: dict[str, object], closing: bool, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over TLS, or if the transport may have closed its descriptor, the later close has to suffice."""
    ours, theirs = socket.socketpair()
    with ours, theirs, rig() as r:
        theirs.setblocking(False)
        link, transport, _ = asked(r)
        infos = {"socket": ours, **infos}
        monkeypatch.setattr(transport, "get_extra_info", lambda name, default=None: infos.get(name, default))
        monkeypatch.setattr(transport, "is_closing", lambda: closing)
        link.close()
        if told:
            assert theirs.recv(1) == b""
        else:
            with pytest.raises(BlockingIOError):
                theirs.recv(1)
        assert ours.fileno() >= 0  # the transport closes it


def test_cancelling_with_a_closed_descriptor_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, rig() as r:
        link, transport, _ = asked(r)
        ours.shutdown(socket.SHUT_RDWR)
        monkeypatch.setattr(transport, "get_extra_info", {"socket": ours}.get)
        link.close()
        assert link.at is UpstreamState.CLOSED and transport.closed


def test_every_state_of_an_upstream_connection_leads_to_closed() -> None:
    assert set(TRANSITIONS) == set(UpstreamState) and not TRANSITIONS[UpstreamState.CLOSED]
    assert all(UpstreamState.CLOSED in steps for at, steps in TRANSITIONS.items() if at is not UpstreamState.CLOSED)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    "wire",
    [
        whole_answer(b"hello"),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"he", b"llo") + LAST,
        b"HTTP/1.1 100 Continue\r\n\r\n" + whole_answer(b"hello"),
    ],
)
def test_an_answer_is_read_in_any_cut_and_the_connection_is_pooled(wire: bytes, size: int) -> None:
    with rig() as r:
        link, transport, asker = asked(r)
        for start in range(0, len(wire), size):
            transport.feed(wire[start : start + size])
        assert asker.told == ["head 200", "end"] and asker.body == b"hello"
        assert link.at is UpstreamState.IDLE and link.answers == 1 and next(iter(r.worker.upstreams)).idle == 1


@pytest.mark.parametrize(
    ("wire", "told"),
    [
        (b"", ["upstream_reset"]),
        (b"HTTP/1.1 20", ["upstream_reset"]),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhell", ["head 200", "upstream_truncated"]),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhel", ["head 200", "upstream_truncated"]),
        (b"HTTP/1.1 200 OK\r\n\r\nhello", ["head 200", "end"]),
    ],
)
def test_a_fin_ends_only_bodies_without_another_framing(wire: bytes, told: list[str]) -> None:
    with rig() as r:
        link, transport, asker = asked(r)
        if wire:
            transport.feed(wire)
        transport.fin()
        r.turn()
        assert asker.told == told and link.at is UpstreamState.CLOSED and transport.closed


def test_a_reset_never_ends_a_body_properly() -> None:
    with rig() as r:
        _, transport, asker = asked(r)
        transport.feed(b"HTTP/1.1 200 OK\r\n\r\nhello")
        transport.reset()
        r.turn()
        assert asker.told == ["head 200", "upstream_truncated"]


@pytest.mark.parametrize(
    ("wire", "told"),
    [
        (b"HTTP/1.1 banana\r\n\r\n", ["upstream_protocol"]),
        (b"SSH-2.0-OpenSSH\r\n", ["upstream_protocol"]),
        (b"HTTP/1.1 101 Switching\r\nupgrade: x\r\n\r\n", ["upstream_protocol"]),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", ["head 200", "upstream_protocol"]),
    ],
)
def test_bytes_that_are_not_http_are_a_protocol_error(wire: bytes, told: list[str]) -> None:
    with rig() as r:
        link, transport, asker = asked(r)
        transport.feed(wire)
        assert asker.told == told and link.at is UpstreamState.CLOSED and transport.aborted


def test_bytes_before_a_protocol_error_are_passed_on() -> None:
    with rig() as r:
        _, transport, asker = asked(r)
        transport.feed(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"he", b"llo") + b"zz\r\n")
        assert asker.told == ["head 200", "upstream_protocol"] and asker.body == b"hello"
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD)
        r.reply(chunk(event("a") + event("b")) + b"zz\r\n")
        assert text_of(events_in(client.answer.body)[:-1]) == "ab"
        large = r.client(post(CHAT))
        r.runtime.settings = dataclasses.replace(r.runtime.settings, event_bytes_max=1000)
        r.reply(SSE_HEAD)
        r.reply(chunk(event("a") + b"data: " + b"b" * 1000) + b"zz\r\n")
        assert text_of(events_in(large.answer.body)[:-1]) == "a"


def test_an_asker_may_close_at_the_head() -> None:
    with rig() as r:
        link, transport, asker = asked(r)
        asker.closes_at_head = True
        transport.feed(whole_answer(b"hello"))
        assert asker.told == ["head 200"] and link.at is UpstreamState.CLOSED


def test_an_asker_that_closes_in_the_middle_of_a_read_gets_no_more() -> None:
    with rig() as r:
        link, transport, asker = asked(r)
        asker.on_piece = lambda piece: link.close()  # type: ignore[method-assign]
        transport.feed(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"a", b"b") + LAST)
        assert asker.told == ["head 200"] and link.at is UpstreamState.CLOSED


def test_a_bug_of_the_asker_closes_the_connection() -> None:
    with rig() as r:
        link, transport, asker = asked(r)

        def broken(piece: bytes) -> None:
            raise ZeroDivisionError

        asker.on_piece = broken  # type: ignore[method-assign]
        transport.feed(whole_answer(b"hello"))
        assert asker.told == ["head 200", "ZeroDivisionError"] and link.at is UpstreamState.CLOSED


def test_a_bug_of_the_asker_at_the_end_of_its_answer_goes_to_the_asker() -> None:
    with rig() as r:
        link, transport, asker = asked(r)

        def broken(link: UpstreamConnection) -> None:
            raise ZeroDivisionError

        asker.on_end = broken  # type: ignore[method-assign]
        transport.feed(whole_answer(b"hello"))
        assert asker.told == ["head 200", "ZeroDivisionError"]
        assert link.at is UpstreamState.IDLE and link.upstream.idle == 1  # its part was done


def test_an_answer_without_a_body_ends_with_its_head() -> None:
    with rig() as r:
        for method, wire in (
            ("HEAD", b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"),
            ("GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
            ("GET", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
        ):
            link, transport, asker = asked(r, method)
            transport.feed(wire)
            assert asker.told[-1] == "end" and link.at is UpstreamState.IDLE


def test_an_answer_that_comes_before_the_request_has_left_ends_its_connection() -> None:
    with rig() as r:
        link, transport, _ = asked(r)
        transport.held += b"the rest of a large request"
        transport.feed(whole_answer(b"no"))
        assert link.at is UpstreamState.CLOSED


def test_an_upstreams_connection_close_ends_the_connection() -> None:
    with rig() as r:
        link, transport, asker = asked(r)
        transport.feed(whole_answer(b"hello", "200 OK", "connection: close"))
        assert asker.told[-1] == "end" and link.at is UpstreamState.CLOSED


def test_only_bodies_can_be_paused_and_resumed() -> None:
    with rig() as r:
        link, transport, _ = asked(r)
        link.pause(0)
        assert transport.reading
        transport.feed(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n")
        link.pause(0)
        assert not transport.reading
        link.resume()
        assert transport.reading
        link.close()
        link.resume()
        link.close()


def test_a_stream_is_never_paused() -> None:
    with rig() as r:
        client = r.client(post(CHAT), capacity=0)
        r.reply(SSE_HEAD)
        for n in range(200):
            r.reply(chunk(event(str(n))))
        assert r.link.reading and client.connection.paused


def test_events_and_loose_lines_keep_their_order() -> None:
    with rig() as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD)
        r.reply(chunk(b": one\n\n" + event("a") + event("b") + b": two\n\n" + event("c") + DONE))
        r.reply(LAST)
        body = client.answer.body
        assert text_of(events_in(body)) == "abc"
        assert (
            body.index(b": one") < body.index(b'"a"') < body.index(b'"b"') < body.index(b": two") < body.index(b'"c"')
        )


AT_ONCE = {"retention_s": 1.0, "detach_grace_max_s": 1.0, "resume_grace_s": 1.0}  # a short end of the rig
CHUNKED = b"transfer-encoding: chunked\r\n"
SHORT, LONG = event("b"), event("b" * 300)  # as chunks: a size line of two digits and of three digits


def heard(*reads: bytes, fields: bytes = CHUNKED) -> bytes:
    """The body that a reader gets of an answer in these reads, each in a turn of its own."""
    with rig(**AT_ONCE) as r:
        client = r.client(post(CHAT))
        r.reply(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n" + fields + b"\r\n")
        for read in reads:
            r.reply(read)
        r.link.fin()
        r.turn()
        assert client.answer.whole
        stream_id = (client.answer.get("x-stream-id") or "").encode()
        retry, _, body = client.answer.body.partition(b"\n\n")
        assert retry.startswith(b"retry: ")  # differs from reader to reader
        return body.replace(stream_id, b"s")


@pytest.mark.parametrize("token", [SHORT, LONG])
@pytest.mark.parametrize(
    "held",
    [
        b"",
        b"data: x\n",
        b"data: x\r\n",
        b"data: x\r",
        b"data: x\n\r",
        b"data: ",
        b"event: named\n",
        b": a comment\n",
        b": half a comment",
        b"retry: 1\n",
        b"data",
        b"\n",
    ],
)
def test_a_token_behind_a_part_of_an_event_belongs_to_that_event(held: bytes, token: bytes) -> None:
    """The token looks like a complete event, but it is the rest of the event that has begun."""
    rest = [chunk(event("c")), chunk(b"\n\n", DONE) + LAST]
    apart = [chunk(event("a")), chunk(event("a")), *([chunk(held)] if held else []), chunk(token), *rest]
    together = [chunk(event("a")), chunk(event("a")), chunk(held + token), *rest]
    assert heard(*apart) == heard(*together) == heard(b"".join(apart))


@pytest.mark.parametrize("token", [SHORT, LONG])
@pytest.mark.parametrize("before", [b"data: x\n", event("a")])
def test_bytes_that_look_like_a_chunk_inside_a_chunk_are_payload(before: bytes, token: bytes) -> None:
    first, looks_like = chunk(event("a")), chunk(token)
    payload = before + looks_like + b"\n\n"
    whole = chunk(payload, DONE) + LAST
    at = whole.index(looks_like)
    assert heard(first, first, whole[:at], looks_like, whole[at + len(looks_like) :]) == heard(first, first, whole)


def test_bytes_that_look_like_a_chunk_behind_half_a_size_line_are_the_rest_of_that_line() -> None:
    first, looks_like = chunk(event("a")), chunk(SHORT)
    payload = (SHORT + b"\r\n").ljust(len(SHORT) + 256 - 2, b":") + b"\n\n"
    whole = chunk(payload, DONE) + LAST
    assert whole[1:].startswith(looks_like)
    end = 1 + len(looks_like)
    assert heard(first, first, whole[:1], looks_like, whole[end:]) == heard(first, first, whole)


@pytest.mark.parametrize("token", [SHORT, LONG])
@pytest.mark.parametrize("length", [False, True])
def test_bytes_that_look_like_a_chunk_are_payload_in_other_framings(length: bool, token: bytes) -> None:
    reads = [event("a"), event("a"), chunk(token), b"\n\n" + DONE]
    body = b"".join(reads)
    fields = b"content-length: %d\r\n" % len(body) if length else b""
    assert heard(*reads, fields=fields) == heard(body, fields=fields)


def test_the_tls_certificate_of_an_upstream_is_verified(tmp_path: object) -> None:
    """The TLS context of a connection checks certificates and host names."""
    import ssl

    with rig() as r:
        upstream = Upstream(r.runtime, UpstreamSettings(name="s", url="https://s.test/base"))
        assert upstream._tls is not None
        assert upstream._tls.verify_mode is ssl.CERT_REQUIRED and upstream._tls.check_hostname
        seen: dict[str, object] = {}

        class Loop(FakeLoop):
            async def create_connection(
                self, make: object, host: object = None, port: object = None, **options: object
            ) -> object:  # type: ignore[override]
                seen.update(options, host=host, port=port)
                return None

        r.runtime.loop, loop = Loop(), r.runtime.loop
        coroutine = upstream.connect()
        loop.run_until_complete(coroutine)  # type: ignore[arg-type]
        r.runtime.loop.close()
        r.runtime.loop = loop
        assert seen == {"ssl": upstream._tls, "server_hostname": "s.test", "host": "s.test", "port": 443}


def test_a_removed_upstream_pools_no_connection() -> None:
    with rig() as r:
        r.client(post(WHOLE))
        next(iter(r.worker.upstreams)).removed = True
        r.reply(whole_answer(b"ok"))
        assert r.link.closed


def test_events_in_the_same_turn_as_the_fin_reach_the_reader() -> None:
    with rig() as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD)
        r.link.feed(chunk(event("Hello")))
        r.link.fin()
        r.turn()
        read = events_in(client.answer.body)
        assert text_of(read[:1]) == "Hello" and read[1].json["error"]["code"] == "upstream_truncated"


def test_events_that_wait_for_a_turn_when_the_fin_comes_reach_the_reader() -> None:
    """A single read holds the work of several turns, and the FIN comes behind it in the same turn."""
    texts = [f"{k} " for k in range(500)]
    with rig() as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event(texts[0])))
        r.link.feed(chunk(*(event(text) for text in texts[1:]), DONE) + LAST)
        r.link.fin()
        assert r.link.unread == [] and r.link.protocol._read, "the FIN has come, and bytes wait"
        r.turn()
        assert client.answer.whole and text_of(events_in(client.answer.body)) == "".join(texts)


def test_a_connection_whose_last_reader_was_slow_reads_on_in_the_pool() -> None:
    with rig() as r:
        slow = r.client(post(WHOLE), capacity=10)
        r.reply(whole_answer(bytes(1000)))
        assert slow.connection.paused and r.link.reading
        other = r.client(post(WHOLE))
        r.reply(whole_answer(b"ok"))
        assert len(r.links) == 1 and other.answer.body == b"ok"


def test_a_silent_connection_to_an_upstream_is_probed_before_a_nat_forgets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as sock,
        rig() as r,
    ):
        monkeypatch.setattr(FakeTransport, "get_extra_info", lambda _, name: sock if name == "socket" else None)
        asked(r)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == keepalive.IDLE_S


# -- heads and events that have begun

BEGUN_HEAD = b"HTTP/1.1 200 OK\r\nx-filler: " + b"x" * 9_000
BEGUN_EVENT = b"data: " + b"x" * 50_000


def charged(r: Rig, client: Client) -> int:
    """Bytes charged beside the prices of the connections and streams that are there."""
    in_use: Any = r.runtime.admission.status()["in_use"]
    streams_bytes = in_use["streams"] * r.runtime.admission.prices.stream_bytes
    return int(in_use["memory"]) - streams_bytes - in_use["connections"] * client.connection.origin.entrance.price_bytes


ENDS: dict[str, Callable[[Rig, Client], None]] = {
    "a fin": lambda r, client: r.link.fin(),
    "a reset": lambda r, client: r.link.reset(ConnectionResetError()),
    "no http": lambda r, client: r.link.feed(b"\n\n\0\n"),
    "too much": lambda r, client: r.link.feed(b"x" * (2 << 20)),
    "the reader's departure": lambda r, client: client.fin(),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_head_that_has_begun_is_charged_until_it_ends(end: str) -> None:
    with rig() as r:
        client = r.client(post(WHOLE))
        before = charged(r, client)
        r.link.feed(BEGUN_HEAD[:30])
        r.link.feed(BEGUN_HEAD[30:])
        assert charged(r, client) == before + len(BEGUN_HEAD)
        ENDS[end](r, client)
        r.turn()
        assert charged(r, client) == before


def test_a_whole_head_is_charged_no_more() -> None:
    with rig() as r:
        client = r.client(post(WHOLE))
        r.link.feed(BEGUN_HEAD)
        r.link.feed(b"\r\ncontent-length: 2\r\n\r\no")
        assert charged(r, client) == 0
        r.reply(b"k")
        assert client.answer.body == b"ok"


@pytest.mark.parametrize("end", [*ENDS, "its end", "the body's end"])
def test_an_event_that_has_begun_is_charged_until_it_ends(end: str) -> None:
    with rig() as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a")))
        before = charged(r, client)
        r.link.feed(chunk(BEGUN_EVENT[:20_000]))
        r.turn()
        assert charged(r, client) == before + 20_000
        r.reply(chunk(BEGUN_EVENT[20_000:]))
        assert charged(r, client) == before + len(BEGUN_EVENT)
        if end == "its end":
            r.reply(chunk(b"\n\n"))
            assert charged(r, client) == before
            r.reply(chunk(DONE) + LAST)
        elif end == "the body's end":
            r.reply(LAST)
        else:
            ENDS[end](r, client)
            r.turn()
        assert charged(r, client) == before
