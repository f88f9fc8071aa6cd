"""Supervisor: several workers as one daemon. It runs no event traffic.

It binds or inherits the listening sockets, makes the shared mapping and the pairs over which workers pass connections
on, and starts the workers as processes of their own (exec, so nothing is shared but what is meant to be). It alone
hears signals and talks to systemd. It tells workers what to do over a pipe each, a SOCK_SEQPACKET pair; the end of
the pipe is a stop, so workers never outlive it.

    a worker dies         its counts are folded into the base row, a new one takes its slot (after a delay that grows
                          while deaths follow each other); its streams are gone, their ids are 410
    a worker is silent    for worker_stuck: killed, then as above. Only its streams end
    we are stuck          systemd's watchdog ends us all: WATCHDOG=1 stops without a turning loop here, or a live worker
    we die                the pipes end: the workers drain quickly, and end

What the workers share stays here over their deaths: the listeners, the mapping, both ends of all pairs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, MutableMapping, Sequence

from streamd import __version__
from streamd.addresses import parse_address
from streamd.config import ConfigError, Settings
from streamd.core.admission import BudgetError
from streamd.daemon import access_files, budget, logs, shared, systemd
from streamd.daemon.drain import Report, State
from streamd.daemon.orders import WORKER_VARIABLE, Launch, Order, Say
from streamd.daemon.single import (
    EXIT_FAILED,
    EXIT_SETTINGS,
    EXTEND_S,
    SECOND_SIGNAL_S,
    STATE_S,
    STATUS_EVERY_S,
    Load,
    as_far_as_running,
    check_inherited,
    run_loop,
)
from streamd.daemon.state_store import StateStore, deal_out, gather_in
from streamd.daemon.worker import QUICK_DRAIN_S, status_line
from streamd.net import listen
from streamd.net.peers import owner_of
from streamd.net.sweep import INTERVAL_S

# A worker that dies at once is started again after this long, doubling with each further death within a minute.
RESTART_S_MIN = 0.1
RESTART_S_MAX = 10.0
RESTART_FORGET_S = 60.0

# From the moment that all workers should have stopped until they are killed.
KILL_AFTER_S = 5.0

# From the end of a worker's pipe to its own end: it only has to return.
END_S = 0.2

# A worker's start is half a second of work; on a busy machine much longer.
START_S_MAX = 30.0

# Half of the shortest worker_stuck: who is so late doesn't judge others.
SILENT_S_MIN = 1.0

# What a message over a pipe may take: settings with a hundred upstreams are 50 KB.
MESSAGE_BYTES_MAX = 192 * 1024


class Member:
    """One slot: the process in it now, and how the ones before fared."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.process: subprocess.Popen[bytes] | None = None
        self.pipe: socket.socket | None = None
        self.ready = False
        self.heard_at = 0.0
        self.report: Report | None = None
        self.deaths = 0  # within RESTART_FORGET_S of each other
        self.died_at = -RESTART_FORGET_S
        self.start_at = 0.0


