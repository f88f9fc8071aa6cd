"""Servers of the engine in the simulation, and the network between them and the nodes.

A server has the data of tests/model_engine.py, and sessions that speak RESP3 with the links of the code under test. Its
bytes take time on the way, in order. Whatever can happen to them is a method here: a server that stands still, that
loses its newest writes, that goes on beside its successor; a network with a hole; a connection that ends in the middle
of a command or of a reply.

The server is an oracle as well: every entry that it takes has to continue its copy.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import hiredis
from model_engine import ModelEngine
from sim_loop import Violation, VirtualLoop, must
from sim_transport import Transport

from streamd.core.log_record import unpack
from streamd.engine.connection import EngineError
from streamd.engine.entry import Entry, parse
from streamd.engine.members import BEAT_S

if TYPE_CHECKING:
    from sim_cluster import SimCluster
    from sim_node import Node

# A way through a data centre, in seconds; in a far engine's times it is FAR_S.
NEAR_S = (0.0002, 0.002)
FAR_S = (0.2, 0.5)

# A member is silent if it gives no sign of life in twice the time between two of them.
SILENT_S = 2 * BEAT_S

# Commands that a full engine refuses, and those that a user without rights is refused here.
REFUSED = frozenset((b"XADD", b"XTRIM"))
NOPERM = EngineError("NOPERM User streamd has no permissions to run the command")
READONLY = EngineError("READONLY You can't write against a read only replica.")
WRITES = frozenset((b"XADD", b"XTRIM", b"HSET", b"HDEL", b"PEXPIRE", b"UNLINK"))


class Untouched(list[Any]):
    """Nobody looks at the transports that were touched."""

    def append(self, item: Any) -> None:
        pass


_UNTOUCHED = Untouched()


def encoded(reply: Any) -> bytes:
    """A reply as RESP3."""
    if type(reply) is bytes:
        return b"$%d\r\n%b\r\n" % (len(reply), reply)
    if type(reply) is int:
        return b":%d\r\n" % reply
    if type(reply) is list:
        return b"*%d\r\n%b" % (len(reply), b"".join(map(encoded, reply)))
    if reply is None:
        return b"_\r\n"
    if type(reply) is dict:
        return b"%%%d\r\n%b" % (len(reply), b"".join([encoded(k) + encoded(v) for k, v in reply.items()]))
    if isinstance(reply, EngineError):
        return b"-%b\r\n" % str(reply).encode()
    raise TypeError(reply)


def pushed(*parts: bytes) -> bytes:
    """A message out of turn."""
    return b">%d\r\n%b" % (len(parts), b"".join(map(encoded, parts)))


class Session:
    """A node's connection to a server: the far side of its transport."""

    def __init__(self, node: Node, server: EngineServerModel) -> None:
        self.node = node
        self.server = server
        self.transport: Transport
        self.parser = hiredis.Reader()
        self.channels: dict[bytes, Callable[[bytes], None]] = {}
        self.is_over = False
        self.began_at = server.loop.now
        self._up: deque[bytes] = deque()  # on the way to the server
        self._down: deque[bytes] = deque()  # on the way to the node
        self._up_due = self._down_due = 0.0
        self._held_up: deque[bytes] = deque()  # in a hole of the network, or at a server that stands still

    # -- the node's bytes

    def took(self, data: bytes) -> None:
        """As a transport's Peer."""
        loop = self.server.loop
        self._up.append(data)
        self._up_due = max(self._up_due, loop.now + self.server.way_s())
        loop.io(self._up_due - loop.now, self._arrive)

    def ended(self, how: str) -> None:
        """As a transport's Peer: the node closed the connection. Its last bytes still arrive."""
        loop = self.server.loop
        loop.io(max(0.0, self._up_due - loop.now) + 0.0005, self.end)

    def delivers(self, length: int) -> None:
        """As a transport's Peer."""

    def _arrive(self) -> None:
        if self.is_over:
            return
        data = self._up.popleft()
        if self._held_up or self.server.is_frozen or self.is_in_hole:
            self._held_up.append(data)
        else:
            self.server.work(self, data)

    @property
    def is_in_hole(self) -> bool:
        """Whether no bytes pass between the node and the server."""
        return (self.node.name, self.server.name) in self.server.cluster.holes

    def flow(self) -> None:
        """The server goes on, or the hole is mended: the held bytes pass."""
        while self._held_up and not (self.is_over or self.server.is_frozen or self.is_in_hole):
            self.server.work(self, self._held_up.popleft())
        while self._down and not (self.is_over or self.is_in_hole):
            self._down_due = self.server.loop.now
            self._deliver()

    # -- the server's bytes

    def reply(self, data: bytes) -> None:
        """Bytes for the node."""
        loop, server = self.server.loop, self.server
        if len(data) > 200 and server.rng.random() < 0.1:
            cut = server.rng.randrange(1, len(data))
            pieces = (data[:cut], data[cut:])
        else:
            pieces = (data,)
        for piece in pieces:
            self._down.append(piece)
            self._down_due = max(self._down_due, loop.now + server.way_s())
            loop.io(self._down_due - loop.now, self._deliver)

    def _deliver(self) -> None:
        if self.is_over or not self._down or self.is_in_hole:
            return  # flow() delivers the bytes that a hole has held
        self.node.loop.arrives(self.transport.receive, self._down.popleft())

    # -- the end

    def end(self) -> None:
        """The server knows that the connection is over."""
        if self.is_over:
            return
        self.is_over = True
        self.server.sessions.pop(self, None)
        for channel, hear in self.channels.items():
            self.server.data.listeners[channel].remove(hear)
        self.channels.clear()

    def cut(self) -> None:
        """The connection breaks now: some of the bytes on the way arrive, in either direction."""
        if self.is_over:
            return
        seen, rng = self.server.cluster.seen, self.server.rng
        up, down = b"".join([*self._held_up, *self._up]), b"".join(self._down)
        self._up.clear()
        self._held_up.clear()
        self._down.clear()
        if up and not self.server.is_frozen and not self.is_in_hole:
            self.server.work(self, up[: rng.randrange(len(up) + 1)])
            seen["a connection is cut in the middle of a command"] += self.parser.len() > 0
        if down and not self.is_in_hole:
            part = down[: rng.randrange(len(down) + 1)]
            is_whole = part == down
            seen["a connection is cut in the middle of a reply"] += not is_whole
            if part:
                self.node.loop.arrives(self.transport.receive, part)
        self.end()
        self.node.loop.arrives(self.transport.receive_reset, ConnectionResetError(104, "Connection reset by peer"))


