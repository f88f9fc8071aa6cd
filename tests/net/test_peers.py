"""Peers: requests at the wrong worker in every form; spreading connections; malformed messages."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop
from fakes import CHAT, events_in, get, post, text_of
from loopback import Conn, Daemon, run
from pair import Pair, pair

from streamd.core.hub import ID_LEN, SLOT_CHARS
from streamd.counters import Counters
from streamd.mockllm import MockOptions
from streamd.net import peers as peers_module
from streamd.net.peers import (
    DATAGRAM_BYTES_MAX,
    MEMORY_BYTES_MAX,
    OUTBOX_MAX,
    SPREAD_SLACK,
    Malformed,
    Note,
    Passed,
    Peers,
)
from streamd.net.totals import BEAT_AT
from streamd.reasons import CloseReason

SLOW = MockOptions(interval_s=0.005, ttft_s=0, tokens=40)
JSON = "Accept: application/json"


async def opened(p: Pair, daemon: Daemon, name: str, *, seal: bool = True) -> None:
    """Publish a stream of that name in the worker that owns it."""
    answer = await daemon.ask(get(f"/v1/streams/{name}", "Content-Length: 0", method="PUT"), method="PUT")
    assert answer.status == 201, answer.body
    said = get(f"/v1/streams/{name}/events" + ("?seal=finished" if seal else ""), "Content-Length: 5", method="PUT")
    assert (await daemon.ask(said + b"hello", method="PUT")).status == 200
    assert p.handed_over == 0


# -- the owners of streams and names


class Crowd:
    """A board that the test fills."""

    def __init__(self, *counts: int) -> None:
        self.counts = list(counts)
        self.stuck: set[int] = set()

    def connections(self, slot: int) -> int:
        return self.counts[slot]

    def alive(self, slot: int, now: float) -> bool:
        return slot not in self.stuck

    def sent(self, slot: int) -> None:
        self.counts[slot] += 1

    def taken(self, slot: int) -> None:
        raise NotImplementedError("the worker's")


class Ends:
    """The socket pairs of some workers, and Peers for the first worker."""

    def __init__(self, crowd: Crowd) -> None:
        self.pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in crowd.counts]
        for _, outlet in self.pairs:
            outlet.setblocking(False)
        self.loop = uvloop.new_event_loop()
        self.counters = Counters()
        self.passed: list[Passed] = []
        self.notes: list[Note] = []
        self.bugs: list[Exception] = []
        outlets = [outlet for _, outlet in self.pairs]
        self.take_passed = self.passed.append
        self.take_note: Callable[[Note], None] = self.notes.append
        inbox = self.pairs[0][0]
        self.peers = Peers(self.loop, 0, crowd, inbox, outlets, self.counters, receiver=self, on_bug=self.bug)
        self.peers.start()

    def bug(self, where: str, error: Exception) -> None:
        self.bugs.append(error)

    def turn(self) -> None:
        for _ in range(3):
            self.loop.run_until_complete(asyncio.sleep(0))

    def close(self) -> None:
        self.peers.stop()
        self.turn()
        self.loop.close()
        for end in (*(end for both in self.pairs for end in both), *(each.sock for each in self.passed)):
            end.close()


@pytest.fixture
def crowd() -> Crowd:
    return Crowd(0, 0, 0)


@pytest.fixture
def ends(crowd: Crowd) -> Iterator[Ends]:
    made = Ends(crowd)
    yield made
    made.close()


def test_every_id_and_name_has_one_owner(ends: Ends) -> None:
    peers = ends.peers
    for slot, char in enumerate(SLOT_CHARS):
        assert peers.owner_of_stream(f"s_{char}" + "x" * (ID_LEN - 3)) == slot % 3
    assert {peers.owner_of_stream(f"room-{k}") for k in range(50)} == {0, 1, 2}
    assert peers.owner_of_stream("room-1") == peers.owner_of_name("room-1")
    assert len({peers.owner_of_name(principal, f"key-{k}") for principal in "ab" for k in range(50)}) == 3
    assert peers.owner_of_name("\ud800") in (0, 1, 2)
    assert peers.owner_of_stream("s_short") == peers.owner_of_name("s_short")


def test_fresh_connections_go_to_the_worker_with_the_fewest(ends: Ends, crowd: Crowd) -> None:
    crowd.counts[:] = [SPREAD_SLACK, 0, 0]
    assert ends.peers.lighter(0.0) is None
    crowd.counts[:] = [500, 500, 500]
    assert ends.peers.lighter(0.0) is None
    crowd.counts[:] = [560, 500, 490]
    assert ends.peers.lighter(0.0) == 2
    crowd.stuck.add(2)
    assert ends.peers.lighter(0.0) == 1
    crowd.stuck.add(1)
    assert ends.peers.lighter(0.0) is None


# -- messages


def test_a_message_too_long_for_a_datagram_goes_in_shared_memory(ends: Ends) -> None:
    near, far = socket.socketpair()
    data = os.urandom(3 * DATAGRAM_BYTES_MAX)
    for size in (0, 100, DATAGRAM_BYTES_MAX, DATAGRAM_BYTES_MAX + 1, len(data)):
        passed = Passed(near, "public", 54_000, ("192.0.2.1", 99), data[:size], tunnelled=True)
        assert ends.peers.pass_on(0, passed)
        assert ends.peers.tell(0, "kind", data[:size])
        ends.turn()
        got, note = ends.passed[-1], ends.notes[-1]
        assert got[1:] == passed[1:]
        assert note == Note(0, "kind", data[:size])
        got.sock.send(b"x")
        assert far.recv(10) == b"x"
    assert not ends.peers.tell(0, "kind", bytes(MEMORY_BYTES_MAX + 1))
    assert ends.counters.handed_over == 5 and not ends.bugs
    near.close()
    far.close()


def test_a_received_descriptor_is_not_inherited_by_programs_that_this_process_starts(ends: Ends) -> None:
    near, far = socket.socketpair()
    ends.peers.pass_on(0, Passed(near, "public", 54_000, ("192.0.2.1", 99), b"GET"))
    ends.turn()
    assert not ends.passed[0].sock.get_inheritable()
    far.close()


def test_messages_wait_for_a_late_owner_up_to_a_bound(ends: Ends) -> None:
    before = len(os.listdir("/proc/self/fd"))
    near, far = socket.socketpair()
    passed = Passed(near, "public", 1, None, b"GET")
    sent = 0
    while ends.peers.pass_on(1, passed):
        sent += 1
    assert sent > OUTBOX_MAX and ends.counters.handed_over == sent
    assert not ends.peers.tell(1, "kind", b"") and not ends.peers.tell(1, "kind", bytes(100_000))
    assert ends.peers.tell(2, "kind", b"")  # a worker that isn't late gets everything
    for k in range(sent):
        message, fds, _, _ = socket.recv_fds(ends.pairs[1][0], 4096, 2)
        assert message.endswith(b"\nGET") and len(fds) == 1, k
        os.close(fds[0])
        ends.turn()
    assert ends.peers._waiting_count == 0
    near.close()
    far.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_connections_that_still_wait_at_the_end_are_closed(ends: Ends) -> None:
    before = len(os.listdir("/proc/self/fd"))
    near, far = socket.socketpair()
    while ends.peers.pass_on(1, Passed(near, "public", 1, None, bytes(DATAGRAM_BYTES_MAX + 1))):
        pass
    near.close()
    far.close()
    ends.peers.stop()
    held = len(os.listdir("/proc/self/fd")) - before
    assert held == 0  # descriptors in flight in the kernel are not ours
    ends.peers.start()


@pytest.mark.parametrize("size", [3, DATAGRAM_BYTES_MAX + 1, MEMORY_BYTES_MAX + 1])
@pytest.mark.parametrize("late", [False, True])
def test_a_message_that_the_kernel_refuses_leaves_no_descriptor_open(ends: Ends, late: bool, size: int) -> None:
    """The owner's end is closed here, so that send() fails; the connection still belongs to the sender."""
    before = len(os.listdir("/proc/self/fd"))
    near, far = socket.socketpair()
    passed = Passed(near, "public", 1, None, bytes(size))
    waiting = 0
    if late:
        while ends.peers.pass_on(1, passed._replace(data=bytes(DATAGRAM_BYTES_MAX + 1))):
            waiting += 1
        assert waiting > OUTBOX_MAX
    ends.pairs[1][0].close()
    if late:
        ends.turn()
        assert len(ends.bugs) == OUTBOX_MAX and all(isinstance(bug, OSError) for bug in ends.bugs)
    for _ in range(3):
        assert not ends.peers.pass_on(1, passed)
        assert not ends.peers.tell(1, "kind", bytes(size))
    assert ends.counters.handed_over == waiting
    near.send(b"x")
    assert far.recv(10) == b"x"
    near.close()
    far.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1  # the owner's end
    assert ends.peers.tell(2, "kind", bytes(DATAGRAM_BYTES_MAX + 1))


