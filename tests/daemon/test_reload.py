"""A reload that goes wrong: it is refused with a line, and systemd is told READY again."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from streamd.config import ConfigError, Settings
from streamd.daemon import logs
from streamd.daemon.control import ToWorker
from streamd.daemon.reload import Reloads, as_far_as_running
from streamd.daemon.slot import Slot
from streamd.sources import ConfigProblem


class Told:
    """systemd."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def reloading(self, now_monotonic_usec: int) -> bool:
        self.words.append("RELOADING")
        return True

    def ready(self, status: str = "") -> bool:
        self.words.append("READY")
        return True


class Place(Slot):
    """A worker that is told, and dies at it if `error` is set."""

    def __init__(self, error: Exception | None = None, number: int = 0) -> None:
        super().__init__(number)
        self.error_at_tell = error
        self.is_gone = False
        self.told: list[ToWorker] = []
        self.outcomes: list[Any] = []  # of reloads

    def tell(self, kind: ToWorker, facts: object = None) -> bool:
        if self.error_at_tell is not None:
            raise self.error_at_tell
        if self.is_gone:
            return False
        if kind is ToWorker.RELOADED:
            self.outcomes.append(facts)
        else:
            self.told.append(kind)
        return True


@pytest.mark.parametrize(
    "error",
    [
        ConfigError([ConfigProblem("file", "key", "", "wrong")]),
        OSError("no file"),
        RecursionError("nested"),
        ValueError("5000 digits"),
        MemoryError(),
        ZeroDivisionError(),
    ],
)
@pytest.mark.parametrize("where", ["load", "tell"])
def test_ready_follows_reloading_whatever_is_raised(
    error: Exception, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(logs, "event", lambda level, name, /, **fields: lines.append(name))
    systemd: Any = Told()
    settings, place = Settings(), Place(error if where == "tell" else None)

    def load() -> Settings:
        if where == "load":
            raise error
        return Settings(head_timeout_s=1.0)

    reloads = Reloads(settings, load, systemd, [place])
    before = reloads._outcome.unix_s
    reloads.ask()
    reloads.begin_if_asked()
    assert systemd.words == ["RELOADING", "READY"]
    assert reloads.settings is settings and any("refused" in line for line in lines)
    place.error_at_tell = None
    reloads._load = lambda: Settings(head_timeout_s=2.0)
    reloads.ask()
    reloads.begin_if_asked()
    assert place.told == [ToWorker.PREPARE]
    reloads.prepared(place, reloads._number, "")
    reloads.answered(place, reloads._number)
    (succeeded, read_at) = place.outcomes[-1]
    assert succeeded and read_at == reloads._outcome.unix_s <= time.time()
    assert where == "tell" or place.outcomes[0] == (False, before)
    assert systemd.words == ["RELOADING", "READY"] * 2 and reloads.settings.head_timeout_s == 2.0


class Daemon:
    """The parent's reloads, with two workers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []
        monkeypatch.setattr(logs, "event", lambda level, name, /, **fields: self.lines.append((name, fields)))
        self.systemd, self.old = Told(), Settings(head_timeout_s=1.0)
        self.fresh = Settings(head_timeout_s=2.0)
        self.first, self.second = self.places = Place(number=0), Place(number=1)
        notifier: Any = self.systemd
        self.reloads = Reloads(self.old, lambda: self.fresh, notifier, self.places)

    def ask(self) -> int:
        """A SIGHUP comes; the number of the reload that is under way."""
        self.reloads.ask()
        self.reloads.begin_if_asked()
        return self.reloads._number

    def told(self) -> list[list[ToWorker]]:
        """What each worker was told since the last look."""
        found = [place.told[:] for place in self.places]
        for place in self.places:
            place.told.clear()
        return found


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Daemon:
    return Daemon(monkeypatch)


def test_new_settings_hold_when_all_workers_have_prepared_them(daemon: Daemon) -> None:
    reloads, number = daemon.reloads, daemon.ask()
    assert daemon.told() == [[ToWorker.PREPARE]] * 2
    reloads.prepared(daemon.first, number, "")
    assert daemon.told() == [[], []] and reloads.settings is daemon.old
    reloads.prepared(daemon.second, number, "")
    assert daemon.told() == [[ToWorker.APPLY]] * 2 and reloads.settings == daemon.fresh
    reloads.answered(daemon.first, number)
    assert daemon.systemd.words == ["RELOADING"]
    reloads.answered(daemon.second, number)
    assert daemon.systemd.words == ["RELOADING", "READY"]
    assert [name for name, _ in daemon.lines] == ["reloaded"]


def test_what_a_worker_refuses_no_worker_applies(daemon: Daemon) -> None:
    reloads, number = daemon.reloads, daemon.ask()
    daemon.told()
    reloads.prepared(daemon.first, number, "")
    reloads.prepared(daemon.second, number, "no such certificate")
    assert daemon.told() == [[ToWorker.DISCARD]] * 2
    assert reloads.settings is daemon.old and daemon.systemd.words == ["RELOADING", "READY"]
    assert daemon.lines[-1][1] == {"error": "no such certificate"}
    reloads.prepared(daemon.first, number, "")  # its answer comes late
    assert daemon.told() == [[], []] and reloads.settings is daemon.old


def test_an_answer_to_an_earlier_reload_counts_for_nothing(daemon: Daemon) -> None:
    reloads, number = daemon.reloads, daemon.ask()
    reloads.prepared(daemon.first, number, "wrong")
    again = daemon.ask()
    daemon.told()
    for _ in range(2):
        for place in daemon.places:
            reloads.answered(place, number)
            reloads.prepared(place, number, "")
    assert again != number and daemon.told() == [[], []] and reloads.settings is daemon.old


def test_a_reload_that_is_asked_for_during_another_begins_at_its_end(daemon: Daemon) -> None:
    reloads, number = daemon.reloads, daemon.ask()
    assert daemon.ask() == number, "one at a time"
    daemon.told()
    reloads.prepared(daemon.first, number, "wrong")
    assert reloads._number == number + 1 and daemon.told() == [[ToWorker.DISCARD, ToWorker.PREPARE]] * 2
    assert daemon.systemd.words == ["RELOADING", "READY", "RELOADING"]


def test_a_worker_that_is_gone_is_not_waited_for_and_its_successor_is(daemon: Daemon) -> None:
    daemon.second.is_gone = True
    reloads, number = daemon.reloads, daemon.ask()
    daemon.second.is_gone = False
    daemon.told()
    reloads.started(daemon.second)  # with the old settings, which it was given
    assert daemon.told() == [[], [ToWorker.PREPARE]]
    reloads.prepared(daemon.first, number, "")
    assert daemon.told() == [[], []] and reloads.settings is daemon.old
    reloads.prepared(daemon.second, number, "")
    assert daemon.told() == [[ToWorker.APPLY]] * 2
    reloads.started(daemon.second)  # its successor has the new settings already
    reloads.answered(daemon.second)  # it has died
    reloads.answered(daemon.first, number)
    assert daemon.told() == [[], []] and daemon.systemd.words == ["RELOADING", "READY"]


def test_a_daemon_that_stops_says_nothing_more_of_its_reload(daemon: Daemon) -> None:
    reloads, number = daemon.reloads, daemon.ask()
    daemon.told()
    reloads.ask()
    reloads.abandon()
    for place in daemon.places:
        reloads.prepared(place, number, "")
        reloads.answered(place)
    reloads.begin_if_asked()
    assert daemon.told() == [[], []] and daemon.systemd.words == ["RELOADING"] and reloads.settings is daemon.old


def test_settings_that_need_a_restart_keep_their_values_and_are_named(daemon: Daemon) -> None:
    daemon.fresh = Settings(head_timeout_s=2.0, workers=daemon.old.workers + 1)
    reloads, number = daemon.reloads, daemon.ask()
    for place in daemon.places:
        reloads.prepared(place, number, "")
    for place in daemon.places:
        reloads.answered(place, number)
    assert (reloads.settings.head_timeout_s, reloads.settings.workers) == (2.0, daemon.old.workers)
    assert daemon.lines[0][1] == {"settings": ("workers",)} and daemon.lines[1][0] == "reloaded"


def test_the_engines_password_stays_with_its_servers() -> None:
    running = Settings(engine=("valkey://a",), engine_user="u", engine_password_file="/p", engine_push_s=0.03)
    moved = Settings(engine=("valkey://b",), engine_user="v", engine_password_file="/q", engine_push_s=0.05)
    used, fixed = as_far_as_running(running, moved)
    assert used == Settings(engine=("valkey://a",), engine_user="u", engine_password_file="/p", engine_push_s=0.05)
    assert fixed == ("engine", "engine_user", "engine_password_file")
    used, fixed = as_far_as_running(running, replace(running, engine_user="v"))
    assert used.engine_user == "v" and fixed == ()
