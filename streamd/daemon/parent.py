"""Parent: the main process of the daemon, around one worker or several. It runs no event traffic.

It binds or inherits the listening sockets and starts the workers, each a process of its own that accepts on these
sockets by itself. Only the parent receives signals, talks to systemd and reads the settings. It sends orders to each
worker over a pipe (daemon/control.py).

    a worker dies         its connections and streams end, their ids are 410; a new worker takes its slot, after a delay
                          that grows while deaths follow each other. The listeners stay here: connections that come in
                          the meantime wait in the kernel's queue
    a worker is silent    for worker_stuck: killed, then as above
    the files are new     replaced by an update while the daemon runs: no worker is started on a mixture of versions;
                          the others go on, and the daemon ends when none is left
    the parent is stuck   systemd's watchdog ends all: WATCHDOG=1 needs a turning loop here and a ready worker
    the parent dies       the pipes end: the workers drain quickly, and end

The parent stays small, because it stands beside every worker: it imports nothing of the data path (a contract in
setup.cfg) and no asyncio (4 MB and 50 ms), but waits in a selector. Rejected: a single worker as the main process, with
no parent. A crash of that worker was a crash of the service, it left its port to any process that bound it first, and
signals, reload and systemd were written twice.

Several workers share a mapping for their counts and pairs of sockets over which they hand connections over, and each
has a memfd for its streams over a restart. The parent makes these and keeps them over the workers' deaths, but only the
workers know their content. A single worker has none of them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from pathlib import Path

from streamd import __version__
from streamd.addresses import parse_address
from streamd.config import LISTEN_WITHOUT_KEYS, METRICS_BEYOND_LOOPBACK, ConfigError, Settings
from streamd.daemon import control, listen, logs, slot, systemd
from streamd.daemon.complaint import complain
from streamd.daemon.control import (
    ADMIN,
    EXIT_FAILED,
    EXIT_SETTINGS,
    QUICK_DRAIN_S,
    STATE_FILE,
    STATE_S,
    DaemonState,
    Launch,
    Received,
    Report,
    StateLaunch,
    ToParent,
    ToWorker,
)
from streamd.daemon.file_modes import check_modes
from streamd.daemon.installed import fingerprint
from streamd.daemon.levels import Levels
from streamd.daemon.log_outlet import open_standard_streams
from streamd.daemon.outages import Outages
from streamd.daemon.reload import Load, Reloads
from streamd.daemon.slot import MEANINGLESS, SIGNALS, Slot
from streamd.daemon.state_mover import move_streams, relay_to_store
from streamd.daemon.typed_json import FormError
from streamd.server_state import ServerView
from streamd.sources import ConfigProblem

# Interval of the parent's clock work, the resolution of its time limits; a worker's beats come at the same interval.
TICK_S = 0.25

# Extension of systemd's timeout, requested again and again while a drain goes on.
EXTEND_S = 10.0

# Shortest time between two signals that both count: Ctrl-C reaches the whole foreground group at once.
SECOND_SIGNAL_S = 1.0

# Grace for workers that should have stopped, before they are killed.
KILL_AFTER_S = 5.0

# Delays before another try to start the process that saves the streams of several workers.
SAVE_AGAIN_S = (0.1, 0.5, 2.0)

# Time limit for a worker's start: half a second of work, much longer on a busy machine, and STATE_S more with saved
# streams.
START_S_MAX = 30.0 + STATE_S

# Interval of looks at files that were replaced: once an update is taken back, workers start again.
MIXTURE_EVERY_S = 10.0

# Verdicts on servers in a message to a worker: 250 of 400 bytes are half of the largest message.
VERDICTS_MAX = 250

# If the parent's own tick is later than this (half of the shortest worker_stuck), the parent was stalled itself and has
# not read the workers' beats: it kills no worker for that.
LATE_S = 1.0


class Parent:
    """The main process. `serve` runs it from start to end."""

    def __init__(
        self,
        settings: Settings,
        load: Load,
        notifier: systemd.Notifier,
        argv: Sequence[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._notifier = notifier
        self._argv = argv
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        # the listeners
        self._public: list[socket.socket] = []
        self._admin: list[socket.socket] = []
        self._metrics: list[socket.socket] = []
        self._public_kept = self._admin_kept = self._metrics_kept = False  # systemd holds them too
        # the workers
        self._slots = [Slot(number) for number in range(settings.workers)]
        self._reloads = Reloads(settings, load, notifier, self._slots, self._hold)
        self._outages = Outages(settings.upstreams, clock())
        self._levels = Levels(settings.log_level)
        self._files = ""  # fingerprint of the files that the daemon was started from, once it serves
        self._is_mixed = False  # the log says that these have been replaced
        self._stored: list[int] = []
        self._lock = -1  # held to the end: a single daemon uses a state_dir
        several = settings.workers if settings.workers > 1 else 0
        self._counters = os.memfd_create("streamd-counters") if several else -1
        self._pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(several)]
        self._snapshots = [os.memfd_create(f"streamd-snapshots-{number}") for number in range(several)]
        # life
        self._state = DaemonState.STARTING
        self._started_at = clock()
        self._exit_status = 0
        # clock work
        self._signalled_at = -SECOND_SIGNAL_S
        self._ticked_at = self._started_at
        self._watchdog_at = self._extended_at = 0.0
        # the drain
        self._closes_at = float("inf")  # when its first step ends; infinite if that has ended, or without a drain
        self._drain_ends_at = self._kill_at = float("inf")
        self._may_be_taken_back = False
        self._own_files: dict[str, tuple[int, int]] = {}  # of operators' Unix listeners: device and inode

    @property
    def _settings(self) -> Settings:
        return self._reloads.settings

    def serve(self, inherited: systemd.Inherited) -> int:
        """Start, watch and stop the workers; returns the exit status.

        Raises OSError if it can't listen, and ConfigError as check_inherited() and check_modes() do.
        """
        check_modes(self._settings)
        with self._signals():
            self._lock = lock_state(self._settings.state_dir)
            self._take_sockets(inherited)
            self._restore()
            for each in self._slots:
                self._start_again(each)
            while self._state is not DaemonState.STOPPED:
                self._turn()
            self._remove_own_files()
            self._save()
        report = self._report()
        if self._exit_status == 0:
            logs.event(logs.INFO, "stopped", finished=report.finished, sent_away=report.sent_away, cut=report.cut)
        return self._exit_status

    def _turn(self) -> None:
        """Wait for a message, a signal or the next tick, and process it."""
        due_at = self._ticked_at + TICK_S
        due = [key.data for key, _ in self._selector.select(max(0.0, due_at - self._clock()))]
        if self._clock() >= due_at:
            due.append(self._tick)
        for work in due:
            try:
                work()
            except Exception as error:  # Why: a bug here must not end the workers, which may not need the parent at all
                logs.bug("parent", error)

    # -- listeners

    def _take_sockets(self, inherited: systemd.Inherited) -> None:
        self._public = [sock for name, sock in inherited.listeners if name not in ("admin", "metrics")]
        self._admin = [sock for name, sock in inherited.listeners if name == "admin"]
        self._metrics = [sock for name, sock in inherited.listeners if name == "metrics"]
        self._stored = list(inherited.stored)
        check_inherited(self._settings, self._public, self._metrics)
        self._public_kept, self._admin_kept = bool(self._public), bool(self._admin)
        self._metrics_kept = bool(self._metrics)
        for sock in self._public:  # now, not when a worker is up: connections come meanwhile
            listen.set_options(sock, self._settings)
        if not self._public:
            # After a stop clients come back at once, and wait while their streams are taken up. A fresh daemon accepts
            # nothing before it knows that it can serve: its files are read by the workers.
            waits = self._has_saved_streams()
            addresses = map(parse_address, self._settings.listen)
            self._public = [listen.bind(address, self._settings, listens=waits) for address in addresses]
        if self._settings.admin and not self._admin:
            self._admin = [listen.bind(parse_address(self._settings.admin), self._settings, mode=listen.ADMIN_MODE)]
        if self._settings.metrics_listen and not self._metrics:
            self._metrics = [listen.bind(parse_address(self._settings.metrics_listen), self._settings)]
        self._note_own_files()

    def _close_listeners(self) -> None:
        """Close the parent's copies first: the last copy must be a worker's, which empties the accept queue.

        A worker removes the file of a Unix listener; the parent does it if the workers haven't come up yet. The
        workers keep listeners of operators open to the end, and _remove_own_files() removes the files of these.
        """
        unused = self._state is DaemonState.STARTING
        for sock, kept in self._listeners():
            listen.close(sock, remove=unused and not kept)
        self._public.clear()
        self._admin.clear()
        self._metrics.clear()

    def _note_own_files(self) -> None:
        """Remember the files of operators' Unix listeners: at the end another daemon may have put its own there."""
        for sock, kept in self._listeners():
            if sock not in self._public and not kept and sock.family == socket.AF_UNIX:
                path = sock.getsockname()
                status = os.stat(path)
                self._own_files[path] = (status.st_dev, status.st_ino)

    def _remove_own_files(self) -> None:
        for path, file in self._own_files.items():
            with contextlib.suppress(OSError):
                status = os.stat(path)
                if (status.st_dev, status.st_ino) == file:
                    os.unlink(path)

    def _listeners(self) -> list[tuple[socket.socket, bool]]:
        kinds = (
            (self._public, self._public_kept),
            (self._admin, self._admin_kept),
            (self._metrics, self._metrics_kept),
        )
        return [(sock, kept) for sockets, kept in kinds for sock in sockets]

    # -- saved streams of several workers; a single worker saves and restores by itself

    def _restore(self) -> None:
        """Bring the streams that the previous daemon saved to the workers that will own them."""
        if not self._has_saved_streams():
            return
        if self._snapshots:
            self._move_streams(saves=False)
            self._close_stored()
        else:
            self._notifier.extend_timeout(round(STATE_S * 1_000_000))

    def _has_saved_streams(self) -> bool:
        folder = self._settings.state_dir
        return bool(self._stored or (folder and (Path(folder) / STATE_FILE).exists()))

    def _save(self) -> None:
        """Bring the streams in the workers' memfds to the store: tried again, because they are lost otherwise."""
        if not any(os.fstat(fd).st_size for fd in self._snapshots):
            return
        for wait_s in SAVE_AGAIN_S:
            try:
                self._move_streams(saves=True)
                return
            except OSError as error:  # no memory, no descriptor, or too many processes
                logs.event(logs.ERROR, "streams can't be saved yet", error=str(error), wait_s=wait_s)
                time.sleep(wait_s)  # no worker is there any more
        self._move_streams(saves=True)

    def _move_streams(self, *, saves: bool) -> None:
        launch = StateLaunch(
            saves=saves,
            pipe=-1,
            snapshots=tuple(self._snapshots),
            stored=tuple(self._stored),
            under_systemd=self._notifier.enabled,
            state_dir=self._settings.state_dir,
            log_level=self._settings.log_level,
            log_format=self._settings.log_format,
        )
        move_streams(launch, self._argv, self._notifier, lambda: self._feed_watchdog(self._clock()))

    def _close_stored(self) -> None:
        """A process has its own copies now: if it dies while it starts, its successor doesn't find them again."""
        for fd in self._stored:
            os.close(fd)
        self._stored.clear()

    # -- workers

    def _start(self, place: Slot) -> None:
        """Start a new process in the slot. Raises OSError, and then the slot is still empty."""
        own_end, worker_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            launch = self._launch(place, worker_end.fileno())
            pid = slot.spawn(self._argv, control.WORKER_VARIABLE, launch.encode(), launch.descriptors())
        except BaseException:
            own_end.close()
            raise
        finally:
            worker_end.close()
        own_end.setblocking(False)
        place.take(pid, own_end, self._clock())
        self._selector.register(own_end, selectors.EVENT_READ, lambda: self._hear(place))
        place.tell(ToWorker.SETTINGS, (self._settings, self._reloads.names))
        self._tell_verdicts(place)
        place.tell(ToWorker.LOG_LEVEL, self._levels.now)
        if launch.stored:
            self._close_stored()
        self._reloads.started(place)

    def _start_again(self, place: Slot) -> None:
        """As _start(); a failure is handled like a worker's death: another try, after a delay that grows."""
        if self._files and fingerprint() != self._files:
            self._refuse_mixture(place)
            return
        self._is_mixed = False
        try:
            self._start(place)
        except (OSError, MemoryError) as error:  # no memory, no descriptor, or too many processes
            wait_s = place.plan_successor(self._clock())
            logs.event(logs.ERROR, "worker can't be started", slot=place.number, error=str(error), wait_s=wait_s)

    def _refuse_mixture(self, place: Slot) -> None:
        """The files have been replaced: look again later, in case they come back; end if no worker is left."""
        place.start_at = self._clock() + MIXTURE_EVERY_S
        if not self._is_mixed:
            self._is_mixed = True
            text = "streamd's files were replaced while it runs; no worker is started on a mixture, restart it"
            logs.event(logs.ERROR, text, slot=place.number, version=__version__)
        if not any(each.pid for each in self._slots):
            self._exit_status = EXIT_FAILED
            self._begin_drain(quick=True)

    def _launch(self, place: Slot, pipe: int) -> Launch:
        launch = Launch(
            slot=place.number,
            workers=len(self._slots),
            started_at=self._started_at,
            pipe=pipe,
            public=tuple(sock.fileno() for sock in self._public),
            public_kept=self._public_kept,
            admin=tuple(sock.fileno() for sock in self._admin),
            admin_kept=self._admin_kept,
            metrics=tuple(sock.fileno() for sock in self._metrics),
            metrics_kept=self._metrics_kept,
            under_systemd=self._notifier.enabled,
        )
        if not self._pairs:
            return launch._replace(stored=tuple(self._stored))
        return launch._replace(
            counters=self._counters,
            snapshots=self._snapshots[place.number],
            inbox=self._pairs[place.number][0].fileno(),
            outlets=tuple(outlet.fileno() for _, outlet in self._pairs),
        )

    def _hear(self, place: Slot) -> None:
        assert place.pipe is not None
        try:
            message = control.receive(place.pipe, ToParent)
        except BlockingIOError:
            return
        except FormError as error:
            logs.event(logs.ERROR, "a worker's message can't be read", slot=place.number, error=str(error))
            return
        if message is None:
            self._gone(place)
        else:
            place.heard_at = self._clock()
            self._work_off(place, message)

    def _work_off(self, place: Slot, message: Received) -> None:
        kind, facts = message.kind, message.facts
        if kind is ToParent.READY:
            self._worker_ready(place, facts)
        elif kind is ToParent.FAILED:
            place.error = facts
        elif kind is ToParent.STANDING:
            place.standing = facts
            self._notifier.status(self._status_line())
        elif kind is ToParent.UPSTREAM:
            self._take_view(place, *facts)
        elif kind is ToParent.PREPARED:
            self._reloads.prepared(place, *facts)
        elif kind is ToParent.APPLIED:
            self._reloads.answered(place, facts)
        elif kind is ToParent.DRAIN:
            self._stop(ADMIN, quick=False)
        elif kind is ToParent.TAKE_BACK:
            self._take_back(place)
        elif kind is ToParent.LOG_LEVEL:
            self._levels.change(facts, self._clock())
            self._tell_all(ToWorker.LOG_LEVEL, self._levels.now)
        elif kind is ToParent.SAVING:
            place.saving = True
        elif kind is ToParent.DRAINED:
            place.report = facts
        elif kind in (ToParent.STORE, ToParent.REMOVE):
            assert place.pipe is not None
            relay_to_store(self._notifier, place.pipe, message)

    def _tell_all(self, kind: ToWorker, facts: object = None) -> None:
        for each in self._slots:
            each.tell(kind, facts)

    # -- inference servers

    def _take_view(self, place: Slot, name: str, view: ServerView) -> None:
        """A worker's view of an inference server has changed."""
        before = self._outages.summary()
        self._outages.report(place.number, name, view, self._clock())
        if self._outages.summary() != before and self._state is DaemonState.SERVING:
            self._notifier.status(self._status_line())

    def _tell_verdicts(self, place: Slot) -> None:
        """Tell a worker how the servers stand, unless it knows; a full pipe gets the verdicts with a later tick."""
        version, verdicts = self._outages.version, self._outages.verdicts()
        if place.verdicts == version:
            return
        bare = [(name, verdict._replace(listed=())) for name, verdict in verdicts]  # each worker has the lists
        pieces = [bare[k : k + VERDICTS_MAX] for k in range(0, len(bare), VERDICTS_MAX)]
        if all(place.tell(ToWorker.UPSTREAMS, piece) for piece in pieces):
            place.verdicts = version

    def _hold(self, settings: Settings) -> None:
        """A reload's settings hold from now on."""
        self._outages.take(settings.upstreams, self._clock())
        self._levels.reload(settings.log_level)
        self._tell_all(ToWorker.LOG_LEVEL, self._levels.now)

    # -- starts and ends of workers

    def _worker_ready(self, place: Slot, budget: str) -> None:
        place.ready = True
        if self._state is not DaemonState.STARTING or not all(each.ready for each in self._slots):
            return
        self._state = DaemonState.SERVING
        logs.event(logs.INFO, "budget", text=budget)
        logs.event(
            logs.INFO,
            "serving",
            version=__version__,
            listen=tuple(map(listen.shown, self._public)),
            admin=tuple(map(listen.shown, self._admin)) or None,
            metrics=tuple(map(listen.shown, self._metrics)) or None,
            upstreams=tuple(each.name for each in self._settings.upstreams),
            keys="yes" if self._settings.keys_file else "none: every client may use the upstreams",
            workers=len(self._slots) if len(self._slots) > 1 else None,
            pid=os.getpid(),
        )
        self._notifier.ready(self._status_line())
        self._files = fingerprint()
        self._reloads.begin_if_asked()

    def _gone(self, place: Slot) -> None:
        """The pipe has ended: its process has ended, or is about to."""
        assert place.pipe is not None
        self._selector.unregister(place.pipe)
        pid = place.pid
        status = place.empty()
        self._reloads.answered(place)
        self._outages.worker_gone(place.number, self._clock())
        if self._state is DaemonState.DRAINING:
            if status and not self._exit_status:
                logs.event(logs.ERROR, "worker died in the drain; its streams ended with it", slot=place.number)
            self._stop_if_all_ended()
        elif self._state is DaemonState.STARTING and (place.error or status in (EXIT_FAILED, EXIT_SETTINGS)):
            self._give_up(place, status)
        else:
            self._replace(place, pid, status)

    def _give_up(self, place: Slot, status: int) -> None:
        """The daemon can't start: print the reason, once for all workers."""
        self._exit_status, lines = place.error or (status, [])
        for line in lines:
            complain(line)
        self._begin_drain(quick=True)

    def _replace(self, place: Slot, pid: int, status: int) -> None:
        """A worker has died: another ready worker folds its counts; if there is none, its successor does."""
        if other := next((each for each in self._slots if each.ready), None):
            other.tell(ToWorker.BURY, (place.number, pid))
        wait_s = place.plan_successor(self._clock())
        why = "; ".join(place.error[1]) if place.error else None
        text = "worker died; its streams ended with it, a new one is started"
        logs.event(logs.ERROR, text, slot=place.number, status=status, error=why, wait_s=wait_s)

    # -- signals

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Signals arrive as bytes through a socket pair, and are processed between two messages."""
        read_end, write_end = socket.socketpair()
        read_end.setblocking(False)
        write_end.setblocking(False)
        before = {number: signal.signal(number, lambda number, frame: None) for number in (*SIGNALS, *MEANINGLESS)}
        signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
        self._selector.register(read_end, selectors.EVENT_READ, lambda: self._take_signals(read_end.recv(64)))
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._selector.unregister(read_end)
            read_end.close()
            write_end.close()

    def _take_signals(self, numbers: bytes) -> None:
        for number in numbers:
            if number in MEANINGLESS:
                logs.event(logs.WARNING, "signal ignored; it has no meaning here", signal=signal_name(number))
            elif number == signal.SIGHUP:
                self.reload()
            else:
                self._stop(signal_name(number), quick=number == signal.SIGINT)

    def _stop(self, name: str, *, quick: bool) -> None:
        now = self._clock()
        if name != ADMIN:
            if now - self._signalled_at < SECOND_SIGNAL_S:
                return
            self._signalled_at = now
        if self._state is DaemonState.DRAINING:
            logs.event(logs.INFO, "hurrying", signal=name)
            self._close_for_drain()
            self._tell_all(ToWorker.HURRY)
            self._kill_at = now + KILL_AFTER_S
            return
        logs.event(logs.INFO, "draining", signal=name)
        self._begin_drain(quick=quick, by=name)

    def _begin_drain(self, *, quick: bool, by: str = "") -> None:
        """Begin the drain's first step, or its second if there is no delay. `by`: a signal's name, or ADMIN."""
        settings, now = self._settings, self._clock()
        waits = self._state is DaemonState.SERVING and not quick and settings.drain_delay_s > 0
        longest_s = settings.drain_delay_s + settings.drain_timeout_s
        self._drain_ends_at = now + (QUICK_DRAIN_S if quick else longest_s)
        self._kill_at = self._drain_ends_at + KILL_AFTER_S
        self._closes_at = now + settings.drain_delay_s if waits else now
        self._reloads.abandon()
        if not waits:
            self._close_listeners()
        self._state = DaemonState.DRAINING
        if self._exit_status == 0:
            # An operator may take the drain back during its delay, but systemd never goes back from STOPPING.
            tell = self._notifier.status if waits and by == ADMIN else self._notifier.stopping
            tell(self._status_line())
        self._may_be_taken_back = waits and by == ADMIN
        self._tell_all(ToWorker.DRAIN, (quick, waits, by))
        if not waits:
            self._closes_at = float("inf")
        self._stop_if_all_ended()

    def _close_for_drain(self) -> None:
        """The delay is over: close the parent's listeners first, then the workers'. No effect if they are closed."""
        if self._closes_at == float("inf"):
            return
        self._closes_at = float("inf")
        self._close_listeners()
        if self._may_be_taken_back:
            self._may_be_taken_back = False
            self._notifier.stopping(self._status_line())
        self._tell_all(ToWorker.CLOSE)

    def _take_back(self, asker: Slot) -> None:
        """Serve as before the drain; workers that have died meanwhile are started again."""
        if self._state is not DaemonState.DRAINING:
            asker.tell(ToWorker.TAKE_BACK)  # it finds that there is no drain
            return
        if not self._may_be_taken_back:
            return  # the worker that asks is told by the order that came between
        self._may_be_taken_back = False
        self._closes_at = self._kill_at = float("inf")
        self._state = DaemonState.SERVING
        logs.event(logs.INFO, "drain taken back")
        self._tell_all(ToWorker.TAKE_BACK)
        self._notifier.status(self._status_line())
        for each in self._slots:
            if not each.pid:
                self._start_again(each)

    def _stop_if_all_ended(self) -> None:
        if not any(each.pid for each in self._slots):
            self._state = DaemonState.STOPPED

    def reload(self) -> None:
        """SIGHUP. While the daemon starts, the reload waits until it serves."""
        if self._state is DaemonState.DRAINING:
            logs.event(logs.WARNING, "reload refused; streamd is stopping")
            return
        self._reloads.ask()
        if self._state is DaemonState.SERVING:
            self._reloads.begin_if_asked()

    # -- clock work

    def _tick(self) -> None:
        now = self._clock()
        logs.flush()
        if now - self._ticked_at > LATE_S:
            for each in self._slots:
                each.heard_at = now
        self._ticked_at = now
        self._outages.tick(now)
        if self._levels.tick(now):
            self._tell_all(ToWorker.LOG_LEVEL, self._levels.now)
        for each in self._slots:
            self._look_after(each, now)
            if each.pid:
                self._tell_verdicts(each)
        if any(each.ready for each in self._slots):
            self._feed_watchdog(now)
        if now >= self._closes_at:
            self._close_for_drain()
        is_stopping = self._state is DaemonState.DRAINING and not self._may_be_taken_back
        if is_stopping and now >= self._extended_at + EXTEND_S / 2:
            self._extended_at = now
            self._notifier.extend_timeout(round(EXTEND_S * 1_000_000))

    def _look_after(self, place: Slot, now: float) -> None:
        if not place.pid:
            if place.start_at and place.start_at <= now and self._state is not DaemonState.DRAINING:
                self._start_again(place)
            return
        # A worker that still takes up saved streams is given its time: killed now, it would lose them all.
        overdue = now >= self._kill_at and place.ready and not place.saving
        if overdue or now - place.heard_at >= self._silence_s_max(place):
            silent_s = round(now - place.heard_at, 1)
            logs.event(logs.ERROR, "worker is stuck; killed", slot=place.number, silent_s=silent_s)
            place.heard_at = now
            place.kill()

    def _silence_s_max(self, place: Slot) -> float:
        stuck_s = self._settings.worker_stuck_s
        if place.saving:
            return max(stuck_s, STATE_S)
        return stuck_s if place.ready else max(stuck_s, START_S_MAX)

    # -- systemd

    def _feed_watchdog(self, now: float) -> None:
        notifier = self._notifier
        if notifier.watchdog_interval_s and now >= self._watchdog_at:
            self._watchdog_at = now + notifier.watchdog_interval_s
            notifier.watchdog()

    def _status_line(self) -> str:
        """The line that `systemctl status` shows."""
        standings = [each.standing for each in self._slots]
        line = (
            f"{self._state.value}: {sum(each.connections for each in standings)} connections,"
            f" {sum(each.streams for each in standings)} streams,"
            f" {sum(each.tokens_per_s for each in standings):.0f} tokens/s,"
            f" saturation {max(each.saturation for each in standings):.2f}"
        )
        ready = sum(each.ready for each in self._slots)
        parts = [line]
        if len(self._slots) > 1:
            parts.append(f"{ready} workers")
        if self._state is DaemonState.DRAINING:
            parts.append(f"ends within {max(0.0, self._drain_ends_at - self._clock()):.0f} s")
        if out := self._outages.summary():
            parts.append(out)
        return ", ".join(parts)

    def _report(self) -> Report:
        reports = [each.report for each in self._slots if each.report is not None]
        return Report(
            finished=sum(each.finished for each in reports),
            sent_away=sum(each.sent_away for each in reports),
            cut=sum(each.cut for each in reports),
        )


def signal_name(number: int) -> str:
    """The signal's name; a real-time signal has a number only."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


