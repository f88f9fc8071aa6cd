"""Peers: the workers beside this one. Who owns what, and how a live connection gets from one to the other.

A stream lives in one worker. Its id says in which (the slot), a chosen name or an idempotency key by its hash. A
request that comes to another worker is passed on with its connection: the descriptor and the bytes already read go
over a SOCK_SEQPACKET pair (SCM_RIGHTS), once, at the request's head; afterwards nothing is in between. The sender
keeps nothing but closes its own copy of the descriptor, which ends no connection as long as the other one lives.

Each worker reads from one end of its own pair; the other end is open in all workers and in the supervisor, who keeps
both over a worker's death, so that its successor takes what still lay there.

A TLS connection can't be passed: its keys are in this process. Its request goes to the owner over a pair of sockets,
and the bytes are carried here (Splice), bounded by both ends' own flow control.

Bounds: a message takes at most DATAGRAM_BYTES_MAX of bytes already read, more goes along in a memfd; a full pair
(EAGAIN) means that the owner is late: OUTBOX_MAX messages wait for it, then it is 503.
"""

from __future__ import annotations

import asyncio
import os
import socket
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import orjson

from streamd.core.admission import Slot
from streamd.core.hub import ID_LEN, SLOT_CHARS
from streamd.counters import Counters

DATAGRAM_BYTES_MAX = 64 * 1024  # a head is 16 KiB at most; the kernel's default send buffer is 208 KiB
OUTBOX_MAX = 256  # connections: a second's worth at the ramp that we carry, a quarter of it per peer
RECEIVED_PER_TURN_MAX = 64  # 64 adoptions of 60 us are 4 ms

# Fresh connections go to the emptiest worker when we have so much more than the mean. The kernel spreads two workers
# on one socket by 1.00 to 1.14 (docs/PROTOCOL.md, section 8); the aim is 1.15.
SPREAD_FACTOR = 1.03
SPREAD_SLACK = 8


class Row(Protocol):
    """A worker's numbers; admission's slots stand in front."""

    def __getitem__(self, k: int, /) -> int: ...


class Elsewhere(Exception):
    """The request belongs to the worker in this slot."""

    def __init__(self, slot: int) -> None:
        super().__init__(slot)
        self.slot = slot


class Passed(NamedTuple):
    """A connection that came from another worker."""

    sock: socket.socket
    listener: str
    price_bytes: int
    remote: tuple[str, int] | None
    data: bytes  # what the sender had read, from the head's first byte on


class Note(NamedTuple):
    """A message without a connection, for the worker's own business."""

    slot: int  # of the sender
    kind: str
    body: bytes


class Peers:
    """This worker's view of all workers. `rows[slot]` is each one's row of the shared mapping."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        slot: int,
        rows: Sequence[Row],
        inbox: socket.socket,
        outlets: Sequence[socket.socket],
        counters: Counters,
    ) -> None:
        # process
        self._loop = loop
        self.slot = slot
        self.workers = len(rows)
        self._rows = rows
        self._inbox = inbox
        self._outlets = outlets
        self._counters = counters
        self._waiting: list[deque[tuple[bytes, list[int]]]] = [deque(maxlen=OUTBOX_MAX) for _ in outlets]
        # wiring
        self.on_passed: Callable[[Passed], None] = _unwired
        self.on_note: Callable[[Note], None] = _unwired

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

    # -- who owns what

    def owner_of_stream(self, stream_id: str) -> int | None:
        """The slot of a stream's worker; None for an id of a worker that this daemon doesn't have."""
        if stream_id.startswith("s_"):
            slot = SLOT_CHARS.find(stream_id[2]) if len(stream_id) == ID_LEN else -1
            return slot if 0 <= slot < self.workers else None
        return self.owner_of_name(stream_id)

    def owner_of_name(self, *parts: str) -> int:
        """The slot of a chosen name, or of a principal's key: the same in every worker and after a restart."""
        return zlib.crc32("\0".join(parts).encode("utf-8", "surrogatepass")) % self.workers

    def lighter(self) -> int | None:
        """The emptiest worker, if this one has clearly more connections than the mean."""
        counts = [row[Slot.CONNECTIONS] for row in self._rows]
        mine = counts[self.slot]
        if mine <= sum(counts) / self.workers * SPREAD_FACTOR + SPREAD_SLACK:
            return None
        return min(range(self.workers), key=counts.__getitem__)

    # -- sending

    def pass_on(self, slot: int, passed: Passed) -> bool:
        """Send a connection; the caller's own copy of the descriptor is still the caller's. False: there is no room."""
        meta = {"l": passed.listener, "p": passed.price_bytes, "r": passed.remote}
        fds = [os.dup(passed.sock.fileno())]
        data = passed.data
        if len(data) > DATAGRAM_BYTES_MAX:
            fds.append(_in_memory(data))
            data = b""
        if not self._send(slot, orjson.dumps(meta) + b"\n" + data, fds):
            return False
        self._counters.moved += 1
        return True

    def tell(self, slot: int, kind: str, body: bytes) -> bool:
        """Send a note of at most DATAGRAM_BYTES_MAX. False: there is no room."""
        assert len(body) <= DATAGRAM_BYTES_MAX
        return self._send(slot, orjson.dumps({"n": kind, "s": self.slot}) + b"\n" + body, [])

    def _send(self, slot: int, message: bytes, fds: list[int]) -> bool:
        waiting = self._waiting[slot]
        if not waiting and self._send_now(slot, message, fds):
            return True
        if len(waiting) == OUTBOX_MAX:
            _close(fds)
            return False
        if not waiting:
            self._loop.add_writer(self._outlets[slot].fileno(), self._writable, slot)
        waiting.append((message, fds))
        return True

    def _send_now(self, slot: int, message: bytes, fds: list[int]) -> bool:
        try:
            socket.send_fds(self._outlets[slot], [message], fds)
        except BlockingIOError:
            return False
        _close(fds)
        return True

    def _writable(self, slot: int) -> None:
        waiting = self._waiting[slot]
        while waiting and self._send_now(slot, *waiting[0]):
            waiting.popleft()
        if not waiting:
            self._loop.remove_writer(self._outlets[slot].fileno())

    # -- receiving

    def _readable(self) -> None:
        for _ in range(RECEIVED_PER_TURN_MAX):
            try:
                message, fds, _, _ = socket.recv_fds(self._inbox, 2 * DATAGRAM_BYTES_MAX, 2)
            except BlockingIOError:
                return
            if not message:
                return
            self._take(message, fds)

    def _take(self, message: bytes, fds: list[int]) -> None:
        line, _, data = message.partition(b"\n")
        meta = orjson.loads(line)
        if "n" in meta:
            self.on_note(Note(meta["s"], meta["n"], data))
            return
        if len(fds) == 2:
            data = _from_memory(fds[1])
        sock = socket.socket(fileno=fds[0])
        remote = tuple(meta["r"]) if meta["r"] is not None else None
        self.on_passed(Passed(sock, meta["l"], meta["p"], remote, data))


def _in_memory(data: bytes) -> int:
    fd = os.memfd_create("streamd-passed")
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(data)
    return fd


def _from_memory(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        return file.read()


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _unwired(what: object) -> None:
    raise NotImplementedError("the worker wires its peers")
