"""Tunnel: a tunnel that carries the bytes of a TLS connection to the worker that owns its stream, and back.

The owner sees an end of a socket pair as if that were the client. Each end does its own flow control: while an end
can't take bytes, the other end isn't read, so at most a single read waits between them.

The rule of docs/PROTOCOL.md, section 4, that the closing side decides holds here, too. When the client has closed, the
owner is sent a FIN on the pair, which stays open: the reader is gone. When the network lost the client, or when this
process dies, the pair is closed: the owner sees POLLHUP and takes it for a loss by the network, and its stream goes on
for resume_grace.

The price here is that of a TLS connection and an end of a pair; the owner pays for the other end.
"""

from __future__ import annotations

import asyncio
import select
import socket
from typing import cast

from streamd.choice import Choice
from streamd.core.guard import guarded
from streamd.core.refusal import Refusal
from streamd.net.outlet import UNIX_SNDBUF_BYTES, LastBytes
from streamd.net.runtime import Runtime
from streamd.net.sweep import NEVER
from streamd.reasons import CloseReason


class TunnelState(Choice):
    """The state of a tunnel."""

    MADE = "made"  # the owner doesn't have the far end yet
    CONNECTING = "connecting"  # the near end is becoming a transport
    DESERTED = "deserted"  # as CONNECTING, and the client has left meanwhile
    BEREFT = "bereft"  # as CONNECTING, and the network has lost the client meanwhile
    OPEN = "open"
    LEFT = "left"  # the client has left, and the owner was told
    LOST = "lost"  # the network has lost the client, and the owner's end is cut
    CLOSING = "closing"  # the owner has closed; the client may still have bytes to take
    OVER = "over"


class TunnelEvent(Choice):
    """A step of a tunnel."""

    BEGIN = "begin"
    CONNECTED = "connected"
    CLIENT_LEFT = "client_left"
    CLIENT_LOST = "client_lost"
    OWNER_CLOSED = "owner_closed"
    END = "end"


_CONNECTED_STEPS = {TunnelEvent.OWNER_CLOSED: TunnelState.CLOSING, TunnelEvent.END: TunnelState.OVER}

TRANSITIONS: dict[TunnelState, dict[TunnelEvent, TunnelState]] = {
    TunnelState.MADE: {TunnelEvent.BEGIN: TunnelState.CONNECTING, TunnelEvent.END: TunnelState.OVER},
    TunnelState.CONNECTING: {
        TunnelEvent.CLIENT_LEFT: TunnelState.DESERTED,
        TunnelEvent.CLIENT_LOST: TunnelState.BEREFT,
        TunnelEvent.CONNECTED: TunnelState.OPEN,
        **_CONNECTED_STEPS,
    },
    TunnelState.DESERTED: {TunnelEvent.CONNECTED: TunnelState.LEFT, **_CONNECTED_STEPS},
    TunnelState.BEREFT: {TunnelEvent.CONNECTED: TunnelState.LOST, **_CONNECTED_STEPS},
    TunnelState.OPEN: {
        TunnelEvent.CLIENT_LEFT: TunnelState.LEFT,
        TunnelEvent.CLIENT_LOST: TunnelState.LOST,
        **_CONNECTED_STEPS,
    },
    TunnelState.LEFT: _CONNECTED_STEPS,
    TunnelState.LOST: _CONNECTED_STEPS,
    TunnelState.CLOSING: {TunnelEvent.END: TunnelState.OVER},
    TunnelState.OVER: {},
}


