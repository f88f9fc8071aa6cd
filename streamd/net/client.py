"""ClientConnection: a downstream connection. It reads requests, and carries their answers in turn.

At any time a connection is in a single state of the table below, and only `_go` changes it:

    FRESH       before its first request: accepted, no head is complete
    ADOPTED     another worker has handed it over, with the beginning of a request
    HEAD        idle between two requests, or collecting a head
    BODY        reading a request's body
    ANSWERING   the request is whole and its answer runs (net/answer.py has the states of the answer)
    LINGER      answered without reading the request to its end: the answer and a FIN are out, further bytes are thrown
                away (RFC 9112 9.6)
    CLOSING     the last bytes are on their way
    LOST        gone

The callers and their methods:

- The transport calls the protocol's methods: data, FIN, pause, resume, loss. The connection goes on reading while an
  answer runs, in order to see a FIN. A FIN counts as the client's departure; only the last bytes of a stream that has
  ended are still written. Bytes behind the request are kept up to `pipeline_bytes_max`; more close the connection.
- All bytes read go through `_behind`, and work() takes them from there: at most a turn's share of them, and at most a
  single request, in a turn of the loop (net/turns.py). While bytes wait for their turn nothing more is read.
- The sweep calls on_due(). All time limits of a connection are there. One timer exists besides, the BROKEN_END_S before
  the close of a failed stream.
- Of the layers above, the answer alone calls the methods of its Carrier. Routes, exchanges and publishers have the
  answer and never the connection.
- The drain and the totals see connections as `Client` of net/runtime.py.

How an answer ends: every way leads through `_end_answer`, once. (An answer whose request moves to another worker is
forgotten, not ended: nothing of it was written.)

    answered()            the answer is complete. The next request follows; or close(), if there will be none; or
                          LINGER, if the request wasn't read to its end
    close()               the answer is over, or given up between two events: the bytes written so far leave, then a FIN
    close_after_error()   the same for a stream that failed, BROKEN_END_S later, so that the client reads its last event
    abort()               the client is gone, stalls or breaks the protocol: the socket is closed at once, and the bytes
                          that are still in user space are lost
    cut()                 a reader is closed that may be in the middle of Stream.append(), where no reader may leave:
                          only the transport is aborted, and the answer ends in connection_lost()
    connection_lost()     the kernel reports a loss

Writing: the transport's high-water mark is 0, so pause_writing() comes, inside write(), as soon as the kernel took less
than all. A slow reader shows by this call alone; a stalled reader shows by the kernel's send queue (net/outlet.py).
`paused` repeats the transport's report and isn't a state of the
table: a connection may be paused in any state. Every close arms an abort: a stalled peer keeps no socket.

An idle connection exists ten thousand times, so it holds little: the data of a request is in its answer, the body being
read is in its intake, and the data that all connections of a listener share is in its entrance.
"""

from __future__ import annotations

import asyncio
import socket
from typing import cast

from streamd.choice import Choice
from streamd.core.guard import guarded
from streamd.core.refusal import Refusal
from streamd.core.stream import Subscriber
from streamd.counters import bump
from streamd.net.answer import NOT_STORED, Answer
from streamd.net.application import Application, Leaving
from streamd.net.http_error import TYPES, HttpError
from streamd.net.intake import Intake
from streamd.net.origin import Entrance, Origin, Remote
from streamd.net.outlet import UNIX_SNDBUF_BYTES, LastBytes, Stall
from streamd.net.reading import TURN, SmallReads, resume_reading
from streamd.net.request import Request
from streamd.net.runtime import Runtime, reason_of
from streamd.net.sweep import NEVER
from streamd.net.turns import CONNECTION_PIECES_MAX, REQUEST_PIECES, STEP_SIZES_BYTES, TakesTurns, pieces_of
from streamd.reasons import CloseReason
from streamd.wire import vary
from streamd.wire.dialect import dialect_of, error_body
from streamd.wire.http1 import (
    Framing,
    HeadReader,
    RemoteProtocolError,
    RequestHead,
    encode_response_head,
    parse_request,
)
from streamd.wire.query import FIELDS_MAX, has_too_many_fields
from streamd.wire.quick_head import whole_head

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

