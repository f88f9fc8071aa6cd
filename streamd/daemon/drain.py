"""Drain: SERVING, DRAINING, STOPPED. No deploy cuts a stream that can end by itself, and every reader is told.

    1. readiness is 503 and systemd knows; for drain_delay everything goes on, so that balancers see it
       then the listeners close (their accept queues emptied first, unless systemd keeps them), idle connections close,
       answers carry Connection: close, new streams get 503
    2. for drain_timeout running generations go on. Only they hold the drain open, and only with a reader or within a
       grace; connections just accepted do for a moment, until their request is there and refused. Readers of published
       streams are sent away (`reconnect`), spread evenly over the window
    3. at the deadline, or when told again: each remaining reader gets `reconnect` with its position, who still waits
       for an answer or sends a body gets 503, upstreams are cut. A cut generation's log ends with an error event for
       those who resume

A person at a terminal (SIGINT) gets the same with short times. An idle daemon passes through all of it at once.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable

from streamd.core.stream import Stream
from streamd.daemon.control import Report
from streamd.net.client import ANSWERING, At, ClientConnection
from streamd.net.problem import Problem
from streamd.net.runtime import Runtime
from streamd.reasons import CloseReason

# How often the window is looked at: ten thousand readers that are sent away over 30 s are 17 a step.
STEP_S = 0.05

# From the last word to a reader until its connection is cut if the bytes don't leave: within the second after the
# deadline that the operator was promised.
LAST_WORDS_S = 0.8

# A connection that was accepted just before has so long to say what it wants: two round trips over half the world.
# Without it those who came a moment before the stop would see a close without an answer.
FIRST_WORDS_S = 1.0

# At most so many readers are told in one step when there is no window left: 10 us each.
TOLD_PER_STEP_MAX = 1000


class Drain:
    """One drain, once. `close_listeners` returns when nobody waits in the accept queues any more."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        delay_s: float,
        timeout_s: float,
        close_listeners: Callable[[], Awaitable[None]],
    ) -> None:
        self._runtime = runtime
        self._delay_s = delay_s
        self._timeout_s = timeout_s
        self._close_listeners = close_listeners
        self._hurried = asyncio.Event()
        self.report = Report()

    def hurry(self) -> None:
        """Told again: go to the end now."""
        self._hurried.set()

    async def run(self) -> Report:
        runtime = self._runtime
        await self._sleep(self._delay_s)
        await self._close_listeners()
        runtime.draining = True
        running = [stream for stream in runtime.hub if _is_generation(stream) and stream.reason is None]
        await self._window()
        self.report.finished = sum(stream.reason is CloseReason.COMPLETE for stream in running)
        await self._last_words()
        return self.report

    async def _window(self) -> None:
        """Until the deadline, as long as something holds it open."""
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
                self.report.sent_away += self._tell(client, "streamd is restarting; reconnect to go on reading.")
            told = max(told, due)
            await self._sleep(STEP_S)
        for k, client in enumerate(published[told:], 1):
            self.report.sent_away += self._tell(client, "streamd is restarting; reconnect to go on reading.")
            if k % TOLD_PER_STEP_MAX == 0:
                await asyncio.sleep(0)

    def _held_open(self) -> bool:
        """A generation that is read or may be resumed, an answer that is still being written, a first request.

        And what is carried to another worker, where the same is decided about it.
        """
        if self._runtime.splices:
            return True
        if any(_is_generation(s) and (s.readers or s.grace_until) for s in self._runtime.hub):
            return True
        holding = (At.HEAD, *ANSWERING)
        return any(client.at in holding and not _reads_published(client) for client in self._runtime.clients)

    def _close_idle(self, *, all_of_them: bool) -> None:
        """Connections between two requests; those before their first only if all_of_them."""
        for client in tuple(self._runtime.clients):
            if client.at is At.HEAD and (client.seasoned or all_of_them):
                client.close(CloseReason.IDLE)

    async def _last_words(self) -> None:
        """Tell whoever still reads or waits, cut the upstreams, and give the bytes a moment to leave."""
        runtime = self._runtime
        # A told reader leaves its generation within a grace. However many they are, none of them is stopped for that:
        # all are cut below, for what it is.
        runtime.hub.detached_max = len(runtime.hub)
        for k, client in enumerate(tuple(runtime.clients)):
            if client.reader is not None:
                self.report.cut += self._tell(client, "streamd stopped before this answer was complete; reconnect.")
            elif client.at in (At.BODY, At.WAITING):
                client.answer_problem(self._too_late())
            elif client.at in (At.HEAD, At.PASSING):
                client.close(CloseReason.DRAINING)
            if k % TOLD_PER_STEP_MAX == TOLD_PER_STEP_MAX - 1:
                await asyncio.sleep(0)
        now = runtime.time()
        for stream in runtime.hub:
            if _is_generation(stream) and stream.reason is None:
                stream.cancel(CloseReason.RESTARTED, now, message="The generation was cut by a restart of streamd.")
        deadline = now + LAST_WORDS_S
        while (runtime.clients or runtime.splices) and runtime.time() < deadline:  # noqa: ASYNC110 (an event per lost connection costs more)
            await asyncio.sleep(0.01)
        for client in tuple(runtime.clients):
            client.abort(CloseReason.DRAINING)

    def _too_late(self) -> Problem:
        text = "streamd stopped before it could answer; try again shortly."
        reason, retry_after_s = CloseReason.DRAINING, self._runtime.retry_after_s()
        # The upstream may have begun: to retry is for the client to decide, not for its SDK (docs/PROTOCOL.md, 4).
        return Problem(
            503, text, code="draining", reason=reason, retry_after_s=retry_after_s, should_retry=False, close=True
        )

    def _tell(self, client: ClientConnection, message: str) -> int:
        """Send a reader away with its position; 1 if it was still there to be told."""
        reader = client.reader
        if reader is None or client.at is not At.STREAMING:
            return 0
        reader.farewell(message=message, retry_ms=self._runtime.retry_ms())
        client.close(CloseReason.DRAINING)
        return 1

    async def _sleep(self, seconds: float) -> None:
        """Sleep, unless told to hurry."""
        if seconds <= 0 or self._hurried.is_set():
            return
        try:
            async with asyncio.timeout(seconds):
                await self._hurried.wait()
        except TimeoutError:
            return


def _is_generation(stream: Stream) -> bool:
    """Not published: its events come from an upstream."""
    return not stream.published


def _reads_published(client: ClientConnection) -> bool:
    return client.reader is not None and client.reader.stream.published