class TunnelEnd(asyncio.Protocol):
    """A side of the tunnel: the bytes that it reads go to the other side."""

    __slots__ = ("is_client", "other", "transport", "tunnel")

    def __init__(self, tunnel: Tunnel, *, is_client: bool) -> None:
        self.tunnel: Tunnel | None = tunnel  # None: the tunnel is over; breaks the reference cycle
        self.is_client = is_client
        self.other: TunnelEnd
        self.transport: asyncio.Transport | None = None  # None: not connected yet, or lost

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=0)

    @guarded
    def data_received(self, data: bytes) -> None:
        transport = self.other.transport
        if transport is not None and not transport.is_closing():
            transport.write(data)

    @guarded
    def pause_writing(self) -> None:
        if self.other.transport is not None:
            self.other.transport.pause_reading()
        if self.is_client and self.tunnel is not None:
            self.tunnel.client_paused()

    @guarded
    def resume_writing(self) -> None:
        if self.other.transport is not None:
            self.other.transport.resume_reading()

    @guarded
    def eof_received(self) -> bool:
        assert self.tunnel is not None
        if self.is_client:
            self.tunnel.client_left()
        else:
            self.tunnel.owner_closed()
        return True  # Why: False would have the transport closed, which with a stalled peer never completes

    def connection_lost(self, exc: Exception | None) -> None:
        tunnel = self.tunnel
        assert tunnel is not None
        self.transport = None
        self._tell_end(tunnel, exc)
        tunnel.side_ended()

    @guarded
    def _tell_end(self, tunnel: Tunnel, exc: Exception | None) -> None:
        if not self.is_client:
            tunnel.owner_closed()
        elif exc is None or isinstance(exc, ConnectionError):
            tunnel.client_left()
        else:
            tunnel.client_lost()

    def crash(self, where: str, error: Exception) -> None:
        """A callback raised: end the tunnel, both sides of it. Never raises."""
        if self.tunnel is not None:
            self.tunnel.crash(where, error)
        elif self.transport is not None:
            self.transport.abort()


