"""Upstream reports: news of a worker for its parent, and the verdicts in /status and /metrics."""

from __future__ import annotations

import dataclasses
import itertools
import json

from fakes import WHOLE, Rig, get, post, rig, whole_answer

from streamd.config import UpstreamSettings
from streamd.daemon.upstream_reports import AGAIN_EVERY_S, UpstreamReports
from streamd.server_state import LISTED_MAX, MODEL_CHARS_MAX, ServerState, ServerView

TWO = tuple(UpstreamSettings(name=name, url=f"http://{name}.test:{port}") for name, port in (("a", 1), ("b", 2)))


class Pipe:
    """The pipe to a parent, which may be full."""

    def __init__(self, r: Rig) -> None:
        self.said: list[tuple[str, ServerView]] = []
        self.said_at: list[float] = []
        self._time = r.loop.time
        self.is_full = False
        self.reports = UpstreamReports(r.runtime, r.worker.upstreams, self.say)
        r.runtime.sweep.on_tick.append(self.reports.tick)

    def say(self, name: str, view: ServerView) -> bool:
        if not self.is_full:
            self.said.append((name, view))
            self.said_at.append(self._time())
        return not self.is_full

    @property
    def states(self) -> list[tuple[str, str]]:
        return [(name, view.state.value) for name, view in self.said]


def asks(r: Rig, answer: bytes = b"") -> None:
    r.client(post(WHOLE))
    if answer:
        r.pass_time(0.05)  # a fresh connection to a doubtful server is watched for a moment
        r.reply(answer)


def test_a_healthy_server_is_not_reported() -> None:
    with rig() as r:
        pipe = Pipe(r)
        for _ in range(5):
            asks(r, whole_answer(b"{}"))
            r.pass_time(1.0)
        assert pipe.said == []


def test_an_outage_is_reported_at_once_and_its_later_failures_once_a_second() -> None:
    with rig() as r:
        pipe = Pipe(r)
        r.refusing.add(1)
        asks(r)
        r.pass_time(0.3)
        assert pipe.states == [("up", "out")]
        assert pipe.said[0][1].reason == "upstream_connect" and pipe.said[0][1].error == "Connection refused"
        for _ in range(60):  # the only server is asked although it is out
            asks(r)
            r.pass_time(0.05)
        outs = [view for _, view in pipe.said if view.state is ServerState.OUT]
        assert 3 <= len(pipe.said) <= 20 and outs[-1].failures > 40
        reports = list(itertools.pairwise(zip(pipe.said_at, pipe.said, strict=True)))
        again = [
            (at - before_at) for (before_at, (_, before)), (at, (_, view)) in reports if view.state is before.state
        ]
        assert again and min(again) >= AGAIN_EVERY_S


def test_an_answer_is_reported_where_it_refutes_the_verdict_and_only_then() -> None:
    with rig() as r:
        pipe = Pipe(r)
        asks(r, whole_answer(b"{}"))
        r.pass_time(0.5)
        assert pipe.said == []
        pipe.reports.hear([("up", ServerView(ServerState.OUT, r.loop.time(), r.loop.time(), 3))])
        r.pass_time(0.5)
        assert pipe.said == [], "this worker's answer is older than the failure"
        asks(r, whole_answer(b"{}"))
        r.pass_time(0.5)
        assert pipe.states == [("up", "up")]


def test_a_report_that_finds_the_pipe_full_is_made_again() -> None:
    with rig() as r:
        pipe = Pipe(r)
        pipe.is_full = True
        r.refusing.add(1)
        asks(r)
        r.pass_time(0.3)
        pipe.is_full = False
        r.pass_time(0.3)
        assert len(pipe.said) == 1 and pipe.said[0][1].state.is_down


def test_a_list_that_finds_the_pipe_full_is_reported_again() -> None:
    with rig() as r:
        pipe = Pipe(r)
        pipe.is_full = True
        (upstream,) = r.worker.upstreams
        upstream.listed = frozenset({"a"})
        r.pass_time(1.1)
        pipe.is_full = False
        r.pass_time(1.1)
        assert [view.listed for _, view in pipe.said] == [("a",)]


def test_models_are_reported_as_far_as_they_are_told_by_name() -> None:
    with rig() as r:
        pipe = Pipe(r)
        (upstream,) = r.worker.upstreams
        upstream.listed = frozenset({"b", "a", "x" * (MODEL_CHARS_MAX + 1)})
        r.pass_time(1.1)
        assert pipe.said[-1][1].listed == ("a", "b")
        upstream.listed = frozenset(f"m{k}" for k in range(LISTED_MAX + 1))
        r.pass_time(1.1)
        assert pipe.said[-1][1].listed == ()


def test_status_and_metrics_show_the_verdicts() -> None:
    with rig(upstreams=TWO) as r:
        r.refusing.update((1, 2))
        asks(r)
        r.pass_time(0.3)
        shown = json.loads(r.client(get("/status"), listener="admin").answer.body)["upstreams"]
        assert {name: each["state"] for name, each in shown.items()} == {"a": "out", "b": "out"}
        assert shown["a"]["failures"] == 1 and shown["a"]["last_reason"] == "upstream_connect"
        assert shown["a"]["last_error"] == "Connection refused" and shown["a"]["since_s"] < 1.0
        text = r.client(get("/metrics"), listener="admin").answer.body
        assert b'streamd_upstream_up{upstream="a"} 0.0' in text and b"warned" not in text
        r.refusing.clear()
        r.pass_time(1.0)
        asks(r, whole_answer(b"{}"))
        r.pass_time(0.3)
        shown = json.loads(r.client(get("/status"), listener="admin").answer.body)["upstreams"]
        back = next(name for name, each in shown.items() if each["state"] == "up")
        assert shown[back]["failures"] == 0 and shown[back]["last_error"] == "Connection refused"
        assert (
            b'streamd_upstream_up{upstream="%b"} 1.0' % back.encode()
            in r.client(get("/metrics"), listener="admin").answer.body
        )


def test_a_server_with_new_settings_is_up_after_a_reload_and_one_that_is_gone_is_not_shown() -> None:
    with rig(upstreams=TWO) as r:
        r.refusing.update((1, 2))
        asks(r)
        r.pass_time(0.3)
        assert [each.is_up for each in r.worker.upstreams] == [False, False]
        r.worker.reload(dataclasses.replace(r.worker.settings, upstreams=(dataclasses.replace(TWO[0], models=("m",)),)))
        assert [each.is_up for each in r.worker.upstreams] == [True]
        assert list(r.worker.upstream_reports.verdicts) == ["a"]
        r.pass_time(0.3)
        shown = json.loads(r.client(get("/status"), listener="admin").answer.body)["upstreams"]
        assert list(shown) == ["a"] and shown["a"]["state"] == "up"
