"""Reload: new settings for all workers, in two steps, so that either all workers use them or none does.

PREPARE: every worker reads the files that the settings name, computes its budget, and reports problems. APPLY, if there
are none: every worker uses the prepared settings. The death of a worker counts as its answer, because its successor
starts with the settings that are current then. So a reload also helps when no worker can start any more.

systemd is told RELOADING at the beginning and READY at the end, after the last worker's answer. A SIGHUP in between is
remembered and begins the next reload: the file may have changed since it was read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from streamd.config import ROWS, ConfigError, Settings
from streamd.daemon import logs, systemd
from streamd.daemon.control import Reloaded, ToWorker
from streamd.daemon.slot import Slot

Load = Callable[[], Settings]

# User, password and certificates belong to the servers that they are for: with other servers they need a restart, too.
ENGINE_FILES = ("engine_user", "engine_password_file", "engine_ca_file")


@dataclass(slots=True)
class Reload:
    """A reload under way. Its step is done when `waiting` is empty."""

    number: int
    settings: Settings
    fixed: tuple[str, ...]  # keys that differ, but need a restart
    step: ToWorker
    waiting: set[int]  # numbers of the slots that haven't answered
    read_at: float = 0.0  # when the settings were read, Unix time


class Reloads:
    """The current settings, and the reload that replaces them."""

    def __init__(
        self,
        settings: Settings,
        load: Load,
        notifier: systemd.Notifier,
        slots: Sequence[Slot],
        on_hold: Callable[[Settings], None] = lambda settings: None,
    ) -> None:
        """`on_hold` is called with settings that hold from now on, before a worker uses them."""
        self.settings = settings
        self.names = tuple(each.name for each in settings.upstreams)  # of all upstreams since the start, by index
        self._load = load
        self._notifier = notifier
        self._slots = slots
        self._on_hold = on_hold
        self._reload: Reload | None = None
        self._outcome = Reloaded(succeeded=True, unix_s=time.time())
        self._number = 0
        self._asked = False

    # -- calls from the parent

    def ask(self) -> None:
        """A SIGHUP has come, possibly before the daemon can reload."""
        self._asked = True

    def begin_if_asked(self) -> None:
        """Read the configuration again, unless a reload is under way: this is called again at its end."""
        if not self._asked or self._reload is not None:
            return
        self._asked = False
        self._notifier.reloading(time.monotonic_ns() // 1000)
        try:
            read_at = time.time()
            settings, fixed = as_far_as_running(self.settings, self._load())
            self._number += 1
            self._reload = Reload(self._number, settings, fixed, ToWorker.PREPARE, set(), read_at)
            for each in self._slots:
                self._include(each)
        except Exception as error:  # Why: systemd waits for READY=1 after RELOADING=1, whatever went wrong
            if not isinstance(error, ConfigError | OSError):
                logs.bug("reload", error)
            self._refuse(str(error) or type(error).__name__)
            return
        self._go_on()

    def started(self, place: Slot) -> None:
        """A worker was started, with the current settings: it takes part in a reload that is still in PREPARE."""
        place.tell(ToWorker.RELOADED, self._outcome)
        self._include(place)

    def _include(self, place: Slot) -> None:
        reload = self._reload
        if reload is None or reload.step is not ToWorker.PREPARE:
            return
        if place.tell(ToWorker.PREPARE, (reload.number, reload.settings, self._names_with(reload.settings))):
            reload.waiting.add(place.number)

    def prepared(self, place: Slot, number: int, error: str) -> None:
        """A worker's answer to PREPARE."""
        if self._reload is None or self._reload.number != number:
            return
        if error:
            for each in self._slots:
                each.tell(ToWorker.DISCARD, number)
            self._refuse(error)
        else:
            self.answered(place, number)

    def answered(self, place: Slot, number: int | None = None) -> None:
        """A worker has done its part of the step, or is gone (no number)."""
        if self._reload is not None and number in (None, self._reload.number):
            self._reload.waiting.discard(place.number)
            self._go_on()

    def abandon(self) -> None:
        """The daemon stops: forget the reload."""
        self._reload = None
        self._asked = False

    # -- steps

    def _go_on(self) -> None:
        reload = self._reload
        if reload is None or reload.waiting:
            return
        try:
            if reload.step is ToWorker.PREPARE:
                self._hold(reload.settings)
                reload.step = ToWorker.APPLY
                reload.waiting = {each.number for each in self._slots if each.tell(ToWorker.APPLY, reload.number)}
        except Exception as error:  # Why: as in begin_if_asked()
            logs.bug("reload", error)
            reload.waiting = set()
        if not reload.waiting:
            self._finish(reload)

    def _hold(self, settings: Settings) -> None:
        self.names = self._names_with(settings)
        self.settings = settings
        logs.set_format(settings.log_format)
        self._on_hold(settings)

    def _names_with(self, settings: Settings) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.names, *(each.name for each in settings.upstreams)]))

    def _finish(self, reload: Reload) -> None:
        if reload.fixed:
            logs.event(logs.WARNING, "settings need a restart; their old values stay in use", settings=reload.fixed)
        self._tell_outcome(Reloaded(succeeded=True, unix_s=reload.read_at))
        logs.event(logs.INFO, "reloaded", upstreams=tuple(each.name for each in reload.settings.upstreams))
        self._end()

    def _refuse(self, error: str) -> None:
        self._tell_outcome(self._outcome._replace(succeeded=False))
        logs.event(logs.ERROR, "reload refused; the old settings hold", error=error)
        self._end()

    def _tell_outcome(self, outcome: Reloaded) -> None:
        """Let all workers know how the reload went: any of them may be asked for metrics."""
        self._outcome = outcome
        try:
            for each in self._slots:
                each.tell(ToWorker.RELOADED, outcome)
        except Exception as error:  # Why: as in begin_if_asked()
            logs.bug("reload", error)

    def _end(self) -> None:
        self._reload = None
        self._notifier.ready()
        self.begin_if_asked()


def as_far_as_running(running: Settings, fresh: Settings) -> tuple[Settings, tuple[str, ...]]:
    """Fresh settings, except that those which need a restart keep their values; and the keys of those that differ."""
    kept_with_engine = ENGINE_FILES if running.engine != fresh.engine else ()
    rows = [
        row
        for row in ROWS
        if (row.restart or row.attribute in kept_with_engine)
        and getattr(running, row.attribute) != getattr(fresh, row.attribute)
    ]
    kept = {row.attribute: getattr(running, row.attribute) for row in rows}
    return replace(fresh, **kept), tuple(row.key for row in rows)
