"""Leaving: a unit gives back all that it holds in this process, because it goes on in another or was dropped.

Nobody hears of an end: nothing is counted as closed, ended or removed, no line is written, and no upstream is hung up
on.
"""

from __future__ import annotations

from streamd.handover.unit import Unit
from streamd.net import client_place, exchange_place, upstream_place
from streamd.net.runtime import Runtime


def leave(runtime: Runtime, unit: Unit) -> None:
    """The unit goes on in another process, or is dropped: give back all that it holds here. Nobody hears of an end."""
    exchange, stream, publisher = unit.exchange, unit.stream, unit.publisher
    for publishing in unit.publishings():
        publishing.leave()
    for wait in unit.waits():
        wait.leave()
    for client in unit.clients:
        client_place.leave(client)
    if exchange is not None:
        owner = exchange._owner
        exchange_place.leave(exchange)
        owner.over()
    if unit.link is not None:
        upstream_place.leave(unit.link)
    if publisher is not None:
        publisher.leave()
    if stream is not None:
        runtime.hub.give_away(stream)
