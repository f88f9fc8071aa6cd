"""Sweep: a single timer for all deadlines of a process.

A connection has no timer of its own: arming and cancelling a timer for each token would cost more than the token.
Instead it keeps `due_at`, a lower bound of its next deadline, which may be early but never late. `on_due(now)` looks at
the real timestamps and returns the next time to look. So a token stores nothing here; a `due_at` that was too early
costs a call.

Every interval (250 ms, the resolution of all time limits) a pass goes over the members, in slices of 250 (0.1 ms with
cold caches, more if many are due). The loop runs between slices, so that a pass is not felt with any number of members:
work that blocks the loop for a hundredth of all time is every reader's p99.

A process that was stopped (a cgroup's freezer, `docker pause`, a debugger) finds all its deadlines due when it goes on,
and in a turn of the loop timers come before reads. So a pass that is later than LATE_S waits for another interval: what
arrived meanwhile is read before anybody is judged by the clock.

While input is held (Turns.hold()) the pass waits as well: nobody is judged by the clock while its bytes lie unread.

stop() holds from the moment of its call, in a pass under way too, and inside a tick or a member's on_due(): the slices
that were planned don't run. Whatever is written down of a member afterwards stays true, as far as deadlines go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Protocol

INTERVAL_S = 0.25
SLICE_MAX = 250
# Lateness of a pass from which on the process was rather stopped than busy: four intervals.
LATE_S = 1.0
NEVER = float("inf")


class Due(Protocol):
    """A member with deadlines."""

    due_at: float

    def on_due(self, now: float) -> float:
        """Handle due deadlines; return the next time to look."""

    def crash(self, where: str, error: Exception) -> None:
        """on_due() raised: end this member alone. Never raises."""


class Sweep:
    """Members and the pass over them. `on_tick(now, lag_s)` runs once at the start of each pass."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_bug: Callable[[str, Exception], None],
        postpones: Callable[[Callable[[], None]], bool] = lambda step: False,
    ) -> None:
        """`postpones`: whether a step has to wait, because input does (net/turns.py); then it is called later."""
        self._loop = loop
        self._on_bug = on_bug  # a member's bug must not stop the deadlines of the others
        self._postpones = postpones
        self._members: set[Due] = set()
        self._step: asyncio.Handle | None = None  # the next step, or the step that runs; None: stopped
        self._pass: tuple[Due, ...] = ()
        self._planned = 0.0
        self.on_tick: list[Callable[[float, float], None]] = []

    def add(self, member: Due) -> None:
        self._members.add(member)

    def discard(self, member: Due) -> None:
        """Remove the member; on_due() isn't called again, not even in a pass under way."""
        member.due_at = NEVER
        self._members.discard(member)

    def __len__(self) -> int:
        return len(self._members)

    def start(self) -> None:
        """Begin, or begin again after stop(). A sweep that runs goes on."""
        if self._step is None:
            self._plan()

    def stop(self) -> None:
        """Call nothing any more until start(): no tick and no member, not even in a pass under way."""
        if self._step is not None:
            self._step.cancel()
        self._step = None
        self._pass = ()

    def _plan(self) -> None:
        self._planned = self._loop.time() + INTERVAL_S
        self._step = self._loop.call_later(INTERVAL_S, self._wake)

    def _wake(self) -> None:
        """Begin a pass; after a long stop an interval later, once, so that reads come first."""
        if self._loop.time() - self._planned > LATE_S:
            self._step = self._loop.call_later(INTERVAL_S, self._tick)
        else:
            self._tick()

    def _tick(self) -> None:
        if self._step is None:
            return
        try:
            if self._postpones(self._tick):
                return
        except Exception as error:
            self._on_bug("sweep.postpones", error)
            self._plan()
            return
        now, step = self._loop.time(), self._step
        for tick in self.on_tick:
            try:
                tick(now, max(0.0, now - self._planned))
            except Exception as error:
                self._on_bug("sweep.on_tick", error)
            if self._step is not step:  # the tick stopped the sweep
                return
        try:
            self._pass = tuple(self._members)
            self._step = self._loop.call_soon(self._slice, 0)
        except MemoryError as error:
            self._on_bug("sweep.on_tick", error)
            self._plan()

    def _slice(self, start: int) -> None:
        if self._step is None:
            return
        try:
            if self._postpones(partial(self._slice, start)):
                return
        except Exception as error:
            self._on_bug("sweep.postpones", error)
            self._plan()
            return
        now, step = self._loop.time(), self._step
        for member in self._pass[start : start + SLICE_MAX]:
            if member.due_at <= now and member in self._members:  # it may have left since the pass began
                try:
                    member.due_at = member.on_due(now)
                except Exception as error:
                    member.due_at = NEVER
                    member.crash("sweep.on_due", error)
                if self._step is not step:  # the member stopped the sweep
                    return
        if start + SLICE_MAX < len(self._pass):
            self._step = self._loop.call_soon(self._slice, start + SLICE_MAX)
        else:
            self._pass = ()
            self._plan()
