"""Attempt: one upstream asked once. A place in flight and a connection, pooled or new, until the answer is over.

Whether another upstream is tried, and what the answer is good for, is decided by its owner: an exchange or a fetch.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from streamd.counters import bump
from streamd.net.runtime import Runtime
from streamd.net.upstream import Asker, Up, Upstream, UpstreamConnection
from streamd.wire.http1 import encode_request_head

_SENT = (b"", b"")  # the request of an attempt that has gone out or is over


@dataclass(slots=True)
class Ask:
    """A request for an upstream; let go at the answer's first byte.

    `fields` makes the header fields for one upstream; `target` and `body` are for one too, as a model may have another
    name there.
    """

    method: str
    target: Callable[[Upstream], bytes]  # below the upstream's base; the path may name the model
    model: str
    fields: Callable[[Upstream, int], list[tuple[bytes, bytes]]]  # (upstream, length of the body)
    body: Callable[[Upstream], bytes]


class Owner(Asker, Protocol):
    """The Asker of the connection, which is also told how far the attempt has come."""

    def on_asked(self, attempt: Attempt) -> None:
        """A connection stands, and the request goes out now."""

    def on_unreachable(self, attempt: Attempt, error: BaseException) -> None:
        """No connection was established: nothing was done at the upstream."""


class Attempt:
    """One try of one upstream, to be started once. `owner` is told of nothing any more after end()."""

    __slots__ = (
        "_connecting",
        "_method",
        "_owner",
        "_request",
        "_runtime",
        "asked_at",
        "connect_by",
        "is_reused",
        "link",
        "upstream",
    )

    def __init__(self, runtime: Runtime, upstream: Upstream, ask: Ask, owner: Owner) -> None:
        """Takes nothing yet. Raises LocalProtocolError where no request can be made of the parts."""
        body = ask.body(upstream)
        target = upstream.settings.origin.base.encode() + ask.target(upstream)
        head = encode_request_head(ask.method, target, ask.fields(upstream, len(body)))
        self._request = (head, body)  # until it is sent; apart, since most bodies are the client's and no copy
        self._method = ask.method
        self._runtime = runtime
        self._owner: Owner | None = owner  # None: over
        self.upstream = upstream
        self._connecting: asyncio.Task[None] | None = None
        self.connect_by = 0.0
        self.link: UpstreamConnection | None = None
        self.is_reused = False  # the connection has carried an answer before
        self.asked_at = 0.0

    def start(self, *, pooled: bool = True) -> None:
        """Take a place and a connection; a new one unless `pooled`."""
        runtime, upstream = self._runtime, self.upstream
        now = runtime.time()
        upstream.in_flight += 1
        link = upstream.take_idle(now) if pooled else None
        if link is not None:
            self._send(link)
            return
        self.connect_by = now + runtime.settings.connect_timeout_s
        self._connecting = runtime.loop.create_task(self._connect(now))

    async def _connect(self, began_at: float) -> None:
        """The only task there is: it lives until the connection stands."""
        runtime, name = self._runtime, self.upstream.settings.name
        try:
            link = await self.upstream.connect()
        except OSError as error:
            self._connecting = None
            self._unreachable(error)
            return
        except Exception as error:
            self._connecting = None
            if self._owner is not None:
                self._owner.on_bug(error)
            return
        self._connecting = None
        bump(runtime.counters.upstream_connects, name)
        runtime.counters.upstream_connect_s.observe(runtime.time() - began_at)
        if self._owner is None:
            link.close()
        elif link.at is Up.CLOSED:  # accepted and closed at once: nothing of ours was read there
            self._unreachable(ConnectionResetError(errno.ECONNRESET, "closed as soon as it was accepted"))
        else:
            self._send(link)

    def _send(self, link: UpstreamConnection) -> None:
        owner = self._owner
        assert owner is not None
        (head, body), self._request = self._request, _SENT
        self.link = link
        self.is_reused = link.answers > 0
        self.asked_at = self._runtime.time()
        owner.on_asked(self)
        link.send(head + body, owner, method=self._method)

    @property
    def is_connecting(self) -> bool:
        """Whether a new connection is being established."""
        return self._connecting is not None

    def time_out(self) -> None:
        """The connection takes too long.

        Why here and not asyncio.timeout(): ten thousand timers were 5 % of a ramp; the sweep passes by anyway.
        """
        connecting, self._connecting = self._connecting, None
        if connecting is not None:
            connecting.cancel()
            self._unreachable(TimeoutError())

    def _unreachable(self, error: BaseException) -> None:
        if self._owner is not None:
            self._owner.on_unreachable(self, error)

    def end(self) -> None:
        """Give the place back; a request that is under way there is cut."""
        if self._owner is None:
            return
        self._owner, self._request = None, _SENT
        self.upstream.in_flight -= 1
        link, self.link = self.link, None
        connecting, self._connecting = self._connecting, None
        if link is not None and link.at not in (Up.IDLE, Up.CLOSED):
            link.close()
        if connecting is not None:
            connecting.cancel()
