"""Unit: the objects that can only move together: a stream with its source and its readers, or a connection by itself.

    a stream       its exchange or publisher, the connection to its upstream, the clients that read it, wait for its
                   first byte, or publish to it
    a request      that has no stream: its exchange, the connection to its upstream, its client
    a client       between two requests, in a request's body, or waiting for a stream to be opened
    an upstream    connection that is idle, in its pool

unit_of_...() finds the unit around an object, and check() says whether it can be frozen at this moment: NotNow means
that it can in a few turns of the loop, any other ValueError that it stays where it is until what the error names is
over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from streamd.api.publish import Publisher, Publishing
from streamd.api.streams import WaitForName
from streamd.core.stream import Stream
from streamd.net import client_place, exchange_place, upstream_place
from streamd.net.answer import Answer
from streamd.net.client import ClientConnection
from streamd.net.exchange import Exchange
from streamd.net.frozen import NotNow
from streamd.net.runtime import Runtime
from streamd.net.upstream import UpstreamConnection


@dataclass(slots=True)
class Unit:
    """The parts of a unit; each connection, exchange and stream of a process belongs to one unit."""

    clients: list[ClientConnection] = field(default_factory=list)
    link: UpstreamConnection | None = None
    exchange: Exchange | None = None
    stream: Stream | None = None
    publisher: Publisher | None = None

    def publishings(self) -> list[Publishing]:
        """The requests that publish to the stream, in the order of their clients."""
        return [sink for client in self.clients if (sink := publishing_of(client)) is not None]

    def waits(self) -> list[WaitForName]:
        """The requests that wait for a stream to be opened."""
        return [wait for client in self.clients if (wait := wait_of(client)) is not None]


def unit_of_client(runtime: Runtime, client: ClientConnection) -> Unit:
    """The unit of a client's connection."""
    answer = client.answer
    if answer is None:
        return Unit([client])
    pending = answer._pending
    if answer.reader is not None:
        return unit_of_stream(runtime, answer.reader.stream)
    if isinstance(pending, Exchange):
        return unit_of_exchange(runtime, pending)
    sink = publishing_of(client)
    return unit_of_stream(runtime, sink._publisher.stream) if sink is not None else Unit([client])


def unit_of_exchange(runtime: Runtime, exchange: Exchange) -> Unit:
    """The unit of an exchange."""
    if exchange.stream is not None:
        return unit_of_stream(runtime, exchange.stream)
    return _with_exchange(Unit(), exchange)


def unit_of_stream(runtime: Runtime, stream: Stream) -> Unit:
    """The unit of a stream."""
    unit = Unit([_carrier_of(cast(Answer, reader.sink)) for reader in stream.readers], stream=stream)
    source = stream.source
    if isinstance(source, Exchange):
        return _with_exchange(unit, source)
    if isinstance(source, Publisher):
        unit.publisher = source
        if source.under_way:  # seldom: a publisher of many events keeps one request open
            clients = [client for client in runtime.clients if isinstance(client, ClientConnection)]
            unit.clients += [each for each in clients if (sink := publishing_of(each)) and sink._publisher is source]
    return unit


def publishing_of(client: ClientConnection) -> Publishing | None:
    """The request of this client that publishes, while its body comes."""
    sink = client._intake._sink if client._intake is not None else None
    return sink if isinstance(sink, Publishing) else None


def wait_of(client: ClientConnection) -> WaitForName | None:
    """The wait of this client for a stream to be opened."""
    pending = client.answer._pending if client.answer is not None else None
    return pending if isinstance(pending, WaitForName) else None


def check(unit: Unit) -> None:
    """Whether the unit can be frozen: raises NotNow, or ValueError for a unit that stays."""
    for client in unit.clients:
        client_place.check(client)
        _check_wait(unit, client)
    if unit.link is not None:
        upstream_place.check(unit.link)
    if unit.exchange is not None:
        exchange_place.check(unit.exchange)
    if unit.stream is not None:
        _check_stream(unit, unit.stream)


def _with_exchange(unit: Unit, exchange: Exchange) -> Unit:
    unit.exchange = exchange
    unit.link = exchange._attempt.link if exchange._attempt is not None else None
    if exchange.answer is not None:
        unit.clients.append(_carrier_of(exchange.answer))
    return unit


def _carrier_of(answer: Answer) -> ClientConnection:
    carrier = answer._carrier
    assert isinstance(carrier, ClientConnection)
    return carrier


def _check_wait(unit: Unit, client: ClientConnection) -> None:
    """What the client's answer waits for is in the unit, or can be told by itself."""
    pending = client.answer._pending if client.answer is not None else None
    if pending is None or pending is unit.exchange or isinstance(pending, WaitForName):
        return
    if isinstance(pending, Exchange):
        raise NotNow("the client is about to be answered")
    raise ValueError(f"the client waits for something that can't be told: {type(pending).__name__}")


def _check_stream(unit: Unit, stream: Stream) -> None:
    if stream.terms.is_copy:
        raise ValueError("the stream follows another node's")
    fanout = stream.fanout
    if fanout is not None and fanout.running:
        fanout.flush()
        raise NotNow("a pass over the stream's readers is under way")
    if stream.reason is None and stream.source is None:
        raise NotNow("the stream was stopped in this turn, and is sealed in the next")
    if stream.reason is None and unit.exchange is None and unit.publisher is None:
        raise ValueError("the stream has a source that can't be told")
    if unit.publisher is not None:
        if unit.publisher.appending is not None:
            raise NotNow("a whole publication is being appended")
        if len(unit.publishings()) != unit.publisher.under_way:
            raise NotNow("a publishing request is about to be answered")
