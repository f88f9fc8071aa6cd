"""Exchange: one request carried upstream, its tries, its time limits, and what becomes of the answer.

    CHOOSING    no connection yet: being established, or none taken
    ASKED       the request is out, the answer's head is awaited
    STREAMING   the answer feeds a stream
    PASSING     the answer goes through as bytes
    COLLECTING  the reader has its 200 already (commit_after), but the answer is no stream: it is read for its error
                text
    OVER

Who tries again, and when, is decided once (docs/PROTOCOL.md, section 4): only if the connection was never
established, or a *reused* connection ended without a byte (once), or the upstream answered 503, or 429 with another
one free. Never after a time-out: no byte back isn't nothing done, and a generation costs money.

A request that asks for a stream has its Stream from the start: a retry of the same request can join it, and a reader
who leaves before the first token can leave it a grace.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import dataclass

import orjson

from streamd.choice import Choice
from streamd.core.stream import Policy, Stream
from streamd.core.usage import UsageTail
from streamd.counters import bump
from streamd.net.client import At, ClientConnection
from streamd.net.problem import Problem
from streamd.net.request import Request
from streamd.net.runtime import Runtime
from streamd.net.sweep import NEVER
from streamd.net.upstream import Up, Upstream, UpstreamConnection
from streamd.net.upstreams import Upstreams
from streamd.reasons import CloseReason
from streamd.wire.http1 import Framing, ResponseHead, encode_request_head

# An error text for an event: the object of an OpenAI-compatible server takes a few hundred bytes.
COLLECTED_BYTES_MAX = 16 * 1024


class Phase(Choice):
    """How far an exchange has come; the module says what each means."""

    CHOOSING = "choosing"
    ASKED = "asked"
    STREAMING = "streaming"
    PASSING = "passing"
    COLLECTING = "collecting"
    OVER = "over"


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.CHOOSING: frozenset((Phase.ASKED, Phase.OVER)),
    Phase.ASKED: frozenset((Phase.CHOOSING, Phase.STREAMING, Phase.PASSING, Phase.COLLECTING, Phase.OVER)),
    Phase.STREAMING: frozenset((Phase.OVER,)),
    Phase.PASSING: frozenset((Phase.OVER,)),
    Phase.COLLECTING: frozenset((Phase.OVER,)),
    Phase.OVER: frozenset(),
}


@dataclass(slots=True)
class Ask:
    """What is asked of an upstream; let go at the answer's first byte.

    `fields` makes the header fields for one upstream; `target` and `body` are for one too, as a model may have another
    name there.
    """

    method: str
    target: Callable[[Upstream], bytes]  # below the upstream's base; the path may name the model
    model: str
    fields: Callable[[Upstream, int], list[tuple[bytes, bytes]]]  # (upstream, length of the body)
    body: Callable[[Upstream], bytes]


class Exchange:
    """One request on its way. `connection` is None once its reader has left or has its stream."""

    __slots__ = (
        "__weakref__",
        "_answers_before",
        "_ask",
        "_asked_at",
        "_collected",
        "_connect_by",
        "_connecting",
        "_link",
        "_phase",
        "_request",
        "_reused_once",
        "_route",
        "_runtime",
        "_started_at",
        "_tried",
        "_upstream",
        "_upstreams",
        "connection",
        "due_at",
        "on_opened",
        "on_over",
        "policy",
        "stream",
        "usage",
    )

    def __init__(
        self,
        runtime: Runtime,
        upstreams: Upstreams,
        ask: Ask,
        *,
        connection: ClientConnection | None,
        request: Request,
        stream: Stream | None,
        policy: Policy,
    ) -> None:
        # process
        self._runtime = runtime
        self._upstreams = upstreams
        # request
        self._ask: Ask | None = ask
        self._request = request
        self._route = request.route
        self.connection = connection
        self.policy = policy
        self.stream = stream
        self.on_opened: Callable[[Stream], None] | None = None  # an answer that turned out to be a stream
        self.on_over: Callable[[], None] | None = None
        self.usage: UsageTail | None = None  # of an answer that passes, where its key's tokens are limited
        # tries
        self._phase = Phase.CHOOSING
        self._tried: tuple[Upstream, ...] = ()
        self._reused_once = False
        self._upstream: Upstream | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._connect_by = 0.0
        self._link: UpstreamConnection | None = None
        self._answers_before = 0
        # time
        self._started_at = runtime.time()
        self._asked_at = 0.0
        self.due_at = NEVER
        # answer
        self._collected = b""

    # -- going upstream

    def start(self) -> None:
        """Take an upstream and ask. Raises Problem if there is none."""
        upstream = self._choose()
        if self.connection is not None:
            self._request.waiting = self
        if self.stream is not None:
            self.stream.source = self
        self._runtime.sweep.add(self)
        self._try(upstream)

    def _choose(self) -> Upstream:
        assert self._ask is not None
        return self._upstreams.choose(self._ask.model, self._runtime.time(), without=self._tried)

    def _try(self, upstream: Upstream) -> None:
        now = self._runtime.time()
        self._upstream = upstream
        upstream.in_flight += 1
        self._request.upstream = upstream.settings.name
        if self.stream is not None:
            self.stream.upstream = upstream.settings.name
        link = None if self._reused_once else upstream.take_idle(now)
        if link is not None:
            self._send(link)
            return
        self._connect_by = now + self._runtime.settings.connect_timeout_s
        self.due_at = min(self._connect_by, self._commit_at())
        self._connecting = self._runtime.loop.create_task(self._connect(upstream, now))

    async def _connect(self, upstream: Upstream, began_at: float) -> None:
        """The only task there is: it lives until the connection stands."""
        counters = self._runtime.counters
        try:
            link = await upstream.connect()
        except OSError as error:
            self._connecting = None
            self._not_connected(upstream, error)
            return
        except Exception as error:
            self._connecting = None
            self.on_bug(error)
            return
        self._connecting = None
        bump(counters.upstream_connects, upstream.settings.name)
        counters.upstream_connect_s.observe(self._runtime.time() - began_at)
        if self._phase is Phase.OVER:
            link.close()
        elif link.at is Up.CLOSED:  # accepted and closed at once: nothing of ours was read there
            self._not_connected(upstream, ConnectionResetError(errno.ECONNRESET, "closed as soon as it was accepted"))
        else:
            self._send(link)

    def _send(self, link: UpstreamConnection) -> None:
        ask, upstream = self._ask, self._upstream
        assert ask is not None and upstream is not None
        body = ask.body(upstream)
        target = upstream.settings.origin.base.encode() + ask.target(upstream)
        head = encode_request_head(ask.method, target, ask.fields(upstream, len(body)))
        self._link = link
        self._answers_before = link.answers
        self._asked_at = self._runtime.time()
        self._go(Phase.ASKED)
        bump(self._runtime.counters.upstream_requests, upstream.settings.name)
        self.due_at = self._next_due()
        link.send(head + body, self, method=ask.method)

    # -- when it doesn't get there

    def _not_connected(self, upstream: Upstream, error: BaseException) -> None:
        """Never established: nothing was done there, so another one may be tried."""
        if self._phase is Phase.OVER:
            return
        self._count_failure(upstream, CloseReason.UPSTREAM_CONNECT)
        self._release(upstream)
        if self._try_another(upstream):
            return
        self._fail(
            Problem(
                502,
                f"The upstream {upstream.settings.name} can't be reached ({_why(error)}).",
                code="upstream_unreachable",
                reason=CloseReason.UPSTREAM_CONNECT,
                should_retry=True,
            )
        )

    def _give_up_connecting(self, connecting: asyncio.Task[None]) -> None:
        """Why here and not asyncio.timeout(): ten thousand timers were 5 % of a ramp; the sweep passes by anyway."""
        upstream = self._upstream
        assert upstream is not None
        self._connecting = None
        connecting.cancel()
        self._not_connected(upstream, TimeoutError())

    def _try_another(self, failed: Upstream) -> bool:
        """Go on with an upstream that was not tried yet, if there is one."""
        self._tried = (*self._tried, failed)
        try:
            upstream = self._choose()
        except Problem:
            return False
        if self._phase is Phase.ASKED:
            self._go(Phase.CHOOSING)
        self._try(upstream)
        return True

    def _count_failure(self, upstream: Upstream, reason: CloseReason) -> None:
        bump(self._runtime.counters.upstream_failures, (upstream.settings.name, reason))
        upstream.failed(self._runtime.time(), self._runtime.rng)

    def _release(self, upstream: Upstream) -> None:
        upstream.in_flight -= 1
        self._upstream = None
        self._link = None

    # -- Asker

    def on_head(self, link: UpstreamConnection, head: ResponseHead) -> None:
        upstream, now = self._upstream, self._runtime.time()
        assert upstream is not None
        self._runtime.counters.upstream_first_byte_s.observe(now - self._asked_at)
        if head.status in (429, 503) and self._elsewhere(link, upstream, head.status):
            return
        upstream.worked()
        if _is_event_stream(head):
            self._take_stream(link, head)
        elif self.connection is not None and self.connection.at is At.WAITING:
            self._pass(link, upstream, head, self.connection)
        elif self.stream is not None:
            self._go(Phase.COLLECTING)
            self._collected = f"The upstream answered {head.status}".encode()
            link.take_body(head)
        else:
            self.cancel(CloseReason.READER_GONE)

    def _elsewhere(self, link: UpstreamConnection, upstream: Upstream, status: int) -> bool:
        """503, or 429 with another upstream free: that one refused before it began, so asking another costs nothing."""
        if self._ask is None:
            return False
        tried = (*self._tried, upstream)
        if self._upstreams.free(self._ask.model, self._runtime.time(), without=tried) is None:
            return False
        link.close()
        if status == 503:
            upstream.failed(self._runtime.time(), self._runtime.rng)
        self._release(upstream)
        return self._try_another(upstream)

    def _take_stream(self, link: UpstreamConnection, head: ResponseHead) -> None:
        request, now = self._request, self._runtime.time()
        stream = self.stream
        if stream is None:
            stream = self.stream = self._runtime.hub.open(request.dialect, now)
            stream.source = self
            stream.upstream = request.upstream
            if self.on_opened is not None:
                self.on_opened(stream)
        self._let_ask_go()
        self._runtime.counters.added_s.observe(self._asked_at - request.started_at)
        self._go(Phase.STREAMING)
        link.take_events(stream, head)
        self.due_at = self._next_due()
        self._attach(stream)

    def _attach(self, stream: Stream) -> None:
        """Give the one who asked its stream, if it is still waiting for it."""
        connection, self.connection = self.connection, None
        if connection is not None and connection.at is At.WAITING:
            connection.begin_stream(stream, seq=1, policy=self.policy)

    def _pass(self, link: UpstreamConnection, upstream: Upstream, head: ResponseHead, to: ClientConnection) -> None:
        self._let_ask_go()
        self._go(Phase.PASSING)
        headers = [(b"x-upstream", upstream.settings.name.encode())]
        fields = head.headers
        if head.status >= 400:
            headers += _error_fields(fields)
            fields = _bounded_retry_after(fields, self._runtime.settings.upstream_retry_after_max_s)
        head = ResponseHead(head.status, head.reason, fields, head.framing, head.content_length, head.keep_alive)
        if self.stream is not None:
            self._drop_stream(self.stream)
        link.take_body(head)
        if to.paused:
            link.pause()
        self.due_at = self._next_due()
        to.pass_head(head, headers)

    def _drop_stream(self, stream: Stream) -> None:
        """The answer is no stream. Those who joined it meanwhile are told, else nothing is left of it."""
        stream.source = None
        self.stream = None
        now = self._runtime.time()
        stream.fail(
            CloseReason.UPSTREAM_REFUSED, now, message="The upstream answered with something else than a stream."
        )
        if not stream.readers:
            self._runtime.hub.remove(stream)

    def on_piece(self, piece: bytes) -> None:
        if self._phase is Phase.PASSING and self.connection is not None:
            if self.usage is not None:
                self.usage.passed(piece)
            self.connection.pass_body(piece)
        elif self._phase is Phase.COLLECTING and len(self._collected) < COLLECTED_BYTES_MAX:
            if b"\n" not in self._collected:
                self._collected += b"\n"
            self._collected += piece[:COLLECTED_BYTES_MAX]

    def on_end(self, link: UpstreamConnection) -> None:
        phase, stream, connection = self._phase, self.stream, self.connection
        if phase is Phase.PASSING and connection is not None:
            self._over()
            if connection.request is not None:
                connection.request.waiting = None
            connection.pass_end()
        elif phase is Phase.COLLECTING:
            self._fail(_refused(self._collected))
        elif stream is not None and stream.progress.complete:
            self._over()
            stream.seal(CloseReason.COMPLETE, self._runtime.time(), clean=True)
        else:
            self._truncated(CloseReason.UPSTREAM_TRUNCATED, "The upstream ended its answer before it was complete.")

    def on_broken(self, link: UpstreamConnection, reason: CloseReason, text: str) -> None:
        upstream = self._upstream
        assert upstream is not None
        if self._phase is Phase.ASKED and not link.any_byte and self._answers_before and not self._reused_once:
            # A pooled connection that the server was closing: nothing of ours was read there.
            self._reused_once = True
            self._release(upstream)
            self._go(Phase.CHOOSING)
            self._try(upstream)
            return
        self._count_failure(upstream, reason)
        if self._phase is Phase.ASKED:
            self._fail(Problem(502, text, code=reason.word, reason=reason, should_retry=False))
        elif self._phase is Phase.COLLECTING:
            self._fail(_refused(self._collected))
        else:
            self._truncated(reason, text)

    def on_bug(self, error: Exception) -> None:
        self._runtime.counters.bugs += 1
        self._runtime.on_bug("upstream.data_received", error)
        text = "streamd made a mistake; its log says more."
        if self._phase in (Phase.STREAMING, Phase.PASSING):
            self._truncated(CloseReason.INTERNAL, text)
        else:
            self._fail(Problem(500, text, code="internal", reason=CloseReason.INTERNAL, should_retry=False))

    # -- ends

    def _truncated(self, reason: CloseReason, text: str) -> None:
        """The answer has begun and will not become whole: never an ending that looks clean."""
        connection, stream = self.connection, self.stream
        self._over()
        if stream is not None:
            stream.fail(reason, self._runtime.time(), message=text)
        elif connection is not None and connection.at is At.PASSING:
            if connection.request is not None:
                connection.request.waiting = None
            connection.abort(reason)

    def _fail(self, problem: Problem) -> None:
        """No answer came that could be passed on: an error status if nothing was sent yet, else an error event."""
        connection, stream = self.connection, self.stream
        self._over()
        waiting = connection is not None and connection.at is At.WAITING
        if stream is not None:
            stream.source = None
            stream.fail(problem.reason, self._runtime.time(), message=problem.message, code=problem.code)
            if waiting and not stream.readers:
                self._runtime.hub.remove(stream)
        if connection is not None and waiting:
            self._request.waiting = None
            connection.answer_problem(problem)

    def _over(self) -> None:
        """Leave the process's books; what is under way upstream is cut."""
        if self._phase is Phase.OVER:
            return
        self._go(Phase.OVER)
        self._runtime.sweep.discard(self)
        link, upstream, connecting = self._link, self._upstream, self._connecting
        if upstream is not None:
            self._release(upstream)
        if link is not None and link.at not in (Up.IDLE, Up.CLOSED):
            link.close()
        if connecting is not None and connecting is not asyncio.current_task(self._runtime.loop):
            connecting.cancel()
        self._connecting = None
        self._ask = None
        if self.usage is not None:
            self.usage.over()
        on_over, self.on_over = self.on_over, None
        if on_over is not None:
            on_over()

    def _let_ask_go(self) -> None:
        self._ask = None
        if self.connection is not None:
            self.connection.let_body_go()

    # -- Waiting: what the connection says

    def reader_gone(self, reason: CloseReason) -> None:
        """The reader left before its answer was complete."""
        self.connection = None
        stream = self.stream
        if stream is None:
            self.cancel(reason)
        elif not stream.readers and stream.reason is None:
            hub = self._runtime.hub
            hub.orphan(stream, stream.grace_s(reason), reason, self._runtime.time())

    def reader_paused(self) -> None:
        if self._link is not None:
            self._link.pause()

    def reader_resumed(self) -> None:
        if self._link is not None:
            self._link.resume()

    # -- Source: what the stream says

    @property
    def needs_reader(self) -> bool:
        """Unless the one who asked still waits for the first byte: others may come and go meanwhile."""
        return self.connection is None or self.connection.at is not At.WAITING

    def cancel(self, reason: CloseReason) -> None:
        """Nobody wants the answer: end it upstream now."""
        if self._upstream is not None:
            bump(self._runtime.counters.upstream_cancels, self._upstream.settings.name)
        connection = self.connection
        self._over()
        if connection is not None and connection.at is At.WAITING:
            self._request.waiting = None
            text = "The generation was stopped before it began to answer."
            connection.answer_problem(Problem(409, text, code=reason.word, reason=reason, should_retry=False))

    # -- deadlines

    def on_due(self, now: float) -> float:
        if self._phase is Phase.OVER:
            return NEVER
        if self._connecting is not None and now >= self._connect_by:
            self._give_up_connecting(self._connecting)
            return self._next_due()
        reason = self._time_out(now)
        if reason is not None:
            self._timed_out(reason)
            return NEVER
        if self._commits and now >= self._commit_at():
            self._commit()
        return self._next_due()

    def _time_out(self, now: float) -> CloseReason | None:
        settings, route = self._runtime.settings, self._route
        if settings.stream_timeout_s and now - self._started_at >= settings.stream_timeout_s:
            return CloseReason.UPSTREAM_STREAM_TIMEOUT
        if self._phase is Phase.CHOOSING:
            return None
        if self._before_first():
            late = route.ttft_timeout_s and now - self._asked_at >= route.ttft_timeout_s
            return CloseReason.UPSTREAM_TTFT_TIMEOUT if late else None
        late = route.idle_timeout_s and now - self._last_sign() >= route.idle_timeout_s
        return CloseReason.UPSTREAM_IDLE_TIMEOUT if late and not self._reader_is_slow() else None

    def _before_first(self) -> bool:
        """ttft_timeout runs until the first event: some servers send their head at once."""
        if self._phase is Phase.STREAMING:
            return self.stream is not None and not self.stream.events
        return self._phase is Phase.ASKED

    def _last_sign(self) -> float:
        if self._phase is Phase.STREAMING and self.stream is not None:
            return self.stream.touched_at
        return self._link.touched_at if self._link is not None else self._asked_at

    def _reader_is_slow(self) -> bool:
        """PASSING, and it is we who don't read."""
        return self._phase is Phase.PASSING and self.connection is not None and self.connection.paused

    def _timed_out(self, reason: CloseReason) -> None:
        if self._upstream is not None and reason is not CloseReason.UPSTREAM_STREAM_TIMEOUT:  # our own limit
            self._count_failure(self._upstream, reason)
        text = _TIME_OUT_TEXTS[reason]
        if self._phase in (Phase.STREAMING, Phase.PASSING):
            self._truncated(reason, text)
        else:
            self._fail(Problem(504, text, code=reason.word, reason=reason, should_retry=False))

    @property
    def _commits(self) -> bool:
        """Whether the reader gets its 200 before the upstream's head."""
        return self.stream is not None and self.connection is not None and self.connection.at is At.WAITING

    def _commit_at(self) -> float:
        return self._started_at + self._route.commit_after_s if self._commits else NEVER

    def _commit(self) -> None:
        """A long prefill: answer 200 now and send heartbeats, so that no proxy in between gives up."""
        stream = self.stream
        assert stream is not None
        self._request.waiting = None
        self._attach(stream)

    def _next_due(self) -> float:
        settings, route = self._runtime.settings, self._route
        due = self._commit_at()
        if settings.stream_timeout_s:
            due = min(due, self._started_at + settings.stream_timeout_s)
        if self._phase is Phase.CHOOSING:
            return min(due, self._connect_by)
        before_first = self._before_first()
        if before_first and route.ttft_timeout_s:
            due = min(due, self._asked_at + route.ttft_timeout_s)
        if not route.idle_timeout_s:
            return due
        # Idle time begins with the first event, which stores nothing here and may come at once; that of a slow reader
        # begins anew when it reads again. Until then there is nothing to measure, and the earliest it could end is
        # from now.
        since = self._runtime.time() if before_first or self._reader_is_slow() else self._last_sign()
        return min(due, since + route.idle_timeout_s)

    def _go(self, phase: Phase) -> None:
        assert phase in TRANSITIONS[self._phase], f"{self._phase} to {phase}"
        self._phase = phase

    @property
    def phase(self) -> Phase:
        return self._phase


