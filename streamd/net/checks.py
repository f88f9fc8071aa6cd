"""Checks: servers with a `health_path` are asked whether they are well, before a request finds out.

Each is asked every few seconds by one check at a time, and once its time out is over. An answer below 400 lets back in
a server that could not be reached; 5xx, no connection and no answer leave it out like a refused connection. 4xx says
that the path or the key is wrong, and nothing about the server: then requests probe it, as without a `health_path`. A
server that answers requests with errors is probed by requests alone, because its check may look fine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from streamd.counters import bump
from streamd.net.attempt import own_ask, why
from streamd.net.dialer import is_own_shortage
from streamd.net.fetch import Fetch
from streamd.net.runtime import Runtime
from streamd.net.upstream import Upstream
from streamd.reasons import CloseReason

# Between two checks of a server: a server that died is left out before many requests have waited for it, and its log
# has 12 lines a minute more. Jitter keeps the workers apart.
EVERY_S: Final = 5.0
JITTER: Final = 0.25


class Check:
    """A server and its checks."""

    __slots__ = ("_began_at", "_fetch", "_runtime", "asked_at", "due_at", "upstream")

    def __init__(self, runtime: Runtime, upstream: Upstream) -> None:
        self._runtime = runtime
        self._fetch: Fetch | None = None  # the check under way
        self._began_at = 0.0
        self.upstream = upstream
        self.asked_at = 0.0  # always: an open connection proves nothing here
        self.due_at = runtime.time() + runtime.rng.uniform(0.0, EVERY_S)

    def tick(self, now: float) -> None:
        """Begin a check if it is time."""
        health, standing = self.upstream.health, self.upstream.health.all
        is_probe = health.is_checked and not health.is_reachable()
        due_at = min(self.due_at, standing.out_until) if is_probe else self.due_at
        if self._fetch is not None or now < due_at or standing.probe is not None:
            return
        self.due_at = now + EVERY_S * self._runtime.rng.uniform(1.0 - JITTER, 1.0 + JITTER)
        self._began_at = now
        standing.begin(self, now)
        counters = self._runtime.counters
        fetch = self._fetch = Fetch(
            self._runtime,
            self.upstream,
            own_ask(self.upstream, self.upstream.settings.health_path, b"*/*"),
            self._done,
            counters.upstream_checks,
        )
        fetch.start(pooled=False)  # whether connections can be established is a part of the question

    def stop(self) -> None:
        """End the check under way."""
        fetch, self._fetch = self._fetch, None
        self.upstream.health.all.end(self)
        if fetch is not None:
            fetch.cancel()

    def _done(self, upstream: Upstream, status: int, body: bytes) -> None:
        runtime, health, fetch = self._runtime, upstream.health, self._fetch
        assert fetch is not None
        self._fetch = None
        if fetch.error is not None and is_own_shortage(fetch.error):
            pass
        elif not status or status >= 500:
            bump(runtime.counters.upstream_failures, (upstream.settings.name, CloseReason.UPSTREAM_CONNECT))
            health.is_checked = True
            error = f"the check: {why(fetch.error)}" if fetch.error is not None else _check_failed(status)
            health.unreachable(self._began_at, runtime.time(), runtime.rng, error=error)
        else:
            health.is_checked = status < 400
            if health.is_checked:
                health.passed_check(runtime.time())
        health.all.end(self)


def _check_failed(status: int) -> str:
    return f"the check: status {status}" if status else "the check: no answer"


class Checks:
    """The checks of all upstreams that have them."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._of: dict[Upstream, Check] = {}

    def take(self, upstreams: Iterable[Upstream]) -> None:
        """These are the upstreams from now on."""
        wanted = [each for each in upstreams if each.settings.health_path]
        for upstream in [each for each in self._of if each not in wanted]:
            self._of.pop(upstream).stop()
        for upstream in wanted:
            if upstream not in self._of:
                self._of[upstream] = Check(self._runtime, upstream)

    def tick(self, now: float) -> None:
        """Every sweep."""
        for check in self._of.values():
            with self._runtime.guard:
                check.tick(now)

    def stop(self) -> None:
        self.take(())
