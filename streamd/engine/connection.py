"""EngineConnection: a connection to a server of the engine. Commands go out, and each gets the next reply.

Replies are matched to commands by their order alone. So no command is ever cancelled, and a connection that misses a
reply, or has one too many, is closed: a reply can't reach a stranger's command.

Commands are collected during a turn of the loop and written in a single write. Replies are dealt out, REPLIES_TURN_MAX
in a turn or those of TURN_S_MAX; while more wait, the socket isn't read. The parser is hiredis, in C: 1.3 us for a
command and its reply, against 20 to 67 of the client libraries. It is imported with this module, and this module only
where an engine is configured.

Bounds: the commands in flight are bounded by the link (engine/link.py), a reply by REPLY_BYTES_MAX, and the replies
that are read and not dealt out yet by a read of the socket (256 KB).
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Final, cast

import hiredis

from streamd.choice import Choice
from streamd.core.guard import Guard

# A copy that is read in one piece is at most a log (log_bytes_max, 1 MiB) and an event (event_bytes_max, 1 MiB), each
# with the engine's own framing: eight times that.
REPLY_BYTES_MAX: Final = 16 * 1024 * 1024

# A reply costs 1 to 10 us with the work that its receiver does, and some ms where it is a piece of a large log. The
# clock is looked at after each few, so a turn takes 2 ms and the work of so many replies at most.
REPLIES_TURN_MAX: Final = 256
REPLIES_LOOK: Final = 8
TURN_S_MAX: Final = 0.002

_NOT_YET: Final = object()


class EngineFault(Choice):
    """Why a connection to the engine ended, or can't be used."""

    NONE = "none"
    REFUSED = "refused"  # no connection could be made
    CLOSED = "closed"  # the engine or the network closed it
    TIMEOUT = "timeout"  # no reply within engine_timeout
    PROTOCOL = "protocol"  # bytes that are no reply, a reply to no command, or a reply too large
    RIGHTS = "rights"  # the user or the password is wrong, or may not do this
    VERSION = "version"  # older than 7.0, or a Redis Cluster
    READ_ONLY = "read_only"  # a replica
    LOADING = "loading"  # the engine reads its data from the disk
    MOVED = "moved"  # the sentinels name another server now
    STOPPED = "stopped"  # by streamd


# Error replies after which the connection is of no use: another server, or this server later, will do.
_ENDING: Final = {
    "READONLY": EngineFault.READ_ONLY,
    "LOADING": EngineFault.LOADING,
    "MASTERDOWN": EngineFault.LOADING,
    "MOVED": EngineFault.VERSION,
    "CLUSTERDOWN": EngineFault.VERSION,
    "NOAUTH": EngineFault.RIGHTS,
}
_OF_RIGHTS: Final = ("WRONGPASS", "NOPERM")


class EngineError(Exception):
    """An error reply. `word` is its first word: OOM, WRONGTYPE, NOPERM."""

    @property
    def word(self) -> str:
        return str(self).partition(" ")[0]


class EngineLost(EngineError):
    """The connection ended before the reply. The command may have been carried out."""


def fault_of(error: EngineError) -> EngineFault:
    """The fault that an error reply shows where none was expected."""
    return EngineFault.RIGHTS if error.word in _OF_RIGHTS else _ENDING.get(error.word, EngineFault.PROTOCOL)


Reply = Any  # bytes, int, None, list, dict, or an EngineError
OnReply = Callable[[Reply], None]
OnPush = Callable[[list[Any]], None]


def packed(*parts: bytes | str | int) -> bytes:
    """A command as the engine reads it."""
    return cast(bytes, hiredis.pack_command(parts))  # type: ignore[arg-type]  # typed as a tuple of one


