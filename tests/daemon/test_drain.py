"""Drain: every phase on a clock that jumps, and the farewell to each kind of reader."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, WHOLE, Client, Rig, chunk, event, events_in, get, post, rig, text_of

from streamd.core.stream import Stream
from streamd.daemon import drain as drain_module
from streamd.daemon.control import QUICK_DRAIN_S, DaemonState, Report
from streamd.daemon.drain import FIRST_WORDS_S, LAST_WORDS_S, STEP_S, Drain
from streamd.reasons import CloseReason

TIMEOUT_S = 30.0


@contextlib.contextmanager
def serving(**settings: Any) -> Iterator[Rig]:
    """A rig with a worker that may drain; its sweep goes on for the rig's own checks at the end."""
    settings.setdefault("drain_timeout_s", TIMEOUT_S)
    with rig(**settings) as r:
        yield r
        while r.worker.state is DaemonState.DRAINING:
            r.pass_time(1.0)
        r.runtime.sweep.start()


def begin(r: Rig, **how: Any) -> None:
    r.worker.drain(**how)
    r.turn()


# Interval of the poll for the end of the drain.
LOOK_S = 0.02


def report(r: Rig) -> Report:
    """The report of the drain, which must be over after another poll at most."""
    r.pass_time(LOOK_S)
    assert r.worker.drained.done(), "still draining"
    assert r.worker.state is DaemonState.STOPPED
    return r.worker.drained.result()


def reading(r: Rig, *events: bytes, body: dict[str, Any] = CHAT, fields: tuple[str, ...] = (), **how: Any) -> Client:
    """A reader of a generation that runs."""
    client = r.client(post(body, *fields), **how)
    r.reply(SSE_HEAD + chunk(*events))
    return client


def published(r: Rig, name: str, *deltas: str) -> Stream:
    client = r.client(get(f"/v1/streams/{name}", "Content-Length: 0", method="PUT"))
    assert client.answer.status == 201
    for delta in deltas:
        client.send(post(delta.encode(), "Content-Type: text/plain", path=f"/v1/streams/{name}/events"))
    client.fin()
    stream = r.runtime.hub.get(name)
    assert stream is not None
    return stream


def the_reconnect(client: Client) -> Any:
    """The last event of an answer that was cut: a farewell, with the reader's position."""
    assert client.gone and not client.answer.whole
    last = events_in(client.answer.body)[-1]
    assert last.name == "reconnect"
    return last.json


def test_an_idle_daemon_stops_at_once() -> None:
    with serving() as r:
        idle = r.client(get("/healthz"))
        before = r.loop.time()
        begin(r)
        assert report(r) == Report()
        assert r.loop.time() - before < 0.1
        assert idle.gone


def test_during_drain_delay_only_readiness_changes() -> None:
    with serving(drain_delay_s=5.0) as r:
        client = r.client()
        begin(r)
        r.pass_time(4.9)
        client.send(get("/readyz"))
        assert client.answers[-1].status == 503
        assert client.answers[-1].body == b'{"status":"draining"}'
        assert client.answers[-1].get("connection") is None
        reader = reading(r, event("a"), DONE)
        r.reply(LAST)
        assert reader.answer.whole
        r.pass_time(0.2)
        assert client.gone and report(r).cut == 0


def test_a_generation_that_ends_within_the_drain_ends_normally() -> None:
    with serving() as r:
        reader = reading(r, event("Hel"))
        begin(r)
        r.pass_time(10)
        r.reply(chunk(event("lo"), DONE) + LAST)
        assert text_of(events_in(reader.answer.body)) == "Hello"
        assert reader.answer.whole and reader.gone
        r.pass_time(STEP_S)
        assert report(r) == Report(finished=1)


