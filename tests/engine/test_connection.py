"""A connection to the engine: each command gets its own reply, however the bytes arrive, or the connection ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("hiredis", reason="the engine needs streamd[cluster]")

from fake_engine import Asked, bulk, push

from streamd.core.guard import Guard
from streamd.engine import connection
from streamd.engine.connection import EngineConnection, EngineError, EngineFault, EngineLost, packed


class Socket(asyncio.Transport):
    """A transport that keeps what is written and does what the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.reading = True
        self.is_aborted = False

    def write(self, data: Any) -> None:
        self.writes.append(data)

    def abort(self) -> None:
        self.is_aborted = True

    def is_closing(self) -> bool:
        return self.is_aborted

    def is_reading(self) -> bool:
        return self.reading

    def pause_reading(self) -> None:
        assert self.reading
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.reading
        self.reading = True


class Turns:
    """The part of a loop that a connection uses: calls for the next turn."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def call_soon(self, call: Any) -> None:
        self.calls.append(call)

    def turn(self) -> None:
        calls, self.calls = self.calls, []
        for call in calls:
            call()


class Rig:
    """A connection, its socket, and all that its owner heard."""

    def __init__(self) -> None:
        self.loop: Any = Turns()
        self.socket = Socket()
        self.pushes: list[list[Any]] = []
        self.lost: list[EngineFault] = []
        self.errors: list[str] = []
        self.asked = Asked()
        guard = Guard(lambda where, error: self.errors.append(where))
        self.connection = EngineConnection(
            self.loop, guard, on_push=self.pushes.append, on_lost=lambda _, fault: self.lost.append(fault)
        )
        self.connection.connection_made(self.socket)

    def ask(self, count: int) -> None:
        for number in range(count):
            self.connection.ask(packed("GET", number), self.asked)

    def feed(self, data: bytes) -> None:
        if not self.socket.is_aborted:
            self.connection.data_received(data)
        while self.loop.calls:
            self.loop.turn()
        if self.socket.is_aborted and not self.lost:
            self.connection.connection_lost(None)


WIRE = b"".join(
    (
        b"+OK\r\n",
        push(b"message", b"c", b"a\r\nb"),
        bulk(b"x" * 70),
        b"_\r\n",
        b"-OOM command not allowed\r\n",
        b":-12\r\n",
        b"*2\r\n*2\r\n" + bulk("1-5") + b"*2\r\n" + bulk("d") + bulk(b"\0\1 a\n") + b"$-1\r\n",
        push(b"subscribe", b"c", b"1"),
        b"%1\r\n+a\r\n:1\r\n",
    )
)


def heard(*pieces: bytes) -> tuple[list[str], list[list[Any]]]:
    rig = Rig()
    rig.ask(7)
    for piece in pieces:
        rig.feed(piece)
    assert not rig.socket.is_aborted and rig.connection.pending == rig.connection.pending_bytes == 0
    return list(map(repr, rig.asked.replies)), rig.pushes


def test_a_reply_is_the_same_wherever_its_bytes_are_cut() -> None:
    whole = heard(WIRE)
    for at in range(1, len(WIRE)):
        assert heard(WIRE[:at], WIRE[at:]) == whole


def test_replies_come_in_the_order_of_their_commands() -> None:
    replies, pushes = heard(*(WIRE[at : at + 1] for at in range(len(WIRE))))
    entry = [[b"1-5", [b"d", b"\0\1 a\n"]], None]
    oom = EngineError("OOM command not allowed")
    assert replies == list(map(repr, (b"OK", b"x" * 70, None, oom, -12, entry, {b"a": 1})))
    assert pushes == [[b"message", b"c", b"a\r\nb"], [b"subscribe", b"c", b"1"]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["reply", "push"]), st.binary(max_size=9))), st.integers(1, 30))
def test_replies_and_pushes_never_mix(said: list[tuple[str, bytes]], size: int) -> None:
    rig = Rig()
    rig.ask(sum(kind == "reply" for kind, _ in said))
    wire = b"".join(bulk(data) if kind == "reply" else push(b"m", data) for kind, data in said)
    for at in range(0, len(wire), size):
        rig.feed(wire[at : at + size])
    assert rig.asked.replies == [data for kind, data in said if kind == "reply"]
    assert rig.pushes == [[b"m", data] for kind, data in said if kind == "push"]


def test_the_commands_of_a_turn_leave_in_a_single_write() -> None:
    rig = Rig()
    rig.ask(3)
    rig.connection.tell(packed("SUBSCRIBE", b"c"))
    assert rig.socket.writes == []
    rig.loop.turn()
    commands = [*(packed("GET", number) for number in range(3)), packed("SUBSCRIBE", b"c")]
    assert rig.socket.writes == [b"".join(commands)]
    assert rig.connection.pending == 3 and rig.connection.pending_bytes == sum(map(len, commands[:3]))


def test_replies_that_take_long_are_fewer_in_a_turn() -> None:
    rig, count = Rig(), 4 * connection.REPLIES_LOOK
    dealt: list[int] = []

    def take_a_millisecond(reply: object) -> None:
        rig.loop.now += 0.001
        dealt.append(1)

    for number in range(count):
        rig.connection.ask(packed("GET", number), take_a_millisecond)
    rig.loop.turn()
    rig.connection.data_received(b":1\r\n" * count)
    assert 0 < len(dealt) <= connection.REPLIES_LOOK and not rig.socket.reading
    while rig.loop.calls:
        rig.loop.turn()
    assert len(dealt) == count and rig.socket.reading


def test_many_replies_are_dealt_out_over_several_turns() -> None:
    rig, count = Rig(), 3 * connection.REPLIES_TURN_MAX + 5
    rig.ask(count)
    rig.loop.turn()
    rig.connection.data_received(b":1\r\n" * count)
    dealt = [len(rig.asked.replies)]
    while rig.loop.calls:
        assert not rig.socket.reading
        rig.loop.turn()
        dealt.append(len(rig.asked.replies))
    assert dealt == [connection.REPLIES_TURN_MAX * k for k in (1, 2, 3)] + [count]
    assert rig.socket.reading


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        (b":1\r\n:2\r\n", EngineFault.PROTOCOL),  # a reply to no command
        (b":1\r\n-NOPERM no channel\r\n", EngineFault.RIGHTS),  # a refused SUBSCRIBE
        (b"HTTP/1.1 400 Bad Request\r\n", EngineFault.PROTOCOL),
        (b"-READONLY You can't write against a read only replica.\r\n", EngineFault.READ_ONLY),
        (b"-LOADING Valkey is loading the dataset in memory\r\n", EngineFault.LOADING),
        (b"-MASTERDOWN Link with MASTER is down\r\n", EngineFault.LOADING),
        (b"-MOVED 3999 127.0.0.1:6381\r\n", EngineFault.VERSION),
        (b"-NOAUTH Authentication required.\r\n", EngineFault.RIGHTS),
        (b"$" + b"9" * 30 + b"\r\n", EngineFault.PROTOCOL),
    ],
)
def test_bytes_out_of_step_and_a_server_of_no_use_end_the_connection(said: bytes, fault: EngineFault) -> None:
    rig = Rig()
    rig.ask(1)
    rig.feed(said + b":7\r\n")
    assert rig.lost == [fault]
    assert len(rig.asked.replies) == 1 and rig.connection.pending == 0


@pytest.mark.parametrize("said", [b"-OOM x\r\n", b"-ERR The ID specified in XADD is equal or smaller\r\n"])
def test_an_error_reply_is_a_reply_like_any_other(said: bytes) -> None:
    rig = Rig()
    rig.ask(2)
    rig.feed(said + b":7\r\n")
    error, other = rig.asked.replies
    assert isinstance(error, EngineError) and other == 7
    assert error.word == said[1:].split()[0].decode() and rig.lost == []


def test_a_reply_beyond_its_bound_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REPLY_BYTES_MAX", 1000)
    rig = Rig()
    rig.ask(2)
    rig.feed(bulk(b"x" * 900) + b"$5000\r\n")
    assert rig.lost == []
    rig.feed(b"x" * 995)
    assert rig.lost == [EngineFault.PROTOCOL]


def test_commands_in_flight_hear_that_their_connection_ended() -> None:
    rig = Rig()
    rig.ask(3)
    rig.feed(b":1\r\n")
    rig.connection.connection_lost(ConnectionResetError())
    assert rig.asked.replies[0] == 1 and rig.lost == [EngineFault.CLOSED]
    assert [type(reply) for reply in rig.asked.replies[1:]] == [EngineLost, EngineLost]
    assert rig.connection.pending_bytes == 0


def test_a_receiver_that_raises_disturbs_no_other() -> None:
    rig = Rig()

    def fail(reply: Any) -> None:
        raise RuntimeError("a mistake")

    rig.connection.ask(packed("GET", "a"), fail)
    rig.ask(1)
    rig.feed(b":1\r\n:2\r\n")
    assert rig.asked.replies == [2] and rig.errors == ["EngineConnection.on_reply"]


def test_a_connection_closed_before_it_stands_is_aborted() -> None:
    rig = Rig()
    young = EngineConnection(
        rig.loop, rig.connection._guard, on_push=rig.pushes.append, on_lost=lambda _, fault: rig.lost.append(fault)
    )
    young.close(EngineFault.TIMEOUT)
    sock = Socket()
    young.connection_made(sock)
    assert sock.is_aborted


def test_commands_of_the_turn_in_which_it_is_closed_are_not_written() -> None:
    rig = Rig()
    rig.ask(1)
    rig.connection.close(EngineFault.TIMEOUT)
    rig.feed(b"")
    assert rig.socket.writes == []


def test_a_full_kernel_is_no_room() -> None:
    rig = Rig()
    rig.connection.pause_writing()
    assert not rig.connection.takes_more
    rig.connection.resume_writing()
    assert rig.connection.takes_more
    rig.connection.close(EngineFault.TIMEOUT)
    assert not rig.connection.takes_more
