"""Runtime: what all connections of a process share."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import TYPE_CHECKING

from streamd.config import Settings
from streamd.core.fanout import SlicedFanout
from streamd.core.hub import Hub
from streamd.core.stream import Stream
from streamd.counters import Counters
from streamd.net.sweep import Sweep
from streamd.wire.http1 import HeadLimits

if TYPE_CHECKING:
    from streamd.net.client import ClientConnection
    from streamd.net.request import Plan, Request
    from streamd.wire.http1 import RequestHead


class Runtime:
    """One per process. `settings` is replaced as a whole on reload; everything reads it anew for each request."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        settings: Settings,
        hub: Hub,
        *,
        rng: random.Random | None = None,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        # process
        self.loop = loop
        self.time = loop.time
        self.unix_time = unix_time
        self.rng = rng or random.Random()
        self.counters = Counters()
        self.sweep = Sweep(loop, self.bug)
        self.hub = hub
        # replaced on reload
        self.settings = settings
        self.limits = HeadLimits(settings.head_bytes_max, settings.headers_max, settings.target_bytes_max)
        # wiring, set once by the worker
        self.plan: Callable[[ClientConnection, Request], Plan] = _nothing_here
        self.admit_stream: Callable[[], None] = lambda: None  # raises Problem 503 where another stream has no room
        self.on_request_end: Callable[[ClientConnection, Request], None] = lambda connection, request: None
        self.on_bug: Callable[[str, BaseException], None] = lambda where, error: None
        # state
        self.clients: set[ClientConnection] = set()
        self.bodies_bytes = 0  # request bodies held, all connections together
        self.draining = False
        self._date = b""
        self._date_until = 0.0

    def new_fanout(self, stream: Stream, flush_interval_s: float = 0.0) -> SlicedFanout:
        """A dispatcher for a stream with many readers, or with a flush interval."""
        return SlicedFanout(
            stream, soon=self.loop.call_soon, later=self.loop.call_later, flush_interval_s=flush_interval_s
        )

    def bug(self, where: str, error: Exception) -> None:
        """A mistake of ours: counted and told."""
        self.counters.bugs += 1
        self.on_bug(where, error)

    def reload(self, settings: Settings) -> None:
        self.settings = settings
        self.limits = HeadLimits(settings.head_bytes_max, settings.headers_max, settings.target_bytes_max)

    def retry_ms(self) -> int:
        """When to come back, spread so that ten thousand readers don't come in one second."""
        return round(self.rng.uniform(self.settings.retry_min_s, self.settings.retry_max_s) * 1000)

    def retry_after_s(self) -> float:
        """The same for a Retry-After header, in whole seconds."""
        return max(1.0, round(self.rng.uniform(self.settings.retry_min_s, self.settings.retry_max_s)))

    def date(self) -> bytes:
        """The Date field (RFC 9110 6.6.1), made once a second."""
        now = self.time()
        if now >= self._date_until:
            self._date = formatdate(self.unix_time(), usegmt=True).encode()
            self._date_until = now + 1
        return self._date


def _nothing_here(connection: ClientConnection, request: Request) -> Plan:
    raise NotImplementedError("the worker wires the routes")


def head_of(request: Request) -> RequestHead:
    """The head of a request that is still being decided on."""
    assert request.head is not None
    return request.head