# A head is read in steps of this size: most heads are smaller, and the bytes behind a head are copied.
HEAD_STEP_BYTES = 4 * 1024

# Delay between the error event of a failed stream and the close. When a body breaks off, a browser's fetch throws away
# the bytes that its page has not read: in Chromium 156 an immediate close lost the error event in four of five tries, a
# close after 50 ms in none.
BROKEN_END_S = 0.25


class ClientState(Choice):
    """The state of a connection; the module's docstring explains each."""

    FRESH = "fresh"
    ADOPTED = "adopted"
    HEAD = "head"
    BODY = "body"
    ANSWERING = "answering"
    LINGER = "linger"
    CLOSING = "closing"
    LOST = "lost"


class ClientEvent(Choice):
    """A step of a connection."""

    BEGIN = "begin"  # a head is complete
    WHOLE = "whole"  # the body is complete, too
    POSTPONE = "postpone"  # the request is read again later
    NEXT = "next"  # the answer is complete, another request may come
    REFUSE = "refuse"  # answered before the request was read to its end
    CLOSE = "close"
    LOSE = "lose"


_EXPECTING_HEAD = {
    ClientEvent.BEGIN: ClientState.BODY,
    ClientEvent.REFUSE: ClientState.LINGER,
    ClientEvent.CLOSE: ClientState.CLOSING,
    ClientEvent.LOSE: ClientState.LOST,
}

TRANSITIONS: dict[ClientState, dict[ClientEvent, ClientState]] = {
    ClientState.FRESH: _EXPECTING_HEAD,
    ClientState.ADOPTED: _EXPECTING_HEAD,
    ClientState.HEAD: _EXPECTING_HEAD,
    ClientState.BODY: {
        ClientEvent.WHOLE: ClientState.ANSWERING,
        ClientEvent.POSTPONE: ClientState.HEAD,
        ClientEvent.REFUSE: ClientState.LINGER,
        ClientEvent.CLOSE: ClientState.CLOSING,
        ClientEvent.LOSE: ClientState.LOST,
    },
    ClientState.ANSWERING: {
        ClientEvent.NEXT: ClientState.HEAD,
        ClientEvent.CLOSE: ClientState.CLOSING,
        ClientEvent.LOSE: ClientState.LOST,
    },
    ClientState.LINGER: {ClientEvent.CLOSE: ClientState.CLOSING, ClientEvent.LOSE: ClientState.LOST},
    ClientState.CLOSING: {ClientEvent.LOSE: ClientState.LOST},
    ClientState.LOST: {},
}

EXPECTING = (ClientState.HEAD, ClientState.FRESH, ClientState.ADOPTED)


