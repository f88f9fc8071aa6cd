"""Attempt: asks an upstream once. It holds a place in flight and a connection, pooled or new, until the answer is over.

Its owner, an exchange or a fetch, decides whether another upstream is tried and how the answer is used.
"""

from __future__ import annotations

import asyncio
import errno
from typing import NamedTuple, Protocol

from streamd.core.health import ERROR_STATUS, FAILED_STATUSES
from streamd.counters import bump
from streamd.net.runtime import Runtime
from streamd.net.upstream import Asker, Upstream, UpstreamConnection, UpstreamState
from streamd.reasons import CloseReason
from streamd.wire import via
from streamd.wire.dialect import Dialect
from streamd.wire.http1 import encode_request_head

# A pooled connection that the server was just closing ends within a round trip of the request; a second is a round trip
# around the world, doubled. Later than this the server may have read the request and worked on it.
STALE_S_MAX = 1.0

# Time for which a fresh connection is watched before the request goes out, if no answer has come since the start or
# since a connection was refused or closed: a proxy whose server isn't there closes what it has accepted within a few
# milliseconds, and a request that was sent by then may have been read.
WATCHED_S = 0.01

_SENT = (b"", b"")  # the request of an attempt that has gone out or is over


class Ask:
    """A request for an upstream; freed at the answer's first byte. A model may have another name at an upstream, so
    target, fields and body depend on it.
    """

    __slots__ = ("at", "method", "model", "principal")

    def __init__(self, method: str, model: str, *, principal: str | None = None, at: str = "") -> None:
        self.method = method
        self.model = model
        self.principal = principal  # of the asker; None: streamd's own question, which judges no upstream
        self.at = at  # the only upstream that may be asked, by name: it keeps what the request is about. "": any

    def target(self, upstream: Upstream) -> bytes:
        """Path and query as a client asks; the path may name the model."""
        raise NotImplementedError

    def fields(self, upstream: Upstream, length: int) -> list[tuple[bytes, bytes]]:
        """The header fields. `length`: of the body, in bytes."""
        raise NotImplementedError

    def body(self, upstream: Upstream) -> bytes:
        """The body; b"" if there is none."""
        raise NotImplementedError


class FixedAsk(Ask):
    """A question of streamd's own, made for a single server."""

    __slots__ = ("_fields", "_target")

    def __init__(self, target: bytes, fields: list[tuple[bytes, bytes]]) -> None:
        super().__init__("GET", "")
        self._target = target
        self._fields = fields

    def target(self, upstream: Upstream) -> bytes:
        return self._target

    def fields(self, upstream: Upstream, length: int) -> list[tuple[bytes, bytes]]:
        return self._fields

    def body(self, upstream: Upstream) -> bytes:
        return b""


def own_ask(upstream: Upstream, path: str, accept: bytes) -> FixedAsk:
    """A question of streamd's own for a server, with the server's own key."""
    settings = upstream.settings
    fields = [(b"host", settings.origin.authority.encode()), (b"accept", accept)]
    fields += [(name.lower().encode(), value.encode()) for name, value in settings.headers.items()]
    fields += [(b"accept-encoding", b"identity"), (b"via", via.OWN)]
    if settings.key:
        fields += Dialect.UNKNOWN.api.credentials(settings.key.encode())
    return FixedAsk(path.encode(), fields)


class Owner(Asker, Protocol):
    """The Asker of the connection, which is also told how far the attempt has come."""

    def on_asked(self, attempt: Attempt) -> None:
        """A connection is established; the request goes out now."""

    def on_unreachable(self, attempt: Attempt, error: BaseException) -> None:
        """No connection was established, so the upstream did no work."""


class AttemptPlace(NamedTuple):
    """An attempt whose request is out, for another process."""

    upstream: str
    method: str
    principal: str | None
    began_at: float
    asked_at: float
    is_reused: bool