_TIME_OUT_TEXTS = {
    CloseReason.UPSTREAM_TTFT_TIMEOUT: "The upstream sent nothing within ttft_timeout.",
    CloseReason.UPSTREAM_IDLE_TIMEOUT: "The upstream fell silent in the middle of its answer.",
    CloseReason.UPSTREAM_STREAM_TIMEOUT: "The answer took longer than stream_timeout allows.",
}


def _is_event_stream(head: ResponseHead) -> bool:
    """200, text/event-stream, and not compressed: what is compressed passes as bytes."""
    if head.status != 200 or head.framing is Framing.NONE:
        return False
    media_type = (head.get(b"content-type") or b"").split(b";")[0].strip().lower()
    coding = (head.get(b"content-encoding") or b"identity").strip().lower()
    return media_type == b"text/event-stream" and coding == b"identity"


def _error_fields(fields: tuple[tuple[bytes, bytes], ...]) -> list[tuple[bytes, bytes]]:
    """The request had reached the upstream: who retries by itself may pay twice. Unless the upstream says."""
    if any(name == b"x-should-retry" for name, _ in fields):
        return []
    return [(b"x-should-retry", b"false")]


def _bounded_retry_after(
    fields: tuple[tuple[bytes, bytes], ...], seconds_max: float
) -> tuple[tuple[bytes, bytes], ...]:
    """SDKs ignore a Retry-After of more than a minute."""
    limit = b"%d" % seconds_max
    return tuple(
        (name, limit if name == b"retry-after" and value.isdigit() and int(value[:9]) > seconds_max else value)
        for name, value in fields
    )


def _refused(collected: bytes) -> Problem:
    """An answer that is no stream, after the reader had its 200: its status and, if it has one, its error's text."""
    line, _, body = collected.partition(b"\n")
    text = line.decode()
    try:
        error = orjson.loads(body)["error"]
        text += f": {error['message'] if isinstance(error, dict) else error}"
    except (orjson.JSONDecodeError, KeyError, TypeError):
        text += " and not with a stream."
    return Problem(502, text[:1000], code="upstream_refused", reason=CloseReason.UPSTREAM_REFUSED, should_retry=False)


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no connection within connect_timeout"
    return getattr(error, "strerror", None) or type(error).__name__