class ClientConnection(TakesTurns, SmallReads):
    """A downstream connection; the Carrier of its answers."""

    _runtime: Runtime

    __slots__ = (
        "__weakref__",
        "_application",
        "_behind",
        "_close_reason",
        "_heads",
        "_intake",
        "_last_bytes",
        "_runtime",
        "answer",
        "at",
        "due_at",
        "origin",
        "paused",
        "pauses",
        "stall",
        "transport",
    )

    def __init__(
        self, application: Application, entrance: Entrance, *, adopted: bytes = b"", remote: Remote | None = None
    ) -> None:
        """`adopted`: the bytes that another worker read before it handed the connection over."""
        # process
        self._runtime = entrance.runtime
        self._application = application
        # connection
        self.origin = Origin(entrance, remote)
        self.at = ClientState.ADOPTED if adopted else ClientState.FRESH
        self.transport: asyncio.Transport
        self.due_at = NEVER
        self.paused = False
        self.stall: Stall | None = None  # watches the kernel's queue since the last pause
        self._last_bytes: LastBytes | None = None  # from the close on
        self.pauses = 0  # reasons for which the socket isn't read (net/reading.py)
        self._behind = adopted  # bytes that were read and not processed yet
        self._close_reason: CloseReason | None = None
        # request
        self._heads: HeadReader | None = None
        self._intake: Intake | None = None
        self.answer: Answer | None = None

    # -- transport callbacks

    @guarded
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's has another base
        self.transport = transport
        transport.set_write_buffer_limits(high=0)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family == socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_SNDBUF_BYTES)
        runtime = self._runtime
        runtime.counters.connections_accepted += 1
        runtime.clients.add(self)
        runtime.sweep.add(self)
        self._allow_head()
        refusal = self.origin.enter(transport, adopted=self.at is ClientState.ADOPTED)
        if refusal is not None:
            self._turn_away(refusal)
        if self._behind:
            self.work_or_wait()

    @guarded
    def arrived(self, remote: Remote | None) -> None:
        """The PROXY layer calls this. None: the proxy itself is the client (its health check)."""
        if self.at is ClientState.FRESH:
            refusal = self.origin.arrived(remote)
            if refusal is not None:
                self._turn_away(refusal)

    @guarded
    def data_received(self, data: bytes) -> None:
        behind = self._behind
        self._behind = behind + data if behind else data
        if not self.pauses & TURN:  # else these bytes wait behind others
            self.work_or_wait()

    @guarded
    def eof_received(self) -> bool:
        """A FIN. If the answer is complete and only has to be written, the connection stays for it."""
        answer = self.answer
        if answer is not None and answer.is_ending:
            answer.request.keep_alive = False
        elif self.at is ClientState.ANSWERING or self.at is ClientState.BODY:
            self.abort(self.origin.reason_of_fin())
        else:
            self.close(CloseReason.READER_GONE if self._mid_head() else CloseReason.IDLE)
        return True  # Why: False would have the transport closed, which with a stalled peer never completes

    def connection_lost(self, exc: Exception | None) -> None:
        if self.at is ClientState.LOST:
            return
        reason = self._close_reason
        if reason is None:
            reason = CloseReason.NETWORK_LOST
            with self._runtime.guard:
                reason = self.origin.reason_of_loss(exc)
        self._gone(reason)

    def _gone(self, reason: CloseReason) -> None:
        """The transport is lost or belongs to another worker: leave all registries of the process."""
        runtime = self._runtime
        with runtime.guard:
            self._end_answer(reason)
        self._go(ClientEvent.LOSE)
        self._behind = b""
        runtime.clients.discard(self)
        runtime.sweep.discard(self)
        self.origin.leave()
        runtime.counters.connections_closed[reason] += 1

    @guarded
    def pause_writing(self) -> None:
        assert not self.paused
        self.paused = True
        runtime = self._runtime
        runtime.counters.paused += 1
        self.stall = Stall(runtime.time())
        self.due_at = min(self.due_at, self._next_look())
        if self.answer is not None:
            self.answer.on_paused()

    @guarded
    def resume_writing(self) -> None:
        assert self.paused
        self.paused = False
        if self.answer is not None:
            self.answer.on_resumed(self._runtime.time())
        elif self._behind and not self.pauses & TURN:
            self.work_or_wait()

    # -- requests in

    @property
    def share(self) -> str:
        """The key that the request came with, else the client's address."""
        key = self.answer.request.principal.key if self.answer is not None else None
        return f"key {key.id}" if key is not None else f"address {self.origin.address or ''}"

    @guarded
    def work(self) -> bool:
        """Process a turn's share of the bytes that were read. True: more wait for the next turn."""
        left, is_next = CONNECTION_PIECES_MAX, False
        while self._behind and left > 0 and not is_next:
            spent = REQUEST_PIECES
            try:
                if self.at in EXPECTING and not self.paused:
                    spent = self._take_head()
                elif self.at is ClientState.BODY:
                    spent = self._take_body()
                else:
                    break
            except HttpError as problem:
                self._refuse(problem)
            except RemoteProtocolError as broken:  # the start of the next request can't be known: close
                text = f"Malformed request: {broken}."
                self._refuse(HttpError(broken.status, text, code=broken.code, close=True))
            except Exception as error:
                self.crash("client.work", error)
                self._behind = b""  # of a connection that ends
            left -= spent
            self._runtime.turns.spend(spent)
            # A request is over, or nothing can be done in this turn: the bytes behind it have the next turn.
            is_next = self._heads is None and (self.at in EXPECTING or (self._intake is not None and not spent))
        size_bytes = len(self._behind)
        if self.at in (ClientState.LINGER, ClientState.CLOSING, ClientState.LOST):
            if self.at is ClientState.LINGER and self._last_bytes is not None:
                self._last_bytes.came_bytes += size_bytes
            self._behind = b""
            is_more = size_bytes >= STEP_SIZES_BYTES[0]  # a flood of a closing connection has turns, too
        elif self.paused or self.at is ClientState.ANSWERING:
            # Why not begun: a client that doesn't take its answers gets no further answers.
            is_more = False
            if size_bytes > self._runtime.settings.pipeline_bytes_max:
                self.abort(CloseReason.PIPELINE_FULL)
        else:
            is_more = left <= 0 or size_bytes > 0
        if not is_more and self.at is not ClientState.LOST:  # a transport that was handed over belongs to others
            resume_reading(self, TURN)
        return is_more

    def _take_head(self) -> int:
        """Process the next step of a head, and of the body behind it. Returns the pieces spent."""
        heads, runtime, data = self._heads, self._runtime, self._behind
        if heads is None and self.at is not ClientState.FRESH:  # a FRESH connection's time began at accept
            self._allow(runtime.settings.head_timeout_s)
        size = whole_head(data, runtime.limits) if heads is None else 0
        if size:
            head_bytes, self._behind = data[:size], data[size:]
        else:
            if heads is None:
                heads = self._heads = HeadReader(runtime.limits)
            step, self._behind = data[:HEAD_STEP_BYTES], data[HEAD_STEP_BYTES:]
            found = heads.feed(step)
            if found is None:
                return pieces_of(len(step))
            self._heads = None
            head_bytes, rest = found
            self._behind = rest + self._behind
        owner = self._begin(parse_request(head_bytes, runtime.limits))
        if owner is not None:
            self._hand_over(owner, head_bytes)
        elif self._intake is not None:
            return REQUEST_PIECES + self._take_body()
        return REQUEST_PIECES

    def _begin(self, head: RequestHead) -> int | None:
        """Plan for a request and ask for its body. Returns the owner's slot if another worker owns the request."""
        runtime = self._runtime
        request = Request(
            head,
            now=runtime.time(),
            route=runtime.settings.route(head.path),
            dialect=dialect_of(head.path, head.query, head.get),
        )
        request.is_handed_over = self.at is ClientState.ADOPTED
        answer = self.answer = Answer(self, self.origin, request, http10=head.http10)
        self._go(ClientEvent.BEGIN)
        intake = self._intake = Intake(runtime, head)
        cors = runtime.cors.response_headers(head.get(b"origin"))
        request.extra_headers = [*cors, *vary.of(head.path, request.dialect)]
        if has_too_many_fields(head.query):
            text = f"The query has more than {FIELDS_MAX} fields; ask with fewer."
            raise HttpError(400, text, code="too_many_query_fields")
        self.origin.find_client(request)
        plan = self._application.plan(answer)
        if plan.owner is not None:
            return plan.owner
        runtime.counters.requests += 1
        intake.begin(plan, answer, head.content_length)
        self._allow(runtime.settings.body_grace_s)
        if head.expect_continue and not self._behind and head.framing is not Framing.NONE:
            self.transport.write(CONTINUE)
        return None

    def _take_body(self) -> int:
        """Process the next step of the body. Returns the pieces spent; 0: nothing can be done in this turn."""
        answer, intake = self.answer, self._intake
        assert answer is not None and intake is not None
        if intake.is_blocked:
            return 0
        data = self._behind
        size = intake.step_bytes(data)
        self._behind = data[size:]
        if intake.feed(data[:size]):
            self._behind = intake.rest + self._behind
            self.due_at = self._next_look()
            self.origin.opened()
            self._intake = None
            self._go(ClientEvent.WHOLE)
            intake.dispatch(answer)
        return intake.spent()

    # -- another worker's requests

    def _hand_over(self, owner: int, head_bytes: bytes) -> None:
        """Give the connection to the owner of its request, once all earlier answers have left. Raises HttpError 503."""
        data = head_bytes + self._behind
        if self.paused:
            self._forget_request()
            self._behind = data
            self._go(ClientEvent.POSTPONE)
            return
        entrance = self.origin.entrance
        leaving = Leaving(self.transport, entrance.listener, entrance.price_bytes, self.origin.remote, data)
        self._application.hand_over(owner, leaving)
        self._forget_request()
        self._gone(CloseReason.MOVED)

    def _forget_request(self) -> None:
        """Drop the request here: the other worker answers, counts and logs it."""
        answer = self.answer
        assert answer is not None
        self.origin.leave_request(answer.request)
        self.answer = self._intake = None

    # -- refusals

    def _turn_away(self, refusal: Refusal) -> None:
        """Not even the reserve has room: answer without reading the request."""
        runtime = self._runtime
        runtime.counters.refused[refusal.reason] += 1
        if not self.origin.has_place:  # its descriptor isn't counted anywhere
            self.abort(refusal.reason)
            return
        bump(runtime.counters.responses, refusal.status)
        body = error_body(message=refusal.message, type=TYPES[refusal.status], code=refusal.code)
        fields = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
            NOT_STORED,
            *runtime.refused(refusal).response_headers(),
        ]
        self.transport.write(encode_response_head(refusal.status, fields) + body)
        self._linger(refusal.reason)

    def _refuse(self, problem: HttpError) -> None:
        """Answer with an error, even if the request's head isn't complete."""
        if self.answer is None:
            runtime = self._runtime
            request = Request.unparsed(now=runtime.time(), route=runtime.settings.route(""))
            self.answer = Answer(self, self.origin, request)
        self.answer.refuse(problem)

    def crash(self, where: str, error: Exception) -> None:
        """A callback raised: count the error, answer it if nothing of an answer is written, and end this connection
        alone. What it holds is given back at the latest in connection_lost(). Never raises.
        """
        runtime = self._runtime
        if self.answer is not None:
            self.answer.crash(where, error)
            return
        runtime.bug(where, error)
        with runtime.guard:
            if self.at in EXPECTING and not self.paused:
                self._refuse(runtime.problem_of(error))
                return
        self.cut(reason_of(error))

    def refused(self, where: str, error: Exception) -> None:
        """The transport refused a write, which may be within Stream.append(): count the error, and end in a later turn.
        Never raises.
        """
        self._runtime.bug(where, error)
        self.cut(reason_of(error))

    # -- called by the answer

    def begin_answer(self) -> None:
        """A whole answer is about to be written. A request that isn't read to its end is the connection's last."""
        if self.at is ClientState.ANSWERING:
            return
        answer, intake = self.answer, self._intake
        assert answer is not None
        if intake is not None and intake.is_whole and answer.request.keep_alive:
            self._go(ClientEvent.WHOLE)  # refused from its head alone, and it has no body
        else:
            answer.request.keep_alive = False

    def answered(self, reason: CloseReason) -> None:
        """The answer is complete: on to the next request, or close."""
        answer = self.answer
        assert answer is not None
        if self.at is not ClientState.ANSWERING:
            self._linger(reason, unread_bytes_max=self._runtime.settings.body_bytes_max)
        elif not answer.request.keep_alive or self._runtime.draining:
            self.close(reason)
        else:
            self._end_answer(reason)
            self._go(ClientEvent.NEXT)
            self._allow_head()
            if self._behind and not self.paused:
                self.wait_for_turn()

    # -- ends

    def close(self, reason: CloseReason) -> None:
        """Close after the bytes written so far; abort if the peer doesn't take them."""
        if self._begin_closing(reason):
            self.transport.close()

    def close_after_error(self, reason: CloseReason) -> None:
        """close() after BROKEN_END_S, so that the client reads the last event before it sees the break."""
        if self._begin_closing(reason):
            self._runtime.loop.call_later(BROKEN_END_S, self.transport.close)

    def _begin_closing(self, reason: CloseReason) -> bool:
        if self.at is ClientState.CLOSING or self.at is ClientState.LOST:
            return False
        self._close_reason = self._close_reason or reason
        with self._runtime.guard:
            self._end_answer(reason)
        self._go(ClientEvent.CLOSE)
        self._arm_abort()
        return True

    def cut(self, reason: CloseReason) -> None:
        """Abort the transport alone: the caller may be inside Stream.append(), where no reader may leave."""
        self._close_reason = reason
        self.due_at = NEVER
        self.transport.abort()

    def abort(self, reason: CloseReason) -> None:
        """Close the socket at once. Bytes in user space are lost; the kernel still sends its own."""
        if self.at is ClientState.LOST:
            return
        self._begin_closing(reason)
        self.due_at = NEVER
        self.transport.abort()

    def _linger(self, reason: CloseReason, *, unread_bytes_max: int = 0) -> None:
        """The request wasn't read to its end: send a FIN, then discard further bytes until close_timeout, and a body
        of up to `unread_bytes_max` as long as it comes."""
        self._close_reason = self._close_reason or reason
        self._end_answer(reason)
        self._go(ClientEvent.REFUSE)
        self._arm_abort(unread_bytes_max)
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _end_answer(self, reason: CloseReason) -> None:
        """End the answer and the intake, and report the request's end. Between requests it does nothing."""
        answer, intake = self.answer, self._intake
        if answer is None:
            return
        self._intake = None
        guard = self._runtime.guard
        try:
            answer.end(reason)
        except Exception as error:
            guard.caught("client.end_answer", error)
        if intake is not None:
            with guard:
                intake.break_off(reason)
        self.origin.leave_request(answer.request)
        try:
            self._application.ended(answer)
        except Exception as error:
            guard.caught("client.ended", error)
        answer.reader = None  # the reader refers to the answer as its sink: break the cycle
        self.answer = None

    def _go(self, event: ClientEvent) -> None:
        at = TRANSITIONS[self.at].get(event)
        assert at is not None, f"{event} at {self.at}"
        self.at = at

    # -- deadlines

    def _allow(self, seconds: float) -> None:
        self.due_at = self._runtime.time() + seconds

    def _allow_head(self) -> None:
        settings = self._runtime.settings
        is_first = self.at is ClientState.FRESH
        self._allow(settings.head_timeout_s if is_first else settings.keepalive_timeout_s)

    def _arm_abort(self, unread_bytes_max: int = 0) -> None:
        runtime = self._runtime
        now = runtime.time()
        self._last_bytes = LastBytes(now, unread_bytes_max)
        self.due_at = now + runtime.settings.close_timeout_s

    def _mid_head(self) -> bool:
        return self._heads is not None and self._heads.bytes_held > 0

    def on_due(self, now: float) -> float:
        """Handle due deadlines: heartbeats, stalls, slow heads and bodies, idling, aborts. Returns the next."""
        if self.at is ClientState.ANSWERING:
            return self._due_answer(now)
        if self.at in EXPECTING:
            return self._due_head(now)
        if self.at is ClientState.BODY:
            return self._due_body(now)
        if self.at is ClientState.LINGER or self.at is ClientState.CLOSING:
            return self._due_abort(now)
        return NEVER

    def _due_answer(self, now: float) -> float:
        answer = self.answer
        assert answer is not None
        if answer.expire(now):
            return self.due_at
        due_at = answer.on_due(now) if not self.paused else answer.expires_at
        if not self.paused:
            return due_at
        assert self.stall is not None  # a heartbeat may have paused it just now
        if self.stall.is_over(self.transport, now, self._runtime.settings):
            self.abort(CloseReason.STALLED)
            return NEVER
        return min(self._next_look(), answer.expires_at)

    def _next_look(self) -> float:
        """When to check again whether a paused client still takes bytes."""
        return self.stall.next_look(self._runtime.settings) if self.paused and self.stall is not None else NEVER

    def _due_head(self, now: float) -> float:
        if self.at is not ClientState.FRESH and not self._mid_head():
            self.close(CloseReason.IDLE)
            return self.due_at
        seconds = self._runtime.settings.head_timeout_s
        text = f"No complete request head came within {seconds:g} s."
        self._refuse(HttpError(408, text, code="head_timeout", reason=CloseReason.HEAD_TIMEOUT, close=True))
        return self.due_at

    def _due_body(self, now: float) -> float:
        """In each window after body_grace a body must bring its least rate. Bodies that are published as they come
        are exempt."""
        settings, intake = self._runtime.settings, self._intake
        window_s = intake.next_window(settings) if intake is not None else NEVER
        if window_s is not None:
            return now + window_s
        text = f"The request's body came at less than {settings.body_bytes_per_s_min} bytes/s."
        self._refuse(HttpError(408, text, code="body_timeout", reason=CloseReason.BODY_TIMEOUT, close=True))
        return self.due_at

    def _due_abort(self, now: float) -> float:
        """Closing: the peer may have the rest as long as it takes bytes, for stall_timeout at most."""
        settings, last_bytes = self._runtime.settings, self._last_bytes
        assert last_bytes is not None
        if self.at is ClientState.LINGER:
            may_go_on = last_bytes.still_come(now, settings)
        else:
            may_go_on = last_bytes.may_go_on(self.transport, now, settings)
        if may_go_on:
            return now + settings.close_timeout_s
        self.abort(CloseReason.STALLED)  # counted under the reason of the close, which stands
        return NEVER

    # -- called for the process: drain, totals, log

    @property
    def is_awaited(self) -> bool:
        """Whether the connection expects a request's head or runs an answer. On a listener of operators it counts only
        while it is used as clients use streamd: a look at a drain must not hold it up.
        """
        if self.origin.is_operators:
            return self.answer is not None and self.answer.request.principal.admin
        return self.at is ClientState.ANSWERING or self.at in EXPECTING

    @guarded
    def close_if_idle(self, *, fresh_too: bool) -> None:
        """Close the connection between two requests; before its first only if `fresh_too`."""
        if self.at in EXPECTING and (fresh_too or self.at is not ClientState.FRESH):
            self.close(CloseReason.IDLE)

    @guarded
    def send_away(self, reason: CloseReason, message: str, *, among: int | None = None) -> bool:
        """End a reader's answer in mid-stream, with its position. False: no reader is here, or it can't be told."""
        return self.answer is not None and self.answer.send_away(reason, message, among=among)

    @guarded
    def give_up(self, problem: HttpError) -> None:
        """Close a connection that has no reader; an open answer becomes a refusal with `problem`."""
        answer = self.answer
        if answer is not None and answer.is_open:
            answer.refuse(problem)
        elif answer is not None and answer.is_whole_by_close:
            self.abort(problem.reason)
        elif self.at is ClientState.ANSWERING or self.at in EXPECTING:
            self.close(problem.reason)

    @property
    def reader(self) -> Subscriber | None:
        """The subscriber that writes here."""
        return self.answer.reader if self.answer is not None else None