@pytest.mark.parametrize("refused", ["memfd_create", "fdopen", "dup"])
@pytest.mark.parametrize("size", [3, DATAGRAM_BYTES_MAX + 1])
def test_a_lack_of_descriptors_or_memory_leaves_no_descriptor_open(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, refused: str, size: int
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    near, far = socket.socketpair()
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, refused, refuse)
        sent = ends.peers.pass_on(1, Passed(near, "public", 1, None, bytes(size)))
    assert sent is (refused != "dup" and size <= DATAGRAM_BYTES_MAX)
    assert len(os.listdir("/proc/self/fd")) == before
    near.close()
    far.close()


@pytest.mark.parametrize("descriptors", [0, 1, 2])
@pytest.mark.parametrize(
    "message",
    [
        b"x",
        b"[]",
        b"{}\n",
        b'"n"',
        b'{"n": 1}\n',
        b'{"n": "kind", "o": "x"}\n',
        b'{"l": "public", "p": "x", "r": null, "f": false, "s": false, "o": 0}\n',
        b'{"l": "public", "p": 1, "r": ["h"], "f": false, "s": false, "o": 0}\n',
        b'{"l": "public", "p": 1, "r": 7, "f": false, "s": false, "o": 0}\n',
        b"\xff" * 1000,
        b"{" + b"x" * (2 * DATAGRAM_BYTES_MAX),
    ],
)
def test_a_malformed_message_is_only_counted_as_a_bug(ends: Ends, message: bytes, descriptors: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    near, far = socket.socketpair()
    if descriptors:
        socket.send_fds(ends.pairs[0][1], [message], [near.fileno()] * descriptors)
    else:
        ends.pairs[0][1].send(message)
    ends.turn()
    (bug,) = ends.bugs
    assert isinstance(bug, Malformed)
    near.close()
    far.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert ends.peers.tell(0, "kind", b"after")
    ends.turn()
    assert ends.notes == [Note(0, "kind", b"after")]


def test_a_bug_while_a_message_is_handled_ends_with_that_message(ends: Ends) -> None:
    def broken(note: Note) -> None:
        raise ZeroDivisionError

    ends.take_note = broken
    assert ends.peers.tell(0, "kind", b"")
    ends.turn()
    assert [type(bug) for bug in ends.bugs] == [ZeroDivisionError]


# -- requests at the wrong worker


@pytest.mark.parametrize("over", ["tcp", "unix"])
def test_reads_and_stops_reach_the_owner(tmp_path: Path, over: str) -> None:
    async def main() -> None:
        async with pair(unix=tmp_path if over == "unix" else None) as p:
            name = p.name_of(p.b)

            async def ask(data: bytes, method: str = "GET", *, at: str = "a") -> Conn:
                if over == "tcp":
                    return await getattr(p, at).connect(data, method=method)
                reader, writer = await asyncio.open_unix_connection(str(tmp_path / at))
                conn = Conn(reader, writer, method)
                p.a._conns.append(conn)
                await conn.send(data)
                return conn

            put = get(f"/v1/streams/{name}", "Content-Length: 0", method="PUT")
            assert (await (await ask(put, "PUT")).answer()).status == 201
            assert [stream.id for stream in p.b.streams] == [name] and not p.a.streams
            said = get(f"/v1/streams/{name}/events?seal=finished", "Content-Length: 5", method="PUT") + b"hello"
            assert (await (await ask(said, "PUT")).answer()).status == 200
            read = await (await ask(get(f"/v1/streams/{name}", "Connection: close"))).answer()
            assert b'"hello"' in read.body
            state = await (await ask(get(f"/v1/streams/{name}", JSON))).answer()
            assert state.status == 200 and b'"state":"sealed"' in state.body
            head = await ask(get(f"/v1/streams/{name}", JSON, method="HEAD"), "HEAD")
            assert (await head.answer()).status == 200
            assert (await (await ask(get(f"/v1/streams/{name}", method="DELETE"), "DELETE")).answer()).status == 204
            assert not p.b.streams
            assert (await (await ask(get(f"/v1/streams/{name}"))).answer()).status == 404
            assert p.a.runtime.counters.handed_over == 7 and p.b.runtime.counters.handed_over == 0
            assert p.a.runtime.counters.connections_closed[CloseReason.MOVED] == 7
            await p.a.until(lambda: not p.a.runtime.clients)
            assert p.a.runtime.counters.requests == 0 and p.b.runtime.counters.requests == 7

    run(main)


def test_a_generation_is_resumed_through_either_worker() -> None:
    async def main() -> None:
        async with pair(SLOW) as p:
            for first, other in (p.both, p.both[::-1]):
                asker = await first.connect(post(CHAT))
                begun = await asker.begun()
                stream_id = begun.get("x-stream-id") or ""
                readers = [
                    await other.connect(get(f"/v1/streams/{stream_id}", "Last-Event-ID: " + f"{stream_id}:1")),
                    await other.connect(post(CHAT, f"Last-Event-ID: {stream_id}:1")),
                ]
                whole = events_in((await asker.answer()).body)
                for reader in readers:
                    events = events_in((await reader.answer()).body)
                    assert events[0].seq >= 2 and text_of(events) == text_of(whole[1:])
            assert p.mock.stats.requests.total() == 2 and p.handed_over == 4

    run(main)


def test_a_reader_through_another_worker_is_logged_and_leaves_as_any_reader() -> None:
    async def main() -> None:
        async with pair(MockOptions(interval_s=0.01, ttft_s=0, tokens=100_000)) as p:
            asker = await p.a.connect(post(CHAT))
            stream_id = (await asker.begun()).get("x-stream-id") or ""
            addresses: list[str] = []
            p.b.worker.application.ended = lambda answer: addresses.append(answer.origin.peer(answer.request))
            await p.b.connect(get("/healthz"))
            reader = await p.b.connect(get(f"/v1/streams/{stream_id}"))
            await reader.begun()
            asker.close()
            await p.a.until(lambda: [len(stream.readers) for stream in p.a.streams] == [1])
            reader.fin()  # the last reader's own: the generation ends at once
            await p.a.until(lambda: [stream.reason for stream in p.a.streams] == [CloseReason.READER_GONE])
            assert all(each.startswith("127.0.0.1:") for each in addresses)

    run(main)


def test_a_kept_alive_connection_moves_between_owners() -> None:
    async def main() -> None:
        async with pair() as p:
            names = [p.name_of(each) for each in p.both]
            for each, name in zip(p.both, names, strict=True):
                await opened(p, each, name)
            conn = await p.a.connect()
            for k in range(6):
                await conn.send(get(f"/v1/streams/{names[k % 2]}", JSON))
                await conn.until(lambda conn, k=k: len(conn.answers) == k + 1 and conn.answers[k].whole)
            assert [answer.status for answer in conn.answers] == [200] * 6
            assert [names[k % 2].encode() in answer.body for k, answer in enumerate(conn.answers)] == [True] * 6
            assert p.handed_over == 5  # a, then b, a, b, a, b
            assert [len(each.runtime.clients) for each in p.both] == [0, 1]
            assert [p.boards[0].connections(slot) for slot in range(2)] == [0, 1]

    run(main)


def test_after_a_404_at_an_owner_the_connection_still_reaches_other_owners() -> None:
    async def main() -> None:
        async with pair() as p:
            mine, theirs = p.name_of(p.a), p.name_of(p.b)
            await opened(p, p.a, mine)
            conn = await p.a.connect(get(f"/v1/streams/{theirs}/nothing/here"))
            await conn.until(lambda conn: bool(conn.answers) and conn.answers[0].whole)
            await conn.send(get(f"/v1/streams/{mine}", JSON))
            await conn.until(lambda conn: len(conn.answers) == 2 and conn.answers[1].whole)
            assert [answer.status for answer in conn.answers] == [404, 200]

    run(main)


def test_pipelined_requests_for_several_owners_are_answered_in_order() -> None:
    async def main() -> None:
        async with pair() as p:
            names = [p.name_of(each) for each in p.both]
            for each, name in zip(p.both, names, strict=True):
                await opened(p, each, name)
            conn = await p.a.connect(b"".join(get(f"/v1/streams/{names[k]}", JSON) for k in (0, 1, 1, 0, 1)))
            await conn.until(lambda conn: len(conn.answers) == 5 and conn.answers[4].whole)
            assert [names[k].encode() in conn.answers[at].body for at, k in enumerate((0, 1, 1, 0, 1))] == [True] * 5

    run(main)


@pytest.mark.parametrize("piece", [1, 7])
def test_a_head_in_pieces_reaches_the_owner(piece: int) -> None:
    async def main() -> None:
        async with pair() as p:
            name = p.name_of(p.b)
            await opened(p, p.b, name)
            conn = await p.a.connect()
            request = get(f"/v1/streams/{name}", JSON)
            for at in range(0, len(request), piece):
                await conn.send(request[at : at + piece])
                await asyncio.sleep(0)
            assert (await conn.answer()).status == 200

    run(main)


def test_an_http_1_0_request_reaches_the_owner() -> None:
    async def main() -> None:
        async with pair() as p:
            name = p.name_of(p.b)
            await opened(p, p.b, name)
            conn = await p.a.connect(get(f"/v1/streams/{name}", version="1.0"))
            await conn.to_the_end()
            assert conn.answers[0].status == 200 and b'"hello"' in conn.answers[0].body

    run(main)


def test_a_body_that_is_expected_is_asked_for_once() -> None:
    async def main() -> None:
        async with pair() as p:
            name = p.name_of(p.b)
            await opened(p, p.b, name, seal=False)
            fields = ("Transfer-Encoding: chunked", "Expect: 100-continue")
            conn = await p.a.connect(
                get(f"/v1/streams/{name}/events?seal=finished", *fields, method="PUT"), method="PUT"
            )
            await conn.until(lambda conn: b"100 Continue\r\n\r\n" in conn.received)
            await conn.send(b"5\r\nworld\r\n0\r\n\r\n")
            assert (await conn.answer()).status == 200
            assert conn.received.count(b"100 Continue") == 1
            read = await p.b.ask(get(f"/v1/streams/{name}"))
            assert b'"helloworld"' in read.body

    run(main)


def test_a_large_body_reaches_the_owner_whole() -> None:
    async def main() -> None:
        async with pair(MockOptions(interval_s=0, ttft_s=0, tokens=3)) as p:
            name = p.name_of(p.b)
            await opened(p, p.b, name, seal=False)
            text = os.urandom(300_000).hex().encode()
            head = get(f"/v1/streams/{name}/events", f"Content-Length: {len(text)}", method="PUT")
            assert (await p.a.ask(head + text, method="PUT")).status == 200
            await p.a.ask(
                get(f"/v1/streams/{name}/events?seal=finished", "Content-Length: 0", method="PUT"), method="PUT"
            )
            read = await p.b.ask(get(f"/v1/streams/{name}"))
            said = b"".join(event.json["delta"].encode() for event in events_in(read.body))
            assert said == b"hello" + text

    run(main)


def test_an_owner_too_far_behind_is_a_503_and_the_connection_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "OUTBOX_MAX", 1)

    async def main() -> None:
        async with pair() as p:
            name = p.name_of(p.b)
            await opened(p, p.b, name)
            p.deaf(p.b)
            fill = 0
            with pytest.raises(BlockingIOError):
                while True:
                    p.peers[0]._outlets[1].send(b"x" * 1000)
                    fill += 1
            waits = await p.a.connect(get(f"/v1/streams/{name}", JSON))
            await p.a.until(lambda: p.peers[0]._waiting_count == 1)
            conn = await p.a.connect(get(f"/v1/streams/{name}", JSON))
            refused = await conn.answer()
            assert refused.status == 503 and refused.error["code"] == "worker_busy"
            assert int(refused.get("retry-after") or 0) >= 1 and refused.get("x-should-retry") == "true"
            source = await p.a.connect(get(f"/v1/streams/{name}", "Accept: text/event-stream"))
            assert (await source.to_the_end()).split(b"\r\n\r\n")[1].split(b"\r\n")[1].startswith(b"retry: ")
            put = get(f"/v1/streams/{name}/events", "Content-Length: 100000", method="PUT")
            publisher = await p.a.connect(put, method="PUT")
            assert (await publisher.answer()).status == 503
            for _ in range(fill):
                p.peers[1]._inbox.recv(2000)
            p.hears_again(p.b)
            assert (await waits.answer()).status == 200
            await conn.send(get(f"/v1/streams/{name}", JSON))
            await conn.until(lambda conn: len(conn.answers) == 2 and conn.answers[1].whole)
            assert conn.answers[1].status == 200

    run(main)