class Supervisor:
    """The parent."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        settings: Settings,
        load: Load,
        notifier: systemd.Notifier,
        argv: Sequence[str],
    ) -> None:
        self._loop = loop
        self._settings = settings
        self._load = load
        self._notifier = notifier
        self._argv = argv
        workers = settings.workers
        self._names = [each.name for each in settings.upstreams]
        self._fd = shared.create(workers)
        self._shared = shared.Shared(self._fd, workers, self._names)
        self._pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(workers)]
        self._members = [Member(slot) for slot in range(workers)]
        self._kept = [os.memfd_create(f"streamd-kept-{slot}") for slot in range(workers)]
        self._public: list[socket.socket] = []
        self._admin: list[socket.socket] = []
        self._kept_open = False  # systemd holds the sockets
        self._exit_status = 0
        self._state = State.STARTING
        self._stopped: asyncio.Future[None] = loop.create_future()
        self._signalled_at = -SECOND_SIGNAL_S
        self._watchdog_at = self._status_at = self._extended_at = 0.0
        self._ticked_at = loop.time()
        self._kill_at = float("inf")
        self._tokens = 0
        self._ticking: asyncio.TimerHandle

    async def serve(self, inherited: systemd.Inherited) -> int:
        """Start, watch, stop. Raises OSError where it can't listen, BudgetError where the machine is too small."""
        budget_line = budget.budget_of(self._settings).describe()
        access_files.check(self._settings)
        self._take_sockets(inherited)
        self._shared.started_at = self._loop.time()
        for number, quick in ((signal.SIGTERM, False), (signal.SIGINT, True)):
            self._loop.add_signal_handler(number, self._stop, number.name, quick)
        self._loop.add_signal_handler(signal.SIGHUP, self.reload)
        logs.event(logs.INFO, "budget", text=budget_line)
        store = StateStore(self._notifier, self._settings.state_dir, inherited.stored)
        if store.is_waiting:
            self._notifier.extend_timeout(round(STATE_S * 1_000_000))
        deal_out(store, self._kept, lambda stream_id: owner_of(stream_id, len(self._members)))
        for member in self._members:
            self._start(member)
        self._ticking = self._loop.call_later(INTERVAL_S, self._tick)
        await self._stopped
        self._ticking.cancel()
        self._notifier.extend_timeout(round(STATE_S * 1_000_000))
        gather_in(store, self._kept)
        report = self._report()
        logs.event(logs.INFO, "stopped", finished=report.finished, moved=report.moved, cut=report.cut)
        return self._exit_status

    def _take_sockets(self, inherited: systemd.Inherited) -> None:
        self._public = [sock for name, sock in inherited.listeners if name != "admin"]
        self._admin = [sock for name, sock in inherited.listeners if name == "admin"]
        check_inherited(self._settings, self._public)
        self._kept_open = bool(self._public)
        if not self._public:
            self._public = [listen.bind(parse_address(address)) for address in self._settings.listen]
        if self._settings.admin and not self._admin:
            self._admin = [listen.bind(parse_address(self._settings.admin))]

    # -- workers

    def _start(self, member: Member) -> None:
        """A new process in the slot."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        inbox, _ = self._pairs[member.slot]
        launch = Launch(
            slot=member.slot,
            workers=len(self._members),
            pipe=theirs.fileno(),
            counters=self._fd,
            public=tuple(sock.fileno() for sock in self._public),
            admin=tuple(sock.fileno() for sock in self._admin),
            kept_open=self._kept_open,
            kept=self._kept[member.slot],
            inbox=inbox.fileno(),
            outlets=tuple(outlet.fileno() for _, outlet in self._pairs),
        )
        environ = {**os.environ, WORKER_VARIABLE: launch.encode()}
        member.process = subprocess.Popen(
            [sys.executable, "-m", "streamd", *self._argv], env=environ, pass_fds=launch.descriptors()
        )
        theirs.close()
        member.pipe = ours
        member.ready = False
        member.report = None
        member.heard_at = self._loop.time()
        member.start_at = 0.0
        self._loop.add_reader(ours.fileno(), self._hear, member)
        self._tell(member, Order.SETTINGS, (self._settings, tuple(self._names)))

    def _tell(self, member: Member, order: Order, what: object = None) -> None:
        if member.pipe is not None:
            with contextlib.suppress(OSError):  # it died, or is stuck: the tick finds out
                member.pipe.send(pickle.dumps((order, what)))

    def _hear(self, member: Member) -> None:
        pipe = member.pipe
        assert pipe is not None
        try:
            message = pipe.recv(MESSAGE_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._gone(member)
            return
        member.heard_at = self._loop.time()
        say, what = pickle.loads(message)  # our own child's
        if say is Say.READY:
            self._worker_ready(member)
        elif say is Say.DRAINED:
            member.report = what
        elif say is Say.DRAIN:
            self._stop("admin", quick=False)
        elif say is Say.LOG_LEVEL:
            logs.set_level(what)
            for other in self._members:
                self._tell(other, Order.LOG_LEVEL, what)

    def _worker_ready(self, member: Member) -> None:
        member.ready = True
        if self._state is State.STARTING and all(each.ready for each in self._members):
            self._state = State.SERVING
            logs.event(
                logs.INFO,
                "serving",
                version=__version__,
                listen=tuple(map(listen.shown, self._public)),
                admin=tuple(map(listen.shown, self._admin)) or None,
                upstreams=tuple(each.name for each in self._settings.upstreams),
                keys="yes" if self._settings.keys_file else "none: everybody who reaches it may use it",
                workers=len(self._members),
                pid=os.getpid(),
            )
            self._notifier.ready(self._status_line(0.0))

    def _gone(self, member: Member) -> None:
        """The pipe's end: the process ended, or is about to."""
        process, pipe = member.process, member.pipe
        assert process is not None and pipe is not None
        self._loop.remove_reader(pipe.fileno())
        pipe.close()
        member.pipe = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        if process.poll() is None:
            process.kill()
            process.wait()
        member.process = None
        member.ready = False
        self._shared.bury(member.slot)
        if self._state is State.DRAINING:
            self._end_if_all_ended()
        elif self._state is State.STARTING and process.returncode in (EXIT_FAILED, EXIT_SETTINGS):
            self._exit_status = process.returncode  # it said why
            self._begin_drain(quick=True)
        else:
            self._plan_successor(member, process.returncode)

    def _plan_successor(self, member: Member, status: int) -> None:
        now = self._loop.time()
        member.deaths = member.deaths + 1 if now - member.died_at < RESTART_FORGET_S else 1
        member.died_at = now
        wait_s = min(RESTART_S_MIN * 2 ** min(member.deaths - 1, 16), RESTART_S_MAX)
        member.start_at = now + wait_s
        text = "worker died; its streams ended with it, a new one is started"
        logs.event(logs.ERROR, text, slot=member.slot, status=status, wait_s=wait_s)

    def _end_if_all_ended(self) -> None:
        if all(member.process is None for member in self._members) and not self._stopped.done():
            self._stopped.set_result(None)

    # -- signals

    def _stop(self, name: str, quick: bool) -> None:
        now = self._loop.time()
        if now - self._signalled_at < SECOND_SIGNAL_S:
            return
        self._signalled_at = now
        if self._state is State.DRAINING:
            logs.event(logs.INFO, "hurrying", signal=name)
            for member in self._members:
                self._tell(member, Order.HURRY)
            self._kill_at = now + KILL_AFTER_S
            return
        logs.event(logs.INFO, "draining", signal=name)
        self._begin_drain(quick=quick)

    def _begin_drain(self, *, quick: bool) -> None:
        settings = self._settings
        self._state = State.DRAINING
        self._notifier.stopping(self._status_line(0.0))
        longest_s = settings.drain_delay_s + settings.drain_timeout_s
        self._kill_at = self._loop.time() + (QUICK_DRAIN_S if quick else longest_s) + KILL_AFTER_S
        for member in self._members:
            self._tell(member, Order.DRAIN, quick)
        # The workers empty the accept queues and close; the last one to do so must be the last.
        for sock in (*self._public, *self._admin):
            sock.close()
        self._end_if_all_ended()

    def reload(self) -> None:
        """SIGHUP: read the configuration again and hand it to the workers, or say why not."""
        if self._state is State.DRAINING:
            logs.event(logs.WARNING, "reload refused; streamd is stopping")
            return
        self._notifier.reloading(time.monotonic_ns() // 1000)
        try:
            settings, fixed = as_far_as_running(self._settings, self._load())
            budget.budget_of(settings)
            access_files.check(settings)
        except (ConfigError, BudgetError, OSError) as error:
            logs.event(logs.ERROR, "reload refused; the old settings hold", error=str(error))
        else:
            self._take_settings(settings)
            if fixed:
                logs.event(logs.WARNING, "settings that only a restart changes are as before", settings=fixed)
            logs.event(logs.INFO, "reloaded", upstreams=tuple(each.name for each in settings.upstreams))
        self._notifier.ready()

    def _take_settings(self, settings: Settings) -> None:
        self._settings = settings
        self._names += [each.name for each in settings.upstreams if each.name not in self._names]
        self._shared.names = tuple(self._names)
        logs.set_level(settings.log_level)
        logs.set_format(settings.log_format)
        for member in self._members:
            self._tell(member, Order.SETTINGS, (settings, tuple(self._names)))

    # -- clock work

    def _tick(self) -> None:
        now = self._loop.time()
        if now - self._ticked_at > SILENT_S_MIN:  # we were stopped ourselves, and have not read what they said since
            for member in self._members:
                member.heard_at = now
        self._ticked_at = now
        for member in self._members:
            self._look_after(member, now)
        self._tell_systemd(now)
        self._ticking = self._loop.call_later(INTERVAL_S, self._tick)

    def _look_after(self, member: Member, now: float) -> None:
        if member.process is None:
            if member.start_at and member.start_at <= now and self._state is not State.DRAINING:
                self._start(member)
            return
        stuck_s = self._settings.worker_stuck_s if member.ready else max(self._settings.worker_stuck_s, START_S_MAX)
        if now >= self._kill_at or now - member.heard_at >= stuck_s:
            silent_s = round(now - member.heard_at, 1)
            logs.event(logs.ERROR, "worker is stuck; killed", slot=member.slot, silent_s=silent_s)
            member.heard_at = now
            member.process.kill()  # the end of its pipe does the rest

    def _tell_systemd(self, now: float) -> None:
        notifier = self._notifier
        alive = any(member.ready and member.process is not None for member in self._members)
        if notifier.watchdog_interval_s and now >= self._watchdog_at and alive:
            self._watchdog_at = now + notifier.watchdog_interval_s
            notifier.watchdog()
        if now >= self._status_at + STATUS_EVERY_S and self._state is not State.STARTING:
            tokens = self._shared.add_up().counters.text_events
            notifier.status(self._status_line((tokens - self._tokens) / max(0.001, now - self._status_at)))
            self._status_at, self._tokens = now, tokens
        if self._state is State.DRAINING and now >= self._extended_at + EXTEND_S / 2:
            self._extended_at = now
            notifier.extend_timeout(round(EXTEND_S * 1_000_000))

    def _status_line(self, tokens_per_s: float) -> str:
        gauges = self._shared.add_up().gauges
        workers = sum(member.ready for member in self._members)
        return f"{status_line(self._state.value, gauges, tokens_per_s)}, {workers} workers"

    def _report(self) -> Report:
        reports = [member.report for member in self._members if member.report is not None]
        return Report(
            finished=sum(each.finished for each in reports),
            moved=sum(each.moved for each in reports),
            cut=sum(each.cut for each in reports),
        )


def run(
    settings: Settings,
    load: Callable[[], Settings],
    argv: Sequence[str],
    environ: MutableMapping[str, str] = os.environ,
) -> int:
    """`streamd serve --workers N`: the exit status. `argv` is the command line behind the program's name."""
    logs.setup(settings.log_level, settings.log_format, journal_stream=environ.get("JOURNAL_STREAM"))
    notifier = systemd.Notifier.from_environ(environ, os.getpid())
    inherited = systemd.inherited(environ, os.getpid())

    async def serve() -> int:
        return await Supervisor(asyncio.get_running_loop(), settings, load, notifier, argv).serve(inherited)

    return run_loop(serve())
