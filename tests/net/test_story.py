"""The story of a request at debug: its steps in order, for all requests or for a watched key or stream alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from fakes import CHAT, DONE, LAST, PLENTY, SSE_HEAD, WHOLE, Rig, chunk, event, get, post, rig, whole_answer

from streamd.config import UpstreamSettings
from streamd.daemon import logs
from streamd.log_levels import Watch

TWO = tuple(UpstreamSettings(name=name, url=f"http://{name}.test:{port}") for name, port in (("a", 1), ("b", 2)))

Steps = list[tuple[str, dict[str, Any]]]


@contextlib.contextmanager
def told(**settings: Any) -> Iterator[tuple[Rig, Steps]]:
    """A rig, and the lines at debug that it writes."""
    steps: Steps = []

    def note(level: int, name: str, /, **fields: Any) -> None:
        if level == logs.DEBUG:
            steps.append((name, {key: value for key, value in fields.items() if value is not None}))

    with rig(**settings) as r, mock.patch.object(logs, "always", note):
        yield r, steps


def everything(r: Rig) -> None:
    r.runtime.story.want((), everything=True)


def watch(r: Rig, *, key: str = "", stream: str = "") -> None:
    r.runtime.story.want((Watch(key, stream, r.loop.time() + 60),), everything=False)


def names(steps: Steps) -> list[str]:
    return [name for name, _ in steps]


def fields(steps: Steps, name: str) -> dict[str, Any]:
    return next(found for each, found in steps if each == name)


def test_nothing_is_told_unless_somebody_wants_it() -> None:
    with told() as (r, steps):
        r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        assert steps == [] and not r.runtime.story.is_on


def test_a_story_of_everything_ends_when_only_a_key_is_watched_or_nothing_is_wanted() -> None:
    with told() as (r, steps):
        everything(r)
        watch(r, key="another key")
        assert r.runtime.story.is_on
        r.client(post(WHOLE))
        r.reply(whole_answer(b"{}"))
        assert steps == []
        r.runtime.story.want((), everything=False)
        assert not r.runtime.story.is_on


def test_a_streams_story_has_its_upstream_and_why_its_connection_first_event_and_reader() -> None:
    with told(upstreams=TWO) as (r, steps):
        everything(r)
        r.refusing.add(1)
        client = r.client(post(CHAT, "X-Request-Id: mine"))
        r.reply(SSE_HEAD)
        r.reply(chunk(event("a")))
        r.reply(chunk(DONE) + LAST)
        assert client.answer.status == 200
        assert names(steps) == [
            *("upstream chosen", "connecting", "no connection"),
            *("upstream chosen", "connecting", "request sent"),
            *("answer begins", "reader joins", "first event", "reader leaves"),
        ]
        assert {found["id"] for _, found in steps} == {"mine"}
        assert len({found["stream"] for _, found in steps}) == 1
        first, second = (found for name, found in steps if name == "upstream chosen")
        assert (first["upstream"], first["others"], first["model"]) == ("a", ("b:0_in_flight",), "m")
        assert (second["upstream"], second["others"], second["tried"]) == ("b", ("a:left_out",), ("a",))
        assert fields(steps, "no connection")["error"] == "Connection refused"
        assert fields(steps, "request sent")["reused"] is False
        assert fields(steps, "answer begins")["status"] == 200
        assert fields(steps, "reader joins")["after"] == 0
        left = fields(steps, "reader leaves")
        assert (left["position"], left["last_seq"]) == (2, 2)


def test_retries_and_breaks_are_told() -> None:
    with told(upstreams=TWO) as (r, steps):
        everything(r)
        r.client(post(WHOLE))
        r.reply(b"HTTP/1.1 503 Full\r\ncontent-length: 2\r\n\r\n{}")
        r.reply(b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n{}")
        r.link.fin()
        r.turn()
        assert names(steps)[-5:] == [
            "upstream chosen",
            "connecting",
            "request sent",
            "answer begins",
            "answer broke off",
        ]
        assert fields(steps, "asked elsewhere")["refused_by"] == "a"
        assert fields(steps, "answer broke off")["upstream"] == "b"


def test_pauses_are_told_with_the_position() -> None:
    with told() as (r, steps):
        everything(r)
        client = r.client(post(CHAT), capacity=600)
        r.reply(SSE_HEAD + chunk(event("a")))
        for _ in range(20):
            r.reply(chunk(event("word " * 10)))
        paused = fields(steps, "reader paused")
        assert 0 < paused["position"] <= paused["last_seq"] < 21 and "unsent_bytes" in paused
        client.take(PLENTY)
        r.turn()
        taken = fields(steps, "reader takes more")
        assert paused["position"] <= taken["position"] < taken["last_seq"] == 21
        client.fin()
        r.turn()
        assert {"reader leaves", "cancelled upstream"} <= set(names(steps))


def test_of_watched_streams_and_keys_alone_the_story_is_told() -> None:
    with told() as (r, steps):
        watched = r.client(post(CHAT, "Authorization: Bearer a"))
        r.reply(SSE_HEAD + chunk(event("a")))
        stream = watched.answer.get("x-stream-id")
        other = r.client(post(CHAT, "Authorization: Bearer b"))
        r.reply(SSE_HEAD + chunk(event("a")))
        watch(r, stream=stream)
        r.client(get(f"/v1/streams/{stream}", f"Last-Event-ID: {stream}:1"))
        r.client(get(f"/v1/streams/{other.answer.get('x-stream-id')}"))
        assert [(name, found["after"]) for name, found in steps] == [("reader joins", 1)]
        assert fields(steps, "reader joins")["stream"] == stream
        steps.clear()
        principal = next(iter({each.terms.owner for each in r.runtime.hub if each.id == stream}))
        watch(r, key=principal)
        for key in ("a", "b"):
            r.client(post(WHOLE, f"Authorization: Bearer {key}"))
            r.reply(whole_answer(b"{}"))
        assert names(steps) == ["upstream chosen", "connecting", "request sent", "answer begins"]


def test_the_line_of_a_watched_request_is_written_at_any_level() -> None:
    kept: list[str] = []
    with rig() as r, mock.patch.object(logs, "always", lambda level, name, /, **_: kept.append(name)):
        watch(r, key="anonymous")
        r.client(post(WHOLE))
        r.reply(whole_answer(b"{}"))
        assert kept[-1] == "request"
        r.runtime.story.want((), everything=False)
        kept.clear()
        r.client(post(WHOLE))
        r.reply(whole_answer(b"{}"))
        assert kept == []
