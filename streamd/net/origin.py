"""Origin: the source of a connection, and the places that it takes: at admission, and under its address."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from streamd.choice import Choice
from streamd.core.admission import address_key
from streamd.core.auth import ADMIN, ANONYMOUS
from streamd.core.bodies import Holders
from streamd.core.refusal import Refusal
from streamd.net.gates import NOT_COUNTED, Keys
from streamd.net.request import Request
from streamd.net.runtime import Runtime
from streamd.net.tunnel import reason_of_end
from streamd.reasons import CloseReason
from streamd.wire.forwarded import is_loopback

# The listeners of operators, which stay open through a drain.
OPERATORS = ("admin", "metrics")

Remote = tuple[str, int]
"""The address and port of a client."""

AWAITED: Remote = ("", -1)  # a PROXY header will name it
UNNAMED: Remote = ("", 0)  # a PROXY header has come, without an address


@dataclass(frozen=True, slots=True)
class Entrance:
    """A way in for connections. All connections of a listener share the object, so that it costs each nothing."""

    runtime: Runtime
    listener: str = "public"  # "public", "loopback", "admin" or "metrics"
    price_bytes: int = 0
    is_tunnelled: bool = False  # another worker carries the bytes (net/tunnel.py)


class Place(Choice):
    """The place that admission gave to a connection."""

    NONE = "none"  # not entered, or turned away
    REGULAR = "regular"
    RESERVED = "reserved"  # for health, metrics and DELETE only
    OPERATOR = "operator"  # the same, on the admin listener
    TURNED_AWAY = "turned_away"  # told that there is no room, and about to close


class Origin:
    """The origin of a connection. Data that all connections of a listener share is in its entrance."""

    __slots__ = ("_gate_keys", "_head_bytes", "_place", "_remote", "_transport", "entrance", "refusal")

    def __init__(self, entrance: Entrance, remote: Remote | None) -> None:
        self.entrance = entrance
        self._transport: asyncio.Transport
        self._remote = remote  # from a PROXY header; None: from the socket
        self._place = Place.NONE
        self.refusal: Refusal | None = None  # the reason for a place that isn't regular
        self._gate_keys: Keys = NOT_COUNTED
        self._head_bytes = 0  # of the present request's head, charged beyond the connection's price

    # -- places

    def enter(self, transport: asyncio.Transport, *, adopted: bool) -> Refusal | None:
        """Take a place. Returns a refusal if there is none, not even a reserved place."""
        self._transport = transport
        admission, price_bytes = self.entrance.runtime.admission, self.entrance.price_bytes
        if adopted:
            admission.adopt_connection(price_bytes)
        else:
            self.refusal = admission.admit_connection(price_bytes)
        if self.refusal is None:
            self._place = Place.REGULAR
            return None if self._remote is AWAITED else self._enter_gates()
        if self.entrance.listener == "admin" and admission.take_operators():
            self._place = Place.OPERATOR
            return None
        if admission.take_reserved():
            self._place = Place.RESERVED
            return None
        if admission.take_turned_away():
            self._place = Place.TURNED_AWAY
        return self.refusal

    def adopt(self, transport: asyncio.Transport, *, is_opening: bool) -> None:
        """In place of enter(): take the place that the connection had in another process."""
        self._transport = transport
        runtime = self.entrance.runtime
        runtime.admission.adopt_connection(self.entrance.price_bytes)
        self._place = Place.REGULAR
        self._gate_keys = runtime.gates.adopt(self.address)
        if not is_opening:
            self.opened()

    def adopt_request(self, request: Request) -> None:
        """In place of find_client(), for a request that goes on from another process."""
        if request.head is not None:
            self._charge_head(request)
        request.gate_key = self.entrance.runtime.gates.adopt_request(request.client) if request.gate_key else ""

    @property
    def has_place(self) -> bool:
        """Whether admission knows of the connection; without a place it has to go at once."""
        return self._place is not Place.NONE

    def _enter_gates(self) -> Refusal | None:
        """Count the connection under its client's address, if that is limited."""
        entered = self.entrance.runtime.gates.enter(self.address)
        if isinstance(entered, Refusal):
            return entered
        self._gate_keys = entered
        return None

    def await_remote(self) -> None:
        """Before enter(): a PROXY header will name the client, and arrived() will follow."""
        self._remote = AWAITED

    def arrived(self, remote: Remote | None) -> Refusal | None:
        """The PROXY header has come; None: the connection is the proxy's own."""
        self._remote = remote
        return self._enter_gates() if self._place is Place.REGULAR else None

    def find_client(self, request: Request) -> None:
        """Take the client's address from a request of a trusted proxy. Raises HttpError 429 if it has no room."""
        self._charge_head(request)
        gates = self.entrance.runtime.gates
        if gates.behind_proxies and gates.proxies.trusts(peer := self.address):
            request.client = gates.proxies.client_address(peer, request.get(gates.proxies.header)) or ""
            entered = gates.enter_request(request.client or None)
            if isinstance(entered, Refusal):
                raise self.entrance.runtime.refused(entered)
            request.gate_key = entered

    def leave_request(self, request: Request) -> None:
        """The request is over: the opposite of find_client()."""
        runtime = self.entrance.runtime
        if self._head_bytes:
            runtime.admission.charge_held(-self._head_bytes)
            self._head_bytes = 0
        if request.gate_key:
            runtime.gates.leave((request.gate_key, ""))

    def _charge_head(self, request: Request) -> None:
        """Charge the part of a head of very many or long fields that goes beyond the connection's price."""
        assert request.head is not None
        admission = self.entrance.runtime.admission
        excess = request.head.held_bytes - admission.head_bytes_max
        if excess > 0:
            self._head_bytes = excess
            admission.charge_held(excess)

    def opened(self) -> None:
        """The connection has sent a complete request."""
        self._gate_keys = self.entrance.runtime.gates.opened(self._gate_keys)

    def leave(self) -> None:
        """The connection is gone: the opposite of enter()."""
        runtime = self.entrance.runtime
        if self._place is Place.REGULAR:
            runtime.admission.release_connection(self.entrance.price_bytes)
        elif self._place is Place.OPERATOR:
            runtime.admission.release_operators()
        elif self._place is Place.TURNED_AWAY:
            runtime.admission.release_turned_away()
        elif self._place is Place.RESERVED:
            runtime.admission.release_reserved()
        runtime.gates.leave(self._gate_keys)

    # -- addresses

    @property
    def listener(self) -> str:
        """ "public", "loopback", "admin" or "metrics"."""
        return self.entrance.listener

    @property
    def is_operators(self) -> bool:
        """Whether the connection came over a listener of operators."""
        return self.entrance.listener in OPERATORS

    @property
    def remote(self) -> Remote | None:
        """The client's end of the connection, as a PROXY header names it if present. None: a Unix socket."""
        if self._remote is not None and self._remote is not AWAITED:
            return self._remote
        name = self._transport.get_extra_info("peername")
        return (name[0], name[1]) if isinstance(name, tuple) else None

    @property
    def address(self) -> str | None:
        """The address of `remote`; None: a Unix socket."""
        remote = self.remote
        return remote[0] or None if remote is not None else None

    def peer(self, request: Request) -> str:
        """The client for the log, as far as trusted proxies name it."""
        remote = self.remote
        return request.client or (f"{remote[0]}:{remote[1]}" if remote is not None else "unix")

    def holders(self, request: Request) -> Holders:
        """Whom a request's body counts for: its principal, and its client's address as far as that is known."""
        gates, principal, address = self.entrance.runtime.gates, request.principal, request.client or self.address
        if not request.client and gates.behind_proxies and gates.proxies.trusts(address):
            address = None  # the proxy's own
        own = (f"principal {principal.id}",) if principal not in (ANONYMOUS, ADMIN) else ()
        return (*own, f"address {address_key(address)}") if address else own

    def is_outside(self, request: Request) -> bool:
        """Whether the request comes from another machine: over a public listener, or through a trusted proxy.

        A proxy that doesn't say for which client it asks may ask for any.
        """
        listener = self.entrance.listener
        if listener != "loopback":
            return listener == "public"
        proxies = self.entrance.runtime.gates.proxies
        if self._remote == UNNAMED or not proxies.knows_client(self.address, request.get(proxies.header)):
            return True
        return proxies.gated(request.client or self.address) is not None

    @property
    def is_unix(self) -> bool:
        """Whether the connection came over a Unix socket."""
        return self.remote is None

    def may_be_rebound(self, request: Request) -> bool:
        """Whether a browser on this machine may have sent the request, for a page whose name was rebound to loopback.

        No browser reaches a Unix socket, but a tunnel to the admin surface (`ssh -L`) brings it there. A trusted proxy
        answers for the names that it serves.
        """
        if self.entrance.listener == "public":
            return False
        address = self.address
        if address is None:
            return self.entrance.listener == "admin"
        gates = self.entrance.runtime.gates
        is_told = self._remote is not None and self.entrance.runtime.settings.proxy_protocol
        if self.entrance.listener not in ("admin", "metrics") and (is_told or gates.proxies.trusts(address)):
            return False
        return is_loopback(address)

    # -- the side that closed

    def reason_of_fin(self) -> CloseReason:
        """The reader closed, unless the worker that carries its bytes has died."""
        if self.entrance.is_tunnelled:
            return reason_of_end(self._transport.get_extra_info("socket"))
        return CloseReason.READER_GONE

    def reason_of_loss(self, exc: Exception | None) -> CloseReason:
        """A FIN or RST is the reader's act; a time-out or an unreachable host is the network's fault."""
        is_own = exc is None or isinstance(exc, ConnectionResetError | BrokenPipeError | ConnectionAbortedError)
        return CloseReason.READER_GONE if is_own and not self.entrance.is_tunnelled else CloseReason.NETWORK_LOST
