"""Checks: a server with a health_path is asked by streamd itself, and no request waits for a server that is gone."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import FakeTransport, Rig, post, whole_answer

from streamd.config import Settings, UpstreamSettings
from streamd.daemon import logs
from streamd.net.checks import EVERY_S, JITTER
from streamd.net.fetch import TIMEOUT_S

A = UpstreamSettings(
    name="a", url="http://a.test:1/base", health_path="/health?deep=1", headers={"X-Org": "o"}, key="sk"
)
B = UpstreamSettings(name="b", url="http://b.test:2")
WHOLE = {"model": "m", "messages": []}
WELL = whole_answer(b"ok", "200 OK", "connection: close")
LONGEST_S = EVERY_S * (1 + JITTER) + 0.5


class Checked(Rig):
    """Two servers, of which the first is checked; it answers each check with `verdict`, if any."""

    verdict: bytes | None = WELL

    def wait(self, seconds: float) -> None:
        """Let time pass, while the first server answers."""
        for _ in range(round(seconds * 4)):
            self.pass_time(0.25)
            for link in self.links:
                if link.sent.startswith(b"GET ") and not link.closed and self.verdict is not None:
                    link.feed(self.verdict)
            self.turn()

    @property
    def checks(self) -> int:
        return self.runtime.counters.upstream_checks.get("a", 0)


@contextlib.contextmanager
def checked(**settings: Any) -> Iterator[Checked]:
    logs.set_level("error")
    r = Checked(upstreams=(A, B), **settings)
    try:
        yield r
        r.worker.upstreams.close()
        r.runtime.sweep.on_tick.remove(r.worker.upstreams.tick)
        r.check_nothing_is_left()
    finally:
        logs.set_level("info")
        r.runtime.sweep.stop()
        r.loop.close()


def test_a_server_is_asked_every_few_seconds_with_its_own_key_and_fields() -> None:
    with checked() as r:
        r.wait(60.0)
        assert 60.0 / LONGEST_S - 1 <= r.checks <= 60.0 / (EVERY_S * (1 - JITTER)) + 1
        sent = bytes(r.links[0].sent)
        assert sent.startswith(b"GET /base/health?deep=1 HTTP/1.1\r\nhost: a.test:1\r\n")
        assert b"authorization: Bearer sk\r\n" in sent and b"x-org: o\r\n" in sent
        assert r.runtime.counters.upstream_requests == {} and set(r.dialled) == {1}


@pytest.mark.parametrize("how", ["refused", "silent", "503", "mute"])
def test_a_server_that_fails_its_check_is_asked_by_checks_alone(how: str) -> None:
    with checked() as r:
        a, b = r.worker.upstreams
        r.refusing = {1} if how == "refused" else set()
        r.mute = {1} if how == "mute" else set()
        r.verdict = whole_answer(b"", "503 Loading", "connection: close") if how == "503" else None
        r.wait(LONGEST_S + TIMEOUT_S)
        assert r.runtime.counters.upstream_failures
        for _ in range(20):
            b.in_flight += 1  # else the server that failed last comes last anyway
            client = r.client(post(WHOLE))
            b.in_flight -= 1
            assert r.links[-1].sent.startswith(b"POST ") and r.dialled[-1] == 2
            r.reply(WELL)
            assert client.statuses == [200]
            r.wait(2.0)
        r.refusing, r.mute, r.verdict = set(), set(), WELL
        r.wait(60.0)
        assert a.health.all.is_in
        b.in_flight += 1
        r.client(post(WHOLE))
        r.pass_time(0.1)
        b.in_flight -= 1
        assert r.dialled[-1] == 1
        r.reply(WELL)


def test_a_fine_check_does_not_let_in_a_server_whose_answers_fail() -> None:
    with checked() as r:
        a, _ = r.worker.upstreams
        r.wait(LONGEST_S)
        a.health.failed("p", r.loop.time(), r.loop.time(), r.runtime.rng)
        a.health.failed("q", r.loop.time(), r.loop.time(), r.runtime.rng)
        before = r.checks
        r.wait(3 * LONGEST_S)
        assert r.checks - before <= 5 and not a.health.all.is_in
        assert a.health.takes("p", r.loop.time()), "a request probes it"


def test_a_check_with_a_wrong_path_or_key_says_nothing() -> None:
    with checked() as r:
        a, _ = r.worker.upstreams
        r.verdict = whole_answer(b"", "404 Not Found", "connection: close")
        r.wait(3 * LONGEST_S)
        assert a.health.all.is_in and not a.health.is_checked
        a.health.unreachable(r.loop.time(), r.loop.time(), r.runtime.rng)
        r.wait(1.0)
        assert a.health.takes("p", r.loop.time())
        before = r.checks
        r.wait(3 * LONGEST_S)
        assert r.checks - before <= 5


def test_a_shortage_of_our_own_is_no_failed_check() -> None:
    with checked() as r:
        a, _ = r.worker.upstreams

        def out_of_them(host: str, port: int, protocol: object) -> FakeTransport:
            raise OSError(errno.EMFILE, "none left")

        r.loop.dial = out_of_them
        r.wait(3 * LONGEST_S)
        assert a.health.all.is_in and not r.runtime.counters.upstream_failures


def test_a_reload_ends_the_checks_of_servers_that_are_gone() -> None:
    with checked() as r:
        r.verdict = None
        while not r.links or r.link.closed:
            r.wait(0.25)
        r.worker.upstreams.reload(Settings(upstreams=(B,)))
        assert r.link.closed
        before = r.checks
        r.wait(2 * LONGEST_S)
        assert r.checks == before
        r.worker.upstreams.reload(Settings(upstreams=(dataclasses.replace(A, health_path="/h"), B)))
        while r.checks == before:
            r.wait(0.25)
        assert r.link.sent.startswith(b"GET /base/h ")
