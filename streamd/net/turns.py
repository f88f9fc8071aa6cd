"""Turns: the work on input, dealt among connections turn by turn of the loop.

THE PROBLEM. libuv reads a socket up to 32 times in a turn, 256,000 bytes each time. Eight MiB of the smallest events,
chunks, lines, interim answers or pipelined requests are a million pieces: worked off at once they hold the loop for
seconds, and all other connections wait.

THE RULE. Work is counted in *pieces*. A piece is an event, a line, a chunk or a TLS record, some 4 to 8 us each; 256
bytes count as a piece as well, because they cost as much when JSON is checked; a request counts REQUEST_PIECES. In a
turn a connection may use CONNECTION_PIECES_MAX, all connections together TURN_PIECES_MAX. A connection that has bytes
left is not read until they are processed, and waits here.

    reads of a turn      are processed at once while the turn has pieces left; else the connection waits
    the next turn        begins with the connections that wait, round robin by `share` and within a share by arrival:
                         a principal or an address with a thousand connections gets as much as another with a single one

A connection's bytes are processed in steps of at most STEP_LINES_MAX lines (step_bytes()), so a turn overshoots its
bound by a step. Every kind of piece, except for plain bytes, has a line end in it.

BOUNDS. A waiting connection holds what was read before reading was paused: a single read. The token's way touches
nothing here: a single small read is a single piece, and net/read_batch.py bounds the number of these by that of the
connections.

Rejected: a time limit (reading the clock for each piece costs as much as a tenth of the piece, and no test could count
on it); a task per connection (a wake-up per read, for honest connections too); smaller reads for all (a system call
per 4 KiB of every body).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar

from streamd.core.stream import Stream
from streamd.net.reading import TURN, pause_reading

# 256 events of 4 to 8 us are 1 to 2 ms, a tenth of the 20 ms between two tokens of a fast model. As bytes: 64 KiB, as
# many as streamd writes at once (core/stream.py).
CONNECTION_PIECES_MAX: Final = 256

# Four connections' worth: 4 to 8 ms, so that a token waits for at most half of its successor's time.
TURN_PIECES_MAX: Final = 1024

BYTES_PER_PIECE: Final = 256  # JSON of small values is parsed at 4 to 37 ns a byte

CONTAINERS_PER_PIECE: Final = 4  # of JSON that is scanned: 1 to 3 us for each list and object in another

# A whole request, from its head to its line in the log: 150 to 300 us.
REQUEST_PIECES: Final = 32

READERS_PER_PIECE: Final = 16

# Sizes of a step; the largest with at most STEP_LINES_MAX line ends is taken. 512 bytes hold at most 512 of them.
STEP_SIZES_BYTES: Final = (64 * 1024, 16 * 1024, 4 * 1024, 512)
STEP_LINES_MAX: Final = 256


Member = TypeVar("Member")


class TurnMember(Protocol):
    """A connection with bytes that were read and not processed yet, or work that goes on over several turns."""

    @property
    def share(self) -> str:
        """The principal or the address that the work is done for."""

    def work(self) -> bool:
        """Do at most CONNECTION_PIECES_MAX of the work and spend() it. True: more is left."""

    def crash(self, where: str, error: Exception) -> None:
        """As in Guarded (core/guard.py)."""


class Rotation(Generic[Member]):
    """Members in the order in which they are served: round robin by share, and within a share by arrival."""

    __slots__ = ("_members", "_shares", "count")

    def __init__(self) -> None:
        self._shares: deque[str] = deque()  # in the order in which they are served; each once
        self._members: dict[str, deque[Member]] = {}  # of each share, in the order of their arrival; none is empty
        self.count = 0

    def add(self, share: str, member: Member) -> None:
        """Take a member, behind all others of its share."""
        members = self._members.get(share)
        if members is None:
            members = self._members[share] = deque()
            self._shares.append(share)
        members.append(member)
        self.count += 1

    def pop(self) -> Member:
        """The first member of the first share, which goes to the end."""
        share = self._shares.popleft()
        members = self._members[share]
        member = members.popleft()
        self.count -= 1
        if members:
            self._shares.append(share)
        else:
            del self._members[share]
        return member

    def pop_surplus(self) -> Member:
        """The newest member of the share that has most."""
        share = max(self._members, key=lambda each: len(self._members[each]))
        members = self._members[share]
        member = members.pop()
        self.count -= 1
        if not members:
            del self._members[share]
            self._shares.remove(share)
        return member


class Turns:
    """One per loop. Bounded by the number of connections: each waits here once."""

    __slots__ = ("_is_due", "_is_held", "_loop", "_on_bug", "_postponed", "_rotation", "left")

    def __init__(self, loop: asyncio.AbstractEventLoop, on_bug: Callable[[str, Exception], None]) -> None:
        self._loop = loop
        self._on_bug = on_bug
        self._rotation: Rotation[TurnMember] = Rotation()
        self._is_due = False  # _begin() is scheduled
        self._is_held = False
        self._postponed: list[Callable[[], None]] = []  # bounded by the requests that wait for other workers
        self.left = TURN_PIECES_MAX  # of this turn

    @property
    def waiting(self) -> int:
        """The number of members that wait."""
        return self._rotation.count

    def spend(self, pieces: int) -> None:
        """Count work that was done in this turn."""
        self.left -= pieces
        if not self._is_due:
            self._wake()

    def hold(self) -> None:
        """Until release() no work on input begins: all connections that have some wait. Tokens go on."""
        self._is_held = True
        self.left = 0

    def release(self) -> None:
        """Go on in the next turn."""
        self._is_held = False
        if not self._is_due:
            self._wake()
        postponed, self._postponed = self._postponed, []
        for call in postponed:
            self._loop.call_soon(call)

    def postpones(self, call: Callable[[], None]) -> bool:
        """Whether work is held; then `call` follows the release. For work on streams that isn't input."""
        if self._is_held:
            self._postponed.append(call)
        return self._is_held

    def wait(self, member: TurnMember) -> None:
        """Call the member's work() in the next turns, until it returns False. The member waits at most once."""
        self._rotation.add(member.share, member)
        if not self._is_due:
            self._wake()

    def _wake(self) -> None:
        self._is_due = True
        self._loop.call_soon(self._begin)

    def _begin(self) -> None:
        """A new turn: serve those that wait, each at most once, until the turn's pieces are spent."""
        self._is_due = False
        if self._is_held:
            return
        self.left = TURN_PIECES_MAX
        rotation = self._rotation
        unfinished = []
        while rotation.count and self.left > 0:
            try:
                member = rotation.pop()
            except Exception as error:
                self._on_bug("turns.next", error)
                break  # the next turn goes on
            try:
                if member.work():
                    unfinished.append(member)
            except Exception as error:
                member.crash("turns.work", error)
        for member in unfinished:
            try:
                rotation.add(member.share, member)
            except Exception as error:
                member.crash("turns.wait", error)
        if rotation.count and not self._is_due:
            self._wake()


