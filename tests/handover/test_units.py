"""Units that move in every state: clients and upstreams notice nothing, and the books are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, WHOLE, Client, Rig, chunk, event, get, post, rig, whole_answer
from moving import connections_of, house_of, move, move_client, told
from states import ANSWER, MORE, STATES, asked, full, go_on, in_body, proxied, publishing, seen, streaming, waiting
from test_slots import VALUES, name_of

from streamd.config import UpstreamSettings
from streamd.core.auth import Key
from streamd.core.keys import Keys
from streamd.core.stream import Subscriber
from streamd.handover.freezing import Freezer
from streamd.handover.landing import build
from streamd.handover.slots import FATES, Fate
from streamd.handover.unit import Unit, unit_of_client, unit_of_stream
from streamd.handover.units import UnitState
from streamd.net.exchange import ExchangeState
from streamd.reasons import CloseReason

WHOLE_STREAM = SSE_HEAD + chunk(event("one ")) + MORE + chunk(DONE) + LAST
JSON_LATE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n"


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_a_unit_that_moves_goes_on_as_if_nothing_had_been(state: Callable[[Rig], Client]) -> None:
    answers = []
    for moves in (2, 0):
        with rig(commit_after_s=3600.0) as r:
            client = state(r)
            in_use = r.runtime.admission.status()["in_use"]
            for _ in range(moves):
                move_client(r, client)
            assert r.runtime.admission.status()["in_use"] == in_use, "each place is taken once"
            go_on(r, state, client)
            answers.append(seen(client, r))
    assert answers[0] == answers[1]


def test_a_stream_moves_at_any_byte_of_its_answer() -> None:
    with rig(commit_after_s=3600.0) as r:
        states = set()
        for at in range(0, len(WHOLE_STREAM), 3):
            client = r.client(post(CHAT))
            r.reply(WHOLE_STREAM[:at])
            states.update(exchange.state for exchange in r.exchanges)
            move_client(r, client)
            r.reply(WHOLE_STREAM[at:])
            assert b"one " in client.raw and b"more " in client.raw and client.answer.body.endswith(DONE), at
            client.fin()
        assert states == {ExchangeState.ASKED, ExchangeState.OPENING, ExchangeState.STREAMING}


def test_json_behind_the_head_of_a_stream_is_collected_over_a_move() -> None:
    with rig(commit_after_s=1.0) as r:
        client = r.client(post(CHAT))
        r.pass_time(2.0)
        body = b'{"id":"a","choices":[{"index":0,"message":{"content":"hello"}}]}'
        r.reply(JSON_LATE.replace(b"99", b"%d" % len(body)) + body[:20])
        assert [exchange.state for exchange in r.exchanges] == [ExchangeState.COLLECTING]
        move_client(r, client)
        r.reply(body[20:])
        assert b"hello" in client.raw and b"[DONE]" in client.raw


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_each_attribute_that_is_carried_has_its_value_after_the_move(state: Callable[[Rig], Client]) -> None:
    """The table of fates says what is true."""
    with rig(commit_after_s=3600.0) as r:
        client = state(r)
        before = carried(unit_of_client(r.runtime, client.connection))
        after = carried(move_client(r, client))
        assert after == before
        client.fin()
        for name in ("a", "later"):
            r.client(get(f"/v1/streams/{name}", method="DELETE"))


def carried(unit: Unit) -> dict[tuple[str, str], Any]:
    """The plain values among the attributes that the table calls carried."""
    things: list[Any] = [*connections_of(unit), unit.exchange, unit.stream, unit.publisher, *unit.publishings()]
    for client in unit.clients:
        things += [client.origin, client._intake, client.answer]
        if client.answer is not None:
            things += [client.answer.request, client.answer.reader]
    if unit.exchange is not None:
        exchange: Any = unit.exchange
        things += [exchange._attempt, exchange._owner, exchange._collected]
    found: dict[tuple[str, str], Any] = {}
    for number, thing in enumerate(things):
        if isinstance(thing, Subscriber):  # while it is live, the stream's own counters are its position
            found[str(number), "place"] = thing.place()
            continue
        for slot in FATES[name_of(type(thing))].get(Fate.CARRIED, "").split() if thing is not None else ():
            value = getattr(thing, slot, None)
            if isinstance(value, VALUES):
                found[f"{number} {name_of(type(thing))}", slot] = value
    return found


def test_a_detached_generation_moves_with_its_grace_and_is_resumed() -> None:
    with rig(resume_grace_s=50.0) as r:
        client = streaming(r)
        stream = client.connection.reader.stream  # type: ignore[union-attr]
        client.reset(TimeoutError(110, "Connection timed out"))
        until = stream.grace_until
        unit = move(r, unit_of_stream(r.runtime, stream))
        assert unit.stream is not None and unit.stream.grace_until == until
        back = r.client(get(f"/v1/streams/{stream.id}"))
        r.reply((MORE + chunk(DONE) + LAST)[1:])
        assert b"one " in back.raw and b"more " in back.raw and not r.runtime.hub.detached


def test_readers_of_one_stream_move_with_it() -> None:
    with rig() as r:
        first = streaming(r)
        stream = first.connection.reader.stream  # type: ignore[union-attr]
        others = [r.client(get(f"/v1/streams/{stream.id}")) for _ in range(70)]
        unit = move(r, unit_of_stream(r.runtime, stream), first, *others)
        assert len(unit.clients) == 71 and unit.stream is not None and unit.stream.fanout is not None
        r.reply((MORE + chunk(DONE) + LAST)[1:])
        r.pass_time(1.0)
        assert all(b"more " in each.raw and b"[DONE]" in each.raw for each in (first, *others))


def test_an_idempotency_key_without_a_stream_holds_over_a_move() -> None:
    with rig() as r:
        client = r.client(post(WHOLE, "Idempotency-Key: k"))
        move_client(r, client)
        assert r.client(post(WHOLE, "Idempotency-Key: k")).answer.status == 409
        r.reply(whole_answer(ANSWER))
        assert client.answer.body == ANSWER and not r.runtime.hub._by_key


def test_the_streams_of_a_key_are_counted_once() -> None:
    key = Key("k1", "alice", b"", b"", streams_max=1)
    with rig() as r:
        rights = r.worker.rights
        client = r.client(post(CHAT))
        stream, request = client.connection.answer._pending.stream, client.connection.answer.request  # type: ignore
        rights.take_keys(Keys({"k1": key}))
        account = rights.account_of("k1")
        account.adopt_stream()
        object.__setattr__(stream.terms, "account", account)
        object.__setattr__(stream.terms, "owner", "k1")
        unit = move(r, unit_of_client(r.runtime, client.connection), client)
        assert account.streams_now == 1 and request is not None and unit.stream is not None
        r.reply(WHOLE_STREAM)
        assert account.streams_now == 0


def test_a_request_that_may_be_sent_again_keeps_its_body_in_the_books() -> None:
    settings = UpstreamSettings(name="up", url="http://up.test:1", aliases={"m": "other"})
    with rig(upstreams=(settings,)) as r:
        r.client(post(WHOLE))
        r.reply(whole_answer(ANSWER))
        client = r.client(post(WHOLE))
        held = r.runtime.bodies_bytes
        move_client(r, client)
        assert r.runtime.bodies_bytes == held > 0
        r.link.fin()
        r.turn()
        assert len(r.links) == 2 and b'"model":"other"' in bytes(r.link.sent).replace(b" ", b"")
        r.reply(whole_answer(ANSWER))
        assert client.answer.body == ANSWER


def test_an_idle_upstream_connection_moves_into_the_pool() -> None:
    with rig() as r:
        r.client(post(WHOLE))
        r.reply(whole_answer(ANSWER))
        (upstream,) = r.worker.upstreams
        (link,) = upstream._idle
        unit = move(r, Unit(link=link))
        assert upstream._idle == [unit.link]
        client = r.client(post(WHOLE))
        r.reply(whole_answer(ANSWER))
        assert client.answer.status == 200 and len(r.links) == 1


def _swap(state: UnitState, wrong: str) -> UnitState:
    (client, *_), stream, exchange = state.clients, state.stream, state.exchange
    assert exchange is not None and stream is not None and state.link is not None
    place = client.place
    return {
        "no stream": state._replace(stream=None),
        "no connection": state._replace(link=None),
        "no exchange": state._replace(exchange=None),
        "another upstream": state._replace(link=state.link._replace(upstream="gone")),
        "a client too many": state._replace(clients=(client, client)),
        "a client too few": state._replace(clients=()),
        "no request": state._replace(clients=(client._replace(request=None),)),
        "no such key": state._replace(has_account=True),
        "an answer without a reader": state._replace(
            clients=(client._replace(place=place._replace(answer=place.answer and place.answer._replace(reader=None))),)
        ),
        "an asker that isn't there": state._replace(exchange=exchange._replace(asker=7)),
        "an exchange for no request": state._replace(exchange=exchange._replace(asker=-1)),
        "a place in front of the stream": state._replace(
            clients=(
                client._replace(
                    place=place._replace(
                        answer=place.answer
                        and place.answer._replace(
                            reader=place.answer.reader and place.answer.reader._replace(position=99)
                        )
                    )
                ),
            )
        ),
    }[wrong]


WRONG = (
    "no stream",
    "no connection",
    "no exchange",
    "another upstream",
    "a client too many",
    "a client too few",
    "no request",
    "no such key",
    "an answer without a reader",
    "an asker that isn't there",
    "an exchange for no request",
    "a place in front of the stream",
)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_unit_that_can_not_be_is_refused_and_nothing_of_it_is_left(wrong: str) -> None:
    with rig() as r:
        client = streaming(r)
        freezer = Freezer(r.runtime)
        frozen = freezer.freeze(unit_of_client(r.runtime, client.connection))
        state = told(r, frozen.unit)
        transports = [connection.transport for connection in connections_of(frozen.unit)]
        frozen.give_away(r.runtime)
        freezer.frozen = []
        before = r.runtime.admission.status()["in_use"]
        assert before == dict.fromkeys(before, 0)  # type: ignore[call-overload]
        with pytest.raises(ValueError, match=r"."):
            build(house_of(r), _swap(state, wrong), transports)
        assert r.runtime.admission.status()["in_use"] == before and not len(r.runtime.hub)
        assert not r.runtime.clients and not r.runtime.readers and not len(r.runtime.sweep)
        freezer.frozen = [build(house_of(r), state, transports)]
        freezer.end()
        client.connection = freezer_client(r)
        client.reset()


def freezer_client(r: Rig) -> Any:
    """The only client."""
    (client,) = r.runtime.clients
    return client


@pytest.mark.parametrize("state", (asked, proxied, full, in_body, waiting, publishing), ids=lambda each: each.__name__)
def test_a_client_that_leaves_after_the_move_is_seen_to_leave(state: Callable[[Rig], Client]) -> None:
    with rig() as r:
        client = state(r)
        move_client(r, client)
        client.reset()
        assert r.ended[-1][1] is CloseReason.READER_GONE and not r.exchanges
        for name in ("a", "later"):
            r.client(get(f"/v1/streams/{name}", method="DELETE"))