def test_during_a_drain_answers_carry_close_and_new_streams_are_refused() -> None:
    with serving() as r:
        holding = reading(r, event("a"))
        new, asking = r.client(), r.client()
        begin(r)
        new.send(post(CHAT))
        assert new.answer.status == 503 and new.answer.error["code"] == "draining"
        assert 1 <= int(new.answer.get("retry-after") or 0) <= 60
        assert new.answer.get("x-should-retry") == "true"
        assert new.answer.get("connection") == "close" and new.gone
        asking.send(get("/readyz"))
        assert (asking.answer.status, asking.answer.get("connection")) == (503, "close")
        assert asking.gone and not holding.gone
        publisher = r.client(get("/v1/streams/news", "Content-Length: 0", method="PUT"))
        assert publisher.answer.error["code"] == "draining"


def test_during_a_drain_a_reader_may_resume_a_running_stream() -> None:
    with serving(resume_grace_s=20.0) as r:
        reader = reading(r, event("a"))
        stream_id = reader.answer.get("x-stream-id")
        back = r.client()
        begin(r)
        back.send(get(f"/v1/streams/{stream_id}", f"Last-Event-ID: {stream_id}:1"))
        r.reply(chunk(event("b"), DONE) + LAST)
        assert text_of(events_in(back.answer.body)) == "b"
        assert back.answer.whole and reader.answer.whole
        r.pass_time(STEP_S)
        assert report(r).finished == 1


def test_a_just_accepted_connection_may_send_its_request_before_it_is_closed() -> None:
    with serving() as r:
        silent, late = r.client(), r.client(b"POST /v1/chat")
        begin(r)
        assert not r.worker.drained.done()
        r.pass_time(FIRST_WORDS_S / 2)
        late.send(post(CHAT)[len("POST /v1/chat") :])
        assert late.answer.error["code"] == "draining"
        assert not silent.gone
        r.pass_time(FIRST_WORDS_S)
        assert silent.gone and silent.raw == b""
        assert report(r) == Report()


def test_a_drain_waits_for_a_generation_until_its_grace_is_over() -> None:
    with serving(resume_grace_s=8.0, stall_timeout_s=2.0) as r:
        reader = reading(r, event("x" * 100_000), capacity=1000)
        r.pass_time(3)
        assert reader.gone
        (stream,) = r.runtime.hub
        assert stream.grace_until
        begin(r)
        r.pass_time(5)
        assert not r.worker.drained.done()
        r.pass_time(4)
        assert stream.reason is CloseReason.ABANDONED
        assert report(r) == Report()


def test_a_detached_generation_may_finish() -> None:
    with serving(detach_grace_s=20.0) as r:
        reader = reading(r, event("a"))
        reader.fin()
        begin(r)
        r.pass_time(2)
        assert not r.worker.drained.done()
        r.reply(chunk(event("b"), DONE) + LAST)
        r.pass_time(STEP_S)
        assert report(r).finished == 1


@pytest.mark.parametrize("quick", [False, True])
def test_at_the_deadline_each_reader_gets_its_position(quick: bool) -> None:
    with serving() as r:
        readers = [reading(r, *[event(str(k))] * (k + 1)) for k in range(3)]
        streams = tuple(r.runtime.hub)
        begin(r, quick=quick)
        r.pass_time((QUICK_DRAIN_S if quick else TIMEOUT_S) - STEP_S)
        assert not any(reader.gone for reader in readers)
        r.pass_time(2 * STEP_S)
        assert report(r) == Report(cut=3)
        for k, reader in enumerate(readers):
            told = the_reconnect(reader)
            assert told["last_id"] == f"{reader.answer.get('x-stream-id')}:{k + 1}"
            assert 100 <= told["retry_ms"] <= 110
        assert [stream.reason for stream in streams] == [CloseReason.RESTARTED] * 3
        assert all(link.closed for link in r.links)


