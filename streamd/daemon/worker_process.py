"""Worker process: a worker that obeys the parent's messages. It ignores signals, and ends when the pipe does."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import MutableMapping
from typing import Any, cast

import uvloop

from streamd.config import ConfigError, Settings
from streamd.core.admission import BudgetError, SharedNumber
from streamd.daemon import collector, control, logs, machine
from streamd.daemon.budget import admission_of, budget_of
from streamd.daemon.control import (
    EXIT_FAILED,
    EXIT_SETTINGS,
    WORKER_VARIABLE,
    Launch,
    ToParent,
    ToWorker,
)
from streamd.daemon.shared import Shared
from streamd.daemon.slot import unblock_signals
from streamd.daemon.state_store import StateStore, leave_streams, put_streams, read_snapshots, take_streams
from streamd.daemon.store_relay import StoreRelay
from streamd.daemon.typed_json import FormError
from streamd.daemon.worker import Prepared, Worker
from streamd.log_levels import LevelChange
from streamd.net.in_turns import in_turns
from streamd.net.peers import Peers
from streamd.server_state import ServerView

# Interval of the numbers for `systemctl status`, which need be no fresher.
STANDING_EVERY_S = 5.0


class WorkerProcess:
    """The process around a worker."""

    def __init__(self, loop: asyncio.AbstractEventLoop, launch: Launch, pipe: socket.socket) -> None:
        self._loop = loop
        self._launch = launch
        self._pipe = pipe
        self._worker: Worker | None = None
        self._shared: Shared | None = None
        self._prepared: tuple[int, Prepared, tuple[str, ...]] | None = None  # and the reload's number, upstreams' names
        self._standing_at = loop.time()
        self._orphaned = False

    async def serve(self, settings: Settings, names: tuple[str, ...]) -> int:
        """Serve until drained; returns the exit status. Raises BudgetError, ConfigError and OSError at the start."""
        launch, loop = self._launch, self._loop
        worker = self._worker = self._alone(settings) if launch.workers == 1 else self._among(settings, names)
        loop.set_exception_handler(self._unexpected)
        worker.started_at = launch.started_at
        worker.parent_bytes = machine.resident_bytes(os.getppid())
        worker.removes_sockets = launch.slot == 0
        if settings.otlp_endpoint:
            collector.begin(worker, slot=launch.slot, started_at=launch.started_at)
        store = StateStore(StoreRelay(self._pipe, launch.under_systemd), settings.state_dir, launch.stored)
        self._restore(store, worker)
        self._pipe.setblocking(False)
        loop.add_reader(self._pipe.fileno(), self._hear)
        await worker.listen([_socket(fd) for fd in launch.public], keep_open=launch.public_kept)
        await worker.listen([_socket(fd) for fd in launch.admin], "admin", keep_open=launch.admin_kept)
        await worker.listen([_socket(fd) for fd in launch.metrics], "metrics", keep_open=launch.metrics_kept)
        worker.runtime.sweep.on_tick.append(self._beat)
        worker.start()
        self._say(ToParent.READY, worker.budget.describe())
        report = await worker.drained
        loop.remove_reader(self._pipe.fileno())
        if not self._orphaned:  # if orphaned: another daemon may run already, and must not find streams from before it
            self._say(ToParent.SAVING)
            self._save(store, worker)
        self._say(ToParent.DRAINED, report)
        return 0

    def _alone(self, settings: Settings) -> Worker:
        return Worker(
            self._loop,
            settings,
            on_drain=self._ask_drain,
            on_take_back=self._ask_take_back,
            on_level=self._ask_level,
            busy_s=machine.busy_s,
            on_upstream=self._say_upstream,
        )

    def _among(self, settings: Settings, names: tuple[str, ...]) -> Worker:
        """A worker of several, with its row in the mapping and its sockets to the others."""
        launch, loop = self._launch, self._loop
        shared = self._shared = Shared(launch.counters, launch.workers, names, launch.slot)
        shared.claim(launch.started_at)
        rng = random.Random()
        budget = budget_of(settings)
        slots = len(SharedNumber)
        row = cast(memoryview, shared.row)[:slots]
        peer_rows = [cast(memoryview, r)[:slots] for k, r in enumerate(shared.rows) if k != launch.slot]
        admission = admission_of(settings, budget, row, peer_rows)  # type: ignore[arg-type]  # they are sequences
        worker = Worker(
            loop,
            settings,
            slot=launch.slot,
            budget=budget,
            admission=admission,
            rng=rng,
            on_drain=self._ask_drain,
            on_take_back=self._ask_take_back,
            on_level=self._ask_level,
            busy_s=machine.busy_s,
            on_upstream=self._say_upstream,
        )
        inbox, outlets = _socket(launch.inbox), [_socket(fd) for fd in launch.outlets]
        counters, bug = worker.runtime.counters, worker.runtime.bug
        peers = Peers(loop, launch.slot, shared, inbox, outlets, counters, receiver=worker, on_bug=bug)
        worker.join(peers, shared)
        return worker

    def _restore(self, store: StateStore, worker: Worker) -> None:
        """Restore saved streams before the worker listens: no reader is answered before its stream is there."""
        if self._launch.workers == 1:
            take_streams(store.take(), worker.runtime, worker.kept.makers)
            return
        if self._launch.slot == 0:
            store.check_directory()
        take_streams(read_snapshots(self._launch.snapshots), worker.runtime, worker.kept.makers)
        os.ftruncate(self._launch.snapshots, 0)  # a successor must not find them again

    def _save(self, store: StateStore, worker: Worker) -> None:
        """Save the streams, in half of the memory that is still free; the other half is for other processes."""
        launch = self._launch
        free_bytes = worker.budget.resources.memory_bytes // launch.workers - machine.resident_bytes()
        room_bytes = max(0, free_bytes) // 2
        if launch.workers == 1:
            put_streams(store, worker.runtime, worker.kept.makers, room_bytes)
        else:
            leave_streams(launch.snapshots, worker.runtime, worker.kept.makers, room_bytes)

    # -- the pipe

    def _hear(self) -> None:
        try:
            message = control.receive(self._pipe, ToWorker)
        except BlockingIOError:
            return
        except FormError as error:
            logs.event(logs.ERROR, "the parent's message can't be read", error=str(error))
            return
        worker = self._worker
        assert worker is not None
        if message is None:
            self._loop.remove_reader(self._pipe.fileno())
            self._orphaned = True
            worker.drain(quick=True)
            return
        kind, facts = message.kind, message.facts
        if kind is ToWorker.PREPARE:
            self._prepare(worker, *facts)
        elif kind is ToWorker.APPLY:
            self._apply(worker, facts)
        elif kind is ToWorker.DISCARD:
            self._prepared = None
        elif kind is ToWorker.DRAIN:
            quick, waits, by = facts
            worker.drain(quick=quick, waits=waits, by=by)
        elif kind is ToWorker.CLOSE:
            worker.end_delay()
        elif kind is ToWorker.TAKE_BACK:
            worker.take_back()
        elif kind is ToWorker.HURRY:
            worker.drain()
        elif kind is ToWorker.LOG_LEVEL:
            worker.set_levels(facts)
        elif kind is ToWorker.UPSTREAMS:
            worker.upstream_reports.hear(facts)
        elif kind is ToWorker.RELOADED:
            worker.reloaded = facts
        elif kind is ToWorker.BURY:
            assert self._shared is not None
            self._shared.bury(*facts)

    def _prepare(self, worker: Worker, number: int, settings: Settings, names: tuple[str, ...]) -> None:
        """Prepare in slices. Whatever is wrong, the answer says so: else the reload, and systemd, would wait for it."""

        def done(prepared: Prepared) -> None:
            self._prepared = number, prepared, names
            self._say(ToParent.PREPARED, (number, ""))

        def failed(error: Exception) -> None:
            if not isinstance(error, ConfigError | BudgetError | OSError | ValueError):
                worker.runtime.bug("worker.prepare", error)
            self._say(ToParent.PREPARED, (number, str(error) or type(error).__name__))

        in_turns(self._loop, worker.prepare(settings), done, failed)

    def _apply(self, worker: Worker, number: int) -> None:
        prepared, self._prepared = self._prepared, None
        with worker.runtime.guard:
            assert prepared is not None and prepared[0] == number
            if self._shared is not None:
                self._shared.names = prepared[2]
            worker.apply(prepared[1])
        self._say(ToParent.APPLIED, number)

    def _unexpected(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """The loop's last resort: a callback outside every guard, or a task that nobody waits for, has raised."""
        error = context.get("exception")
        if isinstance(error, Exception) and self._worker is not None:
            self._worker.runtime.bug(context["message"], error)
        else:
            logs.event(logs.ERROR, "loop", text=context["message"])

    def _say(self, kind: ToParent, facts: object = None) -> bool:
        return control.send(self._pipe, kind, facts)

    def _beat(self, now: float, lag_s: float) -> None:
        self._say(ToParent.BEAT)
        if self._launch.under_systemd and now >= self._standing_at + STANDING_EVERY_S:
            assert self._worker is not None
            self._say(ToParent.STANDING, self._worker.standing(now - self._standing_at))
            self._standing_at = now

    def _ask_drain(self) -> None:
        self._say(ToParent.DRAIN)

    def _ask_take_back(self) -> None:
        self._say(ToParent.TAKE_BACK)

    def _say_upstream(self, name: str, view: ServerView) -> bool:
        return self._say(ToParent.UPSTREAM, (name, view))

    def _ask_level(self, change: LevelChange) -> None:
        self._say(ToParent.LOG_LEVEL, change)


