"""Events of several upstreams in the same turn: all are taken, then all are written, then other bytes are handled."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import CHAT, SSE_HEAD, Client, FakeTransport, Rig, chunk, event, post, rig


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


@pytest.mark.parametrize("failures", [1, 2])
def test_a_bug_in_one_stream_does_not_harm_another(failures: int) -> None:
    with rig() as r:
        (broken, link), (client, other) = relays(r, 2)
        reader = broken.connection.reader
        assert reader is not None
        write, raised = reader.write, []

        def failing(frame: bytes) -> None:
            if len(raised) < failures:
                raised.append(ZeroDivisionError())
                raise raised[-1]
            write(frame)

        reader.push = failing
        reader.stream.update_push()
        link.feed(chunk(event("three ")))
        other.feed(chunk(event("three ")))
        r.turn()
        assert (b"internal" in broken.raw) == (failures == 1)  # else sending the error failed too
        assert b"three " in client.raw
        assert r.bugs == raised
        r.bugs.clear()
        r.runtime.counters.bugs = 0
