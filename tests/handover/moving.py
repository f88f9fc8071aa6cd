"""Moves units of a rig: frozen, told, given away, and built anew from their records, on the same sockets."""

from __future__ import annotations

from typing import Any

from fakes import Client, FakeTransport, Rig

from streamd.handover.freezing import Freezer
from streamd.handover.landing import House, build, go_on
from streamd.handover.record import pack, unpack
from streamd.handover.unit import Unit, unit_of_client
from streamd.handover.units import UNIT, UnitState, unit_state


def house_of(r: Rig) -> House:
    """The rig's worker, as units land in it."""
    worker = r.worker
    return House(
        worker.runtime,
        worker.application,
        worker.upstreams,
        worker.rights,
        worker.streams,
        worker.kept,
        lambda listener, price, tunnelled: worker.entrance(listener, price, is_tunnelled=tunnelled),
    )


def connections_of(unit: Unit) -> list[Any]:
    """The unit's connections, in the order of its record."""
    return [*unit.clients, *([unit.link] if unit.link is not None else [])]


def flush(transport: FakeTransport) -> None:
    """The kernel takes all bytes, as with a raised TCP_NOTSENT_LOWAT."""
    transport.sent += transport.held
    transport.held.clear()
    transport._paused = False


def told(r: Rig, unit: Unit) -> UnitState:
    """The state of the unit, by its record."""
    for connection in connections_of(unit):
        flush(connection.transport)
    state = unit_state(r.runtime.hub, unit)
    read: UnitState = unpack(UNIT, pack(UNIT, state))
    assert read == state
    return read


def move(r: Rig, unit: Unit, *clients: Client) -> Unit:
    """The unit as new objects; `clients` of the test get their new connections."""
    freezer = Freezer(r.runtime)
    frozen = freezer.freeze(unit)
    state = told(r, unit)
    transports = [connection.transport for connection in connections_of(unit)]
    frozen.give_away(r.runtime)
    new = build(house_of(r), state, transports)
    freezer.frozen = [new]
    freezer.end()
    go_on(new.unit, state)
    r.turn()
    by_transport = {connection.transport: connection for connection in new.unit.clients}
    for client in clients:
        client.connection = by_transport[client.transport]  # type: ignore[index]
    return new.unit


def move_client(r: Rig, client: Client) -> Unit:
    """The unit of this client as new objects."""
    return move(r, unit_of_client(r.runtime, client.connection), client)
