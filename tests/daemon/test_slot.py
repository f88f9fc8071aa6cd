"""Slots and the parent's watch over them, without processes and on a clock that the tests set."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamd.config import Settings
from streamd.daemon import parent, systemd
from streamd.daemon.control import STATE_S
from streamd.daemon.parent import START_S_MAX, Parent, lock_state
from streamd.daemon.slot import MEANINGLESS, RESTART_FORGET_S, SIGNALS, Slot, ended, unblock_signals

STUCK_S = 2.0


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The slot numbers of the killed processes."""
    slots: list[int] = []
    monkeypatch.setattr(Slot, "kill", lambda slot: slots.append(slot.number))
    return slots


@pytest.fixture
def alone() -> Iterator[Parent]:
    """A parent that has started no worker."""
    settings = Settings(workers=2, worker_stuck_s=STUCK_S)
    parent = Parent(settings, lambda: settings, systemd.Notifier.from_environ({}, os.getpid()), [], lambda: 1000.0)
    yield parent
    for fd in (parent._counters, *parent._snapshots):
        os.close(fd)
    for sock in (sock for pair in parent._pairs for sock in pair):
        sock.close()
    parent._selector.close()


@pytest.fixture
def slot(alone: Parent) -> Iterator[Slot]:
    """The parent's first slot, where a worker has just been started."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        alone._slots[0].take(os.getpid(), ours, 1000.0)
        yield alone._slots[0]


def test_a_worker_that_starts_slowly_is_not_stuck(alone: Parent, slot: Slot, killed: list[int]) -> None:
    alone._look_after(slot, 1000.0 + START_S_MAX - 0.1)
    assert not killed
    slot.ready = True
    alone._look_after(slot, 1000.0 + STUCK_S - 0.1)
    assert not killed
    alone._look_after(slot, 1000.0 + STUCK_S)
    assert killed == [0]


def test_a_worker_that_never_starts_is_stuck_in_the_end(alone: Parent, slot: Slot, killed: list[int]) -> None:
    alone._look_after(slot, 1000.0 + START_S_MAX)
    assert killed == [0]


def test_a_worker_that_saves_streams_is_neither_stuck_nor_overdue(alone: Parent, slot: Slot, killed: list[int]) -> None:
    slot.ready = slot.saving = True
    alone._kill_at = 1001.0
    alone._look_after(slot, 1000.0 + STATE_S - 0.1)
    assert not killed
    alone._look_after(slot, 1000.0 + STATE_S)
    assert killed == [0]


def test_a_death_long_after_the_last_counts_as_the_first() -> None:
    slot, now = Slot(0), 1000.0
    for pause_s, wait_s in ((0.0, 0.1), (1.0, 0.2), (RESTART_FORGET_S - 0.1, 0.4), (RESTART_FORGET_S, 0.1)):
        now += pause_s
        assert slot.plan_successor(now) == pytest.approx(wait_s)
        assert slot.start_at == pytest.approx(now + wait_s)


def test_a_worker_that_takes_up_saved_streams_is_not_killed_by_an_early_stop(
    alone: Parent, slot: Slot, killed: list[int]
) -> None:
    alone._kill_at = 1001.0
    alone._look_after(slot, 1000.0 + START_S_MAX - 0.1)
    assert not killed
    slot.ready = True
    slot.heard_at = 1000.0 + START_S_MAX
    alone._look_after(slot, 1000.0 + START_S_MAX)
    assert killed == [0]


@pytest.mark.parametrize("shortage", ["socketpair", "spawn"])
def test_a_worker_that_can_not_be_started_is_tried_again_more_and_more_slowly(
    alone: Parent, monkeypatch: pytest.MonkeyPatch, shortage: str
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    place = alone._slots[1]
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(
        *((parent.socket, "socketpair") if shortage == "socketpair" else (parent.slot, "spawn")), refuse
    )
    waits = []
    for _ in range(4):
        alone._start_again(place)
        waits.append(round(place.start_at - 1000.0, 2))
    assert waits == [0.1, 0.2, 0.4, 0.8]
    assert not place.pid and place.pipe is None and len(os.listdir("/proc/self/fd")) == before


def test_the_parents_signals_are_ignored_before_they_may_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocked since before the exec, a signal may be pending: unblocked first, it would end the worker."""
    steps: list[tuple[str, object]] = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: steps.append((handler.name, number)))
    monkeypatch.setattr(signal, "pthread_sigmask", lambda how, numbers: steps.append((how.name, tuple(numbers))))
    unblock_signals()
    numbers = (*SIGNALS, *MEANINGLESS)
    assert steps == [*(("SIG_IGN", number) for number in numbers), ("SIG_UNBLOCK", numbers)]


def test_a_child_is_waited_for_without_a_descriptor() -> None:
    ends = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    stays = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        assert ended(ends.pid, 60.0) == 3
        assert ended(stays.pid, 0.0) == -signal.SIGKILL
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    ends.returncode = stays.returncode = 0  # they are reaped
    assert stays.stdin is not None
    stays.stdin.close()


def test_a_state_dir_has_one_daemon(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "state"
    held = lock_state(str(folder))
    with pytest.raises(OSError, match="another streamd uses this state_dir"):
        lock_state(str(folder))
    os.close(held)
    os.close(lock_state(str(folder)))
    assert os.listdir(folder) == []
    assert lock_state("") == -1
    (tmp_path / "file").touch()
    assert lock_state(str(tmp_path / "file" / "state")) == -1


def test_streams_are_saved_at_another_try_if_no_process_can_be_started(
    alone: Parent, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.ftruncate(alone._snapshots[0], 1)
    tries: list[bool] = []

    def move(*, saves: bool) -> None:
        tries.append(saves)
        if len(tries) < 3:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(alone, "_move_streams", move)
    monkeypatch.setattr(parent, "SAVE_AGAIN_S", (0.0, 0.0, 0.0))
    alone._save()
    assert tries == [True] * 3