class Attempt:
    """A single try of an upstream, to be started once. `owner` gets no more calls after end()."""

    __slots__ = (
        "_connecting",
        "_method",
        "_owner",
        "_principal",
        "_request",
        "_runtime",
        "asked_at",
        "began_at",
        "connect_by",
        "is_reused",
        "link",
        "upstream",
    )

    def __init__(self, runtime: Runtime, upstream: Upstream, ask: Ask, owner: Owner) -> None:
        """Takes no place yet. Raises LocalProtocolError if the parts make no valid request."""
        body = ask.body(upstream)
        target = upstream.settings.origin.target(ask.target(upstream))
        head = encode_request_head(ask.method, target, ask.fields(upstream, len(body)))
        self._request = (head, body)  # until it is sent; apart, because joining copies the body
        self._method = ask.method
        self._principal = ask.principal
        self._runtime = runtime
        self._owner: Owner | None = owner  # None: the attempt is over
        self.upstream = upstream
        self._connecting: asyncio.Task[None] | None = None
        self.connect_by = 0.0
        self.link: UpstreamConnection | None = None
        self.is_reused = False  # whether the connection has carried an answer before
        self.began_at = 0.0
        self.asked_at = 0.0

    @classmethod
    def continued(cls, runtime: Runtime, upstream: Upstream, place: AttemptPlace, link: UpstreamConnection) -> Attempt:
        """An attempt whose request another process has sent, on this connection; own() follows. Takes its place in
        flight.
        """
        attempt = cls.__new__(cls)
        attempt._runtime, attempt.upstream, attempt.link, attempt._owner = runtime, upstream, link, None
        attempt._request, attempt._connecting, attempt.connect_by = _SENT, None, 0.0
        attempt._method, attempt._principal = place.method, place.principal
        attempt.began_at, attempt.asked_at, attempt.is_reused = place.began_at, place.asked_at, place.is_reused
        upstream.in_flight += 1
        if place.principal is not None:
            upstream.health.begin(attempt, place.principal, place.began_at)
        return attempt

    def own(self, owner: Owner) -> None:
        """The owner of a continued attempt is there."""
        self._owner = owner

    def place(self) -> AttemptPlace:
        """The argument of another process's continued(). Raises ValueError while no request is out."""
        if self.link is None:
            raise ValueError("no connection is there yet")
        return AttemptPlace(
            self.upstream.settings.name, self._method, self._principal, self.began_at, self.asked_at, self.is_reused
        )

    def start(self, *, pooled: bool = True) -> None:
        """Take a place in flight and a connection; always a new connection unless `pooled`."""
        runtime, upstream = self._runtime, self.upstream
        now = self.began_at = runtime.time()
        upstream.in_flight += 1
        if self._principal is not None:
            upstream.health.begin(self, self._principal, now)
        link = upstream.take_idle(now) if pooled else None
        if link is not None:
            self._send(link)
            return
        self.connect_by = now + runtime.settings.connect_timeout_s
        upstream.health.connecting[self] = now
        self._connecting = runtime.loop.create_task(self._connect(now))

    async def _connect(self, began_at: float) -> None:
        """The only task of an attempt: it lives until the connection is established."""
        runtime, name = self._runtime, self.upstream.settings.name
        try:
            link = await self.upstream.connect()
        except OSError as error:
            self._connecting = None
            self._unreachable(error)
            return
        except Exception as error:
            self._connecting = None
            self.crash("attempt.connect", error)
            return
        finally:
            self.upstream.health.connecting.pop(self, None)
        try:
            bump(runtime.counters.upstream_connects, name)
            runtime.counters.upstream_connect_s.observe(runtime.time() - began_at)
            if self._principal is not None and self.upstream.health.is_doubtful:
                await asyncio.sleep(WATCHED_S)
            self._connecting = None
            if self._owner is None:
                link.close()
            elif link.at is UpstreamState.CLOSED:  # accepted and closed at once, so the server read nothing
                self._unreachable(ConnectionResetError(errno.ECONNRESET, "closed as soon as it was accepted"))
            else:
                self._send(link)
        except asyncio.CancelledError:
            link.close()
            raise
        except Exception as error:
            self._connecting = None
            with runtime.guard:
                link.close()
            self.crash("attempt.send", error)

    def crash(self, where: str, error: Exception) -> None:
        """The task raised: its owner counts the error and ends. Never raises."""
        owner = self._owner
        if owner is not None:
            owner.on_bug(where, error)
        else:
            self._runtime.bug(where, error)

    def _send(self, link: UpstreamConnection) -> None:
        owner = self._owner
        assert owner is not None
        (head, body), self._request = self._request, _SENT
        self.link = link
        self.is_reused = link.answers > 0
        self.asked_at = self._runtime.time()
        owner.on_asked(self)
        try:
            link.send(head + body, owner, method=self._method)
        except BaseException:
            link.close()  # an idle connection that isn't in the pool would belong to nobody
            raise

    # -- verdicts on the upstream, of the owner

    def judge(self, status: int) -> None:
        """The upstream answered with this status."""
        if status in FAILED_STATUSES or status == ERROR_STATUS:
            self.failed(CloseReason.UPSTREAM_REFUSED, f"status {status}", is_error=status == ERROR_STATUS)
        elif self._principal is not None:
            self.upstream.health.answered(self._principal, self._runtime.time())

    def failed(self, reason: CloseReason, error: str, *, is_error: bool = False) -> None:
        """Count a failure of the upstream, which `error` tells people; UPSTREAM_CONNECT: the request wasn't read.
        `is_error`: it answered 500.
        """
        runtime, upstream = self._runtime, self.upstream
        bump(runtime.counters.upstream_failures, (upstream.settings.name, reason))
        if self._principal is None:
            return
        now, rng = runtime.time(), runtime.rng
        if reason is CloseReason.UPSTREAM_CONNECT:
            upstream.health.unreachable(self.began_at, now, rng, error=error)
        else:
            upstream.health.failed(
                self._principal, self.began_at, now, rng, is_error=is_error, reason=reason, error=error
            )
            upstream.health.is_doubtful |= reason is CloseReason.UPSTREAM_RESET

    @property
    def took_s(self) -> float:
        """Time since the request was sent."""
        return self._runtime.time() - self.asked_at

    @property
    def is_stale(self) -> bool:
        """Whether an end at this moment means that the server was closing the pooled connection, and read nothing."""
        return self.is_reused and self.took_s <= STALE_S_MAX

    # -- the connection

    @property
    def is_connecting(self) -> bool:
        """Whether a new connection is being established."""
        return self._connecting is not None

    def time_out(self) -> None:
        """The connection takes too long.

        Why here and not asyncio.timeout(): ten thousand timers were 5 % of a ramp; the sweep runs anyway.
        """
        connecting, self._connecting = self._connecting, None
        if connecting is not None:
            connecting.cancel()
            self._unreachable(TimeoutError())

    def _unreachable(self, error: BaseException) -> None:
        owner = self._owner
        if owner is not None:
            try:
                owner.on_unreachable(self, error)
            except Exception as raised:
                owner.on_bug("attempt.unreachable", raised)

    def leave(self) -> None:
        """The attempt goes on in another process: give the place back, and leave the connection alone."""
        self.link = None
        self.end()

    def end(self) -> None:
        """Give the place back; cut a request that is under way."""
        if self._owner is None:
            return
        self._owner, self._request = None, _SENT
        self.upstream.in_flight -= 1
        self.upstream.health.connecting.pop(self, None)  # also of a task that never had its first turn
        if self._principal is not None:
            self.upstream.health.end(self, self._principal)
        link, self.link = self.link, None
        connecting, self._connecting = self._connecting, None
        if link is not None and link.at not in (UpstreamState.IDLE, UpstreamState.CLOSED):
            with self._runtime.guard:
                link.close()
        if connecting is not None:
            connecting.cancel()


def why(error: BaseException) -> str:
    """Why no connection was established, for people."""
    if isinstance(error, TimeoutError):
        return "no connection within connect_timeout"
    return getattr(error, "strerror", None) or type(error).__name__