def test_the_log_of_a_cut_generation_ends_with_the_error_restarted() -> None:
    with serving() as r:
        reader = reading(r, event("a"), event("b"))
        (stream,) = r.runtime.hub
        begin(r)
        r.pass_time(TIMEOUT_S + STEP_S)
        assert reader.gone
        assert stream.log.seq_next == 4
        (_, last), *_ = stream.log.read(stream.log.seek(3), bytes_max=1)
        error = events_in(last)[0].json["error"]
        assert error["code"] == "restarted" and "restart" in error["message"]
        assert not stream.ended_clean


def test_a_drain_cuts_no_generation_for_lack_of_detached_places() -> None:
    with serving(detached_max=2) as r:
        readers = [reading(r, event("a")) for _ in range(6)]
        streams = tuple(r.runtime.hub)
        begin(r)
        r.pass_time(TIMEOUT_S + STEP_S)
        assert {stream.reason for stream in streams} == {CloseReason.RESTARTED}
        assert all(the_reconnect(reader)["error"]["code"] == "reconnect" for reader in readers)


def test_a_second_drain_cuts_everything_at_once() -> None:
    with serving(drain_delay_s=100.0) as r:
        reader = reading(r, event("a"))
        began_at = r.loop.time()
        begin(r)
        r.pass_time(1)
        begin(r)
        assert report(r).cut == 1
        assert r.loop.time() - began_at == pytest.approx(1 + LOOK_S)
        assert reader.gone


def test_a_stalled_reader_does_not_hold_up_the_end() -> None:
    with serving(stall_timeout_s=0.0) as r:
        stalled = reading(r, event("x" * 50_000), capacity=1000)
        begin(r)
        r.pass_time(TIMEOUT_S + STEP_S)
        assert not r.worker.drained.done() and not stalled.gone
        r.pass_time(LAST_WORDS_S)
        assert report(r).cut == 1
        assert stalled.transport.aborted


# Published streams


def test_published_readers_are_moved_evenly_and_keep_their_position() -> None:
    with serving(drain_timeout_s=10.0) as r:
        reading(r, event("a"))  # holds it open
        stream = published(r, "news", "one", "two")
        readers = [r.client(get("/v1/streams/news")) for _ in range(40)]
        begin(r)
        gone = []
        for _ in range(10):
            r.pass_time(1)
            gone.append(sum(reader.gone for reader in readers))
        assert all(abs(count - 4 * (k + 1)) <= 1 for k, count in enumerate(gone))
        for reader in readers:
            told = the_reconnect(reader)
            assert told["last_id"] == f"news:{stream.epoch}:2"
            assert text_of(events_in(reader.answer.body)[:-1]) == ""
            assert [read.json["delta"] for read in events_in(reader.answer.body)[:-1]] in (["one", "two"], ["onetwo"])
        r.pass_time(1)
        assert (report(r).sent_away, report(r).cut) == (40, 1)
        assert stream.reason is None
        r.worker.streams.stop_stream(stream)


def test_a_drain_does_not_wait_for_published_streams() -> None:
    with serving() as r:
        stream = published(r, "news", "one")
        reader = r.client(get("/v1/streams/news"))
        before = r.loop.time()
        begin(r)
        assert report(r) == Report(sent_away=1)
        assert r.loop.time() - before < STEP_S
        assert the_reconnect(reader)["last_id"] == f"news:{stream.epoch}:1"
        r.worker.streams.stop_stream(stream)


def test_a_publisher_in_the_middle_of_a_body_is_told_to_try_again_and_its_stream_waits() -> None:
    with serving() as r:
        stream = published(r, "news")
        head = get("/v1/streams/news/events", "Transfer-Encoding: chunked", "Content-Type: text/plain", method="POST")
        publisher = r.client(head + b"3\r\none\r\n")
        assert stream.events == 1
        begin(r)
        r.pass_time(LAST_WORDS_S + STEP_S)
        assert publisher.answer.status == 503 and publisher.answer.error["code"] == "draining"
        assert publisher.answer.get("retry-after")
        assert stream.reason is None and stream.events == 1
        assert report(r) == Report()
        r.worker.streams.stop_stream(stream)


