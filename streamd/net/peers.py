"""Peers: the workers beside this worker, the owners of streams, and the way of a live connection between workers.

A stream lives in a single worker. A generated id names the worker (the slot); a chosen name, an idempotency key or a
conversation names it by a hash. A request that comes to another worker is passed on with its connection: the descriptor
and the bytes already read go over a SOCK_SEQPACKET pair (SCM_RIGHTS), once, at the request's head. Afterwards no
process is in between. The sender closes its own copy of the descriptor and keeps nothing else; the connection lives on
through the receiver's copy.

Each worker reads from an end of its own pair. The other end is open in all workers and in the parent, which keeps both
ends over a worker's death, so that the successor receives the messages that still lay there.

A TLS connection can't be passed on once its handshake has begun: its keys are in this process. Its request goes to the
owner over a pair of sockets, and the bytes are carried here (net/tunnel.py).

A fresh connection of any protocol goes to the emptiest worker at the moment of its accept, before a byte is read, if
this worker has clearly more connections than the mean.

Bounds: a datagram takes at most DATAGRAM_BYTES_MAX of data; more data goes along in a memfd of at most
MEMORY_BYTES_MAX. A full pair (EAGAIN) means that the owner is late: up to OUTBOX_MAX messages wait here, all owners
together; the next is refused with 503.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import orjson

from streamd import descriptors
from streamd.core.hub import ID_LEN, SLOT_CHARS
from streamd.counters import Counters

DATAGRAM_BYTES_MAX = 64 * 1024  # a head is 16 KiB at most; the kernel's default send buffer is 208 KiB
MEMORY_BYTES_MAX = 4 * 1024 * 1024  # a thousand streams of 400 B each, and as many conversations' ids, thrice

# The kernel's buffer holds some 90 connections; a worker that is started again needs half a second.
OUTBOX_MAX = 64
DESCRIPTORS_MAX = 2 * OUTBOX_MAX  # a connection and its memfd each

RECEIVED_PER_TURN_MAX = 64  # 64 adoptions of 60 us are 4 ms

# Fresh connections go to the emptiest worker if this worker has more than the mean by this factor and slack: at 1,000
# connections over two workers the bound allows 519 to 481, a ratio of 1.08, where 1.15 is allowed. The kernel alone
# spread connections over two workers on a socket by 1.00 to 1.14 (docs/PROTOCOL.md, section 8).
SPREAD_FACTOR = 1.03
SPREAD_SLACK = 4

# Sample size when choosing a worker for a new connection; comparing must cost less than serving it.
LOOKED_AT_MAX = 8


class LivenessBoard(Protocol):
    """Numbers that each worker shows to the others (daemon/shared.py)."""

    def connections(self, slot: int) -> int:
        """The worker's connections, with those passed on to it that it hasn't taken yet."""

    def sent(self, slot: int) -> None:
        """This worker has passed a connection on to that worker."""

    def taken(self, sender: int) -> None:
        """This worker has taken a connection that `sender` passed on."""

    def alive(self, slot: int, now: float) -> bool:
        """Whether the worker's loop has turned recently."""


class Passed(NamedTuple):
    """A connection that came from another worker."""

    sock: socket.socket
    listener: str
    price_bytes: int
    remote: tuple[str, int] | None
    data: bytes  # bytes that the sender had read, from the head's first byte on
    fresh: bool = False  # just accepted: no byte is read, and it isn't admitted yet
    tunnelled: bool = False  # the sender carries its bytes
    sender: int = 0  # slot of the sender; pass_on() fills it in


class Note(NamedTuple):
    """A message without a connection, for the worker's own use."""

    slot: int  # of the sender
    kind: str
    body: bytes


class Receiver(Protocol):
    """The worker, which takes the messages of the other workers."""

    def take_passed(self, passed: Passed) -> None:
        """A connection."""

    def take_note(self, note: Note) -> None:
        """A note. Raises Malformed for a kind that no worker sends."""


class Malformed(ValueError):
    """A message that no worker of this daemon can have sent."""


