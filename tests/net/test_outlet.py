"""Packets: the writes of an answer in a turn of the loop share them."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, FakeTransport, chunk, event, post, rig

from streamd.net.outlet import cork, uncork


class Plain:
    """A transport of this socket, as far as cork() looks at it."""

    def __init__(self, sock: socket.socket | None) -> None:
        self.sock = sock

    def get_extra_info(self, name: str) -> socket.socket | None:
        assert name == "socket"
        return self.sock


def corked(transport: Any) -> int | None:
    return cork(transport)


def test_tcp_is_corked_and_uncorked() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        fd = corked(Plain(sock))
        assert fd == sock.fileno()
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK) == 1
        uncork(fd)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK) == 0


def test_no_cork_is_in_a_unix_socket_or_in_a_socket_that_was_closed() -> None:
    near, far = socket.socketpair()
    assert corked(Plain(near)) is None
    uncork(near.fileno())
    near.close()
    far.close()
    assert corked(Plain(near)) is None
    assert corked(Plain(None)) is None


class Watched:
    """Notes what happens to a transport's packets, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        write = FakeTransport.write

        def written(transport: FakeTransport, data: Any) -> None:
            write(transport, data)
            if transport.peer == ("192.0.2.1", 40000):
                self.seen.append("head" if data.startswith(b"HTTP/1.1 200") else "end" if data == LAST else "events")

        def held(transport: Any) -> Any:
            self.seen.append("cork")
            return transport

        monkeypatch.setattr(FakeTransport, "write", written)
        monkeypatch.setattr("streamd.net.answer.cork", held)
        monkeypatch.setattr("streamd.net.answer.uncork", lambda fd: self.seen.append("uncork"))


def test_head_events_and_end_of_a_turn_share_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    with rig() as r:
        client = r.client(post(CHAT))
        watched.seen.clear()
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        assert client.answer.whole
        assert watched.seen == ["cork", "head", "events", "end", "uncork"]


def test_a_head_without_events_and_each_event_leave_in_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    with rig() as r:
        client = r.client(post(CHAT))
        watched.seen.clear()
        r.reply(SSE_HEAD)
        assert watched.seen == ["cork", "head", "uncork"]
        watched.seen.clear()
        r.reply(chunk(event("a")))
        r.reply(chunk(event("b")))
        assert watched.seen == ["events", "events"]
        watched.seen.clear()
        r.reply(chunk(DONE) + LAST)
        assert client.answer.whole
        assert watched.seen == ["cork", "events", "end", "uncork"]


def test_what_a_readers_cork_raises_ends_that_reader_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig() as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a")))
        (stream,) = r.runtime.hub

        def fail(transport: Any) -> Any:
            raise MemoryError

        monkeypatch.setattr("streamd.net.answer.cork", fail)
        r.reply(chunk(DONE) + LAST)
        assert client.gone and stream.ended_clean
        r.bugs.clear()
        r.runtime.counters.no_memory = 0
