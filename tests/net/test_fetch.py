"""Fetch: a small answer from an upstream, reported exactly once, and everything that it took is given back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from fakes import FakeTransport, Rig, chunk, refuse_all, rig, whole_answer

from streamd.config import UpstreamSettings
from streamd.net import upstream as upstream_module
from streamd.net.attempt import Ask, FixedAsk
from streamd.net.fetch import ANSWER_BYTES_MAX, TIMEOUT_S, Fetch
from streamd.net.upstream import Upstream, UpstreamConnection, UpstreamState
from streamd.wire.http1 import LocalProtocolError

PORT = 1
UP = UpstreamSettings(name="up", url=f"http://up.test:{PORT}/base")


def ask(target: bytes = b"/models") -> Ask:
    return FixedAsk(target, [(b"host", b"up.test"), (b"x-length", b"0")])


class Fetching:
    """Fetches from the only upstream of a rig, and their results."""

    def __init__(self, r: Rig) -> None:
        self.r = r
        (self.upstream,) = r.worker.upstreams
        self.told: list[tuple[int, bytes]] = []

    def made(self, asked: Ask | None = None) -> Fetch:
        return Fetch(self.r.runtime, self.upstream, asked or ask(), self._done)

    def begun(self) -> Fetch:
        fetch = self.made()
        fetch.start()
        self.r.turn()
        return fetch

    def _done(self, upstream: Upstream, status: int, body: bytes) -> None:
        assert upstream is self.upstream
        self.told.append((status, body))

    @property
    def at_rest(self) -> bool:
        """No deadline, no task, no request in flight; only pooled connections are open."""
        timers = [timer for timer in self.r.loop._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
        ours = [timer for timer in timers if "Fetch" in repr(timer)]
        links: list[UpstreamConnection] = [transport.protocol for transport in self.r.links]
        return (
            not ours
            and not asyncio.all_tasks(self.r.loop)
            and self.upstream.in_flight == 0
            and all(link.at in (UpstreamState.IDLE, UpstreamState.CLOSED) for link in links)
            and self.upstream.idle == sum(link.at is UpstreamState.IDLE for link in links)
        )


@pytest.fixture
def f() -> Iterator[Fetching]:
    """A rig in which no fetch may be in flight at the end of the test."""
    with rig(upstreams=(UP,)) as r:
        made, held = Fetching(r), memory(r)
        yield made
        assert made.at_rest
        assert memory(r) == held


def memory(r: Rig) -> int:
    in_use = r.runtime.admission.status()["in_use"]
    assert isinstance(in_use, dict)
    return int(in_use["memory"])


def test_the_bytes_of_an_unfinished_answer_are_counted(f: Fetching) -> None:
    f.begun()
    before = memory(f.r)
    answer = whole_answer(b"x" * 50_000)
    f.r.reply(answer[:-20_000])
    assert memory(f.r) == before + 30_000
    f.r.reply(answer[-20_000:])
    assert memory(f.r) == before


def test_the_whole_answer_is_reported_and_the_connection_is_kept(f: Fetching) -> None:
    f.begun()
    assert bytes(f.r.link.sent) == b"GET /base/models HTTP/1.1\r\nhost: up.test\r\nx-length: 0\r\n\r\n"
    assert f.upstream.in_flight == 1 and not f.at_rest
    answer = whole_answer(b"a list of models")
    f.r.reply(answer[:-4])
    assert f.told == [] and f.upstream.in_flight == 1
    f.r.reply(answer[-4:])
    assert f.told == [(200, b"a list of models")]
    assert f.upstream.in_flight == 0 and f.upstream.idle == 1
    f.begun()
    assert f.r.dialled == [PORT], "the second one takes the pooled connection"
    f.r.reply(whole_answer(b"another", "404 Not Found"))
    assert f.told[1:] == [(404, b"another")]


@pytest.mark.parametrize("end", ["fin", "reset", "408"])
def test_a_stale_connection_is_replaced_by_a_fresh_one_once(f: Fetching, end: str) -> None:
    for _ in range(2):
        f.begun()
    for link in f.r.links:
        link.feed(whole_answer(b"pooled"))
    f.begun()
    assert len(f.r.links) == 2 and f.upstream.idle == 1
    used = f.r.links[-1]
    for link in (used, None):
        link = link or f.r.link
        if end == "408":
            link.feed(whole_answer(b"late", "408 Request Timeout"))
        else:
            getattr(link, end)()
        f.r.turn()
    assert len(f.r.links) == 3 and [status for status, _ in f.told[2:]] == [408 if end == "408" else 0]


def test_a_connection_that_ends_later_than_a_second_was_not_stale(f: Fetching) -> None:
    f.begun()
    f.r.reply(whole_answer(b"pooled"))
    f.begun()
    f.r.pass_time(1.1)
    f.r.link.fin()
    f.r.turn()
    assert len(f.r.links) == 1 and f.told[1:] == [(0, b"")]


def test_an_answer_that_ends_with_its_connection_is_whole(f: Fetching) -> None:
    f.begun()
    f.r.reply(b"HTTP/1.1 200 OK\r\n\r\na list")
    f.r.link.fin()
    f.r.turn()
    assert f.told == [(200, b"a list")] and f.r.link.closed


@pytest.mark.parametrize("end", ["refused", "slammed", "fin", "reset", "fin in the body", "malformed"])
def test_each_failure_is_reported_once_as_status_0(f: Fetching, end: str) -> None:
    f.r.refusing |= {PORT} if end == "refused" else set()
    f.r.slamming |= {PORT} if end == "slammed" else set()
    f.begun()
    if end == "fin":
        f.r.link.fin()
    elif end == "reset":
        f.r.link.reset()
    elif end == "fin in the body":
        f.r.reply(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
        f.r.link.fin()
    elif end == "malformed":
        f.r.reply(b"HTTP/1.1 banana\r\n\r\n")
    f.r.turn()
    assert [status for status, _ in f.told] == [0]
    assert f.at_rest and f.upstream.idle == 0
    f.r.pass_time(TIMEOUT_S * 2)
    assert len(f.told) == 1


@pytest.mark.parametrize("mute", [True, False], ids=["connecting", "asked"])
def test_an_upstream_that_is_silent_is_given_up_after_the_time_out(f: Fetching, mute: bool) -> None:
    f.r.mute |= {PORT} if mute else set()
    f.begun()
    f.r.pass_time(TIMEOUT_S * 0.99)
    assert f.told == [] and f.upstream.in_flight == 1
    f.r.pass_time(TIMEOUT_S * 0.02)
    assert f.told == [(0, b"")] and f.at_rest
    assert mute or f.r.link.closed


def test_an_answer_that_trickles_has_no_more_time_than_a_silent_upstream(f: Fetching) -> None:
    f.begun()
    f.r.reply(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n")
    for _ in range(5):
        f.r.reply(b"x")
        f.r.pass_time(TIMEOUT_S * 0.19)
    assert f.told == []
    f.r.pass_time(TIMEOUT_S * 0.1)
    assert [status for status, _ in f.told] == [0] and f.r.link.closed


def test_an_answer_of_the_largest_size_is_accepted_and_a_byte_more_is_not(f: Fetching) -> None:
    f.begun()
    f.r.reply(whole_answer(b"x" * ANSWER_BYTES_MAX))
    assert [(status, len(body)) for status, body in f.told] == [(200, ANSWER_BYTES_MAX)]
    f.begun()
    f.r.reply(b"HTTP/1.1 200 OK\r\ncontent-length: 3000000\r\n\r\n" + b"x" * ANSWER_BYTES_MAX)
    assert len(f.told) == 1
    f.r.reply(b"x")
    assert f.told[1][0] == 0 and f.r.link.closed and f.at_rest


def test_an_answer_that_grows_too_large_in_front_of_a_malformed_chunk_is_told_once(f: Fetching) -> None:
    f.begun()
    f.r.reply(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"x" * ANSWER_BYTES_MAX))
    assert f.told == []
    f.r.reply(chunk(b"x") + chunk(b"y") + b"not a size\r\n")
    assert [status for status, _ in f.told] == [0] and f.r.link.closed and f.at_rest


@pytest.mark.parametrize("when", ["before the start", "connecting", "asked", "in the body", "idle again", "failed"])
def test_a_cancelled_fetch_reports_nothing_and_gives_back_all_it_took(f: Fetching, when: str) -> None:
    if when == "before the start":
        fetch = f.made()
    else:
        f.r.mute |= {PORT} if when == "connecting" else set()
        fetch = f.begun()
    if when == "in the body":
        f.r.reply(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
    elif when == "idle again":
        f.r.reply(whole_answer(b"all"))
    elif when == "failed":
        f.r.link.reset()
        f.r.turn()
    told, idle = list(f.told), f.upstream.idle
    fetch.cancel()
    fetch.cancel()
    f.r.turn()
    assert f.told == told and f.upstream.in_flight == 0 and f.at_rest
    assert f.upstream.idle == idle == (when == "idle again"), "a complete answer leaves its connection in the pool"
    f.r.pass_time(TIMEOUT_S * 2)
    assert f.told == told


def test_a_refusal_in_the_turn_of_the_cancel_is_not_reported(f: Fetching) -> None:
    def refuse_cancelled(host: str, port: int, protocol: UpstreamConnection) -> FakeTransport:
        fetch.cancel()
        return refuse_all(host, port, protocol)

    f.r.loop.dial = refuse_cancelled
    fetch = f.made()
    fetch.start()
    f.r.turn()
    assert f.told == [] and f.at_rest


def counted_bug(f: Fetching, kind: type[Exception]) -> None:
    """Check that exactly this bug was counted and reported, and clear it: the rig must end without a bug."""
    assert [type(bug) for bug in f.r.bugs] == [kind] and f.r.runtime.counters.bugs == 1
    f.r.bugs.clear()
    f.r.runtime.counters.bugs = 0


def test_a_bug_while_connecting_is_reported_at_once_and_counted(f: Fetching) -> None:
    def mistaken(host: str, port: int, protocol: UpstreamConnection) -> FakeTransport:
        raise UnicodeError("label too long")

    f.r.loop.dial = mistaken
    f.begun()
    assert f.told == [(0, b"")] and f.at_rest
    counted_bug(f, UnicodeError)


def test_a_bug_while_reading_the_answer_is_reported_at_once_and_counted(
    f: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*args: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(upstream_module, "decoder_for", mistaken)
    f.begun()
    f.r.reply(whole_answer(b"all"))
    assert f.told == [(0, b"")] and f.r.link.closed and f.at_rest
    counted_bug(f, ZeroDivisionError)


def test_a_bug_at_the_start_is_reported_at_once_and_counted(f: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for several answers would wait for this one for ever."""
    f.begun()
    f.r.reply(whole_answer(b"all"))

    def mistaken(*args: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(UpstreamConnection, "send", mistaken)
    f.begun()
    assert f.told == [(200, b"all"), (0, b"")] and f.at_rest
    counted_bug(f, ZeroDivisionError)


def test_a_bug_behind_the_end_is_counted_and_not_reported_again(f: Fetching) -> None:
    fetch = f.begun()
    f.r.reply(whole_answer(b"all"))
    fetch.on_bug("here", ZeroDivisionError())
    assert f.told == [(200, b"all")]
    counted_bug(f, ZeroDivisionError)


def test_a_request_that_can_not_be_written_takes_nothing(f: Fetching) -> None:
    f.begun()
    f.r.reply(whole_answer(b"all"))
    fetch = f.made(ask(b"/models\r\n"))
    with pytest.raises(LocalProtocolError):
        fetch.start()
    assert f.at_rest and f.upstream.idle == 1
    fetch.cancel()
    assert f.at_rest and len(f.told) == 1
