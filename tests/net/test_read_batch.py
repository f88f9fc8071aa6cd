"""Events of several upstreams in the same turn: all are taken, then all are written, then other bytes are handled."""

from __future__ import annotations

import ssl
from typing import Any

import pytest
from fakes import CHAT, SSE_HEAD, Client, FakeTransport, Rig, chunk, event, get, post, rig


def relays(r: Rig, count: int) -> list[tuple[Client, FakeTransport]]:
    """`count` streams with a learned template in their logs."""
    found = []
    for _ in range(count):
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("one ")))
        r.reply(chunk(event("two ")))
        found.append((client, r.link))
    return found


def spied(relay: tuple[Client, FakeTransport], name: str, order: list[str]) -> None:
    """Note in `order` when the relay's token is in the log, and when its reader gets it."""
    client, link = relay
    reader = client.connection.reader
    assert reader is not None
    write = reader.write

    def writing(frame: bytes) -> None:
        order.append(f"{name} written")
        write(frame)

    reader.write = reader.push = writing
    reader.stream.update_push()
    protocol: Any = link.protocol
    append_if_templated = protocol.append_if_templated

    class Spied(type(protocol)):  # type: ignore[misc]
        __slots__ = ()

        def append_if_templated(self, now: float) -> bytes:
            frame: bytes = append_if_templated(now)
            order.append(f"{name} {'taken' if frame else 'left'}")
            return frame

    protocol.__class__ = Spied


def test_all_events_are_taken_before_any_is_written_and_other_bytes_come_last() -> None:
    with rig() as r:
        order: list[str] = []
        first, ending, last = found = relays(r, 3)
        for relay, name in zip(found, ("first", "ending", "last"), strict=True):
            spied(relay, name, order)
        first[1].feed(chunk(event("three ")))
        ending[1].feed(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        last[1].feed(chunk(event("three ")))
        r.turn()
        assert order == [
            "first taken",
            "ending left",
            "last taken",
            "first written",
            "last written",
            "ending written",
        ]
        for client, _ in (first, last):
            assert client.answer.body.count(b"three ") == 1


def test_a_second_read_in_the_same_turn_keeps_its_place() -> None:
    with rig() as r:
        ((client, link),) = relays(r, 1)
        for text in ("three ", "four ", "five "):
            link.feed(chunk(event(text)))
        r.turn()
        body = client.answer.body
        places = [body.index(text) for text in (b"one ", b"two ", b"three ", b"four ", b"five ")]
        assert places == sorted(places)


def test_a_connection_closed_in_the_same_turn_is_skipped() -> None:
    with rig() as r:
        (gone, link), (client, other) = relays(r, 2)
        link.feed(chunk(event("three ")))
        other.feed(chunk(event("three ")))
        link.protocol.close()
        r.turn()
        assert b"three " not in gone.raw
        assert b"three " in client.raw


@pytest.mark.parametrize("readers", [1, 2])
def test_a_reader_whose_write_raises_ends_alone(readers: int) -> None:
    with rig() as r:
        (broken, link), (client, other) = relays(r, 2)
        joined = [r.client(get(f"/v1/streams/{broken.answer.get('x-stream-id')}")) for _ in range(readers - 1)]
        reader = broken.connection.reader
        assert reader is not None

        def failing(frame: bytes) -> None:
            raise ssl.SSLWantReadError

        reader.push = failing
        reader.stream.update_push()
        for text in ("three ", "four "):
            link.feed(chunk(event(text)))
            other.feed(chunk(event(text)))
            r.turn()
        assert broken.gone and b"three " not in broken.raw
        for each in (client, *joined):
            assert b"three " in each.raw and b"four " in each.raw
        assert link.closed == (not joined)  # without a reader the generation ends: this reader broke its own TLS
        assert r.runtime.counters.tls_refused == 1 and not r.bugs


def test_a_stream_whose_log_fails_ends_alone() -> None:
    with rig() as r:
        (broken, link), (client, other) = relays(r, 2)
        reader = broken.connection.reader
        assert reader is not None
        failures = iter([ZeroDivisionError()])

        class Failing(type(reader.stream)):  # type: ignore[misc]
            __slots__ = ()

            def append_if_templated(self, event: bytes, now: float) -> bytes:
                for failure in failures:
                    raise failure
                return b""

        reader.stream.__class__ = Failing
        link.feed(chunk(event("three ")))
        other.feed(chunk(event("three ")))
        r.turn()
        assert b"internal" in broken.raw and b"three " in client.raw
        assert len(r.bugs) == 1
        r.bugs.clear()
        r.runtime.counters.bugs = 0
