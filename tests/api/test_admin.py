"""The admin listener: drain and log level. Only it serves these, and the tables of tests/api/test_tables.py."""

from __future__ import annotations

import json

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, Client, Rig, chunk, event, get, post, rig

from streamd.daemon import logs
from streamd.daemon.control import DaemonState
from streamd.log_levels import LEVELS
from streamd.reasons import CloseReason

ROUTES = [
    ("POST", "/drain"),
    ("PUT", "/log-level"),
    *(("GET", f"/{table}") for table in ("readers", "streams", "keys")),
    *(("DELETE", f"/{table}/s_1") for table in ("readers", "streams", "keys")),
]


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
        answer = admin(r, get(path, method="PATCH")).answer
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