def lock_state(state_dir: str) -> int:
    """Lock the state directory for this daemon; returns the descriptor that holds the lock, -1 if there is nothing to
    lock. Raises OSError if another daemon uses the directory: of two, the last to stop would overwrite the other's
    streams. A directory that can't be made or locked is none's: the workers say that it can't be written.
    """
    if not state_dir:
        return -1
    try:
        os.makedirs(state_dir, 0o700, exist_ok=True)
        fd = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        text = "another streamd uses this state_dir; give each daemon a directory of its own"
        raise OSError(errno.EBUSY, text, state_dir) from None
    except OSError as error:  # a file system without locks
        logs.event(logs.WARNING, "state_dir can't be locked", dir=state_dir, error=str(error))
    return fd


def check_inherited(settings: Settings, public: Sequence[socket.socket], metrics: Sequence[socket.socket] = ()) -> None:
    """The rules for `listen` and `metrics_listen`, applied to systemd's sockets in their place. Raises ConfigError."""
    rules = (
        (public, settings.keys_file or settings.insecure_public, LISTEN_WITHOUT_KEYS),
        (metrics, settings.metrics_public, METRICS_BEYOND_LOOPBACK),
    )
    problems = [
        ConfigProblem("streamd.socket", "ListenStream", listen.shown(sock), wanted)
        for sockets, may_be_public, wanted in rules
        for sock in sockets
        if not (may_be_public or listen.is_loopback(sock))
    ]
    if problems:
        raise ConfigError(problems)


def run(settings: Settings, load: Load, argv: Sequence[str], environ: MutableMapping[str, str] = os.environ) -> int:
    """Run `streamd serve`; returns the exit status. `argv` is the command line after the program's name."""
    open_standard_streams()
    logs.setup(settings.log_level, settings.log_format, journal_stream=environ.get("JOURNAL_STREAM"))
    notifier = systemd.Notifier.from_environ(environ, os.getpid())
    inherited = systemd.inherited(environ, os.getpid())
    try:
        return Parent(settings, load, notifier, argv).serve(inherited)
    except OSError as error:
        complain(str(error), environ)
        return EXIT_FAILED
    finally:
        logs.finish()
