"""A loop with a virtual clock: time passes only when no callback is ready, and all callbacks run in a single order.

Three queues, as in a real loop: callbacks that are ready, timers, and events of the network (`io`). A turn runs the
callbacks that were ready when it began; the callbacks that they add belong to the next turn. A real loop polls its
sockets between two turns, so now and then an event of the network is drawn forward to such a place: there a reset meets
a callback that is still waiting.

asyncio's own Task, Future and timeout() run on it unchanged. A *step* is one callback into the code under test.
"""

from __future__ import annotations

import asyncio
import inspect
import random
from collections import deque
from collections.abc import Callable, Coroutine
from heapq import heappop, heappush
from typing import Any

DRAWN_FORWARD = 0.2  # chance of one more event of the network between two turns


class Violation(AssertionError):
    """An invariant of the code under test is broken."""


def must(true: object, what: str, *shown: object) -> None:
    """Raise a Violation unless the condition is true."""
    if not true:
        raise Violation(what + "".join(f", {value}" for value in shown))


class Timer:
    """A callback, ready or for later."""

    __slots__ = ("args", "callback", "cancelled", "when")

    def __init__(self, when: float, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.when = when
        self.callback: Callable[..., object] | None = callback
        self.args = args
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True
        self.callback = None
        self.args = ()


class VirtualLoop(asyncio.AbstractEventLoop):
    """Deterministic: the run depends on the seed of `rng` and nothing else."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.now = 1000.0
        self._order = 0  # ties are broken by the order of arrival
        self._ready: deque[Timer] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._io: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self.steps = 0
        self.after: Callable[[], None] = lambda: None  # after each callback and each event of the network
        self.connect: Callable[..., Coroutine[Any, Any, Any]]
        self.failed: list[BaseException] = []

    # -- the loop as the code under test sees it

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> Timer:  # type: ignore[override]
        timer = Timer(self.now, callback, args)
        self._ready.append(timer)
        return timer

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Timer:  # type: ignore[override]
        return self.call_at(self.now + delay, callback, *args)

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Timer:  # type: ignore[override]
        timer = Timer(when, callback, args)
        self._order += 1
        heappush(self._timers, (when, self._order, timer))
        return timer

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self)
        task.add_done_callback(self._task_done)
        return task

    async def create_connection(self, factory: Any, host: Any = None, port: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        return await self.connect(factory, host, port)

    async def getaddrinfo(self, host: Any, port: Any, **options: Any) -> Any:  # type: ignore[override]
        return [(0, 0, 0, "", (host, port))]

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.failed.append(error if error is not None else RuntimeError(str(context.get("message"))))

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failed.append(error)

    # -- the world's side

    def io(self, delay: float, action: Callable[..., object], *args: Any) -> None:
        """The network performs an action after `delay` seconds, or a little earlier."""
        self._order += 1
        heappush(self._io, (self.now + delay, self._order, action, args))

    def jump(self, seconds: float) -> None:
        """The process stood still for this time."""
        self.now += seconds

    def run(self, go_on: Callable[[], bool]) -> None:
        """Turn until `go_on` returns False, or no event is left."""
        asyncio._set_running_loop(self)
        try:
            while go_on() and self._turn():
                pass
        finally:
            asyncio._set_running_loop(None)

    def abandon(self) -> None:
        """A run that a violation ended leaves tasks behind. Close those that never began: Python warns of such a
        coroutine when it is freed, which would be in another test.
        """
        for task in asyncio.all_tasks(self):
            coroutine = task.get_coro()
            if inspect.iscoroutine(coroutine) and inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
                coroutine.close()

    def _turn(self) -> bool:
        ready, timers, io = self._ready, self._timers, self._io
        if not ready:
            if not timers and not io:
                return False
            next_timer = timers[0][0] if timers else float("inf")
            next_io = io[0][0] if io else float("inf")
            self.now = max(self.now, min(next_timer, next_io))
            if next_io <= next_timer:
                self._do_io()
        else:
            while io and self._rng.random() < DRAWN_FORWARD:
                self._do_io()
        while timers and timers[0][0] <= self.now:
            timer = heappop(timers)[2]
            if not timer.cancelled:
                ready.append(timer)
        for _ in range(len(ready)):
            timer = ready.popleft()
            if timer.callback is not None:
                self.steps += 1
                timer.callback(*timer.args)
                self.after()
        return True

    def _do_io(self) -> None:
        _, _, action, args = heappop(self._io)
        action(*args)
        self.after()
