"""Slots and the parent's watch over them, without processes and on a clock that the tests set."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from streamd.config import Settings
from streamd.daemon import systemd
from streamd.daemon.control import STATE_S
from streamd.daemon.parent import START_S_MAX, Parent
from streamd.daemon.slot import RESTART_FORGET_S, Slot

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
