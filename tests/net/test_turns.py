"""Turns of the loop: no connection, and not all of them together, do more than a bounded work in a turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fakes import (
    CHAT,
    LAST,
    SSE_HEAD,
    WHOLE,
    Client,
    FakeLoop,
    FakeTransport,
    Rig,
    chunk,
    events_in,
    get,
    post,
    rig,
    text_of,
)
from fakes import event as delta
from sinks import Loop, Reader, new_stream
from turnmeter import TurnMeter, waits

from streamd.net.client import ClientState
from streamd.net.reading import BACKPRESSURE, TURN, pause_reading, resume_reading
from streamd.net.turns import (
    BYTES_PER_PIECE,
    CONNECTION_PIECES_MAX,
    READERS_PER_PIECE,
    REQUEST_PIECES,
    STEP_LINES_MAX,
    STEP_SIZES_BYTES,
    TURN_PIECES_MAX,
    Rotation,
    Turns,
    event_pieces,
    pieces_of,
    step_bytes,
)
from streamd.net.upstream import INTERIM_ANSWERS_MAX
from streamd.reasons import CloseReason

READ_BYTES = 256_000  # of uvloop, at once
FLOOD_BYTES = 60_000

# A turn exceeds its bound by a step: 512 bytes hold 512 lines. And the meter counts an event twice, where it is cut
# and where it is appended.
CONNECTION_MAX = CONNECTION_PIECES_MAX + 4 * STEP_LINES_MAX
ALL_MAX = 2 * TURN_PIECES_MAX + CONNECTION_MAX


# -- the turns themselves


class Worker:
    """Work that takes several turns."""

    def __init__(self, turns: Turns, share: str, pieces: int, done: list[str]) -> None:
        self.turns, self.share, self.pieces, self.done = turns, share, pieces, done

    def crash(self, where: str, error: Exception) -> None:
        self.done.append(f"{self.share} has crashed")

    def work(self) -> bool:
        spent = min(self.pieces, CONNECTION_PIECES_MAX)
        self.pieces -= spent
        self.turns.spend(spent)
        self.done.append(self.share)
        return self.pieces > 0


@pytest.fixture
def loop() -> Iterator[FakeLoop]:
    made = FakeLoop()
    yield made
    made.close()


def one_turn(loop: FakeLoop) -> None:
    loop.call_soon(loop.stop)
    loop.run_forever()


def test_a_share_with_many_connections_gets_as_much_as_a_share_with_a_single_one(loop: FakeLoop) -> None:
    turns, done = Turns(loop, lambda where, error: None), []
    for _ in range(50):
        turns.wait(Worker(turns, "crowd", 10 * CONNECTION_PIECES_MAX, done))
    turns.wait(Worker(turns, "single", 10 * CONNECTION_PIECES_MAX, done))
    for _ in range(10):
        one_turn(loop)
    assert done.count("single") == 10  # in each turn
    assert len(done) == 10 * TURN_PIECES_MAX // CONNECTION_PIECES_MAX
    assert turns.waiting == 50


def test_nothing_is_served_twice_in_a_turn(loop: FakeLoop) -> None:
    turns, done = Turns(loop, lambda where, error: None), []
    turns.wait(Worker(turns, "a", 3, done))
    turns.wait(Worker(turns, "b", 2 * CONNECTION_PIECES_MAX, done))
    one_turn(loop)
    assert done == ["a", "b"] and turns.waiting == 1


def test_a_mistake_in_the_work_of_a_connection_stops_no_other(loop: FakeLoop) -> None:
    turns, done = Turns(loop, lambda where, error: None), []
    broken = Worker(turns, "broken", 1, done)
    broken.turns = None  # type: ignore[assignment]
    turns.wait(broken)
    turns.wait(Worker(turns, "whole", 1, done))
    one_turn(loop)
    assert done == ["broken has crashed", "whole"] and turns.waiting == 0


def test_a_turn_begins_with_all_its_pieces(loop: FakeLoop) -> None:
    turns = Turns(loop, lambda where, error: None)
    turns.spend(TURN_PIECES_MAX)
    assert turns.left == 0
    one_turn(loop)
    assert turns.left == TURN_PIECES_MAX


def test_of_a_crowd_the_newest_gives_way_and_the_order_of_the_others_stays() -> None:
    rotation: Rotation[str] = Rotation()
    for member in ("a1", "c1", "c2", "b1", "c3"):
        rotation.add(member[0], member)
    assert [rotation.pop_surplus() for _ in range(2)] == ["c3", "c2"]
    assert [rotation.pop() for _ in range(3)] == ["a1", "c1", "b1"] and rotation.count == 0


def test_a_share_that_had_no_members_left_is_served_again() -> None:
    rotation: Rotation[str] = Rotation()
    for take in (rotation.pop, rotation.pop_surplus, rotation.pop):
        rotation.add("a", "member")
        assert rotation.count == 1 and take() == "member"


class Nameless(Worker):
    """Its share can't be told any more once it has worked."""

    @property
    def share(self) -> str:  # type: ignore[override]
        if self.done:
            raise ValueError
        return "nameless"

    @share.setter
    def share(self, share: str) -> None:
        """The share is always the same."""

    def crash(self, where: str, error: Exception) -> None:
        self.done.append(where)

    def work(self) -> bool:
        self.done.append("worked")
        return True


