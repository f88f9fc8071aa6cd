"""One worker as the whole daemon: signals, systemd, configuration, start and stop. No supervisor."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, MutableMapping, Sequence
from typing import Any

import uvloop

from streamd import __version__
from streamd.addresses import parse_address
from streamd.config import ROWS, ConfigError, Settings
from streamd.core.admission import BudgetError
from streamd.daemon import logs, machine, systemd
from streamd.daemon.state_store import StateStore, put_streams, take_streams
from streamd.daemon.worker import Worker
from streamd.net import listen
from streamd.sources import Problem

Load = Callable[[], Settings]

# `systemctl status` and the log of the supervisor need no more than that.
STATUS_EVERY_S = 5.0

# While a drain goes on systemd is told again and again that it may take this much longer.
EXTEND_S = 10.0

# Once before streams are saved, and before they are taken up: 1 GiB of logs, at the 50 MB/s of a slow disk, is 20 s.
STATE_S = 30.0

# A second signal counts only when it comes a second later: Ctrl-C reaches the whole foreground group at once.
SECOND_SIGNAL_S = 1.0

# Exit statuses: 1 is a failure that a restart may mend (the port is taken), 2 a mistake in the settings.
EXIT_FAILED = 1
EXIT_SETTINGS = 2


class Single:
    """The daemon around its one worker."""

    def __init__(
        self,
        worker: Worker,
        load: Load,
        notifier: systemd.Notifier,
    ) -> None:
        self._worker = worker
        self._load = load
        self._notifier = notifier
        self._loop = worker.loop
        self._signalled_at = -SECOND_SIGNAL_S
        self._watchdog_at = 0.0
        self._status_at = 0.0
        self._status_events = 0
        self._extended_at = 0.0
        self._told_stopping = False

    async def serve(self, inherited: systemd.Inherited) -> int:
        """Listen, serve, drain; streams come from the process before and go to the next. OSError: it can't listen."""
        worker, settings = self._worker, self._worker.settings
        public = [sock for name, sock in inherited.listeners if name != "admin"]
        admin = [sock for name, sock in inherited.listeners if name == "admin"]
        check_inherited(settings, public)
        bound = [] if public else [listen.bind(parse_address(address)) for address in settings.listen]
        bound_admin = [listen.bind(parse_address(settings.admin))] if settings.admin and not admin else []
        # Between bind and accept: a start that fails for its port leaves the saved streams where they are, and no
        # reader is answered before its stream is there.
        store = StateStore(self._notifier, settings.state_dir, inherited.stored)
        if store.is_waiting:
            self._notifier.extend_timeout(round(STATE_S * 1_000_000))
        take_streams(store.take(), worker.runtime)
        await worker.listen(public, keep_open=True)
        await worker.listen(admin, "admin", keep_open=True)
        await worker.listen(bound)
        await worker.listen(bound_admin, "admin")
        self._listen_to_signals()
        worker.runtime.sweep.on_tick.append(self._tick)
        worker.start()
        logs.event(logs.INFO, "budget", text=worker.budget.describe())
        self._say_ready([*public, *bound], [*admin, *bound_admin])
        report = await worker.drained
        self._say_stopping()
        if len(worker.runtime.hub):
            self._notifier.extend_timeout(round(STATE_S * 1_000_000))
        put_streams(store, worker.runtime, self._room_bytes())
        logs.event(logs.INFO, "stopped", finished=report.finished, moved=report.moved, cut=report.cut)
        return 0

    def _say_ready(self, public: list[socket.socket], admin: list[socket.socket]) -> None:
        logs.event(
            logs.INFO,
            "serving",
            version=__version__,
            listen=tuple(map(listen.shown, public)),
            admin=tuple(map(listen.shown, admin)) or None,
            upstreams=tuple(each.name for each in self._worker.settings.upstreams),
            keys="yes" if self._worker.settings.keys_file else "none: everybody who reaches it may use it",
            pid=os.getpid(),
        )
        self._notifier.ready(self._worker.status_line(0.0))

    def _say_stopping(self) -> None:
        """Once, whoever asked for the drain: a signal, or the admin surface."""
        if not self._told_stopping:
            self._told_stopping = True
            self._notifier.stopping(self._worker.status_line(0.0))

    def _room_bytes(self) -> int:
        """Memory for saved streams beside everything that is still held: half of what is free, the rest is others'."""
        return max(0, self._worker.budget.resources.memory_bytes - machine.resident_bytes()) // 2

    # -- signals

    def _listen_to_signals(self) -> None:
        loop = self._loop
        loop.add_signal_handler(signal.SIGTERM, self._stop, "SIGTERM", False)
        loop.add_signal_handler(signal.SIGINT, self._stop, "SIGINT", True)
        loop.add_signal_handler(signal.SIGHUP, self.reload)

    def _stop(self, name: str, quick: bool) -> None:
        now = self._loop.time()
        if now - self._signalled_at < SECOND_SIGNAL_S:
            return
        self._signalled_at = now
        logs.event(logs.INFO, "draining" if self._worker.draining is None else "hurrying", signal=name)
        self._worker.drain(quick=quick)
        self._say_stopping()

    def reload(self) -> None:
        """SIGHUP: read the configuration again. A file that isn't right changes nothing and says why."""
        worker = self._worker
        if worker.draining is not None:
            logs.event(logs.WARNING, "reload refused; streamd is stopping")
            return
        self._notifier.reloading(time.monotonic_ns() // 1000)
        try:
            settings, fixed = as_far_as_running(worker.settings, self._load())
            worker.reload(settings)
        except (ConfigError, BudgetError, OSError) as error:
            logs.event(logs.ERROR, "reload refused; the old settings hold", error=str(error))
        else:
            if fixed:
                logs.event(logs.WARNING, "settings that only a restart changes are as before", settings=fixed)
            logs.event(logs.INFO, "reloaded", upstreams=tuple(each.name for each in settings.upstreams))
        self._notifier.ready()

    # -- systemd, from the loop that it vouches for

    def _tick(self, now: float, lag_s: float) -> None:
        notifier, hub = self._notifier, self._worker.runtime.hub
        if notifier.watchdog_interval_s and now >= self._watchdog_at:
            self._watchdog_at = now + notifier.watchdog_interval_s
            notifier.watchdog()
        if notifier.enabled and now >= self._status_at + STATUS_EVERY_S:  # adding up thousands of streams takes ms
            tokens_per_s = (hub.text_events_total - self._status_events) / max(0.001, now - self._status_at)
            self._status_at, self._status_events = now, hub.text_events_total
            notifier.status(self._worker.status_line(tokens_per_s))
        if self._worker.draining is not None:
            self._say_stopping()
        if self._worker.draining is not None and now >= self._extended_at + EXTEND_S / 2:
            self._extended_at = now
            notifier.extend_timeout(round(EXTEND_S * 1_000_000))


def check_inherited(settings: Settings, public: Sequence[socket.socket]) -> None:
    """Sockets of systemd's take the place of `listen`, and so does this rule for it. Raises ConfigError."""
    if settings.keys_file or settings.insecure_public:
        return
    wanted = "must be loopback or a Unix socket without keys_file (or say insecure_public: everybody may use it)"
    problems = [
        Problem("streamd.socket", "ListenStream", listen.shown(sock), wanted)
        for sock in public
        if not listen.is_loopback(sock)
    ]
    if problems:
        raise ConfigError(problems)


def as_far_as_running(running: Settings, fresh: Settings) -> tuple[Settings, tuple[str, ...]]:
    """Fresh settings, but what only a restart changes as it is running; and the keys of those that now differ."""
    rows = [row for row in ROWS if row.restart and getattr(running, row.attribute) != getattr(fresh, row.attribute)]
    kept = {row.attribute: getattr(running, row.attribute) for row in rows}
    return dataclasses.replace(fresh, **kept), tuple(row.key for row in rows)


def run_loop(serve: Coroutine[Any, Any, int]) -> int:
    """Run a process of the daemon to its end: its exit status; what kept it from starting goes to standard error.

    A ConfigError is the command line's to tell (cli.py), one problem a line.
    """
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serve)
    except BudgetError as error:
        print(f"streamd: {error}", file=sys.stderr)
        return EXIT_SETTINGS
    except OSError as error:
        print(f"streamd: {error}", file=sys.stderr)
        return EXIT_FAILED


def run(settings: Settings, load: Load, environ: MutableMapping[str, str] = os.environ) -> int:
    """`streamd serve` with one worker: the exit status."""
    logs.setup(settings.log_level, settings.log_format, journal_stream=environ.get("JOURNAL_STREAM"))
    notifier = systemd.Notifier.from_environ(environ, os.getpid())
    inherited = systemd.inherited(environ, os.getpid())
    return run_loop(_serve(settings, load, notifier, inherited))


async def _serve(settings: Settings, load: Load, notifier: systemd.Notifier, inherited: systemd.Inherited) -> int:
    worker = Worker(asyncio.get_running_loop(), settings)
    return await Single(worker, load, notifier).serve(inherited)