def owner_of(stream_id: str, workers: int) -> int:
    """The slot of the worker that a generated id names, or that the hash of a chosen name or key selects."""
    if stream_id.startswith("s_") and len(stream_id) == ID_LEN and stream_id[2] in SLOT_CHARS:
        return SLOT_CHARS.index(stream_id[2]) % workers
    return zlib.crc32(stream_id.encode("utf-8", "surrogatepass")) % workers


class Peers:
    """This worker's view of all workers."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        slot: int,
        board: LivenessBoard,
        inbox: socket.socket,
        outlets: Sequence[socket.socket],
        counters: Counters,
        *,
        receiver: Receiver,
        on_bug: Callable[[str, Exception], None],
    ) -> None:
        # process
        self._loop = loop
        self.slot = slot
        self.workers = len(outlets)
        self._board = board
        self._inbox = inbox
        self._outlets = outlets
        self._counters = counters
        self._waiting: list[deque[tuple[bytes, list[int]]]] = [deque() for _ in outlets]  # OUTBOX_MAX in all
        self._waiting_count = 0
        self._receiver = receiver
        self._on_bug = on_bug

    def start(self) -> None:
        self._inbox.setblocking(False)
        for outlet in self._outlets:
            outlet.setblocking(False)
        self._loop.add_reader(self._inbox.fileno(), self._readable)

    def stop(self) -> None:
        self._loop.remove_reader(self._inbox.fileno())
        for slot, waiting in enumerate(self._waiting):
            if waiting:
                self._loop.remove_writer(self._outlets[slot].fileno())
            for _, fds in waiting:
                _close(fds)
            waiting.clear()
        self._waiting_count = 0

    # -- owners

    def others(self) -> list[int]:
        """The slots of all other workers."""
        return [slot for slot in range(self.workers) if slot != self.slot]

    def owner_of_stream(self, stream_id: str) -> int:
        """The slot of a stream's worker, also for an id from an earlier daemon with more workers."""
        return owner_of(stream_id, self.workers)

    def owner_of_name(self, *parts: str) -> int:
        """The slot of a chosen name, or of a principal's key: the same in every worker and after a restart."""
        return owner_of("\0".join(parts), self.workers)

    def lighter(self, now: float) -> int | None:
        """The emptiest live worker, for a fresh connection; None unless this worker has clearly more than the mean."""
        board = self._board
        own_count = board.connections(self.slot)
        if own_count <= SPREAD_SLACK or self._waiting_count >= OUTBOX_MAX // 2:
            return None
        others = self.others()
        if len(others) > LOOKED_AT_MAX:
            others = random.sample(others, LOOKED_AT_MAX)
        counts = {slot: board.connections(slot) for slot in others if board.alive(slot, now)}
        if own_count <= (own_count + sum(counts.values())) / (1 + len(counts)) * SPREAD_FACTOR + SPREAD_SLACK:
            return None
        return min(counts, key=counts.__getitem__)

    # -- sending

    def pass_on(self, slot: int, passed: Passed) -> bool:
        """Send a connection. The caller keeps its own copy of the descriptor and closes it. False: there is no room."""
        meta = {
            "l": passed.listener,
            "p": passed.price_bytes,
            "r": passed.remote,
            "f": passed.fresh,
            "s": passed.tunnelled,
            "o": self.slot,
        }
        try:
            fds = [os.dup(passed.sock.fileno())]
        except OSError:
            return False
        if not self._send(slot, orjson.dumps(meta) + b"\n", passed.data, fds):
            return False
        self._counters.handed_over += 1
        self._board.sent(slot)
        return True

    def tell(self, slot: int, kind: str, body: bytes) -> bool:
        """Send a note. False: there is no room, or the note is larger than MEMORY_BYTES_MAX."""
        return self._send(slot, orjson.dumps({"n": kind, "o": self.slot}) + b"\n", body, [])

    def _send(self, slot: int, line: bytes, data: bytes, fds: list[int]) -> bool:
        if len(data) > DATAGRAM_BYTES_MAX:
            memory = _in_memory(data)
            if memory is None:
                _close(fds)
                return False
            fds.append(memory)
            data = b""
        message, waiting = line + data, self._waiting[slot]
        try:
            if not waiting:
                self._send_now(slot, message, fds)
                return True
        except BlockingIOError:
            pass
        except OSError:  # too many descriptors in flight for the kernel (unix(7), ETOOMANYREFS)
            _close(fds)
            return False
        return self._wait(slot, message, fds)

    def _wait(self, slot: int, message: bytes, fds: list[int]) -> bool:
        if self._waiting_count >= OUTBOX_MAX:
            _close(fds)
            return False
        waiting = self._waiting[slot]
        if not waiting:
            self._loop.add_writer(self._outlets[slot].fileno(), self._writable, slot)
        waiting.append((message, fds))
        self._waiting_count += 1
        return True

    def _send_now(self, slot: int, message: bytes, fds: list[int]) -> None:
        """Raises OSError, and then the descriptors are still open."""
        if fds:
            socket.send_fds(self._outlets[slot], [message], fds)
        else:
            self._outlets[slot].send(message)
        _close(fds)

    def _writable(self, slot: int) -> None:
        waiting = self._waiting[slot]
        while waiting:
            message, fds = waiting[0]
            try:
                self._send_now(slot, message, fds)
            except BlockingIOError:
                return
            except OSError as error:
                _close(fds)
                self._on_bug("peers.send", error)
            waiting.popleft()
            self._waiting_count -= 1
        self._loop.remove_writer(self._outlets[slot].fileno())

    # -- receiving

    def _readable(self) -> None:
        for _ in range(RECEIVED_PER_TURN_MAX):
            try:
                message, fds, flags = descriptors.receive(self._inbox, 2 * DATAGRAM_BYTES_MAX, 2)
            except BlockingIOError:
                return
            except (OSError, MemoryError) as error:
                self._on_bug("peers.receive", error)
                return
            self._take(message, fds, flags)

    def _take(self, message: bytes, fds: list[int], flags: int = 0) -> None:
        """Only our workers write here, so an undecodable message is a bug: report it and drop it."""
        try:
            found = _decoded(message, fds, flags)
            if isinstance(found, Note):
                self._receiver.take_note(found)
            else:
                self._receiver.take_passed(found)
        except Exception as error:
            self._on_bug("peers.take", error)


