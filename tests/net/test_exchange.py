"""Exchange: the choice of upstreams and retries, the time of each step, and the outcome of answers that go wrong."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import weakref
from typing import Any

import pytest
from fakes import (
    CHAT,
    DONE,
    LAST,
    SSE_HEAD,
    WHOLE,
    Client,
    FakeTransport,
    Rig,
    chunk,
    event,
    events_in,
    get,
    post,
    rig,
    text_of,
    whole_answer,
)

from streamd.config import UpstreamSettings
from streamd.net import exchange
from streamd.net.attempt import WATCHED_S
from streamd.net.client import BROKEN_END_S
from streamd.net.exchange import TRANSITIONS, ExchangeState
from streamd.reasons import CloseReason
from streamd.wire.via import PASSES_MAX

TWO = (UpstreamSettings(name="a", url="http://a.test:1"), UpstreamSettings(name="b", url="http://b.test:2"))
ONE = TWO[:1]
RATE_LIMITED = whole_answer(b'{"error": {"message": "slow down"}}', "429 Too Many Requests", "retry-after: 7")
OVERLOADED = whole_answer(b'{"error": {"message": "full"}}', "503 Service Unavailable", "retry-after: 600")


def error_event(client: Client) -> dict[str, object]:
    """The error event at the end of a chat stream; the ending must not look clean."""
    client.rig.pass_time(BROKEN_END_S)
    events = events_in(client.answer.body)
    assert not client.answer.whole and client.gone
    assert b"[DONE]" not in client.answer.body
    error: dict[str, object] = events[-1].json["error"]
    return error


def pooled(r: Rig, count: int = 1) -> None:
    """Leave `count` idle connections to the only upstream."""
    clients = [r.client(post(WHOLE)) for _ in range(count)]
    for link in r.links[-count:]:
        link.feed(whole_answer(b"ok"))
    r.turn()
    for client in clients:
        assert client.statuses == [200]
        client.fin()


def test_every_phase_of_an_exchange_leads_to_over() -> None:
    assert set(TRANSITIONS) == set(ExchangeState)
    over = ExchangeState.OVER
    assert all(over in steps for state, steps in TRANSITIONS.items() if state is not over)


# -- the request to the upstream


def test_the_request_to_the_upstream_is_written_anew() -> None:
    with rig() as r:
        fields = ("Authorization: Bearer secret", "X-Api-Key: secret", "Cookie: a=b", "Connection: x-hop", "X-Hop: 1")
        ours = ("X-Stream-Policy: close", "Idempotency-Key: k", "X-Forwarded-For: 10.0.0.1", "Accept-Encoding: gzip")
        r.client(post(WHOLE, *fields, *ours, "X-Request-Id: r1", "X-Other: kept", path="/v1/chat/completions?a=b"))
        head, _, body = bytes(r.link.sent).partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        assert lines[0] == b"POST /v1/chat/completions?a=b HTTP/1.1"
        assert sorted(lines[1:]) == sorted(
            [
                b"host: up.test:1",
                b"content-type: application/json",
                b"x-other: kept",
                b"x-request-id: r1",
                b"accept-encoding: identity",
                b"via: 1.1 streamd",
                b"content-length: %d" % len(body),
            ]
        )


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models"])
def test_a_request_that_comes_round_too_often_is_refused(path: str) -> None:
    with rig() as r:
        for earlier in (0, PASSES_MAX - 1, PASSES_MAX):
            before = len(r.links)
            named = ("Via: 1.1 edge", *["Via: 1.1 streamd"] * earlier)
            client = r.client(post(WHOLE, *named, path=path) if path != "/v1/models" else get(path, *named))
            if earlier == PASSES_MAX:
                assert (client.answer.status, client.answer.error["code"]) == (508, "loop_detected")
                assert len(r.links) == before
                continue
            sent = bytes(r.links[-1].sent)
            assert sent.count(b"via: 1.1 streamd\r\n") == earlier + 1 and sent.count(b"via: 1.1 edge\r\n") == 1
            r.reply(whole_answer(b"{}", "200 OK", "Connection: close"))


def test_an_upstream_gets_its_own_key_base_path_headers_and_model_names() -> None:
    settings = UpstreamSettings(
        name="up", url="http://up.test:1/base", key="sk-up", headers={"X-Org": "o"}, aliases={"m": "their-m"}
    )
    with rig(upstreams=(settings,)) as r:
        r.client(post(WHOLE, "X-Org: theirs", path="/v1/messages"))
        head, _, body = bytes(r.link.sent).partition(b"\r\n\r\n")
        assert head.startswith(b"POST /base/v1/messages HTTP/1.1\r\n")
        assert b"\r\nauthorization: Bearer sk-up" in head and b"\r\nx-api-key: sk-up" in head
        assert head.count(b"x-org") == 1 and b"x-org: o" in head
        assert b'{"model": "their-m", "messages": [{"role"' in body


def test_the_clients_key_passes_only_with_pass_client_key() -> None:
    settings = UpstreamSettings(name="up", url="http://up.test:1", pass_client_key=True)
    with rig(upstreams=(settings,)) as r:
        r.client(post(WHOLE, "Authorization: Bearer mine"))
        assert b"authorization: Bearer mine" in r.link.sent


# -- connecting


def test_a_refused_connection_to_the_only_upstream_is_a_502() -> None:
    with rig() as r:
        r.refusing.add(1)
        client = r.client(post(WHOLE))
        assert client.answer.status == 502 and client.answer.get("x-should-retry") == "true"
        assert client.answer.error["code"] == "upstream_unreachable"
        assert r.ended[-1][1] is CloseReason.UPSTREAM_CONNECT


def test_after_a_refused_connection_the_next_upstream_is_tried() -> None:
    with rig(upstreams=TWO) as r:
        r.refusing.add(1)
        client = r.client(post(WHOLE))
        assert r.dialled == [1, 2]
        r.reply(whole_answer(b"ok"))
        assert client.answer.body == b"ok" and client.answer.get("x-upstream") == "b"


def test_when_all_upstreams_refuse_connections_they_are_left_out() -> None:
    with rig(upstreams=TWO) as r:
        r.refusing |= {1, 2}
        assert r.client(post(CHAT)).answer.status == 502
        assert r.dialled == [1, 2]
        assert not tuple(r.runtime.hub)
        later = r.client(post(WHOLE)).answer  # both are left out
        assert later.status == 503 and int(later.get("retry-after") or 0) >= 1
        assert later.get("x-should-retry") == "true"


def test_accepted_and_closed_at_once_counts_as_never_established() -> None:
    with rig(upstreams=TWO) as r:
        r.slamming.add(1)
        client = r.client(post(WHOLE))
        assert r.dialled == [1, 2]
        r.reply(whole_answer(b"ok"))
        assert client.statuses == [200]


def test_after_the_connect_timeout_the_next_upstream_is_tried() -> None:
    with rig(upstreams=TWO, connect_timeout_s=5.0) as r:
        r.mute.add(1)
        client = r.client(post(WHOLE))
        r.pass_time(4.5)
        assert r.dialled == [1]
        r.pass_time(1.0)
        assert r.dialled[:2] == [1, 2]
        r.links[0].feed(whole_answer(b"ok"))
        r.turn()
        assert client.statuses == [200]


def test_a_bug_while_connecting_is_a_500() -> None:
    with rig() as r:

        def broken(*args: object) -> object:
            raise ZeroDivisionError

        r.loop.dial = broken  # type: ignore[assignment]
        assert r.client(post(WHOLE)).answer.status == 500
        assert [type(bug) for bug in r.bugs] == [ZeroDivisionError]
        r.bugs.clear()
        r.runtime.counters.bugs = 0


# -- the reused connection


def test_a_reused_connection_that_ends_without_a_byte_is_tried_once_again_and_anew() -> None:
    with rig() as r:
        pooled(r, 3)
        client = r.client(post(WHOLE))
        assert len(r.links) == 3
        r.links[2].reset()
        r.turn()
        assert len(r.links) == 4 and r.link.sent == r.links[2].sent[-len(r.link.sent) :]
        r.reply(whole_answer(b"ok"))
        assert client.answer.body == b"ok"


@pytest.mark.parametrize(("seconds", "links"), [(0.9, 2), (1.1, 1)])
@pytest.mark.parametrize("how", ["fin", "reset"])
def test_a_request_that_was_worked_on_for_a_second_is_not_sent_again(seconds: float, links: int, how: str) -> None:
    with rig() as r:
        pooled(r)
        client = r.client(post(WHOLE))
        r.pass_time(seconds)
        getattr(r.links[0], how)()
        r.turn()
        assert len(r.links) == links
        if links == 1:
            assert client.answer.status == 502 and client.answer.get("x-should-retry") == "false"


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL])
def test_a_shortage_of_our_own_is_no_failure_of_the_upstream(code: int) -> None:
    with rig(upstreams=TWO) as r:
        dial = r.loop.dial

        def out_of_them(host: str, port: int, protocol: object) -> FakeTransport:
            raise OSError(code, "none left")

        r.loop.dial = out_of_them
        client = r.client(post(WHOLE))
        assert (client.answer.status, client.answer.error["code"]) == (503, "over_capacity")
        assert client.answer.get("x-should-retry") == "true" and client.answer.get("retry-after")
        assert all(up.health.takes("anonymous", r.loop.time()) for up in r.worker.upstreams)
        assert not r.runtime.counters.upstream_failures
        assert r.runtime.admission.refused()["descriptors"] == 1
        r.loop.dial = dial
        client = r.client(post(WHOLE))
        r.reply(whole_answer(b"ok"))
        assert client.answer.body == b"ok"


def test_a_request_is_sent_again_only_once() -> None:
    with rig() as r:
        pooled(r)
        client = r.client(post(WHOLE))
        r.link.reset()
        r.turn()
        r.link.reset()
        r.turn()
        assert client.answer.status == 502 and client.answer.get("x-should-retry") == "false"
        assert client.answer.error["code"] == "upstream_reset" and len(r.links) == 2


def test_a_reused_connection_that_ends_after_a_byte_is_not_tried_again() -> None:
    with rig() as r:
        pooled(r)
        client = r.client(post(WHOLE))
        r.link.feed(b"H")
        r.link.reset()
        r.turn()
        assert client.answer.status == 502 and len(r.links) == 1


def test_pooled_connections_are_used_for_four_seconds() -> None:
    with rig(pool_idle_timeout_s=4.0) as r:
        pooled(r)
        r.pass_time(3)
        client = r.client(post(WHOLE))
        assert len(r.links) == 1
        r.reply(whole_answer(b"ok"))
        client.fin()
        r.pass_time(4.5)
        assert r.link.closed
        r.client(post(WHOLE))
        assert len(r.links) == 2


def test_a_pooled_connection_just_over_its_time_is_not_taken() -> None:
    with rig(pool_idle_timeout_s=4.0) as r:
        pooled(r)
        r.runtime.sweep.stop()
        r.pass_time(4.1)
        assert not r.link.closed
        r.client(post(WHOLE))
        assert len(r.links) == 2 and r.links[0].closed
        r.runtime.sweep.start()


def test_the_pool_is_bounded() -> None:
    with rig(pool_idle_max=2) as r:
        pooled(r, 3)
        assert [link.closed for link in r.links] == [False, False, True]


@pytest.mark.parametrize("what", ["fin", "reset"])
def test_a_pooled_connection_that_the_server_closes_is_gone(what: str) -> None:
    with rig() as r:
        pooled(r)
        getattr(r.link, what)()
        r.turn()
        client = r.client(post(WHOLE))
        assert len(r.links) == 2
        r.reply(whole_answer(b"ok"))
        assert client.statuses == [200]


def test_unsolicited_bytes_end_a_pooled_connection() -> None:
    with rig() as r:
        pooled(r)
        r.reply(whole_answer(b"forged"))
        assert r.link.closed
        r.client(post(WHOLE))
        assert len(r.links) == 2


def test_bytes_behind_an_answer_end_its_connection() -> None:
    with rig() as r:
        client = r.client(post(WHOLE))
        r.reply(whole_answer(b"ok") + whole_answer(b"forged"))
        assert client.answer.body == b"ok" and r.link.closed


# -- 503 and 429


@pytest.mark.parametrize("refusal", [RATE_LIMITED, OVERLOADED])
@pytest.mark.parametrize("body", [CHAT, WHOLE])
def test_a_request_that_one_upstream_refuses_goes_to_another(refusal: bytes, body: dict[str, object]) -> None:
    with rig(upstreams=TWO) as r:
        client = r.client(post(body))
        r.reply(refusal)
        assert r.dialled == [1, 2] and client.raw == b""
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST if body is CHAT else whole_answer(b"ok"))
        assert client.answer.status == 200 and client.answer.get("x-upstream") == "b"
        a, _ = r.worker.upstreams
        assert a.left_out(r.loop.time()) is (refusal is OVERLOADED)


@pytest.mark.parametrize(("refusal", "status", "retry_after"), [(RATE_LIMITED, 429, "7"), (OVERLOADED, 503, "60")])
def test_the_refusal_of_the_only_upstream_is_passed_on(refusal: bytes, status: int, retry_after: str) -> None:
    with rig(upstreams=ONE) as r:
        for body in (CHAT, WHOLE):
            client = r.client(post(body))
            r.reply(refusal)
            answer = client.answer
            assert answer.status == status and b"error" in answer.body
            assert answer.get("retry-after") == retry_after and answer.get("x-should-retry") is None
            assert not tuple(r.runtime.hub)


def test_when_two_upstreams_refuse_the_second_refusal_is_passed_on() -> None:
    with rig(upstreams=TWO) as r:
        client = r.client(post(WHOLE))
        r.reply(OVERLOADED)
        r.reply(RATE_LIMITED)
        assert client.answer.status == 429 and r.dialled == [1, 2]


def test_an_upstreams_own_x_should_retry_is_kept() -> None:
    with rig() as r:
        client = r.client(post(WHOLE))
        r.reply(whole_answer(b"{}", "500 Oops", "x-should-retry: true"))
        assert client.answer.get("x-should-retry") == "true"


def test_a_refusal_after_the_commit_is_still_tried_elsewhere() -> None:
    with rig(upstreams=TWO, commit_after_s=1.0) as r:
        client = r.client(post(CHAT))
        r.pass_time(1.5)
        assert client.answer.status == 200
        r.reply(OVERLOADED)
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        assert text_of(events_in(client.answer.body)) == "a" and client.answer.whole


# -- back-off


def test_a_failing_upstream_is_left_out_for_longer_and_longer_and_let_back_in() -> None:
    with rig(upstreams=TWO, pool_idle_max=0) as r:
        a, b = r.worker.upstreams
        r.refusing.add(1)
        r.client(post(WHOLE))
        assert r.dialled == [1, 2]
        r.reply(whole_answer(b"ok"))
        waits = []
        for _ in range(5):
            waits.append(a.health.all.out_until - a.health.all.failed_at)
            r.client(post(WHOLE))
            r.reply(whole_answer(b"ok"))
            before = len(r.dialled)
            r.pass_time(a.health.all.out_until - r.loop.time() + 0.3)
            assert r.dialled[before - 1 :] == [2, 1], "the first is tried by streamd itself, once"
        assert all(later > 1.1 * earlier for earlier, later in itertools.pairwise(waits))
        r.refusing.clear()
        r.pass_time(a.health.all.out_until - r.loop.time() + 0.3)
        assert r.dialled[-1] == 1 and a.health.all.is_in
        b.in_flight = 1  # of equally busy servers the first would come last
        r.client(post(WHOLE))
        r.pass_time(WATCHED_S)
        r.reply(whole_answer(b"ok"))
        assert r.dialled[-1] == 1
        b.in_flight = 0


FAILING = ("502 Bad Gateway", "503 Service Unavailable", "504 Gateway Timeout", "529 Overloaded")
REFUSING = ("429 Too Many Requests", "503 Service Unavailable", "529 Overloaded")
PASSED = ("400 Bad", "401 No", "404 None", "408 Slow", "409 Conflict", "422 No", "425 Early", "500 Oops", *FAILING)
KEYED = ("Authorization: Bearer one",), ("Authorization: Bearer two",)  # two principals


@pytest.mark.parametrize("body", [CHAT, WHOLE])
@pytest.mark.parametrize("status", [*PASSED, REFUSING[0]])
def test_the_status_of_the_only_upstream_passes_as_it_is(status: str, body: dict[str, Any]) -> None:
    with rig() as r:
        client = r.client(post(body))
        r.reply(whole_answer(b'{"error": {"message": "its own"}}', status, "x-own: kept"))
        answer = client.answer
        assert answer.status == int(status[:3]) and b"its own" in answer.body and answer.get("x-own") == "kept"
        assert answer.get("x-should-retry") is None and len(r.links) == 1


@pytest.mark.parametrize("status", PASSED)
def test_which_statuses_leave_a_server_out_and_which_are_tried_elsewhere(status: str) -> None:
    with rig(upstreams=TWO) as r:
        client = r.client(post(WHOLE))
        r.reply(whole_answer(b"{}", status))
        if status in REFUSING:
            assert r.dialled == [1, 2]
            r.reply(whole_answer(b"{}"))
        assert client.statuses == [200 if status in REFUSING else int(status[:3])]
        a, b = r.worker.upstreams
        assert a.health.takes("anonymous", r.loop.time()) is (status not in FAILING)
        counted = {name for name, _ in r.runtime.counters.upstream_failures}
        assert counted == ({"a"} if status in (*FAILING, "500 Oops") else set())
        assert b.health.all.is_in


def test_three_errors_in_a_row_leave_a_server_out() -> None:
    with rig(upstreams=TWO) as r:
        _a, b = r.worker.upstreams
        for k in range(4):
            b.in_flight = 1  # else the server that failed last comes last
            client = r.client(post(WHOLE))
            assert r.dialled[-1] == (1 if k < 3 else 2)
            r.reply(whole_answer(b"{}", "500 Oops" if k < 3 else "200 OK", "connection: close"))
            assert client.statuses == [500 if k < 3 else 200]
            b.in_flight = 0


def test_the_failures_that_one_principal_provokes_leave_others_their_server() -> None:
    with rig(upstreams=TWO) as r:
        _a, b = r.worker.upstreams
        for fields, status in ((KEYED[0], "200 OK"), (KEYED[1], "502 Bad Gateway")):
            b.in_flight = 1
            r.client(post(WHOLE, *fields))
            r.reply(whole_answer(b"{}", status, "connection: close"))
            b.in_flight = 0
        dialled = []
        for fields in KEYED:
            b.in_flight = 1
            r.client(post(WHOLE, *fields))
            dialled.append(r.dialled[-1])
            r.reply(whole_answer(b"{}", "200 OK", "connection: close"))
            b.in_flight = 0
        assert dialled == [1, 2]


def test_where_every_server_fails_their_own_errors_arrive() -> None:
    with rig(upstreams=TWO) as r:
        for k in range(12):
            client = r.client(post(WHOLE))
            r.reply(whole_answer(b"{}", "502 Bad Gateway", "connection: close"))
            assert client.statuses == [502], k


def test_a_server_that_is_due_is_probed_by_one_request_at_a_time() -> None:
    with rig(upstreams=TWO, pool_idle_max=0) as r:
        first = r.client(post(WHOLE))
        r.reply(whole_answer(b"{}", "504 Gateway Timeout"))
        assert first.statuses == [504] and r.dialled == [1]
        a, b = r.worker.upstreams
        r.pass_time(1.0)  # its back-off is over
        b.in_flight = 1
        clients = [r.client(post(WHOLE)) for _ in range(20)]
        b.in_flight -= 1
        assert r.dialled[1:].count(1) == 1 and r.dialled[1:].count(2) == 19
        clients[0].reset()  # the probe ends without a verdict
        b.in_flight += 1
        last = r.client(post(WHOLE))
        r.pass_time(WATCHED_S)
        b.in_flight -= 1
        assert r.dialled[-1] == 1
        for link in r.links[1:]:
            link.feed(whole_answer(b"{}", "200 OK", "connection: close"))
        r.turn()
        assert last.statuses == [200] and a.health.all.is_in


def test_a_doubtful_servers_connection_is_watched_before_the_request_goes_out() -> None:
    with rig(upstreams=TWO) as r:
        a, b = r.worker.upstreams
        a.health.is_doubtful = True
        client = r.client(post(WHOLE))
        assert r.dialled == [1] and not r.link.sent
        r.link.fin()
        r.pass_time(WATCHED_S)
        assert r.dialled == [1, 2] and not a.health.is_reachable()
        r.reply(whole_answer(b"ok", "200 OK", "connection: close"))
        assert client.answer.body == b"ok"
        r.pass_time(1.0)
        b.in_flight = 1
        client = r.client(post(WHOLE))
        r.pass_time(WATCHED_S)
        assert r.dialled == [1, 2, 1] and r.link.sent
        r.reply(whole_answer(b"ok", "200 OK", "connection: close"))
        assert client.answer.body == b"ok" and not a.health.is_doubtful
        r.client(post(WHOLE))
        assert r.dialled[-1] == 1 and r.link.sent, "a server that answered isn't watched"
        b.in_flight = 0


@pytest.mark.parametrize("when", ["reader leaves", "connect_timeout"])
def test_a_watched_connection_that_is_given_up_is_closed(when: str) -> None:
    with rig(upstreams=ONE, connect_timeout_s=0.0) as r:
        (a,) = r.worker.upstreams
        a.health.is_doubtful = True
        client = r.client(post(WHOLE))
        if when == "reader leaves":
            client.reset()
        else:
            r.exchanges[0].on_due(r.loop.time() + 1)
            r.turn()
            assert client.answer.status == 502
        assert r.link.closed and not r.link.sent and a.in_flight == 0


@pytest.mark.parametrize("seconds", [0.0, 0.2, 5.0])
@pytest.mark.parametrize("how", ["fin", "reset"])
def test_a_fresh_connection_that_ends_behind_the_request_is_not_tried_again(seconds: float, how: str) -> None:
    with rig(upstreams=TWO) as r:
        client = r.client(post(WHOLE))
        r.pass_time(seconds)
        getattr(r.link, how)()
        r.turn()
        assert client.answer.status == 502 and client.answer.get("x-should-retry") == "false"
        assert r.dialled == [1]


@pytest.mark.parametrize(("seconds", "again"), [(0.0, True), (0.9, True), (1.1, False)])
@pytest.mark.parametrize("body", [CHAT, WHOLE])
def test_a_408_on_a_reused_connection_is_asked_again_once(seconds: float, again: bool, body: dict[str, Any]) -> None:
    with rig() as r:
        pooled(r)
        client = r.client(post(body))
        r.pass_time(seconds)
        r.reply(whole_answer(b"late", "408 Request Timeout", "connection: close"))
        assert len(r.links) == 1 + again
        if again:
            r.reply(whole_answer(b"late", "408 Request Timeout"))
        assert client.answer.status == 408 and client.answer.body == b"late" and len(r.links) == 1 + again
        assert client.answer.get("x-should-retry") is None


def test_the_only_upstream_is_always_tried() -> None:
    with rig() as r:
        r.refusing.add(1)
        for _ in range(5):
            assert r.client(post(WHOLE)).answer.status == 502
        r.refusing.clear()
        client = r.client(post(WHOLE))
        r.pass_time(WATCHED_S)
        r.reply(whole_answer(b"ok"))
        assert client.statuses == [200]


# -- time


def test_a_request_without_a_byte_in_time_is_not_sent_again() -> None:
    with rig(upstreams=TWO, ttft_timeout_s=30.0) as r:
        client = r.client(post(WHOLE))
        r.pass_time(29)
        assert client.raw == b""
        r.pass_time(1.5)
        assert client.answer.status == 504 and client.answer.get("x-should-retry") == "false"
        assert client.answer.error["code"] == "upstream_ttft_timeout"
        assert len(r.links) == 1 and r.link.closed


def test_a_reused_connection_without_a_byte_in_time_is_not_tried_again() -> None:
    with rig(ttft_timeout_s=30.0) as r:
        pooled(r)
        client = r.client(post(WHOLE))
        r.pass_time(31)
        assert client.answer.status == 504 and len(r.links) == 1


def test_the_first_byte_time_runs_until_the_first_event() -> None:
    with rig(ttft_timeout_s=30.0, idle_timeout_s=10.0) as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD)
        r.pass_time(28)
        assert not client.gone
        r.pass_time(3)
        assert error_event(client)["code"] == "upstream_ttft_timeout"


@pytest.mark.parametrize("head_after_s", [0.0, 5.0])
@pytest.mark.parametrize("idle_timeout_s", [0.0, 20.0, 300.0])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_a_head_alone_does_not_put_off_the_first_events_deadline(
    head_after_s: float, idle_timeout_s: float, path: str
) -> None:
    """The commit and the end of idle_timeout check the deadlines between the head and the first event."""
    soon = {"retention_s": 1.0, "detach_grace_max_s": 1.0, "resume_grace_s": 1.0}
    with rig(ttft_timeout_s=30.0, idle_timeout_s=idle_timeout_s, commit_after_s=1.0, **soon) as r:
        client = r.client(post(CHAT, path=path))
        r.pass_time(head_after_s)
        r.reply(SSE_HEAD)
        r.pass_time(29.5 - head_after_s)
        assert not client.gone and not r.link.closed
        r.pass_time(1.0)
        assert r.link.closed
        r.pass_time(BROKEN_END_S)
        assert client.gone and r.closed == {CloseReason.UPSTREAM_TTFT_TIMEOUT: 1}


def test_silence_between_events_is_bounded_by_idle_timeout() -> None:
    with rig(ttft_timeout_s=300.0, idle_timeout_s=20.0) as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD)
        r.pass_time(100)
        r.reply(chunk(event("a")))
        r.pass_time(19)
        r.reply(chunk(b": a comment counts as life\n\n"))
        r.pass_time(19)
        assert not client.gone
        r.pass_time(2)
        assert error_event(client)["code"] == "upstream_idle_timeout" and r.link.closed
        assert text_of(events_in(client.answer.body)[:-1]) == "a"


def test_silence_in_a_passed_body_is_bounded_by_idle_timeout() -> None:
    with rig(idle_timeout_s=20.0) as r:
        client = r.client(post(WHOLE))
        r.reply(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello")
        r.pass_time(15)
        r.reply(b"a")
        r.pass_time(15)
        assert not client.gone
        r.pass_time(6)
        assert client.gone and not client.answer.whole and r.link.closed


def test_the_pause_of_a_slow_reader_does_not_count_as_the_upstreams_silence() -> None:
    with rig(idle_timeout_s=20.0, stall_timeout_s=60.0) as r:
        client = r.client(post(WHOLE), capacity=200)
        r.reply(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n" + b"a" * 500)
        r.pass_time(40)
        client.take()
        r.pass_time(15)
        r.reply(b"a" * 500)
        assert client.answer.whole


def test_a_whole_stream_may_have_a_limit() -> None:
    with rig(stream_timeout_s=60.0) as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD)
        for n in range(65):
            if client.gone:
                break
            r.reply(chunk(event(str(n))))
            r.pass_time(1.0)
        assert error_event(client)["code"] == "upstream_stream_timeout"
        assert r.runtime.counters.upstream_failures == {}  # the upstream is not at fault


def test_after_commit_after_a_stream_has_a_status_and_heartbeats() -> None:
    with rig(commit_after_s=10.0, heartbeat_s=15.0) as r:
        client = r.client(post(CHAT))
        r.pass_time(9.5)
        assert client.raw == b""
        r.pass_time(1.0)
        assert client.answer.status == 200
        r.pass_time(16)
        assert client.answer.body.endswith(b": hb\n")
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        assert text_of(events_in(client.answer.body)) == "a" and client.answer.whole


def test_an_upstreams_head_puts_off_no_heartbeat() -> None:
    with rig(commit_after_s=1.0, heartbeat_s=15.0) as r:
        client = r.client(post(CHAT))
        r.pass_time(10)
        r.reply(SSE_HEAD)  # nothing of it is written to the reader
        r.pass_time(7)
        assert client.answer.body.endswith(b": hb\n")


def test_only_a_request_for_a_stream_is_committed() -> None:
    with rig(commit_after_s=1.0) as r:
        clients = [
            r.client(post(WHOLE)),
            r.client(post({**CHAT, "stream": False})),
            r.client(post(CHAT, path="/v1/embeddings")),
            r.client(get("/v1/files")),
        ]
        r.pass_time(20)
        assert all(client.raw == b"" for client in clients)


def test_a_request_that_is_committed_while_connecting_fails_with_an_event() -> None:
    with rig(commit_after_s=1.0, connect_timeout_s=5.0) as r:
        r.mute.add(1)
        client = r.client(post(CHAT))
        r.pass_time(1.5)
        assert client.answer.status == 200
        r.pass_time(4.5)
        assert error_event(client)["code"] == "upstream_unreachable"


@pytest.mark.parametrize(
    ("wire", "code", "says"),
    [
        (RATE_LIMITED, "upstream_refused", "slow down"),
        (whole_answer(b'{"error": "plain"}', "500 Oops"), "upstream_refused", "plain"),
        (whole_answer(b"<html>", "502 Bad Gateway"), "upstream_refused", "502, not with a stream of events"),
        (whole_answer(b'{"id": 1}', "200 OK", "content-type: application/json"), "upstream_refused", "no whole answer"),
        (
            b"HTTP/1.1 400 No\r\ncontent-length: 99\r\n\r\n" + b'{"error": {"message"',
            "upstream_refused",
            "400, not",
        ),
        (b"HTTP/1.1 400 No\r\n\r\n" + b"a" * 40_000, "upstream_refused", "400"),
    ],
)
def test_after_the_commit_an_answer_without_a_stream_becomes_an_error_event(wire: bytes, code: str, says: str) -> None:
    with rig(commit_after_s=1.0) as r:
        client = r.client(post(CHAT))
        r.pass_time(1.5)
        for start in range(0, len(wire), 20_000):
            r.reply(wire[start : start + 20_000])
        r.link.fin()
        r.turn()
        error = error_event(client)
        assert error["code"] == code and says in str(error["message"])


def test_after_the_commit_an_error_without_end_is_an_error_event_after_16_kib() -> None:
    with rig(commit_after_s=1.0) as r:
        client = r.client(post(CHAT))
        r.pass_time(1.5)
        r.reply(b"HTTP/1.1 500 No\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(15):
            r.reply(chunk(b" " * 1024))
        assert not client.answer.body.endswith(b"\n\n")
        r.reply(chunk(b" " * 1024))
        assert error_event(client)["code"] == "upstream_refused" and r.link.closed


def test_after_the_commit_an_error_that_trickles_is_an_error_event_after_five_seconds() -> None:
    with rig(commit_after_s=1.0) as r:
        client = r.client(post(CHAT))
        r.pass_time(1.5)
        r.reply(b"HTTP/1.1 500 No\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(5):
            assert not r.link.closed
            r.reply(chunk(b" "))
            r.pass_time(1)
        r.pass_time(0.5)
        assert error_event(client)["code"] == "upstream_refused" and r.link.closed


def test_after_the_commit_silence_becomes_an_error_event() -> None:
    with rig(commit_after_s=1.0, ttft_timeout_s=30.0) as r:
        client = r.client(post(CHAT))
        r.pass_time(31)
        assert error_event(client)["code"] == "upstream_ttft_timeout"


def test_ttft_before_the_commit_is_a_504() -> None:
    with rig(commit_after_s=10.0, ttft_timeout_s=5.0) as r:
        client = r.client(post(CHAT))
        r.pass_time(6)
        assert client.answer.status == 504 and not tuple(r.runtime.hub)


# -- answers


def test_complete_is_more_than_a_clean_end() -> None:
    finish = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\n'
    for payload, whole in (
        ((event("a"), DONE), True),
        ((event("a"), finish), True),  # some servers never send [DONE]
        ((event("a"),), False),
        ((event("a", 0), event("b", 1), finish), False),
        ((), False),
    ):
        with rig() as r:
            client = r.client(post(CHAT))
            r.reply(SSE_HEAD + (chunk(*payload) if payload else b"") + LAST)
            if whole:
                assert client.answer.whole and not client.gone
            else:
                assert error_event(client)["code"] == "upstream_truncated"


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (b"content-length: %d\r\n", event("a") + DONE),
        (b"", event("a") + DONE),
        (b"", event("a") + DONE[:-1]),  # the last blank line is missing, and the framing ended properly
    ],
)
def test_a_stream_is_relayed_from_every_framing(head: bytes, body: bytes) -> None:
    with rig() as r:
        client = r.client(post(CHAT))
        length = head % len(body) if head else b""
        r.reply(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n" + length + b"\r\n" + body)
        r.link.fin()
        r.turn()
        assert text_of(events_in(client.answer.body)) == "a" and client.answer.whole


def test_a_stream_of_no_known_dialect_ends_with_its_framing() -> None:
    with rig() as r:
        client = r.client(get("/v1/other"))
        r.reply(SSE_HEAD + chunk(b"data: x\n\n") + LAST)
        assert client.answer.whole and client.answer.get("x-stream-id")
        assert [each.data for each in events_in(client.answer.body)] == [b"x"]


def test_an_event_that_is_too_large_is_a_truncation() -> None:
    with rig(event_bytes_max=1000) as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a") + event("b" * 2000)))
        error = error_event(client)
        assert error["code"] == "event_too_large" and r.link.closed
        assert text_of(events_in(client.answer.body)[:-1]) == "a"


def test_a_too_large_event_without_an_end_is_a_truncation() -> None:
    with rig(event_bytes_max=1000) as r:
        client = r.client(post(CHAT))
        r.reply(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + b"data: " + b"a" * 994)
        r.link.fin()  # the completed blank line is a byte too many
        r.turn()
        assert error_event(client)["code"] == "event_too_large"


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity"])
def test_a_compressed_answer_passes_as_bytes(encoding: str) -> None:
    with rig() as r:
        client = r.client(post(CHAT))
        head = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: {encoding}\r\n".encode()
        r.reply(head + b"transfer-encoding: chunked\r\n\r\n" + chunk(DONE) + LAST)
        answer = client.answer
        assert answer.whole and answer.status == 200
        assert (answer.get("x-stream-id") is None) is (encoding != "identity")
        assert (answer.body == DONE) is (encoding != "identity")


def test_an_answer_with_a_status_other_than_200_passes_unchanged() -> None:
    with rig() as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD.replace(b"200 OK", b"500 Oops") + chunk(DONE) + LAST)
        assert client.answer.status == 500 and client.answer.body == DONE


def test_interim_answers_are_skipped() -> None:
    with rig() as r:
        client = r.client(post(WHOLE))
        r.reply(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n")
        assert client.raw == b""
        r.reply(whole_answer(b"ok"))
        assert client.answer.body == b"ok"


def test_a_passed_body_that_breaks_off_never_looks_whole() -> None:
    for break_off in ("fin", "reset"):
        for head in (b"content-length: 100", b"transfer-encoding: chunked"):
            with rig() as r:
                client = r.client(post(WHOLE))
                r.reply(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n" + (chunk(b"hi") if b"chunked" in head else b"hi"))
                getattr(r.link, break_off)()
                r.turn()
                assert not client.answer.whole and client.gone
                assert r.ended[-1][1] is CloseReason.UPSTREAM_TRUNCATED


def test_a_bug_while_an_answer_is_read_ends_the_stream() -> None:
    with rig() as r:
        waiting, streaming = r.client(post(WHOLE)), None
        r.link.protocol._asker.on_bug("test", ZeroDivisionError())
        r.turn()
        assert waiting.answer.status == 500
        streaming = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a")))
        r.link.protocol.crash("test", ZeroDivisionError())
        r.turn()
        assert error_event(streaming)["code"] == "internal"
        assert len(r.bugs) == r.runtime.counters.bugs == 2
        r.bugs.clear()
        r.runtime.counters.bugs = 0


# -- cancel


@pytest.mark.parametrize("body", [CHAT, WHOLE])
@pytest.mark.parametrize("when", ["connecting", "asked", "begun"])
@pytest.mark.parametrize("how", ["fin", "reset"])
def test_a_reader_that_leaves_cancels_the_request(body: dict[str, object], when: str, how: str) -> None:
    with rig() as r:
        if when == "connecting":
            r.mute.add(1)
        client = r.client(post(body))
        if when == "begun":
            r.reply(SSE_HEAD if body is CHAT else b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n")
        getattr(client, how)()
        assert all(link.aborted for link in r.links) and r.exchanges == []
        assert r.runtime.counters.upstream_cancels == {"up": 1}
        assert r.ended[-1][1] is CloseReason.READER_GONE
        assert all(upstream.in_flight == 0 for upstream in r.worker.upstreams)


def test_a_connection_that_is_established_after_its_reader_left_is_closed() -> None:
    with rig() as r:
        client = r.client()
        client.transport.feed(post(WHOLE))
        client.transport.reset()  # before the connecting task has its turn again
        r.turn()
        assert all(link.closed for link in r.links)


def test_delete_stops_a_stream_and_sends_its_readers_an_error() -> None:
    with rig() as r:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a")))
        stream_id = client.answer.get("x-stream-id")
        assert r.client(get(f"/v1/streams/{stream_id}", method="DELETE")).answer.status == 204
        assert r.link.aborted
        assert error_event(client)["code"] == "cancelled"
        assert r.ended[-1][1] is CloseReason.CANCELLED or r.ended[-2][1] is CloseReason.CANCELLED


def test_delete_before_the_answer_refuses_all_its_readers() -> None:
    with rig() as r:
        first = r.client(post(CHAT, "Idempotency-Key: k"))
        second = r.client(post(CHAT, "Idempotency-Key: k"))  # learns the id
        stream_id = second.answer.get("x-stream-id")
        assert r.client(get(f"/v1/streams/{stream_id}", method="DELETE")).answer.status == 204
        assert first.answer.status == 409 and first.answer.error["code"] == "cancelled"
        assert error_event(second)["code"] == "cancelled"
        assert r.link.aborted


def test_an_answer_without_a_stream_is_an_error_to_joined_readers() -> None:
    with rig() as r:
        first = r.client(post(CHAT, "Idempotency-Key: k"))
        second = r.client(post(CHAT, "Idempotency-Key: k"))
        r.reply(whole_answer(b'{"error": {}}', "400 Bad Request"))
        assert first.answer.status == 400
        assert error_event(second)["code"] == "upstream_refused"


def test_a_failure_before_the_answer_is_an_error_to_joined_readers() -> None:
    with rig() as r:
        first = r.client(post(CHAT, "Idempotency-Key: k"))
        second = r.client(post(CHAT, "Idempotency-Key: k"))
        r.link.reset(ConnectionResetError(errno.ECONNRESET, ""))
        r.turn()
        assert first.answer.status == 502
        assert error_event(second)["code"] == "upstream_reset"


def test_a_reader_that_left_before_the_head_may_come_back_within_its_grace() -> None:
    for wire in (SSE_HEAD + chunk(event("a"), DONE) + LAST, whole_answer(b"{}", "400 Bad Request")):
        with rig() as r:
            client = r.client(post(CHAT, "X-Stream-Detach-Grace: 60"))
            client.fin()
            assert not r.link.closed and r.runtime.hub.detached == 1
            r.reply(wire)
            (stream,) = r.runtime.hub
            assert stream.reason is not None and r.runtime.hub.detached == 0
            back = r.client(get(f"/v1/streams/{stream.id}"))
            if wire.startswith(SSE_HEAD):
                assert text_of(events_in(back.answer.body)) == "a"
            else:
                assert error_event(back)["code"] == "upstream_refused"


def test_an_ended_exchange_leaves_nothing_in_memory() -> None:
    with rig(retention_s=1.0) as r:
        client = r.client(post(CHAT, "Idempotency-Key: k"))
        (exchange,) = r.exchanges
        seen = [weakref.ref(exchange), weakref.ref(client.connection), weakref.ref(r.link.protocol)]
        del exchange
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        (stream,) = r.runtime.hub
        assert stream.source is None and not stream.readers
        del stream
        client.fin()
        r.pass_time(6)
        r.links.clear()
        del client
        gc.collect()
        assert [ref() for ref in seen] == [None, None, None]


# -- the body in the books


def test_a_body_is_charged_as_long_as_it_may_be_sent_again() -> None:
    body = json.dumps({**CHAT, "pad": "x" * 5000})
    with rig(commit_after_s=1.0) as r:
        client = r.client(post(body.encode(), "Content-Type: application/json", "X-Stream-Detach-Grace: 30"))
        r.pass_time(1.5)
        assert client.raw.startswith(b"HTTP/1.1 200") and r.runtime.bodies_bytes == len(body)
        client.reset()
        assert r.runtime.bodies_bytes == len(body), "the generation has a grace, and may be tried elsewhere"
        r.reply(SSE_HEAD)
        assert r.runtime.bodies_bytes == 0
        r.reply(chunk(DONE) + LAST)


@pytest.mark.parametrize(
    "answer", [SSE_HEAD + chunk(DONE) + LAST, whole_answer(b"{}"), whole_answer(b"", "503 Busy"), b""]
)
@pytest.mark.parametrize("body", [CHAT, WHOLE])
def test_the_charge_ends_with_the_upstreams_answer(body: dict[str, Any], answer: bytes) -> None:
    with rig() as r:
        r.client(post(body))
        assert r.runtime.bodies_bytes > 0
        if answer:
            r.reply(answer)
        else:
            r.link.reset()
            r.turn()
        assert r.runtime.bodies_bytes == 0


def test_a_mistake_before_a_request_goes_out_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(exchange, "Attempt", mistaken)
    with rig() as r:
        assert r.client(post(CHAT)).answer.status == 500
        assert [type(bug) for bug in r.bugs] == [ZeroDivisionError]
        assert next(iter(r.worker.upstreams)).in_flight == 0
        r.bugs.clear()
        r.runtime.counters.bugs = 0
