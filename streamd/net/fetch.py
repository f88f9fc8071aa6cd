"""Fetch: a small answer from an upstream, collected whole (GET /v1/models)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from streamd.counters import bump
from streamd.net.attempt import Ask, Attempt
from streamd.net.runtime import Runtime
from streamd.net.upstream import Upstream, UpstreamConnection
from streamd.reasons import CloseReason
from streamd.wire.http1 import ResponseHead

# OpenRouter's list of 340 models is 500 KB; four times that.
ANSWER_BYTES_MAX = 2 * 1024 * 1024

# A list of models takes no computing; a slower upstream is left out of the answer.
TIMEOUT_S = 5.0


class Fetch:
    """Asks once. `done(upstream, status, body)` is called once, with status 0 for any failure, unless cancelled."""

    def __init__(
        self,
        runtime: Runtime,
        upstream: Upstream,
        ask: Ask,
        done: Callable[[Upstream, int, bytes], None],
        counter: dict[str, int] | None = None,
    ) -> None:
        """`counter` counts it by upstream; requests sent are counted by default."""
        self._runtime = runtime
        self._counter = runtime.counters.upstream_requests if counter is None else counter
        self.error: BaseException | None = None  # why no connection was established
        self._upstream = upstream
        self._ask = ask
        self._attempt: Attempt | None = None  # None: not started
        self._done: Callable[[Upstream, int, bytes], None] | None = done
        self._timer: asyncio.TimerHandle | None = None
        self.head: ResponseHead | None = None  # of the answer
        self._body = bytearray()
        self.is_too_large = False  # the answer has more than ANSWER_BYTES_MAX

    def start(self, *, pooled: bool = True) -> None:
        """Ask. Raises LocalProtocolError if the parts make no valid request; then no place is taken."""
        attempt = self._attempt = Attempt(self._runtime, self._upstream, self._ask, self)
        self._timer = self._runtime.loop.call_later(TIMEOUT_S, self._finish, 0)
        self._begin(attempt, pooled=pooled)

    def _begin(self, attempt: Attempt, *, pooled: bool) -> None:
        try:
            attempt.start(pooled=pooled)
        except Exception as error:  # the others of the same list would wait for this one for ever
            self.on_bug("fetch.start", error)

    def _ask_again(self) -> bool:
        """Ask on a fresh connection if the pooled connection was stale; a fresh connection never is."""
        attempt = self._attempt
        if attempt is None or not attempt.is_stale:
            return False
        attempt.end()
        self._attempt = Attempt(self._runtime, self._upstream, self._ask, self)
        self._begin(self._attempt, pooled=False)
        return True

    def cancel(self) -> None:
        """The answer isn't wanted any more; may be called before start()."""
        if self._done is not None:
            self._done = None
            self._close()

    def _finish(self, status: int) -> None:
        done, self._done = self._done, None
        assert done is not None  # after _close() neither the attempt nor the timer calls
        self._close()
        with self._runtime.guard:
            done(self._upstream, status, bytes(self._body))

    def _close(self) -> None:
        if self._attempt is None or self._timer is None:
            return  # never started: no place was taken
        self._attempt.end()
        self._timer.cancel()
        self._runtime.admission.charge_held(-len(self._body))

    # -- owner of the attempt

    def on_asked(self, attempt: Attempt) -> None:
        """The timer runs already."""
        bump(self._counter, self._upstream.settings.name)

    def on_unreachable(self, attempt: Attempt, error: BaseException) -> None:
        self.error = error
        self._finish(0)

    def on_head(self, link: UpstreamConnection, head: ResponseHead) -> None:
        if head.status == 408 and self._ask_again():
            return
        self.head = head
        link.take_body(head)

    def on_piece(self, piece: bytes) -> None:
        self._body += piece
        self._runtime.admission.charge_held(len(piece))
        if len(self._body) > ANSWER_BYTES_MAX:
            self.is_too_large = True
            self._finish(0)

    def on_end(self, link: UpstreamConnection) -> None:
        assert self.head is not None
        self._finish(self.head.status)

    def on_broken(self, link: UpstreamConnection, reason: CloseReason, text: str) -> None:
        if link.any_byte or not self._ask_again():
            self._finish(0)

    def on_bug(self, where: str, error: Exception) -> None:
        self._runtime.bug(where, error)
        if self._done is not None:
            self._finish(0)
