"""ExchangePlace: the state of an exchange whose request is out, and an exchange that goes on from it.

The request, the answer, the stream, and the connection have places and records of their own. An exchange that has no
connection yet can't be told: its unit waits until it has one.

Why functions that look into Exchange: it has as many methods as a class here may have, and none of them is called while
it serves.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from streamd.core.stream import Stream
from streamd.core.usage import Charge, ChargeState, Tally, TallyState
from streamd.net.answer import Answer
from streamd.net.attempt import Ask, Attempt, AttemptPlace
from streamd.net.collected import Collected
from streamd.net.exchange import Exchange, ExchangeOwner, ExchangeState, Learner
from streamd.net.frozen import NotNow
from streamd.net.request import Request
from streamd.net.runtime import Runtime
from streamd.net.upstream import UpstreamConnection
from streamd.net.upstreams import Upstreams
from streamd.policy import Policy
from streamd.wire.heads import Framing, Headers, ResponseHead, joined

HOLDING: Final = (ExchangeState.OPENING, ExchangeState.COLLECTING)
TOLD: Final = (ExchangeState.ASKED, ExchangeState.STREAMING, ExchangeState.PROXYING, *HOLDING)


class CollectedPlace(NamedTuple):
    """A body that is held, and the parts of the head in front of it."""

    status: int
    reason: bytes
    headers: Headers
    framing: Framing
    content_length: int
    keep_alive: bool
    body: bytes
    bytes_max: int


class ExchangePlace(NamedTuple):
    """An exchange without its request, answer, stream and connection. Upstreams are named."""

    state: ExchangeState
    policy: Policy
    may_be_foreign: bool
    tried: tuple[str, ...]
    stale_links: int
    started_at: float
    due_at: float
    ends_at: float
    attempt: AttemptPlace
    charge: ChargeState | None
    tally: TallyState | None  # of a whole answer that is a generation
    collected: CollectedPlace | None


class ExchangeParts(NamedTuple):
    """The objects around an exchange in its new process."""

    request: Request
    answer: Answer | None
    stream: Stream | None
    owner: ExchangeOwner
    learns: Learner | None
    charge: Charge | None  # Charge.continued()
    ask: Ask | None  # of a request that may be sent again
    link: UpstreamConnection  # on which the request is out; go_on_at() comes after the exchange


def check(exchange: Exchange) -> None:
    """Whether the exchange can be frozen: raises NotNow."""
    attempt = exchange._attempt
    if exchange.state in (ExchangeState.CONNECTING, ExchangeState.OVER) or attempt is None or attempt.link is None:
        raise NotNow("no connection is there yet, or the exchange is over")


def place_of(exchange: Exchange) -> ExchangePlace:
    """The state of this exchange. Raises ValueError for an exchange that can't be told."""
    attempt, tally = exchange._attempt, exchange.watch._tally
    if exchange.state not in TOLD or attempt is None:
        raise ValueError(f"an exchange in the state {exchange.state.value}")
    if tally is not None and type(tally) is not Tally:
        raise ValueError("an exchange that is traced")
    return ExchangePlace(
        exchange.state,
        exchange.policy,
        exchange._may_be_foreign,
        tuple([each.settings.name for each in exchange._tried]),
        exchange._stale_links,
        exchange._started_at,
        exchange.due_at,
        exchange._ends_at,
        attempt.place(),
        exchange._charge.state() if exchange._charge is not None else None,
        tally.state() if tally is not None else None,
        _collected_place(exchange._collected) if exchange._collected is not None else None,
    )


def _collected_place(collected: Collected) -> CollectedPlace:
    head = collected.head
    facts = (head.status, head.reason, head.headers, head.framing, head.content_length, head.keep_alive)
    return CollectedPlace(*facts, bytes(collected.body), collected._bytes_max)


def _collected_of(runtime: Runtime, place: CollectedPlace) -> Collected:
    facts = (place.status, place.reason, place.headers, place.framing, place.content_length, place.keep_alive)
    collected = Collected(runtime.admission, ResponseHead(*facts, joined(place.headers)), place.bytes_max)
    collected.take(place.body)
    return collected


def continued(runtime: Runtime, upstreams: Upstreams, place: ExchangePlace, parts: ExchangeParts) -> Exchange:
    """An exchange that goes on: in the sweep, as the source of its stream and the work that its answer waits for.

    Raises ValueError, with nothing taken, for a state that no exchange has, and for an upstream that isn't here.
    """
    by_name = {each.settings.name: each for each in upstreams}
    upstream = by_name.get(place.attempt.upstream)
    if upstream is None or parts.link.upstream is not upstream:
        raise ValueError(f"the upstream {place.attempt.upstream} isn't here, or the connection is another's")
    is_streaming = place.state is ExchangeState.STREAMING
    if place.state not in TOLD or (is_streaming and parts.stream is None) or not 0 <= place.stale_links <= 1:
        raise ValueError("an exchange in a state that can't be told, or a stream without one")
    if (place.collected is not None) is not (place.state in HOLDING):
        raise ValueError("an exchange that holds bytes in the wrong state")
    if place.state is ExchangeState.PROXYING and (parts.answer is None or parts.stream is not None):
        raise ValueError("a whole answer for no client, or for a stream")
    tally = Tally() if place.tally is not None else None
    if tally is not None and place.tally is not None:
        tally.go_on_from(place.tally)
    exchange = Exchange(
        runtime,
        upstreams,
        parts.ask,
        answer=parts.answer,
        request=parts.request,
        stream=parts.stream,
        policy=place.policy,
        charge=parts.charge,
        may_be_foreign=place.may_be_foreign,
        owner=parts.owner,
        learns=parts.learns,
    )
    exchange._state = place.state
    # An upstream that is gone was tried, and can't be chosen again.
    exchange._tried = tuple([by_name[name] for name in place.tried if name in by_name])
    exchange._stale_links, exchange._started_at = place.stale_links, place.started_at
    exchange.due_at, exchange._ends_at = place.due_at, place.ends_at
    exchange.watch._tally = tally
    if place.collected is not None:
        exchange._collected = _collected_of(runtime, place.collected)
    attempt = exchange._attempt = Attempt.continued(runtime, upstream, place.attempt, parts.link)
    attempt.own(exchange)
    if parts.answer is not None:
        parts.answer.later(exchange)
    if parts.stream is not None:
        parts.stream.source = exchange
    runtime.sweep.add(exchange)
    exchange.due_at = place.due_at
    return exchange


def leave(exchange: Exchange) -> None:
    """The exchange goes on in another process: give back all that it holds here. Nobody hears of an end."""
    attempt, exchange._attempt = exchange._attempt, None
    exchange._state = ExchangeState.OVER
    exchange._runtime.sweep.discard(exchange)
    if attempt is not None:
        attempt.leave()
    if exchange._body_charge is not None:
        exchange._body_charge.release()
    if exchange._collected is not None:
        exchange._collected.let_go()
    if exchange._charge is not None:
        exchange._charge.leave()
    exchange._ask = exchange.answer = exchange.stream = exchange._collected = None
