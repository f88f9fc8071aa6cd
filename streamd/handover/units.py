"""Units as records: all that moves together, in one record, with a descriptor for each connection.

The descriptors are those of the clients in their order, then the upstream's. A client's request is in its own facts;
that of an exchange whose client has left is in the unit's.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from streamd.api.kept import MadeReader
from streamd.api.publish import Publisher, PublisherPlace, PublishingPlace
from streamd.api.relayed_ask import AskPlace, RelayedAsk
from streamd.api.relayed_request import RelayedPlace, RelayedRequest
from streamd.core.hub import Hub
from streamd.handover.clients import CLIENT
from streamd.handover.exchanges import ASK, EXCHANGE, RELAYED
from streamd.handover.publishing import PUBLISHER, PUBLISHING
from streamd.handover.record import RecordKind
from streamd.handover.requests import REQUEST, RequestFacts, request_facts
from streamd.handover.streams import STREAM, StreamState, stream_state
from streamd.handover.unit import Unit, publishing_of, wait_of
from streamd.handover.upstreams import UPSTREAM
from streamd.handover.values import Bytes, Flag, Many, Maybe, Seconds, Text, WholeNumber
from streamd.handover.wire_kinds import HELD_BYTES_MAX
from streamd.net import client_place, exchange_place, upstream_place
from streamd.net.client import ClientConnection
from streamd.net.client_place import ClientPlace
from streamd.net.exchange import Exchange
from streamd.net.exchange_place import ExchangePlace
from streamd.net.upstream_place import UpstreamPlace

NO_CLIENT: Final = -1


class WaitPlace(NamedTuple):
    """A wait for a stream to be opened."""

    name: str
    until: float


class ClientFacts(NamedTuple):
    """A client's connection with its request."""

    place: ClientPlace
    request: RequestFacts | None
    publishing: PublishingPlace | None
    wait: WaitPlace | None


class LinkFacts(NamedTuple):
    """A connection to an upstream."""

    upstream: str
    place: UpstreamPlace


class SourceFacts(NamedTuple):
    """An exchange with what belongs to it. Clients are numbers in the unit."""

    place: ExchangePlace
    relayed: RelayedPlace
    asker: int  # the client with whose request it began; NO_CLIENT: that has left, and `request` has the facts
    awaited_by: int  # the client that waits for its answer
    request: RequestFacts | None
    ask: AskPlace | None  # the request may have to be sent once more
    learns: bool
    learnt: bytes | None  # the answer's bytes so far, in which its id is looked for


class UnitState(NamedTuple):
    """A unit."""

    clients: tuple[ClientFacts, ...]
    link: LinkFacts | None
    exchange: SourceFacts | None
    stream: StreamState | None
    has_account: bool  # the stream counts for its owner's key
    publisher: PublisherPlace | None


_NAME: Final = Text(256)
_INDEX: Final = WholeNumber(NO_CLIENT)

UNIT: Final = RecordKind(
    "unit",
    UnitState,
    {
        "clients": Many(
            RecordKind(
                "client_facts",
                ClientFacts,
                {
                    "place": CLIENT,
                    "request": Maybe(REQUEST),
                    "publishing": Maybe(PUBLISHING),
                    "wait": Maybe(RecordKind("wait", WaitPlace, {"name": _NAME, "until": Seconds()})),
                },
            )
        ),
        "link": Maybe(RecordKind("link", LinkFacts, {"upstream": _NAME, "place": UPSTREAM})),
        "exchange": Maybe(
            RecordKind(
                "source",
                SourceFacts,
                {
                    "place": EXCHANGE,
                    "relayed": RELAYED,
                    "asker": _INDEX,
                    "awaited_by": _INDEX,
                    "request": Maybe(REQUEST),
                    "ask": Maybe(ASK),
                    "learns": Flag(),
                    "learnt": Maybe(Bytes(HELD_BYTES_MAX)),
                },
            )
        ),
        "stream": Maybe(STREAM),
        "has_account": Flag(),
        "publisher": Maybe(PUBLISHER),
    },
)
"""A unit."""


def unit_state(hub: Hub, unit: Unit) -> UnitState:
    """The state of a frozen unit, whose last bytes the kernel has taken. Raises ValueError, NotNow among these."""
    stream, link, publisher = unit.stream, unit.link, unit.publisher
    return UnitState(
        tuple([_client_facts(client) for client in unit.clients]),
        LinkFacts(link.upstream.settings.name, upstream_place.place_of(link)) if link is not None else None,
        _source_facts(unit.exchange, unit.clients) if unit.exchange is not None else None,
        stream_state(hub, stream) if stream is not None else None,
        stream is not None and stream.terms.account is not None,
        publisher.place() if isinstance(publisher, Publisher) else None,
    )


def _client_facts(client: ClientConnection) -> ClientFacts:
    answer, publishing, wait = client.answer, publishing_of(client), wait_of(client)
    return ClientFacts(
        client_place.place_of(client),
        request_facts(answer.request)._replace(body=b"") if answer is not None else None,  # that of an ask has it
        publishing.place() if publishing is not None else None,
        WaitPlace(wait.name, wait.due_at) if wait is not None else None,
    )


def _source_facts(exchange: Exchange, clients: list[ClientConnection]) -> SourceFacts:
    owner, ask, learns = exchange._owner, exchange._ask, exchange._learns
    if not isinstance(owner, RelayedRequest) or not isinstance(ask, RelayedAsk | None):
        raise ValueError("an exchange of another kind")
    requests = [client.answer.request if client.answer is not None else None for client in clients]
    answers = [client.answer for client in clients]
    asker = requests.index(exchange._request) if exchange._request in requests else NO_CLIENT
    own = None
    if asker == NO_CLIENT:
        own = request_facts(exchange._request)._replace(body=b"")
    return SourceFacts(
        exchange_place.place_of(exchange),
        owner.place(),
        asker,
        answers.index(exchange.answer) if exchange.answer is not None else NO_CLIENT,
        own,
        ask.place() if ask is not None else None,
        learns is not None,
        learns.read if isinstance(learns, MadeReader) else None,
    )
