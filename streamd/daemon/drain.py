"""Drain: SERVING, DRAINING, STOPPED. No deploy cuts a stream that can end by itself, and every reader is told.

    1. readiness is 503. For drain_delay everything goes on, so that load balancers notice; in this time an operator may
       take the drain back that an operator asked for. Then systemd is told, the listeners close (their accept queues
       are emptied first, unless systemd keeps them), idle connections close, answers carry Connection: close, and new
       streams get 503
    2. for drain_timeout running generations go on. Only they hold the drain open, and only with a reader or within a
       grace; a connection just accepted holds it for FIRST_WORDS_S, until its request has arrived and is refused.
       Readers of published streams are sent away (`reconnect`), spread evenly over the window
    3. at the deadline, or at a second signal, each remaining reader gets `reconnect` with its position, a client that
       still waits for an answer or sends a body gets 503, and upstreams are cut. The log of a cut generation ends with
       an error event, for readers that resume

The listeners of operators (`admin`, `metrics_listen`) and their connections stay to the end of step 3, so that a drain
can be watched and hurried. They never hold it open.

SIGINT, from a person at a terminal, starts the same drain with short times. An idle daemon passes through all steps at
once.
"""

from __future__ import annotations

import asyncio
import enum
import math
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from streamd.core.refusal import Retry
from streamd.core.stream import Stream
from streamd.daemon.control import ADMIN, Report
from streamd.net.http_error import HttpError
from streamd.net.runtime import Client, Runtime
from streamd.reasons import CloseReason

# Length of a step of the window: when ten thousand readers are sent away over 30 s, each step tells 17 of them.
STEP_S = 0.05

# Time for the last bytes to leave before their connection is cut. It fits into the second after the deadline that the
# operator was promised.
LAST_WORDS_S = 0.8

# The same for the last answers of operators, who are on this machine or near it.
OPERATORS_S = 0.2

# Interval of the polls for connections that are lost.
POLL_S = 0.01

# Grace for connections accepted just before the drain: two round trips around half the world. Without it a client that
# connects a moment before the stop would see a close without an answer.
FIRST_WORDS_S = 1.0

# Readers told per loop turn when no window is left: 10 us each.
TOLD_PER_STEP_MAX = 1000


MOVE_ON = "streamd is restarting; reconnect to go on reading."
CUT = "streamd stopped before this answer was complete; reconnect."
CUT_GENERATION = "The generation was cut by a restart of streamd."


class DrainStep(enum.Enum):
    """How far a drain is; the module's docstring explains the steps."""

    DELAY = 1
    WINDOW = 2
    LAST_WORDS = 3
    TAKEN_BACK = 0


class DrainProgress(NamedTuple):
    """The numbers of a drain under way. Times in seconds."""

    since_s: float
    deadline_s: float  # until step 3
    left: int  # generations that still run
    finished: int
    sent_away: int
    cut: int


