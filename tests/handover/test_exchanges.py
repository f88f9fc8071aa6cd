"""Exchanges that move in the middle of an answer: the client, its key's account and the time limits notice nothing."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, WHOLE, Client, Rig, chunk, event, post, rig, whole_answer

from streamd.core.auth import Key
from streamd.core.limits import Account
from streamd.core.usage import Charge, ChargeState, TallyState
from streamd.handover.exchanges import CHARGE, EXCHANGE
from streamd.handover.record import pack, unpack
from streamd.net.exchange import Exchange, ExchangeState
from streamd.net.exchange_place import ExchangeParts, ExchangePlace, continued, place_of
from streamd.reasons import CloseReason

KEY = Key("k", "alice", b"", b"")
EVENTS = SSE_HEAD + chunk(event("one ")) + chunk(event("two ")) + chunk(DONE) + LAST


def parts_of(exchange: Any) -> ExchangeParts:
    return ExchangeParts(
        exchange._request,
        exchange.answer,
        exchange.stream,
        exchange._owner,
        exchange._learns,
        exchange._charge,
        exchange._ask,
        exchange._attempt.link,
    )


def move(r: Rig, **wrong: Any) -> Exchange:
    """Another exchange takes the place of the only exchange, from its record alone."""
    (before,) = r.exchanges
    old: Any = before
    place: ExchangePlace = unpack(EXCHANGE, pack(EXCHANGE, place_of(before)))
    assert place == place_of(before)
    exchange = continued(r.runtime, r.worker.upstreams, place._replace(**wrong), parts_of(before))
    r.runtime.sweep.discard(before)
    old._attempt.upstream.in_flight -= 1
    old._attempt.upstream.health.end(old._attempt, old._attempt._principal)
    old._attempt.link._asker = exchange
    exchange._body_charge, old._body_charge = old._body_charge, None
    assert place_of(exchange) == place
    return exchange


@pytest.mark.parametrize(("asked", "answer"), [(CHAT, EVENTS), (WHOLE, whole_answer(b'{"id":"a"}'))])
def test_an_answer_goes_on_at_any_byte(asked: Any, answer: bytes) -> None:
    with rig() as r:
        states = set()
        for at in range(len(answer)):
            client = Client(r)
            client.send(post(asked))
            r.link.feed(answer[:at])
            r.turn()
            if r.exchanges and r.exchanges[0].state not in (ExchangeState.OPENING, ExchangeState.COLLECTING):
                states.add(move(r).state)
            r.link.feed(answer[at:])
            r.turn()
            assert client.answer.status == 200 and (b"[DONE]" in client.raw or b'{"id":"a"}' in client.raw), at
            client.fin()
        (upstream,) = r.worker.upstreams
        assert upstream.in_flight == 0 and states >= {ExchangeState.ASKED}
        assert states & {ExchangeState.STREAMING, ExchangeState.PROXYING}


def test_time_limits_go_on_as_they_were() -> None:
    with rig(ttft_timeout_s=10.0, commit_after_s=60.0) as r:
        client = r.client(post(CHAT))
        r.pass_time(7.0)
        move(r)
        r.pass_time(2.0)
        assert not client.raw
        r.pass_time(2.0)
        assert client.answer.status == 504


def test_a_reader_that_leaves_after_the_move_cancels_its_generation() -> None:
    with rig() as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("one ")))
        move(r)
        client.fin()
        assert r.link.closed and not r.exchanges


def test_a_request_is_sent_again_after_the_move_where_its_connection_was_stale() -> None:
    with rig() as r:
        r.client(post(WHOLE))
        r.reply(whole_answer(b"{}"))
        client = r.client(post(WHOLE))
        move(r)
        r.link.fin()
        r.turn()
        assert len(r.links) == 2, "on a fresh connection"
        r.reply(whole_answer(b'{"id":"b"}'))
        assert client.answer.body == b'{"id":"b"}'


def test_exchanges_that_have_no_connection_can_not_be_told() -> None:
    with rig() as r:
        r.mute.add(1)
        for upstream in r.worker.upstreams:
            upstream.close_idle()
        waiting = r.client(post(CHAT))
        (exchange,) = r.exchanges
        with pytest.raises(ValueError, match="connecting"):
            place_of(exchange)
        waiting.fin()


@pytest.mark.parametrize(
    "wrong",
    [
        {"state": ExchangeState.OPENING},
        {"state": ExchangeState.OVER},
        {"state": ExchangeState.PROXYING},
        {"stale_links": 2},
        {"tally": TallyState(((b"x", -1),), b"")},
        {"tally": TallyState((), b"x" * 500)},
    ],
)
def test_a_state_that_no_exchange_has_is_refused_and_takes_nothing(wrong: dict[str, Any]) -> None:
    with rig() as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("one ")))
        with pytest.raises(ValueError, match="exchange|answer|tally"):
            move(r, **wrong)
        (upstream,) = r.worker.upstreams
        assert upstream.in_flight == 1 and len(r.exchanges) == 1
        r.reply(chunk(DONE) + LAST)
        client.fin()


def test_an_upstream_that_is_not_here_is_refused() -> None:
    with rig() as r:
        client = r.client(post(CHAT))
        (exchange,) = r.exchanges
        place = place_of(exchange)
        for gone in ({"attempt": place.attempt._replace(upstream="gone")},):
            with pytest.raises(ValueError, match="gone isn't here"):
                continued(r.runtime, r.worker.upstreams, place._replace(**gone), parts_of(exchange))
        client.fin()


def test_a_key_pays_once_for_an_answer_that_moves() -> None:
    answer = b'{"usage":{"prompt_tokens":3,"completion_tokens":40}}'
    for at in range(len(answer)):
        account = Account()
        first = Charge(account, KEY, pays_tokens=True)
        first.asked()
        first.passed(answer[:at])
        then = Charge.continued(account, KEY, unpack(CHARGE, pack(CHARGE, first.state())))
        then.passed(answer[at:])
        then.over()
        assert (account.requests_total, account.tokens_total) == (1, 40)


def test_events_that_pass_as_bytes_are_counted_over_the_move() -> None:
    wire = b"data: a\n\ndata: b\n\ndata: c\n\n"
    for at in range(len(wire)):
        account = Account()
        first = Charge(account, KEY, pays_tokens=True)
        first.asked()
        assert first.open_stream() is None
        first.passed(wire[:at])
        then = Charge.continued(account, KEY, first.state())
        first.leave()
        then.passed(wire[at:])
        then.over()
        assert (account.tokens_total, account.streams_now) == (3, 0)


@pytest.mark.parametrize("wrong", [{"tail": b"123456"}, {"events": -1}, {"events": 1}])
def test_a_charge_that_can_not_be_is_refused(wrong: dict[str, Any]) -> None:
    state = ChargeState(False, 0, True, b"", TallyState((), b""), True)
    Charge.continued(Account(), KEY, state)
    with pytest.raises(ValueError, match="charge"):
        Charge.continued(Account(), KEY, state._replace(**wrong))


def test_the_end_of_a_connection_after_the_move_is_told() -> None:
    with rig() as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("one ")))
        move(r)
        r.link.fin()
        r.turn()
        assert CloseReason.UPSTREAM_TRUNCATED.word.encode() in client.raw
