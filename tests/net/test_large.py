"""Large events and answers leave in pieces: a client that takes nothing holds no copy of them."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, Client, Rig, chunk, event, events_in, get, post, rig, whole_answer
from hypothesis import given
from hypothesis import strategies as st

from streamd.config import UpstreamSettings
from streamd.core.admission import REFUSALS, Admission, Gate
from streamd.core.stream import DIRECT_READERS_MAX, LARGE_EVENT_BYTES_MIN
from streamd.net.answer import LARGE_ANSWER_BYTES_MIN
from streamd.net.application import Plan
from streamd.net.outlet import LARGE_PIECE_BYTES, LargeWrite
from streamd.reasons import CloseReason

LARGE = b"data: " + b"x" * 500_000 + b"\n\n"
ROOMY: dict[str, Any] = {
    "log_bytes_max": 4 * 1024 * 1024,
    "publisher_idle_timeout_s": 5.0,
    "upstreams": (UpstreamSettings(name="up", url="http://up.test:1"),),
}
HELD_MAX = LARGE_PIECE_BYTES + 1024  # of a connection: a piece, and a head


def room(r: Rig) -> None:
    assert r.client(get("/v1/streams/room", "Content-Length: 0", method="PUT")).answer.status == 201


def publish(r: Rig, *events: bytes) -> None:
    body = b"".join(events)
    fields = "Content-Type: text/event-stream", f"Content-Length: {len(body)}"
    assert r.client(get("/v1/streams/room/events", *fields, method="POST") + body).answer.status == 200


def reads(r: Rig, *fields: str, capacity: int = 1 << 60, version: str = "1.1") -> Client:
    return r.client(get("/v1/streams/room", *fields, version=version), capacity=capacity)


def seen(client: Client) -> list[bytes]:
    """The data of the events that came."""
    (answer,) = client.answers
    return [each.data for each in events_in(answer.body)]


@given(st.lists(st.binary(max_size=3 * LARGE_PIECE_BYTES), max_size=6))
def test_pieces_are_the_parts_end_to_end(parts: list[bytes]) -> None:
    large, found = LargeWrite([part for part in parts if part]), []
    while not large.is_over:
        found.append(large.next_piece())
    assert b"".join(found) == b"".join(parts)
    assert all(len(piece) == LARGE_PIECE_BYTES for piece in found[:-1])


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_late_reader_that_takes_nothing_holds_a_piece(version: str) -> None:
    with rig(**ROOMY) as r:
        room(r)
        publish(r, LARGE, event("behind"))
        readers = [reads(r, capacity=1000, version=version) for _ in range(5)]
        assert all(len(reader.transport.held) <= HELD_MAX for reader in readers)
        stream = r.runtime.hub.get("room")
        assert stream is not None
        views = [reader.connection.answer._large for reader in readers if reader.connection.answer]
        shared = {id(part.obj) for view in views if view for part in view._parts if len(part) > LARGE_PIECE_BYTES}
        assert len(shared) == 1, "each reader has a copy of its own"
        for reader in readers:
            reader.take(100_000)
            assert len(reader.transport.held) <= HELD_MAX
            reader.take()
            assert seen(reader)[0] == LARGE[6:-2] and len(seen(reader)) == 2


@pytest.mark.parametrize("readers_count", [1, 3, DIRECT_READERS_MAX + 2])
def test_a_live_reader_that_takes_nothing_holds_a_piece(readers_count: int) -> None:
    with rig(**ROOMY) as r:
        room(r)
        readers = [reads(r, capacity=2000) for _ in range(readers_count - 1)]
        quick = reads(r)
        publish(r, event("a"), LARGE, event("b"))
        assert all(len(reader.transport.held) <= HELD_MAX for reader in readers)
        assert len(seen(quick)) == 3 and seen(quick)[1] == LARGE[6:-2]
        publish(r, event("c"))
        for reader in (*readers, quick):
            reader.take()
            assert [each.seq for each in events_in(reader.answers[0].body)][-1] == 4
            assert LARGE[6:-2] in seen(reader)


def test_a_paused_reader_reads_a_large_event_from_the_log() -> None:
    with rig(**ROOMY) as r:
        room(r)
        reader = reads(r, "X-Stream-Policy: drop_oldest", capacity=300)
        publish(r, event("a" * 300))
        assert reader.connection.paused
        publish(r, LARGE)
        reader.take(400)
        assert len(reader.transport.held) <= HELD_MAX
        reader.take()
        assert seen(reader) == [event("a" * 300)[6:-2], LARGE[6:-2]]


def test_a_large_event_of_an_upstream_reaches_its_reader_whole() -> None:
    with rig(**ROOMY) as r:
        client = r.client(post(CHAT), capacity=1500)
        r.reply(SSE_HEAD + chunk(event("a"), LARGE, event("b"), DONE) + LAST)
        assert len(client.transport.held) <= HELD_MAX
        client.take()
        assert client.answer.whole and LARGE[6:-2] in seen(client) and seen(client)[-1] == b"[DONE]"


def test_bytes_are_counted_once() -> None:
    with rig(**ROOMY) as r:
        room(r)
        client = reads(r)
        publish(r, event("a"), LARGE, event("b"))
        reader = client.connection.reader
        assert reader is not None
        _, _, body = client.raw.partition(b"\r\n\r\n")
        retry = body.index(b"\r\n", body.index(b"retry:")) + 2
        assert reader.bytes_delivered == len(body) - retry and reader.events_delivered == 3


def test_a_reader_in_the_middle_of_a_large_event_is_sent_away_without_a_word() -> None:
    with rig(**ROOMY) as r:
        room(r)
        publish(r, LARGE)
        client = reads(r, capacity=1000)
        assert client.connection.send_away(CloseReason.DRAINING, "later")
        r.turn()
        assert client.gone and b"reconnect" not in client.raw and not client.answers[0].whole


def large_answer(r: Rig, size: int, capacity: int) -> Client:
    plan = r.worker.application.plan
    r.worker.application.plan = lambda answer: Plan(answer=lambda answer: answer.send(200, b"y" * size))
    client = r.client(get(), capacity=capacity)
    r.worker.application.plan = plan
    return client


def test_a_large_answer_leaves_in_pieces_and_is_priced_until_then() -> None:
    size = 10 * LARGE_ANSWER_BYTES_MIN
    with rig() as r:
        client = large_answer(r, size, 1000)
        assert len(client.transport.held) <= HELD_MAX and r.runtime.bodies_bytes == size
        client.send(get("/healthz"))
        client.take()
        assert [len(answer.body) for answer in client.answers] == [size, 15]
        assert r.runtime.bodies_bytes == 0
        assert r.ended[0][1] is CloseReason.COMPLETE


def test_a_large_answer_of_a_client_that_leaves_is_priced_no_more() -> None:
    with rig() as r:
        client = large_answer(r, 10 * LARGE_ANSWER_BYTES_MIN, 1000)
        client.reset()
        assert r.runtime.bodies_bytes == 0


def test_a_large_answer_without_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig() as r:
        monkeypatch.setattr(Admission, "admit_body", lambda admission, count, holders: REFUSALS[Gate.BODIES])
        client = large_answer(r, 10 * LARGE_ANSWER_BYTES_MIN, 1 << 60)
        assert client.answer.status == 503


def test_a_smaller_event_stays_in_its_frame() -> None:
    small = b"data: " + b"x" * (LARGE_EVENT_BYTES_MIN - 9) + b"\n\n"
    with rig(**ROOMY) as r:
        room(r)
        client = reads(r)
        before = client.transport.writes
        publish(r, small)
        assert client.transport.writes == before + 1


def memory(r: Rig) -> int:
    in_use = r.runtime.admission.status()["in_use"]
    assert isinstance(in_use, dict)
    return int(in_use["memory"])


# An answer that isn't a stream, in a single read of the upstream.
PROXIED = [
    whole_answer(b"y" * 200_000),
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"y" * 200_000) + LAST,
]


@pytest.mark.parametrize("end", ["taken", "reader gone", "upstream gone"])
@pytest.mark.parametrize("answer", PROXIED, ids=["length", "chunked"])
def test_a_proxied_answer_that_waits_for_its_reader_is_counted(answer: bytes, end: str) -> None:
    with rig() as r:
        client = r.client(get("/v1/files"), capacity=10_000)
        before = memory(r)
        r.reply(answer)
        waiting = len(client.transport.held) + len(r.link.protocol._read or b"")
        assert waiting > 150_000
        assert before + waiting <= memory(r) <= before + waiting + 1000
        if end == "taken":
            client.take()
            assert client.answer.body == b"y" * 200_000
            assert memory(r) <= before  # the request, and its place, are over
        elif end == "reader gone":
            client.reset()
            assert memory(r) < before
        else:
            r.link.reset()
            client.take()
            assert memory(r) <= before


# -- an event that is larger than the whole log


SMALL_LOG = {**ROOMY, "log_bytes_max": 64 * 1024, "event_bytes_max": 8 * 1024 * 1024}


def data_line(data: bytes) -> bytes:
    return b"data: %b\n\n" % data


def data_of(event: bytes) -> bytes:
    return event[6:-2]


@pytest.mark.parametrize("policy", ["coalesce", "drop_oldest", "close"])
@pytest.mark.parametrize("capacity", [0, 1000, 1 << 60])
def test_a_reader_gets_an_event_larger_than_the_log_live_and_after_a_pause(policy: str, capacity: int) -> None:
    with rig(policy=policy, **SMALL_LOG) as r:
        room(r)
        client = reads(r, capacity=capacity)
        for each in (event("a"), LARGE, data_line(b"b"), data_line(b"c")):
            publish(r, each)
        client.take()
        if policy == "drop_oldest" and not capacity:  # it was full before the first event: its ring dropped two
            assert b"event: gap" in client.raw and seen(client)[-2:] == [b"b", b"c"]
        elif policy != "close":
            assert seen(client)[1:] == [data_of(LARGE), b"b", b"c"]
            assert b"event: gap" not in client.raw


def test_a_reader_that_comes_after_an_event_larger_than_the_log_is_told_of_a_gap() -> None:
    with rig(**SMALL_LOG) as r:
        room(r)
        publish(r, event("a"), LARGE, event("b"))
        assert data_of(LARGE) in seen(reads(r))
        for _ in range(10):
            publish(r, b"data: " + b"y" * 10_000 + b"\n\n")
        late = reads(r)
        assert b"event: gap" in late.raw and data_of(LARGE) not in seen(late)


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_gemini_reader_holds_a_piece_of_an_image_and_not_all(version: str) -> None:
    """Its SDK takes data lines alone; images are the events of this API that are large."""
    ask = get("/v1beta/models/m:streamGenerateContent?alt=sse", "Content-Length: 2", method="POST", version=version)
    with rig(**SMALL_LOG) as r:
        client = r.client(ask + b"{}", capacity=1000)
        r.reply(SSE_HEAD)
        r.reply(chunk(LARGE))
        assert len(client.transport.held) <= HELD_MAX
        client.take()
        assert seen(client) == [data_of(LARGE)] and b"id:" not in client.raw.partition(b"\r\n\r\n")[2]
