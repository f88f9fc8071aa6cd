"""One worker as the whole daemon: signals, systemd, configuration, start and stop. No supervisor."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, MutableMapping

import uvloop

from streamd import __version__
from streamd.addresses import parse_address
from streamd.config import ConfigError, Settings
from streamd.core.admission import BudgetError
from streamd.daemon import logs, systemd
from streamd.daemon.drain import Report
from streamd.daemon.worker import Worker
from streamd.net import listen

Load = Callable[[], Settings]

# `systemctl status` and the log of the supervisor need no more than that.
STATUS_EVERY_S = 5.0

# While a drain goes on systemd is told again and again that it may take this much longer.
EXTEND_S = 10.0

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

    async def serve(self, inherited: systemd.Inherited) -> int:
        """Listen, serve, drain. Raises OSError where it can't listen."""
        worker, settings = self._worker, self._worker.settings
        public = [sock for name, sock in inherited.listeners if name != "admin"]
        admin = [sock for name, sock in inherited.listeners if name == "admin"]
        await worker.listen(public, keep_open=True)
        await worker.listen(admin, "admin", keep_open=True)
        bound = [] if public else [listen.bind(parse_address(address)) for address in settings.listen]
        await worker.listen(bound)
        if settings.admin and not admin:
            admin = [listen.bind(parse_address(settings.admin))]
            await worker.listen(admin, "admin")
        self._handle_signals()
        worker.runtime.sweep.on_tick.append(self._tick)
        worker.start()
        logs.event(logs.INFO, "budget", text=worker.budget.describe())
        self._say_ready([*public, *bound], admin)
        report = await worker.drained
        self._say_stopped(report)
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

    def _say_stopped(self, report: Report) -> None:
        logs.event(logs.INFO, "stopped", finished=report.finished, moved=report.moved, cut=report.cut)

    # -- signals

    def _handle_signals(self) -> None:
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
        self._notifier.stopping()
        self._worker.drain(quick=quick)

    def reload(self) -> None:
        """SIGHUP: read the configuration again. A file that isn't right changes nothing and says why."""
        self._notifier.reloading(time.monotonic_ns() // 1000)
        try:
            settings = self._load()
            self._worker.reload(settings)
        except (ConfigError, OSError) as error:
            logs.event(logs.ERROR, "reload refused; the old settings hold", error=str(error))
        else:
            logs.event(logs.INFO, "reloaded", upstreams=tuple(each.name for each in settings.upstreams))
        self._notifier.ready()

    # -- systemd, from the loop that it vouches for

    def _tick(self, now: float, lag_s: float) -> None:
        notifier, hub = self._notifier, self._worker.runtime.hub
        if notifier.watchdog_interval_s and now >= self._watchdog_at:
            self._watchdog_at = now + notifier.watchdog_interval_s
            notifier.watchdog()
        if now >= self._status_at + STATUS_EVERY_S:
            tokens_per_s = (hub.text_events_total - self._status_events) / max(0.001, now - self._status_at)
            self._status_at, self._status_events = now, hub.text_events_total
            notifier.status(self._worker.status_line(tokens_per_s))
        if self._worker.draining is not None and now >= self._extended_at + EXTEND_S / 2:
            self._extended_at = now
            notifier.extend_timeout(round(EXTEND_S * 1_000_000))


def run(settings: Settings, load: Load, environ: MutableMapping[str, str] = os.environ) -> int:
    """`streamd serve` with one worker: the exit status."""
    logs.setup(settings.log_level, settings.log_format, journal_stream=environ.get("JOURNAL_STREAM"))
    notifier = systemd.Notifier.from_environ(environ, os.getpid())
    inherited = systemd.inherited(environ, os.getpid())
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(settings, load, notifier, inherited))
    except BudgetError as error:
        print(f"streamd: {error}", file=sys.stderr)
        return EXIT_SETTINGS
    except OSError as error:
        print(f"streamd: {error}", file=sys.stderr)
        return EXIT_FAILED


async def _serve(settings: Settings, load: Load, notifier: systemd.Notifier, inherited: systemd.Inherited) -> int:
    worker = Worker(asyncio.get_running_loop(), settings)
    return await Single(worker, load, notifier).serve(inherited)
