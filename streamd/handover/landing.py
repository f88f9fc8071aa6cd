"""Landing: a unit goes on in this process, as new objects made from its record.

    build()     makes the objects on their transports, and freezes them: nothing is written or read, no time limit runs
    FrozenUnit.thaw(), then go_on()     the unit is live
    leave()     the opposite, in the process that the unit leaves, and where a unit was built and is dropped

Places are taken without asking, because the unit was let in before: admission, the counts of addresses, the streams and
bodies of a key. leave() gives them back in the process that had them. Nothing is counted as opened, accepted, ended or
closed at a move, and nothing is logged: the counters of both processes together tell what clients have seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streamd.api.kept import KeptObjects, MadeReader
from streamd.api.publish import Publisher, Publishing
from streamd.api.relayed_ask import RelayedAsk
from streamd.api.relayed_request import RelayedRequest
from streamd.api.rights import Rights
from streamd.api.streams import Streams
from streamd.core.body_charge import BodyCharge
from streamd.core.usage import Charge
from streamd.handover.freezing import FrozenUnit
from streamd.handover.leaving import leave
from streamd.handover.requests import RequestFacts, request_of
from streamd.handover.streams import land_stream
from streamd.handover.unit import Unit
from streamd.handover.units import NO_CLIENT, ClientFacts, LinkFacts, SourceFacts, UnitState
from streamd.handover.values import RecordError
from streamd.net import client_place, exchange_place, upstream_place
from streamd.net.application import Application
from streamd.net.http_error import HttpError
from streamd.net.origin import Entrance
from streamd.net.request import Request
from streamd.net.runtime import Runtime
from streamd.net.upstream import UpstreamConnection, UpstreamState
from streamd.net.upstreams import Upstreams


@dataclass(frozen=True, slots=True)
class House:
    """The parts of a worker that units belong to."""

    runtime: Runtime
    application: Application
    upstreams: Upstreams
    rights: Rights
    streams: Streams
    kept: KeptObjects
    entrance: Callable[[str, int, bool], Entrance]  # of a listener, a price, and whether it is tunnelled


def build(house: House, state: UnitState, transports: Sequence[asyncio.Transport]) -> FrozenUnit:
    """The unit with this state, frozen, on the transports of its clients in their order and of its upstream.

    Raises ValueError, with nothing left behind, for a state that no unit has, and for a unit that has no place here.
    """
    unit = Unit()
    try:
        _build(house, unit, state, transports)
    except HttpError as refused:
        leave(house.runtime, unit)
        raise RecordError(f"a request would be refused here: {refused.message}") from None
    except Exception:
        leave(house.runtime, unit)
        raise
    return FrozenUnit(house.runtime, unit, is_checked=True)


def go_on(unit: Unit, state: UnitState) -> None:
    """The unit is thawed: process what it has read, and let its readers catch up."""
    for client, facts in zip(unit.clients, state.clients, strict=True):
        answer = client.answer
        if answer is not None and answer.reader is not None and facts.place.answer is not None:
            place = facts.place.answer.reader
            assert place is not None
            answer.reader.go_on_from(place, writable=not client.paused)
    if unit.link is not None:
        upstream_place.go_on(unit.link)
    for client in unit.clients:
        client_place.go_on(client)


def _build(house: House, unit: Unit, state: UnitState, transports: Sequence[asyncio.Transport]) -> None:
    runtime, source = house.runtime, state.exchange
    if len(transports) != len(state.clients) + (state.link is not None):
        raise RecordError("a unit with another number of connections")
    if state.stream is not None:
        account = house.rights.account_of(state.stream.owner) if state.has_account else None
        unit.stream = land_stream(runtime.hub, state.stream, account)
        if account is not None and unit.stream.reason is None:
            account.adopt_stream()
        if state.publisher is not None:
            unit.publisher = Publisher.continued(runtime, unit.stream, state.publisher)
    for facts, transport in zip(state.clients, transports, strict=False):
        _build_client(house, unit, facts, transport)
    if state.link is not None:
        _build_link(house, unit, state.link, transports[-1])
    if source is not None:
        _build_exchange(house, unit, source)
    link, exchange = unit.link, unit.exchange
    if link is not None and state.link is not None:
        is_streaming = state.link.place.at is UpstreamState.EVENTS
        upstream_place.go_on_at(link, state.link.place, exchange, unit.stream if is_streaming else None)


def _request(house: House, facts: RequestFacts) -> Request:
    principal = house.rights.principal_again(facts.principal_id, facts.key_id, is_admin=facts.is_admin)
    return request_of(facts, house.runtime.settings.route(facts.path), principal)


def _build_client(house: House, unit: Unit, facts: ClientFacts, transport: asyncio.Transport) -> None:
    place = facts.place
    entrance = house.entrance(place.listener, place.price_bytes, place.is_tunnelled)
    if (facts.request is None) is not (place.answer is None):
        raise RecordError("a client with an answer to no request")
    client = client_place.continued(house.application, entrance, place, transport)
    unit.clients.append(client)
    if facts.request is None or place.answer is None:
        return
    answer = client_place.answer_of(client, place.answer, _request(house, facts.request))
    if place.answer.reader is not None:
        if unit.stream is None:
            raise RecordError("a reader without a stream")
        client_place.subscribe(answer, unit.stream, place.answer.reader)
    if facts.wait is not None:
        house.streams.wait_on(answer, facts.wait.name, facts.wait.until)
    if place.intake is None:
        return
    if facts.publishing is None:
        plan = house.application.plan(answer)
        if plan.owner is not None:
            raise RecordError("a request that belongs to another worker")
        client_place.intake_of(client, place.intake, plan, None)
        return
    if unit.publisher is None:
        raise RecordError("a publishing request without its stream")
    sink = Publishing.continued(house.runtime, house.rights, answer, unit.publisher, facts.publishing)
    client_place.intake_of(client, place.intake, None, sink)


def _build_link(house: House, unit: Unit, facts: LinkFacts, transport: asyncio.Transport) -> None:
    upstream = next((each for each in house.upstreams if each.settings.name == facts.upstream), None)
    if upstream is None:
        raise RecordError(f"the upstream {facts.upstream} isn't here")
    link = unit.link = UpstreamConnection(house.runtime, upstream)
    link.connection_made(transport)


def _build_exchange(house: House, unit: Unit, source: SourceFacts) -> None:
    runtime, place = house.runtime, source.place
    if unit.link is None or max(source.asker, source.awaited_by) >= len(unit.clients):
        raise RecordError("an exchange without its connection, or for a client that isn't in the unit")
    answer = unit.clients[source.awaited_by].answer if source.awaited_by != NO_CLIENT else None
    asker = unit.clients[source.asker].answer if source.asker != NO_CLIENT else None
    if asker is not None:
        request = asker.request
    elif source.request is not None:
        request = _request(house, source.request)
    else:
        raise RecordError("an exchange without a request")
    ask = None
    if source.ask is not None:
        ask = RelayedAsk.continued(request, source.ask, house.rights.watched(request))
        if source.ask.body:
            holders = asker.origin.holders(request) if asker is not None else ()
            request.body_charge = BodyCharge(runtime.admission, holders)
            request.body_charge.adopt(len(source.ask.body))
            request.body = source.ask.body if asker is not None else b""
    charge, key = None, request.principal.key
    if place.charge is not None:
        if key is None:
            raise RecordError("a charge without a key")
        charge = Charge.continued(house.rights.account_of(key.id), key, place.charge)
    relayed = RelayedRequest.continued(runtime, house.rights, request, source.relayed)
    relayed.charge = charge
    learns = MadeReader(house.kept, request.principal.id, source.learnt) if source.learns else None
    stream = unit.stream
    parts = exchange_place.ExchangeParts(request, answer, stream, relayed, learns, charge, ask, unit.link)
    try:
        unit.exchange = exchange_place.continued(runtime, house.upstreams, place, parts)
    except Exception:
        relayed.over()
        if charge is not None:
            charge.leave()
        if request.body_charge is not None:
            request.body_charge.release()
        raise
