"""Catalogue: the models that each upstream lists, so that of several that may take a model one that has it is asked.

Asked unprompted are only upstreams that share a model by the settings: two with `*`, or two that name the same. A
single upstream is asked nothing that no client asked, unless its models are wanted for metrics (`metrics_listen`); what
it lists for a client is remembered all the same. A list
that fails, or that isn't understood, is no failure of its server: then nothing is known of it, and requests go as they
would without lists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from streamd.net.attempt import own_ask
from streamd.net.fetch import Fetch
from streamd.net.runtime import Runtime
from streamd.net.upstream import Upstream
from streamd.wire.model_names import names_listed

# After a list that failed: a server that loads its model answers within minutes. Doubles up to models_refresh.
RETRY_S: Final = 5.0
# Jitter keeps the workers apart.
JITTER: Final = 0.25


class Listing:
    """A server and the question for its list."""

    __slots__ = ("_failures", "_fetch", "_runtime", "due_at", "upstream")

    def __init__(self, runtime: Runtime, upstream: Upstream) -> None:
        self._runtime = runtime
        self._failures = 0  # in a row
        self._fetch: Fetch | None = None  # the question under way
        self.upstream = upstream
        self.due_at = runtime.time()

    def tick(self, now: float) -> None:
        """Ask if it is time, and the server is well and has room."""
        if self._fetch is not None or now < self.due_at:
            return
        if not self.upstream.health.is_reachable() or self.upstream.full():
            return
        counter = self._runtime.counters.upstream_checks
        self._fetch = Fetch(
            self._runtime, self.upstream, own_ask(self.upstream, "/v1/models", b"application/json"), self._done, counter
        )
        self._fetch.start()

    def stop(self) -> None:
        """End the question under way."""
        fetch, self._fetch = self._fetch, None
        if fetch is not None:
            fetch.cancel()

    def _done(self, upstream: Upstream, status: int, body: bytes) -> None:
        self._fetch = None
        runtime = self._runtime
        names = names_listed(body) if status == 200 else frozenset()
        every_s = runtime.settings.models_refresh_s
        if names:
            self._failures = 0
            upstream.listed = names
        else:  # what it listed before may still be true
            every_s = min(RETRY_S * 2**self._failures, every_s)
            self._failures = min(self._failures + 1, 16)
        self.due_at = runtime.time() + every_s * runtime.rng.uniform(1.0 - JITTER, 1.0 + JITTER)


class Catalogue:
    """The questions to all upstreams that share a model."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._of: dict[Upstream, Listing] = {}

    def take(self, upstreams: Iterable[Upstream]) -> None:
        """These are the upstreams from now on."""
        every = tuple(upstreams)
        wanted = sharing(every)
        if self._runtime.settings.metrics_listen:
            wanted += [each for each in every if each not in wanted and "*" in each.settings.models]
        for upstream in [each for each in self._of if each not in wanted]:
            self._of.pop(upstream).stop()
        for upstream in wanted:
            if upstream not in self._of:
                self._of[upstream] = Listing(self._runtime, upstream)

    def tick(self, now: float) -> None:
        """At the start, and every sweep."""
        if not self._runtime.settings.models_refresh_s:
            return
        for listing in self._of.values():
            with self._runtime.guard:
                listing.tick(now)

    def stop(self) -> None:
        self.take(())


def sharing(upstreams: Iterable[Upstream]) -> list[Upstream]:
    """The upstreams of which two or more may take the same model."""
    upstreams = tuple(upstreams)
    takes = {each: {*each.settings.models, *each.settings.aliases} for each in upstreams}
    counts = Counter(name for names in takes.values() for name in names)
    return [each for each in upstreams if any(counts[name] > 1 for name in takes[each])]