def _decoded(message: bytes, fds: list[int], flags: int) -> Passed | Note:
    """Raises Malformed, after closing all descriptors of the message."""
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise Malformed("cut off: it is too long, or this process has no file descriptors left")
        line, _, data = message.partition(b"\n")
        meta = orjson.loads(line)
        is_note = "n" in meta
        if len(fds) == 2 - is_note:
            data = _from_memory(fds.pop())
        if len(fds) != 1 - is_note:
            raise Malformed(f"{len(fds)} descriptors")
        if is_note:
            return Note(int(meta["o"]), str(meta["n"]), data)
        remote = (str(meta["r"][0]), int(meta["r"][1])) if meta["r"] is not None else None
        listener, price_bytes, sender = str(meta["l"]), int(meta["p"]), int(meta["o"])
        fresh, tunnelled = bool(meta["f"]), bool(meta["s"])
        return Passed(socket.socket(fileno=fds[0]), listener, price_bytes, remote, data, fresh, tunnelled, sender)
    except (Malformed, OSError, ValueError, TypeError, KeyError, IndexError) as error:
        _close(fds)
        raise Malformed(f"{error!r} in {message[:100]!r}") from None


def _in_memory(data: bytes) -> int | None:
    """A memfd with the bytes; None if they are too many, or if no descriptor or memory is available."""
    if len(data) > MEMORY_BYTES_MAX:
        return None
    try:
        fd = os.memfd_create("streamd-passed")
    except OSError:
        return None
    try:
        with os.fdopen(fd, "wb", closefd=False) as file:
            file.write(data)
    except OSError:
        os.close(fd)
        return None
    return fd


def _from_memory(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        data = file.read(MEMORY_BYTES_MAX + 1)
    if len(data) > MEMORY_BYTES_MAX:
        raise Malformed(f"its data is larger than {MEMORY_BYTES_MAX} bytes")
    return data


def _close(fds: list[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
    fds.clear()
