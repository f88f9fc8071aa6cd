"""Fetch: one small answer from one upstream, collected whole (GET /v1/models)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from streamd.net.exchange import Ask
from streamd.net.runtime import Runtime
from streamd.net.upstream import Up, Upstream, UpstreamConnection
from streamd.reasons import CloseReason
from streamd.wire.http1 import ResponseHead, encode_request_head

# OpenRouter's list of 340 models is 500 KB; four times that.
ANSWER_BYTES_MAX = 2 * 1024 * 1024

# A list of models takes no computing; who needs longer is left out.
TIMEOUT_S = 5.0


class Fetch:
    """Asks once; `done(upstream, status, body)` is called once, with status 0 for any failure, unless cancelled."""

    def __init__(
        self, runtime: Runtime, upstream: Upstream, ask: Ask, done: Callable[[Upstream, int, bytes], None]
    ) -> None:
        self._runtime = runtime
        self._upstream = upstream
        self._ask = ask
        self._done: Callable[[Upstream, int, bytes], None] | None = done
        self._link: UpstreamConnection | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._status = 0
        self._body = bytearray()

    def start(self) -> None:
        """Ask. Where no request can be made of the parts it raises, and has taken nothing."""
        request = self._request()
        self._upstream.in_flight += 1
        self._timer = self._runtime.loop.call_later(TIMEOUT_S, self._finish, 0)
        link = self._upstream.take_idle(self._runtime.time())
        if link is not None:
            self._send(link, request)
        else:
            self._task = self._runtime.loop.create_task(self._connect(request))

    def cancel(self) -> None:
        """The answer isn't wanted any more; before start() it isn't wanted at all."""
        if self._done is not None:
            self._done = None
            self._close()

    async def _connect(self, request: bytes) -> None:
        try:
            link = await self._upstream.connect()
        except OSError:
            self._finish(0)
            return
        except Exception as error:
            self.on_bug(error)
            return
        if self._done is None:
            link.close()
        elif link.at is Up.CLOSED:  # accepted and closed at once
            self._finish(0)
        else:
            self._send(link, request)

    def _request(self) -> bytes:
        ask, upstream = self._ask, self._upstream
        body = ask.body(upstream)
        target = upstream.settings.origin.base.encode() + ask.target(upstream)
        return encode_request_head("GET", target, ask.fields(upstream, len(body))) + body

    def _send(self, link: UpstreamConnection, request: bytes) -> None:
        self._link = link
        link.send(request, self, method="GET")

    def _finish(self, status: int) -> None:
        done, self._done = self._done, None
        if done is not None:
            self._close()
            done(self._upstream, status, bytes(self._body))

    def _close(self) -> None:
        if self._timer is None:
            return  # never started: nothing was taken
        self._upstream.in_flight -= 1
        self._timer.cancel()
        if self._link is not None and self._link.at not in (Up.IDLE, Up.CLOSED):
            self._link.close()
        task, self._task = self._task, None  # a cancelled task's error holds this object, which must not hold the task
        if task is not None and self._link is None:
            task.cancel()

    # -- Asker

    def on_head(self, link: UpstreamConnection, head: ResponseHead) -> None:
        self._status = head.status
        link.take_body(head)

    def on_piece(self, piece: bytes) -> None:
        self._body += piece
        if len(self._body) > ANSWER_BYTES_MAX:
            self._finish(0)

    def on_end(self, link: UpstreamConnection) -> None:
        self._finish(self._status)

    def on_broken(self, link: UpstreamConnection, reason: CloseReason, text: str) -> None:
        self._finish(0)

    def on_bug(self, error: Exception) -> None:
        self._runtime.bug("fetch", error)
        self._finish(0)
