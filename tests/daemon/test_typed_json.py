"""Typed JSON: every kind of message passes unchanged, and neighbouring versions understand each other."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from typing import Any, NamedTuple

import pytest

from streamd.config import RouteOverride, Settings, UpstreamSettings
from streamd.daemon import control
from streamd.daemon.control import (
    FORMS,
    MESSAGES_VERSION,
    DaemonState,
    Received,
    Reloaded,
    Report,
    Standing,
    ToParent,
    ToWorker,
)
from streamd.daemon.typed_json import FormError, read, written
from streamd.forward_proxy import ForwardProxy
from streamd.log_levels import LevelChange, LogLevels, Watch
from streamd.server_state import ServerState, ServerView

UPSTREAM = UpstreamSettings(
    name="a",
    url="https://a.test/v1?x=1",
    models=("m", "n"),
    key="secret",
    headers={"x-a": "b"},
    through=ForwardProxy("proxy.test", 3128, "Basic eA=="),
)
SETTINGS = Settings(upstreams=(UPSTREAM,), routes=(RouteOverride(path="/v1/chat/*", policy="close", heartbeat_s=2.5),))
VIEW = ServerView(ServerState.OUT, 1.5, 1.0, 3, "upstream_connect", "no way", ("m",))

FACTS: dict[ToWorker | ToParent, Any] = {
    ToWorker.SETTINGS: (SETTINGS, ("a", "b")),
    ToWorker.UPSTREAMS: (("a", VIEW), ("b", ServerView())),
    ToWorker.PREPARE: (7, SETTINGS, ("a",)),
    ToWorker.APPLY: 7,
    ToWorker.DISCARD: 7,
    ToWorker.DRAIN: (True, False, "SIGTERM"),
    ToWorker.LOG_LEVEL: LogLevels("info", "debug", 9.5, (Watch("k", "", 4.0),)),
    ToWorker.BURY: (3, 4711),
    ToWorker.RELOADED: Reloaded(False, 1.8e9),
    ToWorker.STORED: True,
    ToParent.READY: "the budget",
    ToParent.FAILED: (2, ("line", "another")),
    ToParent.STANDING: Standing(1, 2, 3.5, 0.25),
    ToParent.UPSTREAM: ("a", VIEW),
    ToParent.PREPARED: (7, "why not"),
    ToParent.APPLIED: 7,
    ToParent.LOG_LEVEL: LevelChange("debug", 60.0, key="k"),
    ToParent.DRAINED: Report(1, 2, 3),
    ToParent.STORE: "name",
    ToParent.REMOVE: "name",
}
KINDS: list[ToWorker | ToParent] = [*ToWorker, *ToParent]


@pytest.fixture
def pipe() -> Any:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_of_message_passes_unchanged(kind: ToWorker | ToParent, pipe: Any) -> None:
    ours, theirs = pipe
    facts = FACTS.get(kind)
    assert (facts is None) == (FORMS[kind] is None), "each kind with facts has an example"
    assert control.send(ours, kind, facts)
    found = control.receive(theirs, type(kind))
    assert found == Received(kind, facts)


def test_settings_pass_with_what_is_derived_from_them(pipe: Any) -> None:
    found = read(json.loads(json.dumps(written(SETTINGS, Settings))), Settings)
    assert found == SETTINGS and found.upstreams[0].origin == UPSTREAM.origin
    assert found.upstreams[0].key == "secret"
    assert found.route("/v1/chat/completions") == SETTINGS.route("/v1/chat/completions")


class Older(NamedTuple):
    """A kind's facts in the version before."""

    name: str


class Newer(NamedTuple):
    """And in this version."""

    name: str
    count: int = 5


def test_neighbouring_versions_read_each_other() -> None:
    assert read(written(Older("a"), Older), Newer) == Newer("a", 5)
    assert read(written(Newer("a", 9), Newer), Older) == Older("a")
    with pytest.raises(FormError, match="Newer"):
        read({"count": 1}, Newer)


@pytest.mark.parametrize("version, taken", [(-1, True), (0, True), (1, True), (2, False), (-2, False)])
def test_versions_beside_this_one_are_taken(version: int, taken: bool, pipe: Any) -> None:
    ours, theirs = pipe
    ours.send(json.dumps([MESSAGES_VERSION + version, "hurry", None]).encode())
    if taken:
        assert control.receive(theirs, ToWorker) == Received(ToWorker.HURRY, None)
    else:
        with pytest.raises(FormError, match="version"):
            control.receive(theirs, ToWorker)


def test_a_kind_of_another_version_says_nothing_and_its_descriptor_is_closed(pipe: Any) -> None:
    ours, theirs = pipe
    before = len(os.listdir("/proc/self/fd"))
    data = json.dumps([MESSAGES_VERSION, "levitate", {"by": 3}]).encode()
    socket.send_fds(ours, [data], [ours.fileno()])
    assert control.send(ours, ToWorker.CLOSE)
    assert control.receive(theirs, ToWorker) == Received(ToWorker.CLOSE, None)
    socket.send_fds(ours, [b"{"], [ours.fileno()])
    with pytest.raises(FormError):
        control.receive(theirs, ToWorker)
    assert len(os.listdir("/proc/self/fd")) == before


WRONG: list[tuple[Any, Any]] = [
    (True, int),
    (1, bool),
    ("1", float),
    (1.5, int),
    (None, str),
    (1, None),
    ([1], tuple[int, int]),
    ("ab", tuple[str, ...]),
    ({"a": 1}, tuple[int, ...]),
    ("nowhere", ServerState),
    ([], Standing),
    ({"connections": "many"}, Standing),
    ({}, Watch),
    ([], dict[str, str]),
]


@pytest.mark.parametrize("given, form", WRONG)
def test_facts_of_another_type_are_refused(given: Any, form: Any) -> None:
    with pytest.raises(FormError):
        read(given, form)


@pytest.mark.parametrize(
    "value, form", [(VIEW, Standing), (DaemonState.SERVING, ServerState), ((1,), str), (1, Report)]
)
def test_what_could_not_be_read_is_not_written(value: Any, form: Any) -> None:
    with pytest.raises(FormError):
        written(value, form)


def test_an_error_never_shows_a_value() -> None:
    facts = written(UPSTREAM, UpstreamSettings) | {"key": ["secret"]}
    with pytest.raises(FormError) as caught:
        read(facts, UpstreamSettings)
    assert "secret" not in str(caught.value)


def test_every_field_of_the_settings_has_a_type_that_passes() -> None:
    fields = {field.name for field in dataclasses.fields(Settings) if field.init}
    assert set(written(Settings(), Settings)) == fields