class HasTurns(Protocol):
    """The part of the runtime that a connection's turns need."""

    turns: Turns


class TakesTurns:
    """A connection whose socket isn't read while its bytes wait for a turn. Its work() ends the pause."""

    __slots__ = ()

    transport: asyncio.Transport
    pauses: int
    _runtime: HasTurns

    @property
    def share(self) -> str:
        """As in TurnMember."""
        raise NotImplementedError

    def work(self) -> bool:
        """As in TurnMember."""
        raise NotImplementedError

    def crash(self, where: str, error: Exception) -> None:
        """As in Guarded (core/guard.py)."""
        raise NotImplementedError

    def work_or_wait(self) -> None:
        """Process the bytes that were read, now if the turn has room for it."""
        if self._runtime.turns.left <= 0 or self.work():
            self.wait_for_turn()

    def wait_for_turn(self) -> None:
        """Process the rest in the next turns, and read nothing until then."""
        if not self.pauses & TURN:
            pause_reading(self, TURN)
            self._runtime.turns.wait(self)


def step_bytes(data: bytes) -> int:
    """How many of the first bytes of `data` to process at once: up to 64 KiB with at most STEP_LINES_MAX line ends."""
    if len(data) <= STEP_SIZES_BYTES[-1]:
        return len(data)
    for size in STEP_SIZES_BYTES[:-1]:
        if data.count(b"\n", 0, size) + data.count(b"\r", 0, size) <= STEP_LINES_MAX:
            return size
    return STEP_SIZES_BYTES[-1]


def event_pieces(stream: Stream) -> int:
    """The work on an event of the stream, in pieces: a paused reader's ring takes 0.3 us, and there are 64 at most."""
    return 1 + len(stream.readers) // READERS_PER_PIECE if stream.direct else 1


def pieces_of(size_bytes: int) -> int:
    """The work on plain bytes, in pieces."""
    return size_bytes // BYTES_PER_PIECE + 1
