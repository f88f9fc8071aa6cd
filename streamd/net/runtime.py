"""Runtime: the state that all connections of a process share."""

from __future__ import annotations

import asyncio
import math
import random
import ssl
import time
from collections.abc import Callable
from email.utils import formatdate
from functools import partial
from typing import Protocol

from streamd.config import Settings
from streamd.core.admission import Admission, Budget, Demands, GiveWay, Limits, Prices, Resources, stands_firm
from streamd.core.body_charge import BodyCharge
from streamd.core.fanout import SlicedFanout
from streamd.core.guard import Guard
from streamd.core.hub import Hub
from streamd.core.lags import Lags
from streamd.core.refusal import Refusal, Retry
from streamd.core.stream import Stream, Subscriber
from streamd.counters import Counters
from streamd.net.gates import AddressGates
from streamd.net.handshakes import Handshakes
from streamd.net.http_error import HttpError
from streamd.net.inquiry import Inquiries
from streamd.net.pacing import Pacing
from streamd.net.peers import Peers
from streamd.net.read_batch import ReadBatch
from streamd.net.request import Request
from streamd.net.story import Story
from streamd.net.sweep import Sweep
from streamd.net.tracing import Tracing
from streamd.net.turns import Turns
from streamd.reasons import CloseReason
from streamd.wire.cors import Cors
from streamd.wire.forwarded import TrustedProxies
from streamd.wire.http1 import HeadLimits, RequestHead

# Retry-After when a place must become free first. PROTOCOL 4 allows 60 s at most; ten thousand refused clients over
# these ten seconds are a thousand a second, the ramp that streamd carries.
ROOM_S_MIN = 2
ROOM_S_MAX = 12

# Readers that come back to a worker in a second: 10,000 over 4 s are 2,500 connections/s, which two workers accept.
RETURNS_PER_S = 1250.0

RESTARTING = Refusal(CloseReason.DRAINING, "draining", "streamd is restarting; try again shortly.", retry=Retry.SOON)
NO_MEMORY = Refusal(
    CloseReason.OVER_BUDGET, "no_memory", "streamd has no memory for this now; try again shortly.", retry=Retry.SOON
)
WORKER_BUSY = Refusal(
    CloseReason.OVER_BUDGET,
    "worker_busy",
    "The worker process that has to answer this request is overloaded; try again shortly.",
    retry=Retry.SOON,
)


class CameFrom(Protocol):
    """The origin of a connection, as the drain sees it."""

    @property
    def is_operators(self) -> bool:
        """Whether the connection came over a listener of operators."""


class Client(Protocol):
    """A client connection, as the totals and the drain see it."""

    paused: bool

    @property
    def origin(self) -> CameFrom:
        """Where the connection came from."""

    @property
    def reader(self) -> Subscriber | None:
        """Its subscriber, while its answer is a stream."""

    @property
    def is_awaited(self) -> bool:
        """Whether a request of a client may still come, or is being answered; operators' own requests don't count."""

    def close_if_idle(self, *, fresh_too: bool) -> None:
        """Close the connection between two requests; before its first only if `fresh_too`."""

    def send_away(self, reason: CloseReason, message: str, *, among: int | None = None) -> bool:
        """End a reader's answer in mid-stream, with its position. False: no reader is here, or it can't be told.

        `among`: the readers that are sent away at this moment; None: it may be all that there are.
        """

    def give_up(self, problem: HttpError) -> None:
        """Close a connection that has no reader; an open answer becomes a refusal with `problem`."""

    def abort(self, reason: CloseReason) -> None:
        """Close now."""


class OpenTunnel(Protocol):
    """A TLS connection whose bytes are carried to another worker."""

    def abort(self) -> None:
        """Close both ends now."""


class Reporting:
    """A worker's reports about its own work: counts, bugs, the story of requests, and the spans of generations."""

    def __init__(self, time: Callable[[], float], on_bug: Callable[[str, BaseException], None]) -> None:
        self.counters = Counters()
        self.on_bug = on_bug
        self.story = Story(time)
        self.tracing: Tracing | None = None  # spans of generations; None: none are made

    def resumed(self, stream: Stream) -> None:
        """A reader begins at a position that it names."""
        self.counters.resumes += 1
        if self.tracing is not None:
            self.tracing.resumed(stream)

    def bug(self, where: str, error: Exception) -> None:
        """A callback raised: count the error by its fault, and report it unless a peer or its network is at fault."""
        counters = self.counters
        if isinstance(error, MemoryError):
            counters.no_memory += 1
        elif isinstance(error, ssl.SSLError):
            counters.tls_refused += 1
            return
        elif isinstance(error, OSError):
            counters.transport_refused += 1
            if isinstance(error, ConnectionError | TimeoutError):
                return
        else:
            counters.bugs += 1
        self.on_bug(where, error)