# Other connections


def test_at_the_deadline_a_waiting_request_gets_a_503() -> None:
    with serving() as r:
        waiting = r.client(post(WHOLE))
        begin(r)
        r.pass_time(TIMEOUT_S - STEP_S)
        assert waiting.raw == b""
        r.pass_time(2 * STEP_S)
        assert (waiting.answer.status, waiting.answer.error["code"]) == (503, "draining")
        assert waiting.answer.get("x-should-retry") == "false"
        assert r.link.closed


def test_a_reader_with_an_unannounced_gap_is_sent_back_in_front_of_it() -> None:
    with serving(policy="drop_oldest", ring_slots=32) as r:
        reader = reading(r, event("x" * 2000), capacity=600)
        for k in range(40):
            r.reply(chunk(event(str(k))))
        begin(r)
        begin(r)
        reader.take()
        assert report(r).cut == 1
        assert the_reconnect(reader)["last_id"].endswith(":1")


def test_a_connection_whose_answer_is_cut_off_counts_as_drained() -> None:
    with serving() as r:
        reading(r, event("a"))
        begin(r)
        r.pass_time(TIMEOUT_S + STEP_S)
        assert r.closed[CloseReason.DRAINING] == 1
        assert ("POST /v1/chat/completions", CloseReason.DRAINING, 200) in r.ended


def test_the_accept_queue_is_emptied_before_anything_is_closed() -> None:
    """The order: first the listeners are closed, however long that takes, then new requests get a 503."""
    with serving() as r:
        asked: list[bool] = []

        async def close_listeners() -> None:
            asked.append(r.runtime.draining)
            await asyncio.sleep(1)

        drain = Drain(
            r.runtime,
            delay_s=0.0,
            timeout_s=1.0,
            close_listeners=close_listeners,
            close_operators=functools.partial(asyncio.sleep, 0),
        )
        assert r.loop.run_until_complete(drain.run()) == Report()
        assert asked == [False] and r.runtime.draining


def test_a_drain_waits_for_tunnels_to_other_workers() -> None:
    """The stream behind the bytes belongs to the other worker, which makes the same decision about it."""
    with serving() as r:
        carried = Carried()
        r.runtime.tunnels.add(carried)  # type: ignore[arg-type]
        begin(r)
        r.pass_time(TIMEOUT_S / 2)
        assert not r.worker.drained.done()
        r.runtime.tunnels.discard(carried)  # type: ignore[arg-type]
        r.pass_time(STEP_S)
        assert report(r) == Report()


class Carried:
    """Stands for a tunnel, of which the drain asks only whether it is there."""


def test_readers_that_are_told_over_several_turns_stop_no_generation_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain_module, "TOLD_PER_STEP_MAX", 2)
    with serving(detached_max=2) as r:
        readers = [reading(r, event("a")) for _ in range(6)]
        streams = tuple(r.runtime.hub)
        begin(r)
        r.pass_time(TIMEOUT_S + STEP_S)
        assert [stream.reason for stream in streams] == [CloseReason.RESTARTED] * 6
        assert all(the_reconnect(reader)["error"]["code"] == "reconnect" for reader in readers)


# -- operators


def operator(r: Rig, data: bytes = b"", listener: str = "admin") -> Client:
    client = r.client(data, listener=listener)
    r.turn()
    return client


def drain_in_status(client: Client) -> Any:
    client.send(get("/status"))
    assert client.answer.status == 200
    return json.loads(client.answer.body)["drain"]