def test_an_idempotency_key_is_a_single_generation_at_any_worker() -> None:
    async def main() -> None:
        async with pair(SLOW) as p:
            for k in range(4):
                fields = (f"Idempotency-Key: key-{k}",)
                askers = [await each.connect(post(CHAT, *fields)) for each in p.both]
                texts = {text_of(events_in((await asker.answer()).body)) for asker in askers}
                assert len(texts) == 1
                other = {**CHAT, "model": "another"}
                answers = [await each.ask(post(other, *fields)) for each in p.both]
                assert [answer.status for answer in answers] == [422, 422]
            assert p.mock.stats.requests.total() == 4
            own = [await each.ask(post(CHAT, "Idempotency-Key: key-0", "x-api-key: somebody")) for each in p.both]
            assert [answer.status for answer in own] == [200, 200]
            assert p.mock.stats.requests.total() == 5

    run(main)


# -- spread


@pytest.mark.parametrize("speaks", [True, False])
def test_fresh_connections_are_spread_when_they_are_accepted(speaks: bool) -> None:
    """All connections come to a; silent connections go to b in time as well."""

    async def main() -> None:
        async with pair() as p:
            conns = [await p.a.connect(get("/healthz") if speaks else b"") for _ in range(400)]
            await p.a.until(lambda: sum(len(each.runtime.clients) for each in p.both) == 400)
            counts = sorted(len(each.runtime.clients) for each in p.both)
            assert counts[1] <= 1.15 * counts[0], counts
            assert p.b.runtime.counters.handed_over == 0
            if speaks:
                assert [(await conn.answer()).status for conn in conns] == [200] * 400
            assert all(not each.runtime.admission.refused()["connections"] for each in p.both)

    run(main)


def test_no_connection_goes_to_a_worker_whose_loop_stands_still() -> None:
    async def main() -> None:
        async with pair() as p:
            p.b.runtime.sweep.stop()
            p.boards[1].row[BEAT_AT] = 0
            for _ in range(20):
                await p.a.connect()
            await p.a.until(lambda: len(p.a.runtime.clients) == 20)
            assert p.handed_over == 0

    run(main)
