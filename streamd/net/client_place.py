"""ClientPlace: the state of a client's connection between two requests or in a head, for another process.

Ten thousand connections may be idle so. The process that has the socket next makes a connection of it with
continued(), lets the transport begin, and calls go_on_at(). It takes a place at admission as a connection that another
worker hands over does (no refusal), and is counted under its client's address anew.

A connection can't be told yet in the middle of a request's body or of an answer, not even of one whose last bytes wait
here for the client; and not at all under TLS, before a PROXY header has come, on a reserved place, or while it is being
closed: it stays where it is until that is over.
"""

from __future__ import annotations

from typing import NamedTuple

from streamd.core.stream import SubscriberState
from streamd.net.answer import AnswerState
from streamd.net.application import Application
from streamd.net.client import EXPECTING, ClientConnection, ClientState
from streamd.net.frozen import NotNow
from streamd.net.gates import NOT_COUNTED
from streamd.net.origin import AWAITED, Entrance, Place, Remote
from streamd.net.reading import TURN
from streamd.wire.http1 import HeadReader, HeadState


class ClientPlace(NamedTuple):
    """A connection that expects a head, or the rest of a head."""

    at: ClientState
    listener: str
    price_bytes: int
    is_tunnelled: bool
    remote: Remote | None  # from a PROXY header
    is_opening: bool  # it has not sent a complete request yet, and is counted so under its address
    due_at: float
    behind: bytes
    head: HeadState | None


def check(client: ClientConnection) -> None:
    """Whether the connection can be frozen: raises NotNow, or ValueError for a connection that stays."""
    if client.at in (ClientState.LINGER, ClientState.CLOSING, ClientState.LOST):
        raise ValueError("the connection is over")
    transport, origin, answer = client.transport, client.origin, client.answer
    if transport.is_closing():
        raise NotNow("the connection is lost, and hears of it in this turn")
    if transport.get_extra_info("ssl_object") or origin._remote is AWAITED:
        raise ValueError("the connection has TLS, or waits for a PROXY header")
    if origin._place is not Place.REGULAR:
        raise ValueError("the connection has a reserved place")
    if client.pauses & TURN:
        raise NotNow("bytes of the client wait for a turn")
    if answer is None:
        return
    if answer._held is not None:
        raise NotNow("the writes of this turn leave at its end")
    if answer.state is AnswerState.WRITING or answer._large is not None:
        raise ValueError("a large answer, or a large event, is on its way")
    if answer.reader is not None and answer.reader.state is SubscriberState.CATCHING:
        raise NotNow("the reader catches up")
    if client.at is ClientState.ANSWERING and answer._pending is None and answer.reader is None:
        raise ValueError("the answer waits for something that can't be told")


def place_of(client: ClientConnection) -> ClientPlace:
    """The state of this connection. Raises ValueError for a connection that can't be told."""
    origin = client.origin
    if client.at not in EXPECTING or client.answer is not None:
        raise ValueError("the connection is in the middle of a request, or over")
    if client.paused:
        raise ValueError("bytes of the last answer have not left yet")
    if client.transport.get_extra_info("ssl_object") or origin._remote is AWAITED:
        raise ValueError("the connection has TLS, or waits for a PROXY header")
    if origin._place is not Place.REGULAR:
        raise ValueError("the connection has a reserved place")
    return ClientPlace(
        client.at,
        origin.entrance.listener,
        origin.entrance.price_bytes,
        origin.entrance.is_tunnelled,
        origin._remote,
        origin._gate_keys[1] != NOT_COUNTED[1],
        client.due_at,
        client._behind,
        client._heads.state() if client._heads is not None else None,
    )


def continued(application: Application, entrance: Entrance, place: ClientPlace) -> ClientConnection:
    """A connection for the socket; connection_made() and go_on_at() follow. Raises ValueError for an impossible state.

    The entrance is the new process's, for the place's listener, price and tunnel.
    """
    if place.at not in EXPECTING:
        raise ValueError("a connection in the middle of a request, or over")
    if place.head is not None:
        HeadReader(entrance.runtime.limits).go_on_from(place.head)
    client = ClientConnection(application, entrance, remote=place.remote)
    client.at = ClientState.ADOPTED  # it has been admitted
    return client


def go_on_at(client: ClientConnection, place: ClientPlace) -> None:
    """Go on where the connection was. It may have been turned away or lost by now: then it stays so."""
    if client.at is not ClientState.ADOPTED or client.answer is not None:
        return
    if not place.is_opening:
        client.origin.opened()
    client.at = place.at
    client.due_at = place.due_at
    if place.head is not None:
        client._heads = HeadReader(client._runtime.limits)
        client._heads.go_on_from(place.head)
    if place.behind:
        client._behind = place.behind
        client.work_or_wait()
