"""Events of several upstreams in the same turn: all are taken, then all are written, then other bytes are handled."""

from __future__ import annotations

import ssl
from typing import Any

import pytest
from fakes import CHAT, SSE_HEAD, Client, FakeTransport, Rig, chunk, event, events_in, get, post, rig, text_of


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
    transport: Any = client.connection.transport
    transport_write = transport.write

    def leaving(data: bytes) -> None:
        order.append(f"{name} leaves")
        transport_write(data)

    transport.write = leaving  # the writer of an answer's end, not of a token's frame
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
            "ending leaves",
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


def test_a_read_of_several_tokens_goes_out_in_a_single_write() -> None:
    with rig() as r:
        ((client, link),) = relays(r, 1)
        order: list[str] = []
        spied((client, link), "relay", order)
        link.feed(b"".join(chunk(event(text)) for text in ("three ", "four ", "five ")))
        r.turn()
        assert order == ["relay left", "relay written"]
        assert text_of(events_in(client.answer.body)) == "one two three four five "
        assert [each.seq for each in events_in(client.answer.body)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_tokens_in_front_of_an_unknown_event_are_taken_and_the_rest_follows(cut: int) -> None:
    """A read ends with events, comments or the end of the answer behind some tokens; perhaps within a chunk."""
    with rig() as r:
        ((client, link),) = relays(r, 1)
        finish = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
        rest = [chunk(finish), chunk(b": a comment of the server's\n\n"), chunk(event("four ")), b"0\r\n\r\n"]
        link.feed(chunk(event("three ")) * 2 + b"".join(rest[:cut]) + rest[cut][:7])
        r.turn()
        link.feed(rest[cut][7:] + b"".join(rest[cut + 1 :]))
        r.turn()
        assert text_of(events_in(client.answer.body)) == "one two three three four "
        assert client.answer.whole


def test_tokens_read_together_with_an_unknown_event_are_written_once() -> None:
    """The read ends with the unknown event, so all of it is whole chunks, and only the tokens are of a known shape."""
    with rig() as r:
        ((client, link),) = relays(r, 1)
        finish = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
        link.feed(chunk(event("three ")) + chunk(event("four ")) + chunk(finish))
        r.turn()
        read = events_in(client.answer.body)
        assert text_of(read) == "one two three four "
        assert [each.seq for each in read] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("policy", ["coalesce", "drop_oldest", "close"])
@pytest.mark.parametrize("others", [0, 2, 80])
def test_tokens_read_together_reach_readers_as_tokens_read_alone_do(policy: str, others: int) -> None:
    """The same events for readers that are on time, stalled or many, under each policy."""
    texts = [f"{k} " for k in range(60)]
    bodies = []
    for together in (1, 5):
        with rig(policy=policy, ring_slots=32) as r:
            ((client, link),) = relays(r, 1)
            address = f"/v1/streams/{client.answer.get('x-stream-id')}"
            joined = [r.client(get(address)) for _ in range(others)]
            stalled = r.client(get(address))
            r.turn()
            for k in range(0, len(texts), together):
                if k == 20:
                    stalled.transport.capacity = 300
                link.feed(b"".join(chunk(event(text)) for text in texts[k : k + together]))
                r.turn()
            stalled.take()
            link.feed(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            r.turn()
            on_time = [[(each.seq, each.data) for each in events_in(c.answer.body)] for c in (client, *joined)]
            assert all([seq for seq, _ in each][-1:] == [63] for each in on_time)
            late = text_of(events_in(stalled.answer.body))
            if policy == "coalesce":
                assert late == "one two " + "".join(texts)
            elif policy == "close":
                assert "".join(("one two ", *texts)).startswith(late)
            bodies.append(on_time[0])
    assert bodies[0] == bodies[1]
    assert len(bodies[0]) == 63


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