class EngineServerModel:
    """A server of the engine at an address."""

    def __init__(self, cluster: SimCluster, name: str, *, role: str = "master") -> None:
        self.cluster = cluster
        self.loop: VirtualLoop = cluster.loop
        self.rng: random.Random = cluster.rng
        self.name = name
        self.role = role
        self.clock_ahead_s = 0.0
        self.data = ModelEngine(self._clock)
        self.sessions: dict[Session, None] = {}
        self.is_up = True
        self.is_frozen = False
        self.is_far = False
        self.denies = False  # streamd's user has lost its right to write
        self.loss = 0.0  # chance that a message is lost on its way to a listener
        self.beaten_at: dict[str, float] = {}  # the last sign of life of each member
        self.back_at: dict[str, float] = {}  # the first sign of life after a long silence
        self.lost_at = float("-inf")  # when data was lost for the last time

    def _clock(self) -> float:
        return self.loop.now + self.clock_ahead_s

    def way_s(self) -> float:
        """How long bytes are on their way now."""
        return self.rng.uniform(*(FAR_S if self.is_far else NEAR_S))

    # -- connections

    def accept(self, node: Node, factory: Callable[[], Any], made: asyncio.Future[Any]) -> None:
        """A connection arrives."""
        if made.done() or node.loop.is_over:
            return
        if (node.name, self.name) in self.cluster.holes or self.is_frozen or node.loop.is_frozen:
            self.loop.io(0.2, self.accept, node, factory, made)
            return
        if not self.is_up:
            made.set_exception(ConnectionRefusedError(111, "Connection refused"))
            return
        session = Session(node, self)
        session.transport = Transport(node.loop, session, (self.name, 6379), _UNTOUCHED)  # type: ignore[arg-type]
        protocol = session.transport.protocol = factory()
        self.sessions[session] = None
        protocol.connection_made(session.transport)
        made.set_result((session.transport, protocol))

    def cut_all(self) -> None:
        """All connections break."""
        for session in tuple(self.sessions):
            session.cut()

    def flow(self) -> None:
        """Held bytes pass."""
        for session in tuple(self.sessions):
            session.flow()

    # -- commands

    def work(self, session: Session, data: bytes) -> None:
        """Carry out the commands in these bytes."""
        parser, out = session.parser, []
        parser.feed(data)
        while (command := parser.gets()) is not False:
            out.append(self.answer(session, tuple(command)))
            if session.is_over:
                return
        if out:
            session.reply(b"".join(out))

    def answer(self, session: Session, command: tuple[bytes, ...]) -> bytes:
        """The reply to a command."""
        name = command[0]
        if name == b"XADD" or name == b"PUBLISH":
            pass
        elif name == b"PING":
            return encoded(command[1])
        elif name == b"HELLO":
            return encoded({b"version": b"9.1.2", b"mode": b"standalone", b"role": self.role.encode()})
        elif name == b"SUBSCRIBE":
            return b"".join([self._subscribe(session, channel) for channel in command[1:]])
        elif name == b"UNSUBSCRIBE":
            return b"".join([self._unsubscribe(session, channel) for channel in command[1:]])
        elif name == b"INFO":
            return encoded(b"maxmemory_policy:noeviction")
        elif name == b"SENTINEL":
            return encoded([self.cluster.primary_of_sentinels.name.encode(), b"6379"])
        if name in WRITES:
            if self.role != "master":
                return encoded(READONLY)
            if self.denies and name in REFUSED:
                return encoded(NOPERM)
        reply = self.data.execute(command)
        if name == b"XADD" and type(reply) is bytes and b":l:" in command[1]:
            self._check_entry(session, command[1], reply)
        elif name == b"HSET" and type(reply) is int and command[1] == self.cluster.keys.members():
            self._beaten(command[2].decode())
        return encoded(reply)

    def _beaten(self, member: str) -> None:
        now = self.loop.now
        if now - self.beaten_at.get(member, 0.0) > SILENT_S:
            self.back_at[member] = now
        self.beaten_at[member] = now

    def _subscribe(self, session: Session, channel: bytes) -> bytes:
        if channel not in session.channels:

            def hear(text: bytes) -> None:
                if self.loss and self.rng.random() < self.loss:
                    self.cluster.seen["a message is lost"] += 1
                    return
                session.reply(pushed(b"message", channel, text))

            session.channels[channel] = hear
            self.data.listeners.setdefault(channel, []).append(hear)
        return pushed_count(b"subscribe", channel)

    def _unsubscribe(self, session: Session, channel: bytes) -> bytes:
        hear = session.channels.pop(channel, None)
        if hear is not None:
            self.data.listeners[channel].remove(hear)
        return pushed_count(b"unsubscribe", channel)

    def _check_entry(self, session: Session, key: bytes, entry_id: bytes) -> None:
        """An entry was taken: readers of the copy get a log without a hole from it."""
        entries = self.data.keys[key].entries
        entry = self.parsed(entries[-1])
        before = self.parsed(entries[-2]) if len(entries) > 1 else None
        where = f"{key.decode()} {entry_id.decode()} by {session.node.member}"
        fence, seq = entry.position
        if entry.starts_over:
            if entry.record:
                record = unpack(entry.record, entry.last_seq)
                must(record.starts_over, "a start whose record continues another", where)
        elif before is None:
            raise Violation(f"a copy is begun in its middle: {where}")
        elif seq == 0:
            must(entry.last_seq == before.last_seq, "a fence raised at another place", where, before.last_seq)
        else:
            must(before.position.fence == fence, "an entry of another fence", where, before.position)
            record = unpack(entry.record, entry.last_seq)
            must(record.seq_first == before.last_seq + 1, "an entry that doesn't continue its copy", where, before)
        if before is not None and before.end is not None and not entry.starts_over:
            raise Violation(f"an entry behind the end: {where}")
        self.cluster.entry_taken(self, session.node, key, entry)

    @staticmethod
    def parsed(entry: tuple[tuple[int, int], list[bytes]]) -> Entry:
        """An entry of the data, taken apart."""
        (fence, seq), fields = entry
        try:
            return parse([b"%d-%d" % (fence, seq), fields])
        except ValueError as error:
            raise Violation(f"an entry that no reader can read: {error}") from None

    def newest(self, key: bytes) -> Entry | None:
        """The newest entry of a copy; None if there is no copy."""
        found = self.data.keys.get(key)
        return self.parsed(found.entries[-1]) if found is not None and found.entries else None

    def succeed(self, lost: int) -> None:
        """A replica that has never got the last `lost` writes takes the place of this server, at its address."""
        self.data.fail_over(lost)
        self.lost_at = self.loop.now

    def flush(self) -> None:
        """All data is gone."""
        self.data.flush()
        self.lost_at = self.loop.now


def pushed_count(kind: bytes, channel: bytes) -> bytes:
    """The confirmation of a subscription."""
    return b">3\r\n%b%b:1\r\n" % (encoded(kind), encoded(channel))
