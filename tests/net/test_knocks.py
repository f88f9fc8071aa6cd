"""Knocks: streamd itself finds out that a server can be reached again, and no request waits for one that can't."""

from __future__ import annotations

import dataclasses
import errno

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, Client, FakeTransport, Rig, chunk, event, post, rig

from streamd.config import Settings, UpstreamSettings
from streamd.net.knocks import SHORTAGE_S
from streamd.reasons import CloseReason

A = UpstreamSettings(name="a", url="http://a.test:1")
B = UpstreamSettings(name="b", url="http://b.test:2")
CONNECT_S = 5.0
FAULTS = ("refused", "mute", "closed at once")


def make(r: Rig, fault: str, ports: tuple[int, ...] = (1,)) -> None:
    """From now on the servers at these ports are like this."""
    for kind, name in ((r.refusing, "refused"), (r.mute, "mute"), (r.slamming, "closed at once")):
        kind.clear()
        if name == fault:
            kind.update(ports)
    for upstream in r.worker.upstreams:
        upstream.health.is_doubtful = True


def asked(r: Rig, *, key: str = "k") -> Client:
    """A request, answered by the server that gets it."""
    before = {link: link.sent.count(b"POST ") for link in r.links}
    client = r.client(post(CHAT, f"Authorization: Bearer {key}"))
    r.pass_time(0.02)
    for link in r.links:
        if link.sent.count(b"POST ") > before.get(link, 0) and not link.closed:
            link.feed(SSE_HEAD + chunk(event("a"), DONE) + LAST)
    r.turn()
    return client


def put_out(r: Rig, fault: str) -> None:
    """The first server fails until it is left out."""
    make(r, fault)
    first = r.client(post(CHAT))
    r.pass_time(CONNECT_S + 0.5)
    for link in r.links:
        if b"POST " in bytes(link.sent) and not link.closed:
            link.feed(SSE_HEAD + chunk(event("a"), DONE) + LAST)
    r.turn()
    assert first.answer.whole and not r.worker.upstreams._all[0].health.is_reachable()


@pytest.mark.parametrize("fault", FAULTS)
def test_no_request_waits_for_a_server_that_was_left_out(fault: str) -> None:
    with rig(upstreams=(A, B), connect_timeout_s=CONNECT_S) as r:
        put_out(r, fault)
        for k in range(120):
            client = asked(r, key=f"k{k}")
            assert client.answer.whole and client.answer.get("x-upstream") in (None, "b"), k
            r.pass_time(0.5)
        knocks = r.runtime.counters.upstream_checks["a"]
        assert 3 <= knocks <= 12 and set(r.runtime.counters.upstream_checks) == {"a"}
        assert r.runtime.counters.upstream_failures["a", CloseReason.UPSTREAM_CONNECT] in (knocks, knocks + 1)
        make(r, "")
        r.pass_time(40)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_came_back_gets_the_connection_that_found_out(fault: str) -> None:
    with rig(upstreams=(A, B), connect_timeout_s=CONNECT_S) as r:
        put_out(r, fault)
        make(r, "")
        up = r.worker.upstreams._all[0]
        while not up.health.is_reachable():
            r.pass_time(0.25)
        assert up.idle == 1
        dialled = r.dialled.count(1)
        for _ in range(2):  # of two idle servers the one that failed comes last
            r.client(post(CHAT))
        r.pass_time(0.02)
        assert r.dialled.count(1) == dialled and up.idle == 0
        for link in r.links:
            if not link.closed and b"POST " in bytes(link.sent):
                link.feed(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        r.turn()


def test_a_models_only_server_is_tried_by_requests() -> None:
    with rig(upstreams=(A,), connect_timeout_s=CONNECT_S) as r:
        make(r, "refused")
        for _ in range(3):
            assert r.client(post(CHAT)).answer.status == 502
            r.pass_time(3)
        assert not r.runtime.counters.upstream_checks
    named = (dataclasses.replace(A, models=("x",)), dataclasses.replace(B, models=("y",)))
    with rig(upstreams=named) as r:
        make(r, "refused", (1, 2))
        assert r.client(post(CHAT | {"model": "x"})).answer.status == 502
        r.pass_time(10)
        assert sum(r.runtime.counters.upstream_checks.values()) == 0


def test_where_no_server_is_left_a_request_finds_out() -> None:
    with rig(upstreams=(A, B), connect_timeout_s=CONNECT_S) as r:
        make(r, "refused", (1, 2))
        assert r.client(post(CHAT)).answer.status == 502
        assert r.client(post(CHAT)).answer.status == 503, "both are left out"
        make(r, "")
        now = r.runtime.time()
        for upstream in r.worker.upstreams:
            upstream.health.all.out_until = now - 0.01  # and the next sweep comes later
        assert asked(r).answer.whole
        r.pass_time(2)
        assert all(upstream.health.is_reachable() for upstream in r.worker.upstreams)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_between_the_end_of_the_time_out_and_the_knock_goes_elsewhere(fault: str) -> None:
    with rig(upstreams=(A, B), connect_timeout_s=CONNECT_S) as r:
        put_out(r, fault)
        out = r.worker.upstreams._all[0]
        for k in range(4):
            while out.health.connecting:  # a knock that finds no server
                r.pass_time(0.25)
            out.health.all.out_until = r.runtime.time() - 0.01
            dialled = r.dialled.count(1)
            r.client(post(CHAT, f"Authorization: Bearer {k}"))
            assert r.dialled.count(1) == dialled and not out.health.connecting
            r.pass_time(0.02)
            r.links[-1].feed(SSE_HEAD + chunk(event("a"), DONE) + LAST)


def test_a_server_that_answers_with_errors_is_not_knocked_at() -> None:
    with rig(upstreams=(A, B)) as r:
        r.client(post(CHAT))
        r.reply(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n")
        assert r.worker.upstreams._all[0].left_out(r.runtime.time())
        r.pass_time(10)
        assert sum(r.runtime.counters.upstream_checks.values()) == 0


def test_a_shortage_of_our_own_says_nothing_about_the_server() -> None:
    with rig(upstreams=(A, B), connect_timeout_s=CONNECT_S) as r:
        put_out(r, "refused")
        failures = r.runtime.counters.upstream_failures["a", CloseReason.UPSTREAM_CONNECT]

        def short(host: str, port: int, protocol: object) -> FakeTransport:
            raise OSError(errno.EMFILE, "Too many open files")

        dial, r.loop.dial = r.loop.dial, short
        before = r.runtime.counters.upstream_checks.get("a", 0)
        r.pass_time(10)
        knocks = r.runtime.counters.upstream_checks["a"] - before
        assert 5 <= knocks <= 10 / SHORTAGE_S + 1
        assert r.runtime.counters.upstream_failures["a", CloseReason.UPSTREAM_CONNECT] == failures
        r.loop.dial = dial
        make(r, "")
        r.pass_time(3)
        assert r.worker.upstreams._all[0].health.is_reachable()


@pytest.mark.parametrize("fault", ["refused", "mute"])
def test_a_reload_ends_the_knocks_at_servers_that_are_gone(fault: str) -> None:
    with rig(upstreams=(A, B), connect_timeout_s=CONNECT_S) as r:
        put_out(r, fault)
        r.pass_time(1)
        r.worker.upstreams.reload(Settings(upstreams=(B,)))
        knocks = r.runtime.counters.upstream_checks["a"]
        r.pass_time(30)
        assert r.runtime.counters.upstream_checks["a"] == knocks
        assert asked(r).answer.whole