def deadline_in_metrics(r: Rig) -> float | None:
    text = operator(r, get("/metrics"), listener="metrics").answer.body.decode()
    found = re.search(r"^streamd_drain_deadline_timestamp_seconds (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else None


def test_without_a_drain_status_has_none_and_there_is_nothing_to_take_back() -> None:
    with rig() as r:
        assert drain_in_status(operator(r)) is None
        answer = operator(r, get("/drain", method="DELETE")).answer
        assert (answer.status, answer.error["code"]) == (409, "not_draining")


def test_operators_watch_a_drain_to_its_end_and_never_hold_it_open() -> None:
    with serving(drain_delay_s=5.0) as r:
        news = published(r, "news", "a")
        ends, cut = reading(r, event("a")), reading(r, event("b"))
        fan = r.client(get("/v1/streams/news"))
        begin(r)
        found = drain_in_status(operator(r))
        assert found["by"] == "admin" and found["may_be_taken_back"]
        assert (found["deadline_s"], found["left"], found["finished"]) == (35.0, 2, 0)
        r.pass_time(14)
        silent, scraper = operator(r), operator(r, listener="metrics")
        r.pass_time(1 + FIRST_WORDS_S)
        r.links[0].feed(chunk(DONE) + LAST)
        r.pass_time(STEP_S * 2)
        found = drain_in_status(operator(r))
        assert found["since_s"] == pytest.approx(16.1) and found["deadline_s"] == pytest.approx(18.9)
        assert found["since"] < found["deadline"] and found["since"].endswith("Z")
        assert (found["left"], found["finished"], found["sent_away"], found["cut"]) == (1, 1, 1, 0)
        assert not found["may_be_taken_back"] and ends.gone and fan.gone
        assert not silent.gone and not scraper.gone, "a connection that an operator has made stays, too"
        scraper.send(get("/metrics"))
        assert b"streamd_drain_left 1.0" in scraper.answer.body and b"streamd_draining 1.0" in scraper.answer.body
        r.pass_time(25)
        assert cut.gone and silent.gone and report(r) == Report(finished=1, sent_away=1, cut=1)
        r.worker.streams.stop_stream(news)


def test_the_metric_of_a_deadline_stays_in_a_drain_that_its_main_process_forgets() -> None:
    with serving(drain_delay_s=5.0) as r:
        r.runtime.unix_time = lambda: 1_800_000_000 + r.loop.time()
        reader = reading(r, event("a"))
        assert deadline_in_metrics(r) is None
        deadline = r.runtime.unix_time() + 5.0 + TIMEOUT_S
        begin(r, waits=True)
        r.pass_time(TIMEOUT_S * 3)
        assert deadline_in_metrics(r) == pytest.approx(deadline, abs=0.5) and r.runtime.unix_time() > deadline
        assert not reader.gone
        r.worker.take_back()
        assert deadline_in_metrics(r) is None
        r.links[0].feed(chunk(DONE) + LAST)


def test_a_drain_does_not_wait_for_operators() -> None:
    with serving() as r:
        idle, silent = operator(r, get("/healthz")), operator(r)
        before = r.loop.time()
        begin(r)
        assert report(r) == Report() and r.loop.time() - before < 0.3
        assert idle.gone and silent.gone


def test_a_generation_that_an_operator_asked_for_holds_the_drain_like_any_other() -> None:
    with serving() as r:
        client = operator(r, post(CHAT))
        begin(r)
        r.pass_time(5)
        assert not r.worker.drained.done(), "it waits for its first token"
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        assert client.answer.whole
        r.pass_time(1)
        assert report(r) == Report(finished=1)


def test_a_drain_is_taken_back_while_the_listeners_are_open() -> None:
    with rig(drain_delay_s=5.0, drain_timeout_s=TIMEOUT_S) as r:
        reader = reading(r, event("a"))
        for _ in range(2):
            begin(r)
            r.pass_time(4)
            answer = operator(r, get("/drain", method="DELETE")).answer
            assert (answer.status, json.loads(answer.body)) == (200, {"state": "serving"})
            assert r.client(get("/readyz")).answer.status == 200 and drain_in_status(operator(r)) is None
        r.pass_time(60)
        assert not reader.gone and r.worker.state is DaemonState.SERVING and not r.runtime.draining
        assert r.client(get("/healthz")).answer.get("connection") is None


def test_a_drain_whose_listeners_are_closed_or_that_a_signal_began_goes_on() -> None:
    with serving(drain_delay_s=5.0) as r:
        reading(r, event("a"))
        begin(r, by="SIGTERM")
        answer = operator(r, get("/drain", method="DELETE")).answer
        assert (answer.status, answer.error["code"]) == (409, "drain_under_way")
        r.pass_time(36)
        assert report(r).cut == 1
    with serving() as r:
        reading(r, event("a"))
        begin(r)
        answer = operator(r, get("/drain", method="DELETE")).answer
        assert (answer.status, answer.error["code"]) == (409, "drain_under_way")
        r.pass_time(36)
        assert report(r).cut == 1


@pytest.mark.parametrize("order", ["close", "hurry"])
def test_an_operator_who_is_too_late_is_told_so(order: str) -> None:
    """The parent has closed the listeners, or a signal has come, while the operator's request was on its way."""
    with serving(drain_delay_s=5.0) as r:
        reading(r, event("a"))
        r.worker._on_take_back = lambda: None
        begin(r, waits=True)
        client = operator(r, get("/drain", method="DELETE"))
        r.pass_time(60)
        assert client.raw == b"" and not r.runtime.draining, "the parent's order ends the delay, and not the clock"
        if order == "close":
            r.worker.end_delay()
        else:
            r.worker.drain()
        r.turn()
        assert (client.answer.status, client.answer.error["code"]) == (409, "drain_under_way")
        r.pass_time(36)
        assert report(r).cut == 1


@pytest.mark.parametrize(("by", "status"), [("admin", 200), ("SIGTERM", 409)])
def test_a_worker_that_has_not_heard_of_a_drain_asks_whether_it_is_taken_back(by: str, status: int) -> None:
    """Another worker began it a moment ago: both orders come in turn."""
    with serving(drain_delay_s=5.0) as r:
        r.worker._on_take_back = lambda: None
        client = operator(r, get("/drain", method="DELETE"))
        assert client.raw == b""
        begin(r, waits=True, by=by)
        r.worker.take_back()
        r.turn()
        assert client.answer.status == status and (r.worker.draining is None) == (status == 200)
        if by != "admin":
            r.worker.end_delay()
        else:
            begin(r)
        r.pass_time(36)
        report(r)


def test_a_drain_that_an_operator_asks_for_is_answered_when_the_order_for_all_workers_is_there() -> None:
    with serving(drain_delay_s=5.0) as r:
        r.worker._on_drain = lambda: None
        first = operator(r, post(b"", path="/drain"))
        assert first.raw == b"" and r.worker.draining is None
        begin(r, waits=True)
        r.turn()
        assert first.answer.status == 202
        second = operator(r, post(b"", path="/drain"))
        assert second.raw == b""
        r.worker.drain()
        r.turn()
        assert second.answer.status == 202
        r.pass_time(10)
        report(r)


def test_readers_are_asked_back_within_a_window_of_those_that_leave_at_the_same_moment() -> None:
    asked: list[int | None] = []
    with serving(drain_timeout_s=10.0) as r:
        usual = r.runtime.retry_ms
        r.runtime.retry_ms = lambda among=None: asked.append(among) or usual(among)  # type: ignore[method-assign,func-returns-value]
        stream = published(r, "room", "a")
        for _ in range(40):
            r.client(get("/v1/streams/room"))
        for _ in range(3):
            reading(r, event("a"))
        assert r.runtime.readers == 43
        asked.clear()
        begin(r)
        r.pass_time(10.0 + LAST_WORDS_S + 0.5)
        report(r)
        spread, at_once = asked[:40], asked[40:]
        assert max(each for each in spread if each is not None) <= 3, "evenly over ten seconds"
        assert at_once == [3] * 3, "the generations that the deadline cuts"
        assert r.runtime.readers == 0
        r.worker.streams.stop_stream(stream)
