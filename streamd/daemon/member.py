"""One worker of several: obeys its supervisor's pipe, ignores signals, ends when the pipe does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import random
import signal
import socket
from collections.abc import MutableMapping
from typing import cast

from streamd.config import ConfigError, Settings
from streamd.core.admission import BudgetError, Slot
from streamd.daemon import logs, machine
from streamd.daemon.budget import admission_of, budget_of
from streamd.daemon.orders import WORKER_VARIABLE, Launch, Order, Say
from streamd.daemon.shared import Shared
from streamd.daemon.single import run_loop
from streamd.daemon.state_store import leave_streams, read_kept, take_streams
from streamd.daemon.worker import Worker
from streamd.net.peers import Peers

MESSAGE_BYTES_MAX = 192 * 1024


class WorkerProcess:
    """The process around one worker."""

    def __init__(self, loop: asyncio.AbstractEventLoop, launch: Launch, pipe: socket.socket) -> None:
        self._loop = loop
        self._launch = launch
        self._pipe = pipe
        self._worker: Worker | None = None
        self._shared: Shared | None = None

    async def serve(self, settings: Settings, names: tuple[str, ...]) -> int:
        launch, loop = self._launch, self._loop
        shared = self._shared = Shared(launch.counters, launch.workers, names, launch.slot)
        rng = random.Random()
        budget = budget_of(settings)
        slots = len(Slot)
        row = cast(memoryview, shared.row)[:slots]
        peer_rows = [cast(memoryview, r)[:slots] for k, r in enumerate(shared.rows) if k != launch.slot]
        admission = admission_of(settings, budget, rng, row, peer_rows)  # type: ignore[arg-type]  # they are sequences
        worker = self._worker = Worker(
            loop,
            settings,
            slot=launch.slot,
            budget=budget,
            admission=admission,
            rng=rng,
            on_drain=self._ask_drain,
            on_level=self._ask_level,
        )
        inbox, outlets = _socket(launch.inbox), [_socket(fd) for fd in launch.outlets]
        worker.removes_sockets = launch.slot == 0
        worker.join(Peers(loop, launch.slot, shared, inbox, outlets, worker.runtime.counters), shared)
        take_streams(read_kept(launch.kept), worker.runtime)
        os.ftruncate(launch.kept, 0)  # a successor must not find them again
        self._pipe.setblocking(False)
        loop.add_reader(self._pipe.fileno(), self._hear)
        await worker.listen([_socket(fd) for fd in launch.public], keep_open=launch.kept_open)
        await worker.listen([_socket(fd) for fd in launch.admin], "admin", keep_open=launch.kept_open)
        worker.runtime.sweep.on_tick.append(self._beat)
        worker.start()
        self._say(Say.READY)
        report = await worker.drained
        free_bytes = budget.resources.memory_bytes // launch.workers - machine.resident_bytes()
        leave_streams(launch.kept, worker.runtime, max(0, free_bytes) // 2)
        self._say(Say.DRAINED, report)
        return 0

    # -- the pipe

    def _hear(self) -> None:
        try:
            message = self._pipe.recv(MESSAGE_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        worker, shared = self._worker, self._shared
        assert worker is not None and shared is not None
        if not message:
            self._loop.remove_reader(self._pipe.fileno())
            worker.drain(quick=True)
            return
        order, what = pickle.loads(message)  # our own parent's
        if order is Order.SETTINGS:
            settings, shared.names = what
            self._reload(worker, settings)
        elif order is Order.DRAIN:
            worker.drain(quick=what)
        elif order is Order.HURRY:
            worker.drain()
        elif order is Order.LOG_LEVEL:
            logs.set_level(what)

    def _reload(self, worker: Worker, settings: Settings) -> None:
        """The supervisor has tried the settings; what it read may have changed since."""
        try:
            worker.reload(settings)
        except (ConfigError, BudgetError) as error:
            slot = self._launch.slot
            logs.event(logs.ERROR, "reload refused by a worker; its old settings hold", slot=slot, error=str(error))

    def _say(self, say: Say, what: object = None) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(pickle.dumps((say, what)))

    def _beat(self, now: float, lag_s: float) -> None:
        self._say(Say.BEAT)

    def _ask_drain(self) -> None:
        self._say(Say.DRAIN)

    def _ask_level(self, level: str) -> None:
        self._say(Say.LOG_LEVEL, level)


def _socket(fd: int) -> socket.socket:
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    os.set_inheritable(fd, False)
    return sock


def run(environ: MutableMapping[str, str] = os.environ) -> int:
    """The exit status of a worker process, launched as STREAMD__WORKER says."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    launch = Launch.decode(environ.pop(WORKER_VARIABLE))
    pipe = _socket(launch.pipe)
    pipe.setblocking(True)
    order, (settings, names) = pickle.loads(pipe.recv(MESSAGE_BYTES_MAX))
    assert order is Order.SETTINGS
    logs.setup(settings.log_level, settings.log_format, journal_stream=environ.get("JOURNAL_STREAM"))

    async def serve() -> int:
        return await WorkerProcess(asyncio.get_running_loop(), launch, pipe).serve(settings, names)

    return run_loop(serve())