def _socket(fd: int) -> socket.socket:
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    os.set_inheritable(fd, False)
    return sock


def run(environ: MutableMapping[str, str] = os.environ) -> int:
    """Run the worker that STREAMD__WORKER describes; returns its exit status."""
    unblock_signals()
    launch = Launch.decode(environ.pop(WORKER_VARIABLE))
    pipe = _socket(launch.pipe)
    pipe.setblocking(True)
    message = control.receive(pipe, ToWorker)
    if message is None:  # the parent is gone already
        return EXIT_FAILED
    settings, names = message.facts
    logs.setup(settings.log_level, settings.log_format, journal_stream=environ.get("JOURNAL_STREAM"))

    async def serve() -> int:
        return await WorkerProcess(asyncio.get_running_loop(), launch, pipe).serve(settings, names)

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serve())
    except ConfigError as error:
        return _failed(pipe, EXIT_SETTINGS, *map(str, error.problems))
    except BudgetError as error:
        return _failed(pipe, EXIT_SETTINGS, str(error))
    except OSError as error:
        return _failed(pipe, EXIT_FAILED, str(error))
    finally:
        logs.finish()
        pipe.detach()  # the pipe's end says that the process has ended, so it stays open until then


def _failed(pipe: socket.socket, status: int, *lines: str) -> int:
    control.send(pipe, ToParent.FAILED, (status, lines))
    return status
