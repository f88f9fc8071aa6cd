"""ClientConnection: one downstream connection. Requests in, answers and frames out, pause and resume.

A connection is in one place of the table below at any time, and `_go` is the only one who moves it:

    HEAD       collecting a request's head; also idle between requests
    BODY       reading a request's body
    WAITING    the request is whole and somebody works on its answer
    STREAMING  a subscriber of a stream writes here
    PASSING    the body of another answer passes through
    LINGER     refused with an unread body: the answer and a FIN are out, what still comes is thrown away (RFC 9112 9.6)
    CLOSING    the last bytes are on their way
    LOST       gone

While an answer runs, reading goes on: that is how a FIN is seen, and a FIN means that the reader is gone. What comes
behind the request is kept up to `pipeline_bytes_max`; more closes the connection.

Writing: the transport's high-water mark is 0, so pause_writing() comes, inside write(), as soon as the kernel took less
than all. It is the only sign of a slow reader. Every close arms an abort: a stalled peer keeps no socket.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import cast

from streamd.choice import Choice
from streamd.core.admission import Refusal
from streamd.core.ring import Ring
from streamd.core.stream import Form, Policy, Stream, Sub, Subscriber
from streamd.counters import bump
from streamd.net.peers import Elsewhere, Passed
from streamd.net.problem import TYPES, Problem
from streamd.net.request import BodySink, Plan, Request
from streamd.net.runtime import Runtime, refused, worker_busy
from streamd.net.splice import UNIX_SNDBUF_BYTES, open_splice, outstanding, reason_of_end
from streamd.net.sweep import NEVER
from streamd.reasons import By, CloseReason
from streamd.wire.chunked import LAST_CHUNK, BodyDecoder, decoder_for, encode_chunk
from streamd.wire.cors import REPLACED
from streamd.wire.dialect import dialect_of, error_body
from streamd.wire.http1 import (
    Framing,
    HeadReader,
    RemoteProtocolError,
    ResponseHead,
    encode_response_head,
    end_to_end,
    parse_request,
)

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

# A stalled reader is looked at so often within stall_timeout, to see whether its kernel still takes bytes.
STALL_SAMPLES = 4


# From the error event of a stream that failed to the close that follows it. A browser's fetch throws away what its page
# has not read when a body breaks off: in Chromium 156 a close at once lost the error event in four of five tries, one
# after 50 ms in none.
BROKEN_END_S = 0.25


class At(Choice):
    """Where a connection is; the module says what each means."""

    HEAD = "head"
    BODY = "body"
    WAITING = "waiting"
    STREAMING = "streaming"
    PASSING = "passing"
    LINGER = "linger"
    CLOSING = "closing"
    LOST = "lost"


class Step(Choice):
    """What moves it on."""

    BEGIN = "begin"  # a head is there
    WHOLE = "whole"  # and the body
    STREAM = "stream"  # the answer is a stream
    PASS = "pass"  # the answer passes through
    NEXT = "next"  # the answer is complete, another request may come
    REFUSE = "refuse"  # answered before the request was read to its end
    CLOSE = "close"
    LOSE = "lose"


TRANSITIONS: dict[At, dict[Step, At]] = {
    At.HEAD: {Step.BEGIN: At.BODY, Step.REFUSE: At.LINGER, Step.CLOSE: At.CLOSING, Step.LOSE: At.LOST},
    At.BODY: {Step.WHOLE: At.WAITING, Step.REFUSE: At.LINGER, Step.CLOSE: At.CLOSING, Step.LOSE: At.LOST},
    At.WAITING: {
        Step.STREAM: At.STREAMING,
        Step.PASS: At.PASSING,
        Step.NEXT: At.HEAD,
        Step.CLOSE: At.CLOSING,
        Step.LOSE: At.LOST,
    },
    At.STREAMING: {Step.NEXT: At.HEAD, Step.CLOSE: At.CLOSING, Step.LOSE: At.LOST},
    At.PASSING: {Step.NEXT: At.HEAD, Step.CLOSE: At.CLOSING, Step.LOSE: At.LOST},
    At.LINGER: {Step.CLOSE: At.CLOSING, Step.LOSE: At.LOST},
    At.CLOSING: {Step.CLOSE: At.CLOSING, Step.LOSE: At.LOST},
    At.LOST: {},
}

ANSWERING = (At.WAITING, At.STREAMING, At.PASSING)


class ClientConnection(asyncio.Protocol):
    """A downstream connection; also the Sink of its subscriber."""

    __slots__ = (
        "__weakref__",
        "_behind",
        "_body",
        "_chunked",
        "_close_reason",
        "_decoder",
        "_gate_keys",
        "_keep_alive",
        "_lines_since",
        "_opened",
        "_outstanding",
        "_plan",
        "_price_bytes",
        "_progress_at",
        "_reader_of_heads",
        "_remote",
        "_remote_awaited",
        "_runtime",
        "_seasoned",
        "_sink",
        "_spliced",
        "_turned_away",
        "at",
        "bytes_passed",
        "due_at",
        "listener",
        "passed",
        "paused",
        "reader",
        "refusal",
        "request",
        "transport",
        "write",
        "wrote_at",
    )

    def __init__(self, runtime: Runtime, listener: str = "public", price_bytes: int = 0) -> None:
        # process
        self._runtime = runtime
        # connection
        self.listener = listener  # "public", "loopback" or "admin"
        self._price_bytes = price_bytes
        self.refusal: Refusal | None = None  # not admitted: may ask for health, metrics and DELETE, and no more
        self.at = At.HEAD
        self.transport: asyncio.Transport
        self.write: Callable[[bytes], None]
        self.due_at = NEVER
        self.paused = False
        self._turned_away = False
        self.passed: Passed | None = None  # by another worker, and its request not yet taken
        self._spliced = False  # another worker carries its bytes
        self._remote: tuple[str, int] | None = None  # as a PROXY header says; None: as the socket says
        self._remote_awaited = False  # such a header is to come
        self._gate_keys = ("", "")  # what net/gates.py counts it by
        self._opened = False  # a first request came: idle time counts as kept alive
        self._lines_since = 0.0  # when the connection began to allow a head, or its first byte came
        self._outstanding = 0  # bytes that the peer had not taken when it was last looked at
        self._progress_at = 0.0
        self._behind = b""  # requests that came behind a running answer
        self._close_reason: CloseReason | None = None
        # request
        self._reader_of_heads: HeadReader | None = None
        self._plan: Plan | None = None
        self._decoder: BodyDecoder | None = None
        self._body: bytearray | None = None
        self._sink: BodySink | None = None
        self.request: Request | None = None
        # answer
        self._keep_alive = True
        self._chunked = True
        self._seasoned = False
        self.reader: Subscriber | None = None
        self.wrote_at = 0.0  # heartbeats and heads; events are in the stream's touched_at
        self.bytes_passed = 0

    # -- transport callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's has another base
        self.transport = transport
        self.write = transport.write
        transport.set_write_buffer_limits(high=0)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family == socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_SNDBUF_BYTES)
        runtime = self._runtime
        runtime.counters.connections_accepted += 1
        runtime.clients.add(self)
        runtime.sweep.add(self)
        self._allow_head()
        if self.passed is not None:
            self._adopt(self.passed)
            return
        self.refusal = runtime.admission.admit_connection(self._price_bytes)
        if self.refusal is not None and not runtime.admission.take_reserved():
            self._turn_away(self.refusal)
        if self.refusal is None and not self._remote_awaited:
            self._enter_gates()

    def _adopt(self, passed: Passed) -> None:
        """Another worker admitted this connection and read the beginning of its request."""
        self._runtime.admission.adopt_connection(self._price_bytes)
        self._remote = passed.remote
        self._spliced = passed.spliced
        self._opened = True
        self._enter_gates()
        if self.at is At.HEAD:
            self.data_received(passed.data)

    def _pass_on(self, slot: int, data: bytes) -> None:
        """The request is another worker's: give it the connection. Only once all earlier answers have left.

        Raises Problem 503 where the owner is too far behind to take it.
        """
        request = self.request
        assert request is not None
        if self.paused:
            self._runtime.gates.leave((request.gate_key, ""))
            self.request = None
            self._behind = data
            self._go(Step.WHOLE)
            self._go(Step.NEXT)
            return
        if self.transport.get_extra_info("ssl_object"):
            self._pass_spliced(slot, data)
        else:
            sock = self.transport.get_extra_info("socket")
            self._send_to(slot, Passed(sock, self.listener, self._price_bytes, self._remote_of(), data))
            self._go(Step.CLOSE)
            self.transport.abort()
        self._close_reason = CloseReason.MOVED
        self._runtime.gates.leave((request.gate_key, ""))
        self.request = None
        if self.at is not At.CLOSING:
            self.connection_lost(None)

    def _pass_spliced(self, slot: int, data: bytes) -> None:
        """TLS: its keys are here, so the bytes go through here. Raises Problem 503."""
        splice = open_splice(self._runtime, self._price_bytes)
        if isinstance(splice, Refusal):
            raise refused(splice)
        passed = Passed(splice.far, self.listener, splice.pair_bytes, self._remote_of(), data, spliced=True)
        try:
            self._send_to(slot, passed)
        except Problem:
            splice.give_up()
            raise
        splice.begin(self.transport)

    def _send_to(self, slot: int, passed: Passed) -> None:
        peers = self._runtime.peers
        assert peers is not None
        if not peers.pass_on(slot, passed):
            raise worker_busy(self._runtime)

    def _remote_of(self) -> tuple[str, int] | None:
        name = self.transport.get_extra_info("peername")
        return self._remote or ((name[0], name[1]) if isinstance(name, tuple) else None)

    def await_remote(self) -> None:
        """Before connection_made(): a PROXY header will say where the connection comes from, then comes arrived()."""
        self._remote_awaited = True

    def arrived(self, remote: tuple[str, int] | None) -> None:
        """The header has come; None: it is the proxy's own connection."""
        self._remote_awaited = False
        self._remote = remote
        if self.at is At.HEAD and self.refusal is None:
            self._enter_gates()

    def _enter_gates(self) -> None:
        """Count the connection by its client's address, where that is limited; over the limit it is turned away."""
        entered = self._runtime.gates.enter(self.address)
        if isinstance(entered, Refusal):
            self._turn_away(entered)
        else:
            self._gate_keys = entered

    def data_received(self, data: bytes) -> None:
        try:
            self._take(data)
        except Problem as problem:
            self.answer_problem(problem)
        except RemoteProtocolError as broken:
            self._refuse_broken(broken)
        except Exception as error:
            self.crash("client.data_received", error)

    def eof_received(self) -> bool:
        """A FIN. True keeps the connection for an answer that is complete and only has to be written."""
        if self.at is At.STREAMING and self.reader is not None and self.reader.stream.reason is not None:
            self._keep_alive = False
            return True
        if self.at in ANSWERING or self.at is At.BODY:
            self.abort(self._reason_of_fin())
        elif self.at in (At.HEAD, At.LINGER):
            self.close(CloseReason.READER_GONE if self._mid_head() else CloseReason.IDLE)
        return True  # Why: False would have the transport closed, which with a stalled peer never completes

    def _reason_of_fin(self) -> CloseReason:
        """The reader's own doing, unless the worker that carries its bytes has died."""
        return reason_of_end(self.transport.get_extra_info("socket")) if self._spliced else CloseReason.READER_GONE

    def connection_lost(self, exc: Exception | None) -> None:
        if self.at is At.LOST:
            return
        reason = self._close_reason or (CloseReason.NETWORK_LOST if self._spliced else _reason_of_loss(exc))
        self._end_answer(reason)
        self._go(Step.LOSE)
        runtime = self._runtime
        runtime.clients.discard(self)
        runtime.sweep.discard(self)
        if self.refusal is None:
            runtime.admission.release_connection(self._price_bytes)
        elif not self._turned_away:
            runtime.admission.release_reserved()
        runtime.gates.leave(self._gate_keys)
        runtime.counters.connections_closed[reason] += 1

    def pause_writing(self) -> None:
        assert not self.paused
        self.paused = True
        now = self._runtime.time()
        self._progress_at = now
        self._outstanding = -1
        self.due_at = min(self.due_at, now + self._stall_sample_s())
        self._runtime.counters.paused += 1
        if self.reader is not None:
            if self.live:  # else the answer's last bytes were what filled it
                self.reader.pause()
        elif self.at is At.PASSING and self.request is not None and self.request.waiting is not None:
            self.request.waiting.reader_paused()

    def resume_writing(self) -> None:
        assert self.paused
        self.paused = False
        self.wrote_at = self._runtime.time()
        if self.due_at == NEVER and self.at is At.STREAMING:
            self.due_at = self.wrote_at  # without a stall_timeout nothing was due while it was paused
        if self.reader is not None:
            if self.live:
                self.reader.resume()
        elif self.at is At.PASSING and self.request is not None and self.request.waiting is not None:
            self.request.waiting.reader_resumed()
        elif self.at is At.HEAD:
            self._go_on()

    # -- requests in

    def _take(self, data: bytes) -> None:
        if self.at is At.BODY:
            self._take_body(data)
        elif self.at in ANSWERING or (self.at is At.HEAD and self.paused):
            # No request is begun while its client doesn't take the answers to those before it.
            self._behind += data
        elif self.at is At.HEAD:
            behind, self._behind = self._behind, b""  # _go_on() may not have had its turn yet
            self._take_head(behind + data)
        # Here, so that it holds as well for what came in one read with the request.
        if len(self._behind) > self._runtime.settings.pipeline_bytes_max and (self.at in ANSWERING or self.paused):
            self.abort(CloseReason.PIPELINE_FULL)

    def _take_head(self, data: bytes) -> None:
        reader = self._reader_of_heads
        if reader is None:
            reader = self._reader_of_heads = HeadReader(self._runtime.limits)
            if self._opened:
                self._lines_since = self._runtime.time()
                self.due_at = self._lines_since + self._runtime.settings.head_timeout_s
        found = reader.feed(data)
        if found is None:
            return
        self._reader_of_heads = None
        head_bytes, rest = found
        head = parse_request(head_bytes, self._runtime.limits)
        runtime = self._runtime
        now = runtime.time()
        self._opened = True
        self._keep_alive = head.keep_alive
        self._chunked = not head.http10
        dialect = dialect_of(head.path, head.query, head.get)
        request = Request(head, now=now, route=runtime.settings.route(head.path), dialect=dialect)
        self.request = request
        self._go(Step.BEGIN)
        self._decoder = decoder_for(head.framing, head.content_length)
        if self._decoder.done:
            self._behind = rest  # also where the plan refuses: the connection goes on with it
        request.extra_headers = runtime.cors.response_headers(head.get(b"origin"))
        self._find_client(request)
        try:
            self._plan = runtime.plan(self, request)
        except Elsewhere as elsewhere:
            self._pass_on(elsewhere.slot, head_bytes + rest)
            return
        finally:
            self.passed = None
            self._seasoned = True
        runtime.counters.requests += 1
        self._expect_body(request, rest)
        if self._decoder is not None:
            self._take_body(rest)

    def _find_client(self, request: Request) -> None:
        """Behind a trusted proxy the client's address is the request's. Raises Problem 429 where it has no room."""
        gates = self._runtime.gates
        if gates.behind_proxies and gates.proxies.trusts(peer := self.address):
            request.client = gates.proxies.client_address(peer, request.get(gates.proxies.header)) or ""
            entered = gates.enter_request(request.client or None)
            if isinstance(entered, Refusal):
                raise refused(entered)
            request.gate_key = entered

    def _expect_body(self, request: Request, rest: bytes) -> None:
        """Between head and body: refuse what is too large before it is read, or ask for it."""
        head, plan = request.head, self._plan
        assert head is not None and plan is not None
        if plan.take_body is not None:
            self._sink = plan.take_body(self, request)
        elif head.content_length > self._body_bytes_max():
            raise self._too_large()
        else:
            self._body = bytearray()
        self._lines_since = self._runtime.time()
        self.due_at = self._lines_since + self._runtime.settings.body_grace_s
        if head.expect_continue and not rest and head.framing is not Framing.NONE:
            self.write(CONTINUE)

    def _take_body(self, data: bytes) -> None:
        decoder = self._decoder
        assert decoder is not None
        if not decoder.done:
            for piece in decoder.feed(data) if data else ():
                self._keep(piece)
                if self.at is not At.BODY:
                    return
            rest = decoder.rest
        else:
            rest = data
        if decoder.done:
            self._behind = rest
            self._dispatch()

    def _keep(self, piece: bytes) -> None:
        if self._sink is not None:
            self._sink.body_piece(piece)
            return
        body, runtime = self._body, self._runtime
        assert body is not None
        runtime.hold_body(len(piece))
        body += piece
        if len(body) > self._body_bytes_max():
            raise self._too_large()

    def _dispatch(self) -> None:
        """The request is whole: let somebody answer it."""
        request, plan, body, sink = self.request, self._plan, self._body, self._sink
        assert request is not None and plan is not None
        self._decoder = self._plan = self._body = self._sink = None
        self.due_at = NEVER
        self._gate_keys = self._runtime.gates.opened(self._gate_keys)
        self._go(Step.WHOLE)
        if sink is not None:
            sink.body_end()
            return
        assert body is not None and plan.answer is not None
        request.body = bytes(body)
        plan.answer(self, request)

    def _body_bytes_max(self) -> int:
        assert self._plan is not None
        return self._plan.body_bytes_max or self._runtime.settings.body_bytes_max

    def _too_large(self) -> Problem:
        return Problem(
            413,
            f"The request's body is larger than {self._body_bytes_max()} bytes.",
            code="body_too_large",
            reason=CloseReason.BODY_TOO_LARGE,
        )

    def let_body_go(self) -> None:
        """The body isn't needed any more: nothing will be tried again."""
        if self.request is not None and self.request.body:
            self._runtime.let_body_go(len(self.request.body))
            self.request.body = b""

    # -- answers out

    def answer(self, status: int, body: bytes = b"", headers: list[tuple[bytes, bytes]] | None = None) -> None:
        """A whole answer. Then the next request, or the end of the connection."""
        request = self.request
        assert request is not None
        unread = self.at is At.BODY and not (self._keep_alive and self._decoder is not None and self._decoder.done)
        if unread:
            self._keep_alive = False
        elif self.at is At.BODY:
            self._go(Step.WHOLE)  # refused from its head, and there is no body
        request.status = status
        request.answered_at = self._runtime.time()
        fields = headers or []
        if status not in (204, 304):
            fields = [*fields, (b"content-length", b"%d" % len(body))]
        head = encode_response_head(status, self._with_ours(fields))
        self.write(head if request.method == "HEAD" or status in (204, 304) else head + body)
        self.bytes_passed = len(body)
        if unread:
            self._linger()
        else:
            self._next(request.reason or CloseReason.COMPLETE)

    def _turn_away(self, refusal: Refusal) -> None:
        """Not even the reserve has a place: answer without reading the request."""
        self._turned_away = True
        runtime = self._runtime
        runtime.counters.refused[refusal.reason] += 1
        bump(runtime.counters.responses, refusal.status)
        body = error_body(message=refusal.message, type=TYPES[refusal.status], code=refusal.code)
        fields = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"retry-after", b"%d" % refusal.retry_after_s),
            (b"connection", b"close"),
        ]
        self.write(encode_response_head(refusal.status, fields) + body)
        self._close_reason = refusal.reason
        self._go(Step.REFUSE)
        self._arm_abort()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def answer_problem(self, problem: Problem) -> None:
        """An error of streamd's own, in the shape that the route's clients know."""
        request = self.request
        if self.at not in (At.BODY, At.WAITING) or request is None:
            self.abort(problem.reason)
            return
        request.reason = problem.reason
        self._runtime.counters.refused[problem.reason] += 1
        if problem.close:
            self._keep_alive = False
        if problem.status in (429, 503) and _is_event_source(request):
            self._refuse_event_source(request, problem)
            return
        body = error_body(
            message=problem.message,
            type=problem.type,
            code=problem.code,
            param=problem.param,
            status=problem.status,
            dialect=request.dialect,
        )
        if problem.last_seq is not None:
            body = body[:-1] + b',"last_seq":%d}' % problem.last_seq
        self.answer(problem.status, body, [(b"content-type", b"application/json"), *problem.response_headers()])

    def _refuse_event_source(self, request: Request, problem: Problem) -> None:
        """An EventSource gives up for good at any status but 200: let it come back, and say why in a comment."""
        self._keep_alive = False
        request.status = 200
        fields = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache, no-transform")]
        if self._chunked:
            fields.append((b"transfer-encoding", b"chunked"))
        retry_ms = max(self._runtime.retry_ms(), round((problem.retry_after_s or 0) * 1000))
        lines = b"retry: %d\n: %b %d %b\n" % (
            retry_ms,
            problem.code.encode(),
            problem.status,
            problem.message.replace("\n", " ").encode(),
        )
        head = encode_response_head(200, self._with_ours(fields))
        self.write(head + (encode_chunk(lines) if self._chunked else lines))
        self.close(problem.reason)

    def begin_stream(self, stream: Stream, *, seq: int, policy: Policy, reset: bool = False, rest: bytes = b"") -> None:
        """The answer is a stream, from `seq` on. Writes the head and `retry:`, then subscribes.

        rest (raw only): what a reader that counts bytes hasn't got of the event in front of `seq`.
        """
        request, runtime = self.request, self._runtime
        assert request is not None and self.at is At.WAITING
        request.status = 200
        request.waiting = None
        fields = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache, no-transform"),
            (b"x-accel-buffering", b"no"),
            (b"x-stream-id", stream.id.encode()),
        ]
        if stream.upstream:
            fields.append((b"x-upstream", stream.upstream.encode()))
        if self._chunked:
            fields.append((b"transfer-encoding", b"chunked"))
        else:
            self._keep_alive = False
        head = encode_response_head(200, self._with_ours(fields))
        if request.method == "HEAD":
            self.write(head)
            self._next(CloseReason.COMPLETE)
            return
        self.let_body_go()
        request.head = None
        self._go(Step.STREAM)
        # A line, not a block (docs/PROTOCOL.md, section 3): it stands in front of the first event's lines.
        opening = rest if request.raw else b"" if request.data_only else b"retry: %d\n" % runtime.retry_ms()
        self.write(head + (encode_chunk(opening) if self._chunked and opening else opening))
        form = _form(chunked=self._chunked, raw=request.raw, data_only=request.data_only)
        ring = Ring(runtime.settings.ring_slots, runtime.settings.ring_bytes_max)
        reader = Subscriber(stream, self, policy=policy, ring=ring, form=form)
        self.reader = reader
        runtime.counters.subscriptions += 1
        self.wrote_at = runtime.time()
        heartbeat_at = self.wrote_at + (request.route.heartbeat_s or NEVER)
        self.due_at = min(self.due_at, heartbeat_at, request.expires_at or NEVER)  # a pause may have set it already
        runtime.hub.rejoin(stream, reader)
        if reset:
            reader.announce_reset()
        reader.start(seq, writable=not self.paused)

    def pass_head(self, head: ResponseHead, headers: list[tuple[bytes, bytes]]) -> None:
        """The answer is the upstream's: its status and headers, with our framing. pass_body() and pass_end() follow."""
        request = self.request
        assert request is not None and self.at is At.WAITING
        request.status = head.status
        request.answered_at = self._runtime.time()
        self.let_body_go()
        fields = [field for field in end_to_end(head.headers) if field[0] not in _OURS]
        fields += headers
        bodiless = request.method == "HEAD" or head.framing is Framing.NONE
        if bodiless:
            self._chunked = False
            length = head.get(b"content-length")
            if length is not None and head.status != 204:
                fields.append((b"content-length", length))
        elif head.framing is Framing.LENGTH:
            self._chunked = False
            fields.append((b"content-length", b"%d" % head.content_length))
        elif self._chunked:
            fields.append((b"transfer-encoding", b"chunked"))
        else:
            self._keep_alive = False
            # A FIN is this body's proper end; only a reset says that it was cut, and a close before pass_end() is one.
            self._linger_s(0)
        self._go(Step.PASS)
        self.write(encode_response_head(head.status, self._with_ours(fields), reason=head.reason))

    def _linger_s(self, seconds: int | None) -> None:
        """SO_LINGER; None: off."""
        sock = self.transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            on = seconds is not None
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", on, seconds or 0))

    def pass_body(self, piece: bytes) -> None:
        assert self.at is At.PASSING
        self.bytes_passed += len(piece)
        self.write(encode_chunk(piece) if self._chunked else piece)

    def pass_end(self) -> None:
        """The upstream's answer is complete."""
        assert self.at is At.PASSING
        if self._chunked:
            self.write(LAST_CHUNK)
        elif not self._keep_alive:
            self._linger_s(None)
        self._next(CloseReason.COMPLETE)

    # -- Sink

    def soon(self, turn: Callable[[], None]) -> None:
        self._runtime.loop.call_soon(turn)

    def stream_ended(self, clean: bool) -> None:
        reader = self.reader
        assert reader is not None and reader.stream.reason is not None
        if clean and self._chunked:
            self.write(LAST_CHUNK)
        if clean:
            self._next(CloseReason.COMPLETE)
        else:
            self.close(reader.stream.reason, after_s=BROKEN_END_S)

    def slow_consumer(self) -> None:
        """Called inside Stream.append(), where no reader may leave: that is done in connection_lost()."""
        self._close_reason = CloseReason.SLOW_CONSUMER
        self.due_at = NEVER
        self.transport.abort()

    # -- ends

    def close(self, reason: CloseReason, *, after_s: float = 0.0) -> None:
        """Write what is written and close, a while later if so asked; abort if the peer doesn't take it."""
        if self.at in (At.CLOSING, At.LOST):
            return
        self._close_reason = self._close_reason or reason
        self._end_answer(reason)
        self._go(Step.CLOSE)
        self._arm_abort()
        if after_s:
            self._runtime.loop.call_later(after_s, self.transport.close)
        else:
            self.transport.close()

    def abort(self, reason: CloseReason) -> None:
        """Close now; what wasn't sent is thrown away."""
        if self.at is At.LOST:
            return
        self._close_reason = self._close_reason or reason
        self._end_answer(reason)
        if self.at is not At.CLOSING:
            self._go(Step.CLOSE)
        self.due_at = NEVER
        self.transport.abort()

    def crash(self, where: str, error: Exception) -> None:
        """A bug: loud, counted, and only this connection's."""
        self._runtime.counters.bugs += 1
        self._runtime.on_bug(where, error)
        if self.at is At.WAITING or self.at is At.BODY:
            text = "streamd made a mistake; its log says more, under this answer's X-Request-Id."
            self.answer_problem(Problem(500, text, code="internal", reason=CloseReason.INTERNAL, close=True))
        else:
            self.abort(CloseReason.INTERNAL)

    def _linger(self) -> None:
        """The request wasn't read to its end: FIN, then throw away what comes, for a while."""
        assert self.request is not None
        reason = self.request.reason or CloseReason.COMPLETE
        self._close_reason = self._close_reason or reason
        self._end_answer(reason)
        self._go(Step.REFUSE)
        self._arm_abort()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _refuse_broken(self, broken: RemoteProtocolError) -> None:
        """A request that isn't HTTP as the RFCs have it. Nobody knows where the next one begins: close."""
        if self.request is None:
            self._go(Step.BEGIN)
            self.request = _unparsed(self._runtime)
        problem = Problem(broken.status, f"Malformed request: {broken}.", code=broken.code, close=True)
        self.answer_problem(problem)

    def _next(self, reason: CloseReason) -> None:
        """The answer is complete."""
        if not self._keep_alive or self._runtime.draining:
            self.close(reason)
            return
        self._end_answer(reason)
        self._go(Step.NEXT)
        self._allow_head()
        if self._behind:
            self._runtime.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """The next request came behind the one that was just answered."""
        if self.at is At.HEAD and self._behind and not self.paused:
            data, self._behind = self._behind, b""
            self.data_received(data)

    def _end_answer(self, reason: CloseReason) -> None:
        """Release all that belongs to the request, in one place, and say how it ended. Nothing between requests."""
        request, reader, sink = self.request, self.reader, self._sink
        if request is None:
            return
        if request.reason is None:
            request.reason = reason
        self._forget_body()
        if reader is not None:
            request.reason = self._reason_of_reader(reader, request.reason)
            reader.end()
            self._runtime.hub.leave(reader, request.reason, self._runtime.time())
        waiting, request.waiting = request.waiting, None
        if waiting is not None and reason is not CloseReason.COMPLETE:
            waiting.reader_gone(reason)
        if sink is not None:
            sink.body_lost(reason)
        self._runtime.gates.leave((request.gate_key, ""))
        self._runtime.on_request_end(self, request)
        self.reader = None
        self.request = None
        self.bytes_passed = 0

    def _reason_of_reader(self, reader: Subscriber, reason: CloseReason) -> CloseReason:
        """A reader that closes after the terminal event has completed (the OpenAI SDK always does)."""
        if reason.by is By.READER and reader.stream.progress.terminal and reader.at_end and not self.paused:
            return CloseReason.COMPLETE
        return reason

    def _forget_body(self) -> None:
        self.let_body_go()
        if self._body is not None:
            self._runtime.let_body_go(len(self._body))
        self._body = self._decoder = self._plan = self._sink = None

    def _arm_abort(self) -> None:
        self._progress_at = self._lines_since = self._runtime.time()
        self._outstanding = -1
        self.due_at = self._progress_at + self._runtime.settings.close_timeout_s

    def _allow_head(self) -> None:
        settings = self._runtime.settings
        self._lines_since = self._runtime.time()
        self.due_at = self._lines_since + (settings.keepalive_timeout_s if self._opened else settings.head_timeout_s)

    def _mid_head(self) -> bool:
        return self._reader_of_heads is not None and self._reader_of_heads.bytes_held > 0

    def _go(self, step: Step) -> None:
        at = TRANSITIONS[self.at].get(step)
        assert at is not None, f"{step} at {self.at}"
        self.at = at

    # -- deadlines

    def on_due(self, now: float) -> float:
        """Whatever time brings: heartbeats, stalls, slow heads and bodies, idle connections, aborts."""
        if self._expired(now):
            return self.due_at
        if self.at is At.STREAMING or self.at is At.PASSING:
            return self._due_stall(now) if self.paused else self._due_heartbeat(now)
        if self.at is At.HEAD:
            return self._due_head(now)
        if self.at is At.BODY:
            return self._due_body(now)
        if self.at in (At.LINGER, At.CLOSING):
            return self._due_abort(now)
        return NEVER

    def _due_heartbeat(self, now: float) -> float:
        reader, request = self.reader, self.request
        if reader is None or request is None:
            return NEVER
        if not request.route.heartbeat_s:
            return self._expires_at()
        last = max(self.wrote_at, reader.stream.touched_at)
        if now - last >= request.route.heartbeat_s:
            reader.heartbeat()
            self.wrote_at = last = now
            if self.paused:
                return self._due_stall(now)
        return min(last + request.route.heartbeat_s, self._expires_at())

    def _expires_at(self) -> float:
        """When this reader's right to read ends."""
        return self.request.expires_at or NEVER if self.request is not None else NEVER

    def _expired(self, now: float) -> bool:
        """The token that let this reader in has expired: it is told where it stands, and the stream goes on."""
        reader = self.reader
        if reader is None or now < self._expires_at():
            return False
        text = "The access token expired; get a new one and resume."
        reader.farewell(message=text, retry_ms=self._runtime.retry_ms())
        self.close(CloseReason.TOKEN_EXPIRED)
        return True

    def _due_stall(self, now: float) -> float:
        """Paused: it is stalled if its kernel took nothing of what is outstanding for stall_timeout."""
        limit_s = self._runtime.settings.stall_timeout_s
        if not limit_s:
            return self._expires_at()
        outstanding = self.outstanding()
        if outstanding != self._outstanding:
            if self._outstanding >= 0:
                self._progress_at = now
            self._outstanding = outstanding
        if now - self._progress_at >= limit_s:
            self.abort(CloseReason.STALLED)
            return NEVER
        return min(now + self._stall_sample_s(), self._progress_at + limit_s, self._expires_at())

    def _stall_sample_s(self) -> float:
        limit_s = self._runtime.settings.stall_timeout_s
        return limit_s / STALL_SAMPLES if limit_s else NEVER

    def outstanding(self) -> int:
        """Bytes that were written and that the peer's kernel has not taken (acknowledged) yet."""
        return outstanding(self.transport)

    def _due_head(self, now: float) -> float:
        if self._opened and not self._mid_head():
            self.close(CloseReason.IDLE)
            return self.due_at
        self.request = _unparsed(self._runtime)
        self._go(Step.BEGIN)
        seconds = self._runtime.settings.head_timeout_s
        text = f"No complete request head came within {seconds:g} s."
        self.answer_problem(Problem(408, text, code="head_timeout", reason=CloseReason.HEAD_TIMEOUT, close=True))
        return self.due_at

    def _due_body(self, now: float) -> float:
        """After body_grace a body has to come at body_bytes_per_s_min, counted from there; what is published at any."""
        settings = self._runtime.settings
        if self._body is None:
            return NEVER
        allowed_s = settings.body_grace_s + len(self._body) / settings.body_bytes_per_s_min
        if now - self._lines_since < allowed_s:
            return self._lines_since + allowed_s
        text = f"The request's body came at less than {settings.body_bytes_per_s_min} bytes/s."
        self.answer_problem(Problem(408, text, code="body_timeout", reason=CloseReason.BODY_TIMEOUT, close=True))
        return self.due_at

    def _due_abort(self, now: float) -> float:
        """Closing: as long as the peer takes bytes it may have the rest, within stall_timeout."""
        settings = self._runtime.settings
        outstanding = self.outstanding()
        moving = self._outstanding < 0 or outstanding < self._outstanding
        if outstanding and moving and now - self._lines_since < settings.stall_timeout_s and self.at is At.CLOSING:
            self._outstanding = outstanding
            return now + settings.close_timeout_s
        self.abort(CloseReason.STALLED)
        return NEVER

    # -- what every answer carries

    def _with_ours(self, fields: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        request = self.request
        assert request is not None
        if not any(name == b"date" for name, _ in fields):
            fields = [(b"date", self._runtime.date()), *fields]
        fields = [*fields, (b"x-request-id", request.id.encode()), *request.extra_headers]
        if self._runtime.draining:
            self._keep_alive = False
        if not self._keep_alive:
            fields.append((b"connection", b"close"))
        bump(self._runtime.counters.responses, request.status)
        return fields

    @property
    def seasoned(self) -> bool:
        """It has had a request answered here."""
        return self._seasoned

    @property
    def peer(self) -> str:
        """The address of the other side, for the log: the client's as far as trusted proxies tell it."""
        if self.request is not None and self.request.client:
            return self.request.client
        name = self._remote or self.transport.get_extra_info("peername")
        return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "unix"

    @property
    def address(self) -> str | None:
        """Where the connection comes from, a PROXY header believed; None: a Unix socket."""
        name = self._remote or self.transport.get_extra_info("peername")
        return name[0] or None if isinstance(name, tuple) else None

    def is_from_outside(self, request: Request) -> bool:
        """Whether somebody else than this machine asks: a public listener, or a trusted proxy says so."""
        if self.listener != "loopback":
            return self.listener == "public"
        return self._runtime.gates.proxies.gated(request.client or self.address) is not None

    @property
    def live(self) -> bool:
        return self.reader is not None and self.reader.state is not Sub.ENDED


# Not passed on from an upstream: what streamd writes itself, and what it says of pages, which are not its own.
_OURS = frozenset({b"content-length", b"x-request-id", b"x-stream-id", b"x-upstream"}) | REPLACED


def _form(*, chunked: bool, raw: bool, data_only: bool) -> Form:
    if raw:
        return Form.RAW_CHUNKED if chunked else Form.RAW_BARE
    if data_only:
        return Form.DATA_CHUNKED if chunked else Form.DATA_BARE
    return Form.CHUNKED if chunked else Form.BARE


def _reason_of_loss(exc: Exception | None) -> CloseReason:
    """Who closed: a FIN or RST is the reader's own, a time-out or an unreachable host the network's."""
    if exc is None or isinstance(exc, ConnectionResetError | BrokenPipeError | ConnectionAbortedError):
        return CloseReason.READER_GONE
    return CloseReason.NETWORK_LOST


def _is_event_source(request: Request) -> bool:
    accept = request.get(b"accept") or b""
    return request.method == "GET" and request.path.startswith("/v1/stream") and b"text/event-stream" in accept


def _unparsed(runtime: Runtime) -> Request:
    """Stands for a request whose head never was one."""
    return Request.unparsed(now=runtime.time(), route=runtime.settings.route(""))
