"""Knocks: streamd tries a connection of its own to a server that can't be reached. No request has to wait for it.

Only a server without a `health_path` of which others may take the models: where no other may, a request is the only
user, and finds out at once. A knock begins once the server's time out is over, and takes the place of the request that
would probe it. A connection that stands for a moment lets the server back in, and waits in the pool for its first
request; a server that answers with errors is probed by requests alone, because connecting to it proves nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from streamd.counters import bump
from streamd.net.attempt import WATCHED_S, why
from streamd.net.dialer import is_own_shortage
from streamd.net.runtime import Runtime
from streamd.net.upstream import Upstream, UpstreamState
from streamd.reasons import CloseReason

# Until the next knock after one that streamd's own lack of descriptors or ports has prevented.
SHORTAGE_S: Final = 1.0


class Knock:
    """A server and the connection that is tried."""

    __slots__ = ("_began_at", "_due_at", "_runtime", "_trying", "asked_at", "upstream")

    def __init__(self, runtime: Runtime, upstream: Upstream) -> None:
        self._runtime = runtime
        self._trying: asyncio.Task[None] | None = None
        self._began_at = 0.0
        self._due_at = 0.0
        self.upstream = upstream
        self.asked_at = 0.0  # always: a connection that is awaited proves nothing

    def tick(self, now: float) -> None:
        """Begin a knock if it is time, or end it after connect_timeout."""
        health = self.upstream.health
        if self._trying is not None:
            if now - self._began_at >= self._runtime.settings.connect_timeout_s:
                self._end_trying()
                self._failed(why(TimeoutError()))
            return
        standing = health.all
        if health.is_reachable() or now < max(standing.out_until, self._due_at) or standing.probe is not None:
            return
        self._began_at = now
        standing.begin(self, now)
        bump(self._runtime.counters.upstream_checks, self.upstream.settings.name)
        self._trying = self._runtime.loop.create_task(self._try())

    async def _try(self) -> None:
        """The only task of a knock."""
        runtime, upstream = self._runtime, self.upstream
        try:
            link = await upstream.connect()
            try:
                await asyncio.sleep(WATCHED_S)  # a proxy whose server isn't there closes what it has accepted
            except asyncio.CancelledError:
                link.close()
                raise
            self._trying = None
            if link.at is UpstreamState.CLOSED:
                self._failed("closed as soon as it was accepted")
                return
            upstream.health.passed_check(runtime.time())
            upstream.keep(link, runtime.time())
        except OSError as error:
            self._trying = None
            if is_own_shortage(error):
                self._due_at = runtime.time() + SHORTAGE_S
                upstream.health.all.end(self)
            else:
                self._failed(why(error))
        except Exception as error:
            self._trying = None
            upstream.health.all.end(self)
            runtime.bug("knock", error)

    def _failed(self, error: str) -> None:
        runtime, upstream = self._runtime, self.upstream
        bump(runtime.counters.upstream_failures, (upstream.settings.name, CloseReason.UPSTREAM_CONNECT))
        upstream.health.unreachable(self._began_at, runtime.time(), runtime.rng, error=error)
        upstream.health.all.end(self)

    def _end_trying(self) -> None:
        trying, self._trying = self._trying, None
        if trying is not None:
            trying.cancel()

    def stop(self) -> None:
        """End the knock under way."""
        self._end_trying()
        self.upstream.health.all.end(self)
        self.upstream.health.is_knocked = False


class Knocks:
    """The knocks at all servers that share a model with another."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._of: dict[Upstream, Knock] = {}

    def take(self, upstreams: Iterable[Upstream]) -> None:
        """These are the servers that share a model from now on."""
        wanted = [each for each in upstreams if not each.settings.health_path]
        for upstream in [each for each in self._of if each not in wanted]:
            self._of.pop(upstream).stop()
        for upstream in wanted:
            if upstream not in self._of:
                self._of[upstream] = Knock(self._runtime, upstream)
                upstream.health.is_knocked = True

    def tick(self, now: float) -> None:
        """Every sweep."""
        for knock in self._of.values():
            with self._runtime.guard:
                knock.tick(now)
