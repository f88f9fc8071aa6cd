"""Runtime: what all connections of a process share."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import TYPE_CHECKING

from streamd.config import Settings
from streamd.core.admission import Admission, Budget, Demands, Limits, Prices, Refusal, Resources
from streamd.core.fanout import SlicedFanout
from streamd.core.hub import Hub
from streamd.core.stream import Stream
from streamd.counters import Counters
from streamd.net.gates import AddressGates
from streamd.net.inquiry import Inquiries
from streamd.net.peers import Peers
from streamd.net.problem import Problem
from streamd.net.sweep import Sweep
from streamd.net.turn import Turn
from streamd.reasons import CloseReason
from streamd.wire.cors import Cors
from streamd.wire.http1 import HeadLimits

if TYPE_CHECKING:
    from streamd.net.client import ClientConnection
    from streamd.net.request import Plan, Request
    from streamd.net.splice import Splice
    from streamd.wire.http1 import RequestHead


class Runtime:
    """One per process. `settings` is replaced as a whole on reload; everything reads it anew for each request."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        settings: Settings,
        hub: Hub,
        *,
        admission: Admission | None = None,
        rng: random.Random | None = None,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        # process
        self.loop = loop
        self.time = loop.time
        self.unix_time = unix_time
        self.rng = rng or random.Random()
        self.admission = admission or unlimited(self.rng)
        self.counters = Counters()
        self.sweep = Sweep(loop, self.bug)
        self.turn = Turn(loop)
        self.hub = hub
        self.gates = AddressGates(self.admission, settings)
        self.peers: Peers | None = None  # the other workers, where there are any
        self.inquiries: Inquiries | None = None  # what they are asked
        # replaced on reload
        self.settings = settings
        self.limits = HeadLimits(settings.head_bytes_max, settings.headers_max, settings.target_bytes_max)
        self.cors = Cors.of(settings.cors_origins, credentials=settings.cors_credentials)
        self.tls: ssl.SSLContext | None = None  # the TCP listeners'
        # wiring, set once by the worker
        self.plan: Callable[[ClientConnection, Request], Plan] = _nothing_here
        self.on_request_end: Callable[[ClientConnection, Request], None] = lambda connection, request: None
        self.on_bug: Callable[[str, BaseException], None] = lambda where, error: None
        # state
        self.clients: set[ClientConnection] = set()
        self.splices: set[Splice] = set()  # TLS connections whose bytes are carried to another worker
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

    def admit_stream(self) -> None:
        """Take a published stream. Raises Problem 503 where it has no room, or while draining."""
        self.check_not_draining()
        refusal = self.admission.admit_stream()
        if refusal is not None:
            raise refused(refusal)

    def admit_relay(self) -> None:
        """Take a request for an upstream. Raises Problem as above."""
        self.check_not_draining()
        refusal = self.admission.admit_relay()
        if refusal is not None:
            raise refused(refusal)

    @property
    def bodies_bytes(self) -> int:
        """Request bodies that are held here, all connections together."""
        return self.admission.bodies_bytes

    def hold_body(self, count: int) -> None:
        """So many bytes of a request's body are to be kept; let_body_go() gives them back. Raises Problem 503."""
        refusal = self.admission.admit_body(count)
        if refusal is not None:
            raise Problem(
                refusal.status,
                refusal.message,
                code="bodies_over_budget",
                reason=refusal.reason,
                retry_after_s=refusal.retry_after_s,
                should_retry=True,
            )

    def let_body_go(self, count: int) -> None:
        """So many bytes less are kept."""
        self.admission.release_body(count)

    def check_not_draining(self) -> None:
        """Raises Problem 503 once the drain has closed the listeners."""
        if self.draining:
            raise Problem(
                503,
                "streamd is restarting; try again shortly.",
                code="draining",
                reason=CloseReason.DRAINING,
                retry_after_s=self.retry_after_s(),
                should_retry=True,
            )

    def reload(self, settings: Settings) -> None:
        self.settings = settings
        self.limits = HeadLimits(settings.head_bytes_max, settings.headers_max, settings.target_bytes_max)
        self.cors = Cors.of(settings.cors_origins, credentials=settings.cors_credentials)
        self.gates.reload(settings)

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


def refused(refusal: Refusal, *, close: bool = False) -> Problem:
    """What admission refused, as an answer."""
    return Problem(
        refusal.status,
        refusal.message,
        code=refusal.code,
        reason=refusal.reason,
        retry_after_s=refusal.retry_after_s,
        should_retry=True,
        close=close,
    )


def worker_busy(runtime: Runtime) -> Problem:
    """Another worker, without which there is no answer, doesn't keep up."""
    return Problem(
        503,
        "The worker that this belongs to is too far behind; try again shortly.",
        code="worker_busy",
        reason=CloseReason.OVER_BUDGET,
        retry_after_s=runtime.retry_after_s(),
        should_retry=True,
    )


def unlimited(rng: random.Random) -> Admission:
    """Gates that are never shut, for a runtime whose machine nobody measured."""
    resources = Resources(memory_bytes=1 << 50, memory_source="none", descriptors_per_worker=1 << 30)
    return Admission(Budget.compute(resources, Demands(), Prices()), Limits(loop_lag_max_s=0), rng)


def head_of(request: Request) -> RequestHead:
    """The head of a request that is still being decided on."""
    assert request.head is not None
    return request.head