def test_a_member_that_can_not_wait_again_ends_and_stops_no_other(loop: FakeLoop) -> None:
    turns, done, others = Turns(loop, lambda where, error: None), [], []
    turns.wait(Nameless(turns, "", 1, done))
    turns.wait(Worker(turns, "whole", 2 * CONNECTION_PIECES_MAX, others))
    for _ in range(2):
        one_turn(loop)
    assert done == ["worked", "turns.wait"] and others == ["whole", "whole"] and turns.waiting == 0


def test_a_mistake_in_the_order_itself_is_reported_and_the_next_turn_goes_on(
    loop: FakeLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    bugs: list[str] = []
    turns, done = Turns(loop, lambda where, error: bugs.append(where)), []
    pop, calls = Rotation.pop, iter((True, False))

    def mistaken(rotation: Rotation[Any]) -> Any:
        if next(calls):
            raise KeyError
        return pop(rotation)

    monkeypatch.setattr(Rotation, "pop", mistaken)
    turns.wait(Worker(turns, "whole", 1, done))
    one_turn(loop)
    assert bugs == ["turns.next"] and done == [] and turns.waiting == 1
    one_turn(loop)
    assert bugs == ["turns.next"] and done == ["whole"] and turns.waiting == 0


@pytest.mark.parametrize("line", [b"\n", b"1\n", b"data:\n\n", b"data:\r\r", b"1\r\nx\r\n", b"x" * 300 + b"\n", b"x"])
def test_a_step_holds_few_lines_and_as_many_bytes_as_it_may(line: bytes) -> None:
    data = line * (READ_BYTES // len(line))
    size = step_bytes(data)
    assert 0 < size <= STEP_SIZES_BYTES[0]
    lines = data.count(b"\n", 0, size) + data.count(b"\r", 0, size)
    assert lines <= STEP_LINES_MAX or size == STEP_SIZES_BYTES[-1]
    larger = [step for step in STEP_SIZES_BYTES if step > size]
    assert all(data.count(b"\n", 0, step) + data.count(b"\r", 0, step) > STEP_LINES_MAX for step in larger)


def test_a_small_read_is_a_single_step() -> None:
    assert step_bytes(b"\n" * 512) == 512 and step_bytes(b"") == 0


# -- the reasons of a pause


def test_reading_goes_on_when_the_last_reason_is_gone(loop: FakeLoop) -> None:
    class Connection:
        transport = FakeTransport(loop, None)
        pauses = 0

    connection = Connection()
    pause_reading(connection, TURN)
    pause_reading(connection, BACKPRESSURE)
    pause_reading(connection, TURN)
    assert not connection.transport.reading
    resume_reading(connection, TURN)
    assert not connection.transport.reading
    resume_reading(connection, TURN)
    assert not connection.transport.reading
    resume_reading(connection, BACKPRESSURE)
    assert connection.transport.reading and connection.pauses == 0


# -- every kind of input

Flood = Callable[[Rig], FakeTransport]  # gives the connection whose next bytes are the flood


def fresh(r: Rig) -> FakeTransport:
    return r.client().transport


def posts_whole(r: Rig) -> FakeTransport:
    return r.client(get("/v1/completions", "Content-Length: 20000000", method="POST")).transport


def posts_chunked(r: Rig) -> FakeTransport:
    return r.client(get("/v1/completions", "Transfer-Encoding: chunked", method="POST")).transport


def lingers(r: Rig) -> FakeTransport:
    client = r.client(get("/v1/completions", "Content-Length: 2000000000", method="POST"))
    assert client.connection.at is ClientState.LINGER
    return client.transport


def publishes(r: Rig, media_type: str, framing: str) -> FakeTransport:
    name = f"room-{len(tuple(r.runtime.hub))}"
    r.client(get(f"/v1/streams/{name}", "Content-Length: 0", method="PUT"))
    return r.client(get(f"/v1/streams/{name}/events", f"Content-Type: {media_type}", framing, method="POST")).transport


def publishes_events(r: Rig) -> FakeTransport:
    return publishes(r, "text/event-stream", "Content-Length: 20000000")


def publishes_lines(r: Rig) -> FakeTransport:
    return publishes(r, "application/x-ndjson", "Content-Length: 20000000")


def publishes_text(r: Rig) -> FakeTransport:
    return publishes(r, "text/plain", "Content-Length: 20000000")


def publishes_chunked_events(r: Rig) -> FakeTransport:
    return publishes(r, "text/event-stream", "Transfer-Encoding: chunked")


def publishes_chunked_lines(r: Rig) -> FakeTransport:
    return publishes(r, "application/x-ndjson", "Transfer-Encoding: chunked")


def asked(r: Rig) -> FakeTransport:
    """An upstream that hasn't answered yet."""
    r.client(post(WHOLE))
    return r.link


def streams(r: Rig) -> FakeTransport:
    r.client(post(CHAT))
    r.reply(SSE_HEAD)
    return r.link


def streams_bare(r: Rig) -> FakeTransport:
    r.client(post(CHAT))
    r.reply(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
    return r.link


def answers_chunked(r: Rig) -> FakeTransport:
    r.client(post(WHOLE))
    r.reply(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    return r.link


def answers_bare(r: Rig) -> FakeTransport:
    r.client(post(WHOLE))
    r.reply(b"HTTP/1.1 200 OK\r\n\r\n")
    return r.link


SHORTEST = b"GET / HTTP/1.1\r\nHost:a\r\n\r\n"
LARGE_CHUNK = b"4000\r\n" + b"data:\n\n" * 2340 + b":x\n\n\r\n"

FLOODS: dict[str, tuple[Flood, bytes]] = {
    "pipelined requests": (fresh, SHORTEST),
    "a head without an end": (fresh, b"a: b\r\n"),
    "a body with a length": (posts_whole, b"x" * 100),
    "a body of chunks of a byte": (posts_chunked, b"1\r\nx\r\n"),
    "a body of chunks": (posts_chunked, b"40\r\n" + b"x" * 64 + b"\r\n"),
    "bytes behind a refusal": (lingers, b"x" * 100),
    "published events": (publishes_events, b"data:\n\n"),
    "published events with CR": (publishes_events, b"data:\r\r"),
    "published comments": (publishes_events, b":\n\n"),
    "published lines": (publishes_lines, b"1\n"),
    "published empty lines": (publishes_lines, b"\n"),
    "published text": (publishes_text, b"word\n"),
    "published events in chunks of a byte": (
        publishes_chunked_events,
        b"".join(b"1\r\n%c\r\n" % byte for byte in b"data:\n\n"),
    ),
    "published events in large chunks": (publishes_chunked_events, LARGE_CHUNK),
    "published lines in chunks": (publishes_chunked_lines, b"2\r\n1\n\r\n"),
    "interim answers": (asked, b"HTTP/1.1 100 C\r\n\r\n"),
    "an upstream's head without an end": (asked, b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20),
    "events in a chunk each": (streams, b"7\r\ndata:\n\n\r\n"),
    "events in large chunks": (streams, LARGE_CHUNK),
    "comments": (streams_bare, b":\n\n"),
    "comments and events": (streams_bare, b":\n\ndata:\n\n"),
    "events": (streams_bare, b"data:\n\n"),
    "events with CR": (streams_bare, b"data:\r\r"),
    "chunks of a byte": (answers_chunked, b"1\r\nx\r\n"),
    "an answer until its close": (answers_bare, b"x" * 100),
}


@pytest.mark.parametrize("kind", FLOODS)
def test_the_work_of_a_connection_in_a_turn_is_bounded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, piece = FLOODS[kind]
    with rig(log_bytes_max=64 * 1024) as r:
        transport = begin(r)
        meter = TurnMeter(monkeypatch)
        transport.feed(piece * (FLOOD_BYTES // len(piece)))
        one_turn(r.loop)
        assert not (waits(transport.protocol) and transport.reading), "more is read while bytes wait"
        r.turn()
        meter.end_turn()
        assert meter.worst <= CONNECTION_MAX
        assert transport.closed or (transport.reading and not waits(transport.protocol)), "bytes are left for ever"
        transport.reset()
        r.turn()


@pytest.mark.parametrize("kind", FLOODS)
def test_the_work_of_all_connections_in_a_turn_is_bounded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, piece = FLOODS[kind]
    with rig(log_bytes_max=64 * 1024) as r:
        transports = [begin(r) for _ in range(12)]
        meter = TurnMeter(monkeypatch)
        for transport in transports:
            transport.feed(piece * (FLOOD_BYTES // 5 // len(piece)))
        r.turn()
        meter.end_turn()
        assert meter.worst <= ALL_MAX
        for transport in transports:
            assert transport.closed or (transport.reading and not waits(transport.protocol))
            transport.reset()
        r.turn()


@pytest.mark.parametrize("kind", FLOODS)
def test_an_honest_request_is_answered_in_the_next_turns_beside_a_flood(kind: str) -> None:
    begin, piece = FLOODS[kind]
    with rig(log_bytes_max=64 * 1024) as r:
        transport = begin(r)
        transport.feed(piece * (FLOOD_BYTES // len(piece)))
        honest = r.client()
        honest.transport.feed(get())
        for _ in range(4):
            one_turn(r.loop)
        assert honest.statuses == [200]
        r.turn()
        transport.reset()
        r.turn()


# -- the bytes that wait


def test_many_small_reads_of_a_turn_share_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig() as r:
        clients = [r.client() for _ in range(3 * TURN_PIECES_MAX // REQUEST_PIECES)]
        meter = TurnMeter(monkeypatch)
        for client in clients:
            client.transport.feed(get())
        r.turn()
        meter.end_turn()
        assert meter.worst <= TURN_PIECES_MAX + REQUEST_PIECES
        assert all(client.statuses == [200] for client in clients)


def test_a_fin_behind_bytes_that_wait_is_seen_when_they_are_processed() -> None:
    with rig() as r:
        client = r.client()
        client.transport.feed(SHORTEST * 500)
        client.transport.fin()
        r.turn()
        assert len(client.answers) == 500 and client.gone


def test_an_upstreams_end_waits_behind_its_events() -> None:
    events = [delta(str(k)) for k in range(2000)]
    with rig(log_bytes_max=1024 * 1024) as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD)
        r.link.feed(chunk(*events) + LAST)
        r.link.reset()
        r.turn()
        assert text_of(events_in(client.answer.body)) == "".join(map(str, range(2000)))


def test_bytes_for_a_client_that_takes_nothing_wait_at_the_upstream() -> None:
    with rig() as r:
        client = r.client(post(WHOLE), capacity=1000)
        r.reply(b"HTTP/1.1 200 OK\r\n\r\n")
        r.link.feed(b"x" * READ_BYTES)
        r.turn()
        assert client.connection.paused and not r.link.reading
        assert len(client.transport.held) < READ_BYTES / 2
        r.link.fin()
        client.take()
        assert client.answer.body == b"x" * READ_BYTES and client.answer.whole


def test_bytes_that_come_after_an_answer_are_never_the_next_answer() -> None:
    with rig() as r:
        first = r.client(post(WHOLE))
        r.runtime.turns.spend(TURN_PIECES_MAX)  # so that the answer waits for its turn
        r.link.feed(
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok" + b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nno"
        )
        r.turn()
        assert first.answer.body == b"ok" and r.link.closed


@pytest.mark.parametrize("count", [INTERIM_ANSWERS_MAX, INTERIM_ANSWERS_MAX + 1])
def test_interim_answers_are_bounded(count: int) -> None:
    with rig() as r:
        client = r.client(post(WHOLE))
        for _ in range(count):
            r.reply(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        if count > INTERIM_ANSWERS_MAX:
            assert client.answer.status == 502 and r.link.closed
            assert client.answer.error["code"] == "upstream_protocol"
        else:
            r.reply(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            assert client.answer.status == 200
            r.client(post(WHOLE))  # on the same connection, and counted anew
            r.reply(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            assert len(r.links) == 1 and not r.link.closed


def test_pipelined_bytes_are_bounded_between_two_answers() -> None:
    with rig() as r:
        client = r.client()
        client.transport.feed(SHORTEST * (READ_BYTES // len(SHORTEST)))
        for _ in range(20):
            client.transport.feed(SHORTEST * 1000)  # the kernel keeps these
            one_turn(r.loop)
            assert waits(client.connection) <= READ_BYTES
        client.reset()
        assert r.closed == {CloseReason.READER_GONE: 1}


# -- whole bodies that are appended over several turns

LINES = 3000
ROOMY: dict[str, Any] = {"log_bytes_max": 1024 * 1024, "publisher_idle_timeout_s": 5.0}


def sends(r: Rig, body: bytes) -> Client:
    """Publish a whole body of lines; no turn of the loop has passed yet."""
    client = r.client()
    fields = "Content-Type: application/x-ndjson", f"Content-Length: {len(body)}"
    client.transport.feed(get("/v1/streams/room/events", *fields, method="POST") + body)
    return client


def many_lines(r: Rig) -> Client:
    return sends(r, b"".join(b'{"n":%d}\n' % k for k in range(LINES)))


def room(r: Rig) -> None:
    assert r.client(get("/v1/streams/room", "Content-Length: 0", method="PUT")).answer.status == 201


def until_half_is_appended(r: Rig) -> int:
    stream = r.runtime.hub.get("room")
    assert stream is not None
    while stream.events < LINES / 2:
        one_turn(r.loop)
    assert stream.events < LINES, "all were appended in a single turn"
    return stream.events


def test_a_whole_body_is_appended_in_turns_and_answered_at_its_end() -> None:
    with rig(**ROOMY) as r:
        room(r)
        client = many_lines(r)
        until_half_is_appended(r)
        assert client.answers == []
        r.turn()
        assert client.answer.status == 200 and b'"last_seq":%d' % LINES in client.answer.body
        assert r.runtime.bodies_bytes == 0


def test_no_other_request_publishes_between_the_events_of_a_whole_body() -> None:
    with rig(**ROOMY) as r:
        room(r)
        first = many_lines(r)
        until_half_is_appended(r)
        second = sends(r, b'"second"\n')
        r.turn()
        assert first.answer.status == second.answer.status == 200
        stream = r.runtime.hub.get("room")
        assert stream is not None and stream.events == LINES + 1
        assert b"second" in (stream.log.last_event() or b"")


def test_a_whole_body_is_appended_although_its_publisher_leaves() -> None:
    with rig(**ROOMY) as r:
        room(r)
        client = many_lines(r)
        until_half_is_appended(r)
        client.reset()
        stream = r.runtime.hub.get("room")
        assert stream is not None and stream.events == LINES
        assert r.runtime.bodies_bytes == 0


def test_a_stream_that_ends_in_the_middle_of_a_whole_body_refuses_the_rest() -> None:
    with rig(**ROOMY) as r:
        room(r)
        client = many_lines(r)
        until_half_is_appended(r)
        assert r.client(get("/v1/streams/room", method="DELETE")).answer.status in (200, 204)
        r.turn()
        assert client.answer.status == 409 and client.answer.error["code"] == "stream_sealed"


def test_a_mistake_at_the_end_of_a_whole_body_publishes_nothing() -> None:
    with rig(**ROOMY) as r:
        room(r)
        client = sends(r, b"1\n" * 5000 + b"{\n")
        r.turn()
        stream = r.runtime.hub.get("room")
        assert client.answer.status == 400 and stream is not None and stream.events == 0


def test_a_whole_body_waits_as_its_bytes_and_not_as_its_events() -> None:
    with rig(**ROOMY) as r:
        room(r)
        body = b"1\n" * 20_000
        client = r.client(
            get("/v1/streams/room/events", "Content-Type: application/x-ndjson", "Content-Length: 40001", method="POST")
        )
        client.transport.feed(body)
        r.turn()
        assert r.runtime.bodies_bytes == len(body)
        intake = client.connection._intake
        assert intake is not None
        held = intake._sink._held  # type: ignore[union-attr]
        assert sum(map(len, held)) == len(body) and len(held) < len(body) / 100
        client.send(b"\n")
        assert client.answer.status == 200


def test_an_event_counts_by_the_readers_that_it_is_written_to_at_once() -> None:
    stream, loop = new_stream(), Loop()
    counted = [event_pieces(stream)]
    for _ in range(3 * READERS_PER_PIECE):
        Reader(stream, loop)
        counted.append(event_pieces(stream))
    assert counted == [1 + count // READERS_PER_PIECE for count in range(len(counted))]
    stream.direct = False  # its readers are served in passes, which are counted by themselves
    assert event_pieces(stream) == 1


def test_plain_bytes_count_by_their_number() -> None:
    assert pieces_of(0) == 1 and pieces_of(64 * 1024) == 64 * 1024 // BYTES_PER_PIECE + 1