class Runtime(Reporting):
    """One per process. A reload replaces `settings` as a whole; all code reads it anew for each request."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        settings: Settings,
        hub: Hub,
        *,
        admission: Admission | None = None,
        rng: random.Random | None = None,
        unix_time: Callable[[], float] = time.time,
        on_bug: Callable[[str, BaseException], None] = lambda where, error: None,
    ) -> None:
        # process
        super().__init__(loop.time, on_bug)
        self.loop = loop
        self.time = loop.time
        self.unix_time = unix_time
        self.rng = rng or random.Random()
        self.admission = admission or unlimited()
        self.guard = hub.guard = Guard(self.bug)
        self.turns = Turns(loop, self.bug)
        self.sweep = Sweep(loop, self.bug, self.turns.postpones)
        self.read_batch = ReadBatch(loop, self.counters)
        self.handshakes = Handshakes(loop, self.bug)
        self.hub = hub
        self.lags = Lags()
        self.gates = AddressGates(self.admission, settings)
        self.peers: Peers | None = None  # the other workers; None: this worker is alone
        self.inquiries: Inquiries | None = None  # questions to the other workers
        # replaced on reload
        self.settings = settings
        self.limits = HeadLimits(settings.head_bytes_max, settings.headers_max, settings.target_bytes_max)
        self.cors = Cors.of(settings.cors_origins, credentials=settings.cors_credentials)
        self.tls: ssl.SSLContext | None = None  # for the TCP listeners
        # state
        self.clients: set[Client] = set()
        self.tunnels: set[OpenTunnel] = set()
        self.draining = False
        self.readers = 0  # answers that are streams now
        self._dated = (b"", 0.0)  # the Date field, and until when it holds

    @property
    def pacing(self) -> Pacing:
        """The pauses between the reads of upstreams."""
        return self.read_batch.pacing

    def new_fanout(self, stream: Stream) -> SlicedFanout:
        """A dispatcher for a stream with many readers, or whose events wait for each other."""
        return SlicedFanout(
            stream,
            soon=self.loop.call_soon,
            later=self.loop.call_later,
            time=self.time,
            interval_s=partial(self._dispatch_s, stream),
            on_pass=self._handed_out,
        )

    def held_back(self, stream: Stream) -> Stream:
        """The stream itself, with a dispatcher if its next events have to wait for each other in it."""
        if stream.direct and self._dispatch_s(stream) > 0:
            stream.use_fanout(self.new_fanout(stream))
        return stream

    def _dispatch_s(self, stream: Stream) -> float:
        """How long a stream's events wait in its dispatcher: those of an upstream have waited in its socket."""
        terms, pacing = stream.terms, self.pacing
        return pacing.interval_s(terms.write_interval) if terms.published else pacing.hold_s(terms.write_interval)

    def _handed_out(self, held_s: float) -> None:
        """A dispatcher hands out events, the first of which has waited for held_s."""
        self.counters.event_writes += 1
        if held_s:
            self.counters.held_s.observe(held_s)

    def problem_of(self, error: Exception) -> HttpError:
        """The answer to a request for which a callback raised `error`, whose connection ends after it."""
        if isinstance(error, MemoryError):
            return self.refused(NO_MEMORY, close=True)
        text = "streamd made a mistake; its log says more, under this answer's X-Request-Id."
        return HttpError(500, text, code="internal", reason=CloseReason.INTERNAL, close=True)

    def admit_stream(self, owner: str = "") -> None:
        """Reserve room for a published stream. Raises HttpError 503 if there is none, or while draining.

        In favour of `owner`, a principal, another's stream without a reader may end (core/hub.py).
        """
        self.check_not_draining()
        refusal = self.admission.admit_stream(self._give_way_to(owner))
        if refusal is not None:
            raise self.refused(refusal)

    def admit_relay(self, owner: str = "") -> None:
        """Reserve room for a request to an upstream. Raises HttpError as admit_stream()."""
        self.check_not_draining()
        refusal = self.admission.admit_relay(self._give_way_to(owner))
        if refusal is not None:
            raise self.refused(refusal)

    def _give_way_to(self, owner: str) -> GiveWay:
        if not owner:
            return stands_firm
        return lambda relayed: self.hub.make_place(owner, self.time(), relayed=relayed)

    @property
    def bodies_bytes(self) -> int:
        """Bytes of request bodies held here, over all connections."""
        return self.admission.bodies_bytes

    def hold_body(self, charge: BodyCharge, size_bytes: int) -> None:
        """The body of this charge takes `size_bytes` from now on. Raises HttpError 503, and then changes nothing."""
        refusal = charge.resize(size_bytes)
        if refusal is not None:
            raise self.refused(refusal)

    def check_not_draining(self) -> None:
        """Raises HttpError 503 once the drain has closed the listeners."""
        if self.draining:
            raise self.refused(RESTARTING)

    def check(self, settings: Settings) -> None:
        """Build everything that reload() will, without using it. Raises ValueError."""
        HeadLimits(settings.head_bytes_max, settings.headers_max, settings.target_bytes_max)
        Cors.of(settings.cors_origins, credentials=settings.cors_credentials)
        TrustedProxies.of(settings.trusted_proxies, header=settings.forwarded_header.encode())

    def reload(self, settings: Settings) -> None:
        self.settings = settings
        self.limits = HeadLimits(settings.head_bytes_max, settings.headers_max, settings.target_bytes_max)
        self.cors = Cors.of(settings.cors_origins, credentials=settings.cors_credentials)
        self.gates.reload(settings)

    # -- times to come back: random, so that ten thousand clients don't come in the same second

    def retry_ms(self, among: int | None = None) -> int:
        """A random time for the `retry:` of a stream, in milliseconds.

        The window grows with the readers that may come back together: all of this worker's, or as many as `among`.
        """
        settings, count = self.settings, self.readers if among is None else among
        longest_s = min(settings.retry_max_s, settings.retry_min_s + count / RETURNS_PER_S)
        return round(self.rng.uniform(settings.retry_min_s, longest_s) * 1000)

    def retry_after_s(self, retry: Retry) -> float | None:
        """A random time for Retry-After, in whole seconds; None: send no Retry-After."""
        if retry is Retry.NEVER:
            return None
        if retry is Retry.WITH_ROOM:
            return float(math.ceil(self.rng.uniform(ROOM_S_MIN, ROOM_S_MAX)))
        return max(1.0, round(self.rng.uniform(self.settings.retry_min_s, self.settings.retry_max_s)))

    def refused(self, refusal: Refusal, *, close: bool = False) -> HttpError:
        """Turn a refusal into a HttpError."""
        retry_after_s = refusal.retry_after_s or self.retry_after_s(refusal.retry)
        return HttpError(
            refusal.status,
            refusal.message,
            code=refusal.code,
            reason=refusal.reason,
            retry_after_s=retry_after_s,
            should_retry=True if refusal.retry is not Retry.NEVER else None,
            headers=((b"www-authenticate", refusal.challenge),) if refusal.challenge is not None else (),
            close=close,
        )

    def date(self) -> bytes:
        """The Date field (RFC 9110 6.6.1), made once a second."""
        now = self.time()
        if now >= self._dated[1]:
            self._dated = (formatdate(self.unix_time(), usegmt=True).encode(), now + 1)
        return self._dated[0]


def unlimited() -> Admission:
    """Gates that are never shut, for a runtime without a measured machine."""
    resources = Resources(memory_bytes=1 << 50, memory_source="none", descriptors_per_worker=1 << 30)
    return Admission(Budget.compute(resources, Demands(), Prices()), Limits(loop_lag_max_s=0))


def reason_of(error: Exception) -> CloseReason:
    """How a connection ends if a callback of it raised `error`."""
    if isinstance(error, MemoryError):
        return CloseReason.OVER_BUDGET
    if isinstance(error, ssl.SSLError):
        return CloseReason.TLS_FAILED
    return CloseReason.NETWORK_LOST if isinstance(error, OSError) else CloseReason.INTERNAL


def head_of(request: Request) -> RequestHead:
    """The head of a request that is still being planned."""
    assert request.head is not None
    return request.head