class EngineConnection(asyncio.Protocol):
    """The protocol of a connection. `on_lost` is called once, with the reason, after every command got its reply."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        guard: Guard,
        *,
        on_push: OnPush,
        on_lost: Callable[[EngineConnection, EngineFault], None],
    ) -> None:
        # process
        self._loop = loop
        self._guard = guard
        self._on_push = on_push
        self._on_lost = on_lost
        # connection
        self._transport: asyncio.Transport | None = None
        self._reader = hiredis.Reader(replyError=EngineError, notEnoughData=_NOT_YET)
        self._unparsed_bytes = 0  # received since the last whole reply
        self._fault = EngineFault.NONE  # why it is being closed
        self._is_paused = False  # the kernel doesn't take all bytes
        self._is_dealing = False  # replies wait for another turn
        self._is_over = False
        # commands
        self._out: list[bytes] = []  # of this turn
        self._pending: deque[tuple[OnReply, int]] = deque()  # the receiver of each reply, and the size of the command
        self.pending_bytes = 0
        self.asked = 0  # commands, and the replies to them, since the connection began
        self.answered = 0

    # -- commands

    @property
    def pending(self) -> int:
        """Commands without a reply."""
        return len(self._pending)

    @property
    def takes_more(self) -> bool:
        """Whether the kernel takes bytes at once."""
        return not self._is_paused and self._fault is EngineFault.NONE

    def ask(self, command: bytes, on_reply: OnReply) -> None:
        """Send a packed command. `on_reply` gets its reply, or EngineLost if the connection ends before."""
        self._pending.append((on_reply, len(command)))
        self.pending_bytes += len(command)
        self.asked += 1
        self.tell(command)

    def tell(self, command: bytes) -> None:
        """Send a packed command that has no reply but pushes: (P)SUBSCRIBE and its like, in RESP3."""
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(command)

    def _flush(self) -> None:
        out, self._out = self._out, []
        if self._transport is not None and self._fault is EngineFault.NONE and out:
            with self._guard:
                self._transport.write(b"".join(out))

    def close(self, fault: EngineFault) -> None:
        """Close the connection now. `on_lost` is called in a later turn, with the first fault."""
        if self._fault is EngineFault.NONE:
            self._fault = fault
        if self._transport is not None:
            self._transport.abort()

    # -- the transport's calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As in asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)
        if self._fault is not EngineFault.NONE:  # closed before it stood
            self._transport.abort()

    def set_user_timeout(self, seconds: float) -> None:
        """Let the kernel end a connection whose bytes nobody acknowledges for this time."""
        assert self._transport is not None
        sock = self._transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(seconds * 1000))

    def pause_writing(self) -> None:
        """As in asyncio.Protocol."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """As in asyncio.Protocol."""
        self._is_paused = False

    def data_received(self, data: bytes) -> None:
        """As in asyncio.Protocol."""
        self._unparsed_bytes += len(data)
        self._reader.feed(data)
        if not self._is_dealing:
            self._deal()

    def _deal(self) -> None:
        """Deal out a turn's share of the replies."""
        self._is_dealing = False
        if self._fault is not EngineFault.NONE or self._is_over:
            return
        ends_at = self._loop.time() + TURN_S_MAX
        for number in range(REPLIES_TURN_MAX):
            if number % REPLIES_LOOK == REPLIES_LOOK - 1 and self._loop.time() > ends_at:
                break
            try:
                reply = self._reader.gets()
            except (hiredis.HiredisError, MemoryError):
                self.close(EngineFault.PROTOCOL)
                return
            if reply is _NOT_YET:
                if self._unparsed_bytes > REPLY_BYTES_MAX:
                    self.close(EngineFault.PROTOCOL)
                self._read_on()
                return
            self._unparsed_bytes = self._reader.len()
            self._deal_out(reply)
            if self._fault is not EngineFault.NONE:
                return
        assert self._transport is not None
        if self._transport.is_reading():
            self._transport.pause_reading()
        self._is_dealing = True
        self._loop.call_soon(self._deal)

    def _read_on(self) -> None:
        assert self._transport is not None
        if not self._transport.is_reading() and not self._transport.is_closing():
            self._transport.resume_reading()

    def _deal_out(self, reply: Reply) -> None:
        if type(reply) is hiredis.PushNotification:
            try:
                self._on_push(reply)
            except Exception as error:
                self._guard.caught("EngineConnection.on_push", error)
            return
        if not self._pending:
            # The reply to no command: a refused SUBSCRIBE, or bytes that are out of step.
            self.close(fault_of(reply) if isinstance(reply, EngineError) else EngineFault.PROTOCOL)
            return
        on_reply, size = self._pending.popleft()
        self.pending_bytes -= size
        self.answered += 1
        self._give(on_reply, reply)
        if isinstance(reply, EngineError) and reply.word in _ENDING:
            self.close(_ENDING[reply.word])

    def _give(self, on_reply: OnReply, reply: Reply) -> None:
        try:
            on_reply(reply)
        except Exception as error:
            self._guard.caught("EngineConnection.on_reply", error)

    def connection_lost(self, error: Exception | None) -> None:
        """As in asyncio.Protocol. The commands in flight get EngineLost, in their order."""
        self._is_over = True
        if self._fault is EngineFault.NONE:
            self._fault = EngineFault.CLOSED
        lost = EngineLost(f"LOST the connection to the engine ended: {self._fault.value}")
        while self._pending:
            on_reply, _ = self._pending.popleft()
            self._give(on_reply, lost)
        self.pending_bytes = 0
        self._transport = None
        self._on_lost(self, self._fault)
