"""Packets: the writes of an answer in a turn of the loop share them."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, FakeTransport, chunk, event, post, rig

from streamd.net.outlet import TOGETHER_BYTES_MAX


class Watched:
    """Notes the writes to a client's transport, in order, each by its parts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        write = FakeTransport.write

        def written(transport: FakeTransport, data: Any) -> None:
            write(transport, data)
            if transport.peer == ("192.0.2.1", 40000):
                parts = {
                    "head": data.startswith(b"HTTP/1.1 200"),
                    "events": b"data: " in data,
                    "end": data.endswith(b"\r\n" + LAST),
                }
                self.seen.append(" ".join(name for name, is_there in parts.items() if is_there))

        monkeypatch.setattr(FakeTransport, "write", written)


def test_head_events_and_end_of_a_turn_are_a_single_write(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    with rig() as r:
        client = r.client(post(CHAT))
        watched.seen.clear()
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        assert client.answer.whole
        assert watched.seen == ["head events end"]


def test_a_head_without_events_and_each_event_leave_in_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    with rig() as r:
        client = r.client(post(CHAT))
        watched.seen.clear()
        r.reply(SSE_HEAD)
        assert watched.seen == ["head"]
        watched.seen.clear()
        r.reply(chunk(event("a")))
        r.reply(chunk(event("b")))
        assert watched.seen == ["events", "events"]
        watched.seen.clear()
        r.reply(chunk(DONE) + LAST)
        assert client.answer.whole
        assert watched.seen == ["events end"]


def test_tokens_behind_the_last_write_that_was_held_are_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    with rig() as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a")))
        (stream,) = r.runtime.hub
        assert stream.push == client.transport.write
        watched.seen.clear()
        r.reply(chunk(event("b")))
        assert watched.seen == ["events"]


def test_no_more_than_a_few_packets_wait_for_the_turns_end(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    with rig() as r:
        client = r.client(post(CHAT))
        watched.seen.clear()
        text = "x" * TOGETHER_BYTES_MAX
        r.reply(SSE_HEAD + chunk(event(text), event("b"), DONE) + LAST)
        assert client.answer.whole and text.encode() in client.answer.body
        assert watched.seen[0] == "head events" and len(watched.seen) > 1


def test_a_reader_that_is_full_pauses_as_the_held_bytes_are_written() -> None:
    with rig() as r:
        client = r.client(post(CHAT), capacity=100)
        r.reply(SSE_HEAD + chunk(event("a"), event("b")))
        assert client.connection.paused
        r.reply(chunk(event("c"), DONE) + LAST)
        client.take()
        assert client.answer.whole and client.answer.body.count(b"data: ") == 4


def test_what_the_write_of_held_bytes_raises_ends_that_reader_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig() as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a")))
        (stream,) = r.runtime.hub
        write = FakeTransport.write

        def fail(transport: FakeTransport, data: Any) -> None:
            if transport is client.transport:
                raise MemoryError
            write(transport, data)

        monkeypatch.setattr(FakeTransport, "write", fail)
        r.reply(chunk(DONE) + LAST)
        assert client.gone and stream.ended_clean
        r.bugs.clear()
        r.runtime.counters.no_memory = 0