class Tunnel:
    """Both sides, from the moment that the owner has the far end of the pair. A member of the sweep."""

    def __init__(self, runtime: Runtime, price_bytes: int, pair_bytes: int) -> None:
        """For a connection of that price; use open_tunnel()."""
        self._runtime = runtime
        self._price_bytes = price_bytes
        self.pair_bytes = pair_bytes  # the price of each end
        self._near, self.far = socket.socketpair()
        self._near.setblocking(False)
        self._near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_SNDBUF_BYTES)
        self._client = TunnelEnd(self, is_client=True)
        self._owner = TunnelEnd(self, is_client=False)
        self._client.other, self._owner.other = self._owner, self._client
        self._state = TunnelState.MADE
        self._connecting: asyncio.Task[None] | None = None
        self._last_bytes: LastBytes | None = None  # from CLOSING on
        self.due_at = NEVER

    def begin(self, transport: asyncio.Transport) -> None:
        """The owner has the far end: carry the bytes of `transport` to it from now on."""
        runtime = self._runtime
        self._go(TunnelEvent.BEGIN)
        self.far.close()
        runtime.admission.adopt_connection(self._price_bytes)
        runtime.tunnels.add(self)
        runtime.sweep.add(self)
        transport.pause_reading()
        self._client.connection_made(transport)
        transport.set_protocol(self._client)
        self._connecting = runtime.loop.create_task(self._connect())

    def give_up(self) -> None:
        """The owner has no room for the connection: no bytes will be carried."""
        self._go(TunnelEvent.END)
        self.far.close()
        self._near.close()
        self._client.tunnel = self._owner.tunnel = None
        self._runtime.admission.release_connection(self.pair_bytes)

    async def _connect(self) -> None:
        try:
            await self._runtime.loop.connect_accepted_socket(lambda: self._owner, self._near)
        except OSError:
            self._near.close()
            self._connecting = None
            self.owner_closed()
            self.side_ended()
            return
        except Exception as error:
            self._near.close()
            self._connecting = None
            self.crash("tunnel.connect", error)
            self.side_ended()
            return
        self._connecting = None
        self._go(TunnelEvent.CONNECTED)
        try:
            if self._state is TunnelState.LEFT:
                self.client_left()
            elif self._state is TunnelState.LOST:
                self.client_lost()
            if self._client.transport is not None:
                self._client.transport.resume_reading()
        except Exception as error:
            self.crash("tunnel.connected", error)

    # -- ends

    def client_left(self) -> None:
        """The client sent a FIN or RST: the owner gets a FIN, and closes in its own time."""
        self._note(TunnelEvent.CLIENT_LEFT)
        transport = self._owner.transport
        if transport is None or transport.is_closing():
            return
        transport.write_eof()
        if self._client.transport is None:
            transport.resume_reading()  # the owner's bytes have no receiver any more, but must be read to their end

    def client_lost(self) -> None:
        """The network lost the client: close the pair, so that the owner sees a loss."""
        self._note(TunnelEvent.CLIENT_LOST)
        if self._owner.transport is not None:
            self._owner.transport.abort()

    def owner_closed(self) -> None:
        """The owner has closed: send its last bytes for as long as the client takes them."""
        transport = self._client.transport
        if self._owner.transport is not None:
            self._owner.transport.abort()
        if transport is not None and not transport.is_closing():
            self._begin_closing()
            transport.close()

    def abort(self) -> None:
        """Close both sides now. The end of the client's side that follows isn't the client's doing."""
        self._note(TunnelEvent.CLIENT_LOST)
        for side in (self._client, self._owner):
            if side.transport is not None:
                side.transport.abort()

    def crash(self, where: str, error: Exception) -> None:
        """A callback or a deadline raised: count the error, and end both sides. Never raises."""
        self._runtime.bug(where, error)
        with self._runtime.guard:
            self.abort()

    def side_ended(self) -> None:
        """The tunnel is over when both sides have ended."""
        if self._client.transport is not None or self._owner.transport is not None or self._connecting is not None:
            return
        runtime = self._runtime
        if self._state is not TunnelState.OVER:
            self._go(TunnelEvent.END)
            self._client.tunnel = self._owner.tunnel = None
            runtime.tunnels.discard(self)
            runtime.sweep.discard(self)
            runtime.admission.release_connection(self._price_bytes)
            runtime.admission.release_connection(self.pair_bytes)

    # -- deadlines

    def client_paused(self) -> None:
        """The owner isn't read from now on, so its close can't be seen: poll for it every close_timeout."""
        self.due_at = min(self.due_at, self._runtime.time() + self._runtime.settings.close_timeout_s)

    def _begin_closing(self) -> None:
        if self._state is TunnelState.CLOSING:
            return
        self._go(TunnelEvent.OWNER_CLOSED)
        now = self._runtime.time()
        self._last_bytes = LastBytes(now)
        self.due_at = now + self._runtime.settings.close_timeout_s

    def on_due(self, now: float) -> float:
        """The owner has closed: the client may have the rest as long as it takes bytes, for stall_timeout at most."""
        transport, owner, settings = self._client.transport, self._owner.transport, self._runtime.settings
        if transport is None:
            return NEVER
        if self._state is not TunnelState.CLOSING:
            if owner is None or owner.is_reading():
                return NEVER
            if not is_closed(owner.get_extra_info("socket")):
                return now + settings.close_timeout_s
            self._begin_closing()
        assert self._last_bytes is not None
        if self._last_bytes.may_go_on(transport, now, settings):
            return now + settings.close_timeout_s
        self.abort()
        return NEVER

    def _note(self, event: TunnelEvent) -> None:
        """Record an end of the client; the first counts."""
        if event in TRANSITIONS[self._state]:
            self._go(event)

    def _go(self, event: TunnelEvent) -> None:
        state = TRANSITIONS[self._state].get(event)
        assert state is not None, f"{event} in {self._state}"
        self._state = state


def open_tunnel(runtime: Runtime, price_bytes: int) -> Tunnel | Refusal:
    """A tunnel for a connection of that price, its near end charged to admission; or a refusal."""
    pair_bytes = runtime.admission.prices.unix_bytes
    refusal = runtime.admission.admit_connection(pair_bytes)
    if refusal is not None:
        return refusal
    try:
        return Tunnel(runtime, price_bytes, pair_bytes)
    except OSError:
        runtime.admission.release_connection(pair_bytes)
        return runtime.admission.refuse_descriptors()


def is_closed(sock: socket.socket) -> bool:
    """Whether the other end of a pair is closed, and not only shut down for writing."""
    poll = select.poll()
    poll.register(sock, 0)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))


def reason_of_end(sock: socket.socket) -> CloseReason:
    """For the owner, after a FIN on its end of the pair: did the reader leave, or did the process between them die?"""
    return CloseReason.NETWORK_LOST if is_closed(sock) else CloseReason.READER_GONE