class Drain:
    """A drain, run once. `close_listeners` (those of clients) and `close_operators` return when the accept queues are
    empty. `waits`: end_delay() ends step 1, and not the clock. `by`: the name of a signal, or ADMIN.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        delay_s: float,
        timeout_s: float,
        close_listeners: Callable[[], Awaitable[None]],
        close_operators: Callable[[], Awaitable[None]],
        waits: bool = False,
        by: str = ADMIN,
    ) -> None:
        self._runtime = runtime
        self._delay_s = delay_s
        self._timeout_s = timeout_s
        self._close_listeners = close_listeners
        self._close_operators = close_operators
        self._waits = waits
        self.by = by
        self.step = DrainStep.DELAY
        self._began_at = runtime.time()
        self._deadline = self._began_at + delay_s + timeout_s
        self._running: list[Stream] = []  # the generations at the beginning of step 2
        self._delay_over = asyncio.Event()
        self._hurried = asyncio.Event()
        self.report = Report()

    # -- orders

    def hurry(self) -> None:
        """A second signal: go to step 3 now."""
        self._hurried.set()
        self._delay_over.set()

    def end_delay(self) -> None:
        """End step 1 now."""
        self._delay_over.set()

    @property
    def may_be_taken_back(self) -> bool:
        """Whether an operator may take this drain back. A signal's sender, such as systemd, waits for the end."""
        return self.step is DrainStep.DELAY and self.by == ADMIN and not self._delay_over.is_set()

    def take_back(self) -> None:
        """Serve as before: run() returns without having closed anything. Only while may_be_taken_back."""
        assert self.may_be_taken_back
        self.step = DrainStep.TAKEN_BACK
        self._delay_over.set()

    # -- reports

    @property
    def deadline(self) -> float:
        """When step 3 begins at the latest, by the loop's clock. Step 1 may be longer than planned: then it moves."""
        return self._deadline

    def progress(self) -> DrainProgress:
        """The numbers of this moment."""
        now, report = self._runtime.time(), self.report
        running = self._running or self._generations()
        left = sum(stream.reason is None for stream in running)
        deadline_s = 0.0 if self.step is DrainStep.LAST_WORDS else max(0.0, self._deadline - now)
        return DrainProgress(now - self._began_at, deadline_s, left, self._finished(), report.sent_away, report.cut)

    def _generations(self) -> list[Stream]:
        return [stream for stream in self._runtime.hub if _is_generation(stream) and stream.reason is None]

    def _finished(self) -> int:
        return sum(stream.reason is CloseReason.COMPLETE for stream in self._running)

    # -- the steps

    async def run(self) -> Report:
        """Drain; returns at the end, or when the drain was taken back."""
        runtime = self._runtime
        await self._sleep(math.inf if self._waits else self._delay_s, self._delay_over)
        if self.step is DrainStep.TAKEN_BACK:
            return self.report
        self.step = DrainStep.WINDOW
        self._delay_over.set()
        self._deadline = runtime.time() + self._timeout_s
        await self._close_listeners()
        runtime.draining = True
        self._running = self._generations()
        await self._window()
        self.step = DrainStep.LAST_WORDS
        self.report.finished = self._finished()
        await self._last_words()
        await self._last_operators()
        return self.report

    async def _window(self) -> None:
        """Step 2: until the deadline, or until nothing holds the drain open any more."""
        began_at = self._runtime.time()
        deadline = began_at + self._timeout_s
        published = [client for client in self._runtime.clients if _reads_published(client)]
        told = 0
        while True:
            now = self._runtime.time()
            self._close_idle(all_of_them=now >= began_at + FIRST_WORDS_S)
            if self._hurried.is_set() or now >= deadline or not self._held_open():
                break
            due = math.ceil(len(published) * (now - began_at) / self._timeout_s)
            for client in published[told:due]:
                self.report.sent_away += bool(client.send_away(CloseReason.DRAINING, MOVE_ON, among=due - told))
            told = max(told, due)
            await self._sleep(STEP_S, self._hurried)
        left = len(published) - told
        for k, client in enumerate(published[told:], 1):
            self.report.sent_away += bool(client.send_away(CloseReason.DRAINING, MOVE_ON, among=left))
            if k % TOLD_PER_STEP_MAX == 0:
                await asyncio.sleep(0)

    def _held_open(self) -> bool:
        """Whether a generation is read or may be resumed, an answer is being written, or a first request may come.

        A tunnel to another worker counts too: that worker makes the same decision about it.
        """
        if self._runtime.tunnels:
            return True
        if any(_is_generation(s) and (s.readers or s.grace_until) for s in self._runtime.hub):
            return True
        return any(client.is_awaited and not _reads_published(client) for client in self._runtime.clients)

    def _close_idle(self, *, all_of_them: bool) -> None:
        """Close connections between two requests; connections before their first request only with `all_of_them`."""
        for client in tuple(self._runtime.clients):
            if not client.origin.is_operators:
                client.close_if_idle(fresh_too=all_of_them)

    async def _last_words(self) -> None:
        """Step 3: tell all remaining clients, cut the upstreams, and give the bytes a moment to leave."""
        runtime = self._runtime
        # A reader that is told leaves its generation detached, within a grace. The bound on detached generations is
        # lifted, so that none ends for exceeding it: all are cut below, with RESTARTED as their reason.
        runtime.hub.detached_max = len(runtime.hub)
        left = runtime.readers
        for k, client in enumerate(tuple(runtime.clients)):
            if client.reader is not None:
                self.report.cut += bool(client.send_away(CloseReason.DRAINING, CUT, among=left))
            elif client.is_awaited or not client.origin.is_operators:
                client.give_up(self._too_late())
            if k % TOLD_PER_STEP_MAX == TOLD_PER_STEP_MAX - 1:
                await asyncio.sleep(0)
        now = runtime.time()
        for stream in runtime.hub:
            if _is_generation(stream) and stream.reason is None:
                with runtime.guard:
                    stream.cancel(CloseReason.RESTARTED, now, message=CUT_GENERATION)
        deadline = now + LAST_WORDS_S
        while (self._clients_left() or runtime.tunnels) and runtime.time() < deadline:  # noqa: ASYNC110 (an event per lost connection costs more)
            await asyncio.sleep(POLL_S)
        for client in self._clients_left():
            client.abort(CloseReason.DRAINING)

    def _clients_left(self) -> list[Client]:
        """Connections that aren't an operator's."""
        return [client for client in self._runtime.clients if not client.origin.is_operators]

    async def _last_operators(self) -> None:
        """The end of step 3: the drain can't be watched any more."""
        runtime = self._runtime
        await self._close_operators()
        for client in tuple(runtime.clients):
            client.give_up(self._too_late())
        deadline = runtime.time() + OPERATORS_S
        while runtime.clients and runtime.time() < deadline:  # noqa: ASYNC110 (an event per lost connection costs more)
            await asyncio.sleep(POLL_S)
        for client in tuple(runtime.clients):
            client.abort(CloseReason.DRAINING)

    def _too_late(self) -> HttpError:
        text = "streamd stopped before it could answer; try again shortly."
        reason, retry_after_s = CloseReason.DRAINING, self._runtime.retry_after_s(Retry.SOON)
        # The upstream may have begun: the client has to decide about a retry, and not its SDK (docs/PROTOCOL.md, 4).
        return HttpError(
            503, text, code="draining", reason=reason, retry_after_s=retry_after_s, should_retry=False, close=True
        )

    async def _sleep(self, seconds: float, until: asyncio.Event) -> None:
        """Sleep, but no longer than until that event."""
        if seconds <= 0 or until.is_set():
            return
        try:
            async with asyncio.timeout(seconds if seconds < math.inf else None):
                await until.wait()
        except TimeoutError:
            return


def _is_generation(stream: Stream) -> bool:
    """Whether the stream's events come from an upstream, and not from a publisher or another node."""
    return not (stream.terms.published or stream.terms.is_copy)


def _reads_published(client: Client) -> bool:
    return client.reader is not None and not _is_generation(client.reader.stream)
