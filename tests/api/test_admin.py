"""The admin listener: drain, log level, the streams of all workers with the largest lag. Only it serves these."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, Client, Rig, chunk, event, get, post, rig

from streamd.api.admin import LEVELS, STREAMS_SHOWN_MAX, WORST
from streamd.daemon import logs
from streamd.daemon.control import DaemonState
from streamd.net.inquiry import ANSWER_S, Inquiries
from streamd.net.peers import Note, Peers
from streamd.reasons import CloseReason

ROUTES = [("POST", "/drain"), ("GET", "/streams"), ("PUT", "/log-level")]


def admin(r: Rig, data: bytes) -> Client:
    """A connection to the admin socket that sends this request."""
    return r.client(data, listener="admin")


def put(word: bytes) -> bytes:
    return get("/log-level", f"Content-Length: {len(word)}", method="PUT") + word


# -- the listeners that serve it


@pytest.mark.parametrize("listener", ["public", "loopback"])
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_no_other_listener_has_these_routes(listener: str, method: str, path: str) -> None:
    with rig() as r:
        level = logs._sink.level
        client = r.client(get(path, "Content-Length: 0", method=method), listener=listener)
        assert client.answer.status in (401, 404)
        assert r.worker.draining is None and logs._sink.level == level


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_another_method_gets_a_405_that_allows_the_right_method(method: str, path: str) -> None:
    with rig() as r:
        answer = admin(r, get(path, method="DELETE")).answer
        assert answer.status == 405 and method in (answer.get("allow") or "").split(", ")


def test_the_admin_socket_answers_everything_else_too() -> None:
    with rig() as r:
        assert admin(r, get("/healthz")).answer.status == 200
        assert admin(r, get("/v1/nothing/there", method="POST")).raw == b"", "goes upstream like any request"
        assert r.dialled


# -- drain


def test_a_drain_is_answered_and_lets_generations_end() -> None:
    with rig() as r:
        reader = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a")))
        answer = admin(r, get("/drain", "Content-Length: 0", method="POST")).answer
        assert (answer.status, json.loads(answer.body)) == (202, {"state": "draining"})
        assert r.worker.state is DaemonState.DRAINING and not r.worker.drained.done()
        assert not reader.gone
        r.reply(chunk(event("b"), DONE) + LAST)
        r.pass_time(1)
        assert reader.answer.whole and r.worker.drained.result().finished == 1
        r.runtime.sweep.start()  # the drain stopped it, and the remaining connections have deadlines


def test_a_second_drain_goes_to_the_end_at_once() -> None:
    with rig(drain_timeout_s=60.0) as r:
        r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a")))
        first = admin(r, get("/drain", "Content-Length: 0", method="POST"))
        r.pass_time(10)
        assert not r.worker.drained.done(), "the first waits for the reader"
        # The listeners are closed; a connection made earlier asks.
        second = Client(r, listener="admin")
        second.send(get("/drain", "Content-Length: 0", method="POST"))
        assert (first.answer.status, second.answer.status) == (202, 202)
        r.pass_time(5)
        assert r.worker.drained.result().cut == 1
        assert [reason for what, reason, _ in r.ended if what.startswith("POST /v1")] == [CloseReason.DRAINING]
        r.runtime.sweep.start()


# -- log level


@pytest.mark.parametrize("word", LEVELS)
@pytest.mark.parametrize("wrap", [b"%b", b" %b\r\n"], ids=["bare", "a line"])
def test_the_log_level_is_set_by_its_word(word: str, wrap: bytes) -> None:
    with rig() as r:
        answer = admin(r, put(wrap % word.encode())).answer
        assert (answer.status, answer.body) == (204, b"")
        assert logs._sink.level == logs.LEVELS[word]
        logs.set_level("error")


@pytest.mark.parametrize("word", [b"", b"verbose", b"INFO", b"info debug", b"\xff\xfe", b"x" * 64])
def test_an_unknown_log_level_is_refused_and_nothing_changes(word: bytes) -> None:
    with rig() as r:
        answer = admin(r, put(word)).answer
        assert (answer.status, answer.error["code"]) == (400, "bad_log_level")
        assert all(level in answer.error["message"] for level in LEVELS)
        assert logs._sink.level == logs.ERROR


def test_a_log_level_of_many_bytes_is_not_read() -> None:
    with rig() as r:
        assert admin(r, put(b"info" + b" " * 61)).answer.status == 413
        assert logs._sink.level == logs.ERROR


# -- the streams with the largest lag


def lagging(r: Rig, *lags: int) -> None:
    """A stream per number: the number of events since its reader stopped reading."""
    for lag in lags:
        client = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("taken")))
        client.transport.capacity = 0
        for _ in range(lag):
            r.reply(chunk(event("not taken")))


def shown(client: Client) -> dict[str, Any]:
    assert client.answer.status == 200 and client.answer.get("content-type") == "application/json"
    return cast(dict[str, Any], json.loads(client.answer.body))


def lags_of(found: dict[str, Any]) -> list[int]:
    return [state["lag_max"] for state in found["data"]]


def test_without_streams_the_list_is_empty() -> None:
    with rig() as r:
        assert shown(admin(r, get("/streams"))) == {"data": []}


def test_streams_are_listed_worst_first() -> None:
    with rig() as r:
        lagging(r, 5, 30, 0, 12)
        found = shown(admin(r, get("/streams")))
        lags = lags_of(found)
        assert lags == sorted(lags, reverse=True) and len(set(lags)) == 4
        assert [state["last_seq"] for state in found["data"]] == [31, 13, 6, 1]
        assert all(state["state"] == "live" and state["subscribers"] == 1 for state in found["data"])


def test_the_list_ends_after_the_streams_with_the_largest_lag() -> None:
    with rig() as r:
        lagging(r, *[1] * (STREAMS_SHOWN_MAX - 1), 4, 0)
        seqs = [state["last_seq"] for state in shown(admin(r, get("/streams")))["data"]]
        assert seqs == [5] + [2] * (STREAMS_SHOWN_MAX - 1)


class Others:
    """Workers 1 and 2 beside that of the rig: they answer as the test tells them to."""

    slot = 0

    def __init__(self, r: Rig) -> None:
        self.r = r
        self.asked: list[Note] = []
        self.inquiries = r.runtime.inquiries = Inquiries(r.loop, cast(Peers, self), r.worker._answerers)
        r.runtime.peers = cast(Peers, self)

    def others(self) -> list[int]:
        return [1, 2]

    def tell(self, slot: int, kind: str, body: bytes) -> bool:
        self.asked.append(Note(slot, kind, body))
        return True

    def answer(self, slot: int, *states: dict[str, Any]) -> None:
        number = next(note.body[:8] for note in self.asked if note.slot == slot)
        assert self.inquiries.take(Note(slot, "!", number + json.dumps(states).encode()))
        self.r.turn()


def state(name: str, lag: int) -> dict[str, Any]:
    return {"id": name, "lag_max": lag}


def test_the_lists_of_all_workers_become_one_list() -> None:
    with rig() as r:
        lagging(r, 10)
        (own,) = shown(admin(r, get("/streams")))["data"]
        others = Others(r)
        client = admin(r, get("/streams"))
        assert [(note.slot, note.kind) for note in others.asked] == [(1, f"?{WORST}"), (2, f"?{WORST}")]
        others.answer(2, state("two", 999), state("both", 3))
        assert client.raw == b"", "worker 1 is still to answer"
        others.answer(1, *(state(f"one-{k}", 4) for k in range(STREAMS_SHOWN_MAX)))
        found = shown(client)
        assert [each["id"] for each in found["data"][:3]] == ["two", own["id"], "one-0"]
        assert len(found["data"]) == STREAMS_SHOWN_MAX and lags_of(found)[-1] == 4
        assert "workers_missing" not in found


def test_a_worker_that_does_not_answer_is_counted_as_missing() -> None:
    with rig() as r:
        lagging(r, 2)
        others = Others(r)
        client = admin(r, get("/streams"))
        others.answer(2, state("two", 999))
        r.pass_time(ANSWER_S * 0.9)
        assert client.raw == b""
        r.pass_time(ANSWER_S * 0.2)
        found = shown(client)
        assert found["workers_missing"] == 1
        assert len(found["data"]) == 2 and found["data"][0]["id"] == "two"
        others.answer(1, state("late", 5))
        assert client.statuses == [200]


def test_an_asker_that_leaves_gets_no_answer_and_leaves_no_question_behind() -> None:
    with rig() as r:
        others = Others(r)
        client = admin(r, get("/streams"))
        client.reset()
        others.answer(1)
        others.answer(2)
        assert client.raw == b"" and len(others.inquiries) == 0
        assert r.ended[-1][:2] == ("GET /streams", CloseReason.READER_GONE)


def test_a_worker_answers_another_worker_with_its_own_streams_of_the_largest_lag() -> None:
    with rig() as r:
        lagging(r, 1, 3)
        others = Others(r)
        assert others.inquiries.take(Note(1, f"?{WORST}", b"\0\0\0\0\0\0\0\x09"))
        (answer,) = others.asked
        assert (answer.slot, answer.kind, answer.body[:8]) == (1, "!", b"\0\0\0\0\0\0\0\x09")
        assert [each["last_seq"] for each in json.loads(answer.body[8:])] == [4, 2]
