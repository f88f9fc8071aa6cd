"""Answer: a request and its response.

    OPEN        nothing of the response is written, so it may still become anything; its request may still be arriving
    WRITING     a large whole answer goes out in pieces
    STREAMING   a subscriber of a stream writes here
    PROXYING    an upstream's answer goes through
    OVER        written, or given up

A connection makes an answer when a request's head is complete or malformed, and drops it when the next request may
come. All code that works on a request gets the answer, and nothing of the connection. It calls a single one of these
methods

    send()                                     a whole answer; a large answer leaves in pieces
    refuse()                                   an error of streamd's own, in the shape that the route's clients know
    stream()                                   the answer is a stream: the client becomes its reader
    proxy_head(), proxy_body(), proxy_end()    the answer is an upstream's

at once, or later: later(pending) names the work that the answer waits for. The work hears of the client's departure and
of a refusal for another reason (a drain); once it proxies, it also hears when the client pauses and resumes. It ends
with settle(respond), which runs `respond` if the answer is still open, and turns its HttpError into a refusal. stream()
and proxy_head() need a request that is whole; send() and refuse() may come before its body does.

An answer ends in a single place, end(), which its connection calls once: because the answer is complete, because the
connection closes, or because the connection is lost. A token touches nothing here: a subscriber writes to
the transport itself.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Protocol

from streamd.choice import Choice
from streamd.core.body_charge import BodyCharge
from streamd.core.guard import guarded
from streamd.core.ring import Ring
from streamd.core.stream import Form, Stream, Subscriber, SubscriberState
from streamd.counters import bump
from streamd.net.http_error import HttpError
from streamd.net.origin import Origin
from streamd.net.outlet import HeldWrites, LargeWrite
from streamd.net.request import Request
from streamd.net.runtime import reason_of
from streamd.net.sweep import NEVER
from streamd.policy import Policy
from streamd.reasons import By, CloseReason
from streamd.wire.answer_fields import EVENT_STREAM, Fields
from streamd.wire.chunked import LAST_CHUNK, encode_chunk
from streamd.wire.dialect import error_body
from streamd.wire.http1 import Framing, ResponseHead, encode_response_head

STREAM_TYPE = (b"content-type", EVENT_STREAM)
STREAM_CACHING = (b"cache-control", b"no-store, no-transform")

NOT_STORED = (b"cache-control", b"no-store")

# A whole answer above this size goes out in pieces. Refusals and most answers of the API are below 16 KiB.
LARGE_ANSWER_BYTES_MIN = 64 * 1024


class AnswerState(Choice):
    """The state of an answer; the module's docstring explains each."""

    OPEN = "open"
    WRITING = "writing"
    STREAMING = "streaming"
    PROXYING = "proxying"
    OVER = "over"


class AnswerEvent(Choice):
    """A step of an answer."""

    WRITE = "write"
    STREAM = "stream"
    PROXY = "proxy"
    END = "end"


TRANSITIONS: dict[AnswerState, dict[AnswerEvent, AnswerState]] = {
    AnswerState.OPEN: {
        AnswerEvent.WRITE: AnswerState.WRITING,
        AnswerEvent.STREAM: AnswerState.STREAMING,
        AnswerEvent.PROXY: AnswerState.PROXYING,
        AnswerEvent.END: AnswerState.OVER,
    },
    AnswerState.WRITING: {AnswerEvent.END: AnswerState.OVER},
    AnswerState.STREAMING: {AnswerEvent.END: AnswerState.OVER},
    AnswerState.PROXYING: {AnswerEvent.END: AnswerState.OVER},
    AnswerState.OVER: {},
}


class Pending:
    """Work that an answer waits for."""

    __slots__ = ()

    def on_gone(self, reason: CloseReason) -> None:
        """The connection is lost or was closed: the answer is over, and nothing may be written to it any more."""

    def on_paused(self) -> None:
        """The client takes no more of a proxied answer for now."""

    def on_resumed(self) -> None:
        """The client takes more."""


class Carrier(Protocol):
    """The connection that an answer goes out on."""

    transport: asyncio.Transport
    paused: bool
    due_at: float

    def begin_answer(self) -> None:
        """A whole answer is about to be written, perhaps before its request is whole: may another request follow?"""

    def answered(self, reason: CloseReason) -> None:
        """The answer is complete: on to the next request, or close."""

    def close(self, reason: CloseReason) -> None:
        """Close once the bytes written so far have left."""

    def close_after_error(self, reason: CloseReason) -> None:
        """Close in a moment, so that the client reads the last event before it sees the break."""

    def cut(self, reason: CloseReason) -> None:
        """Abort the transport alone; the answer ends in a later turn. For calls from within Stream.append()."""

    def abort(self, reason: CloseReason) -> None:
        """Close the socket at once. Bytes in user space are lost; the kernel still sends its own."""


class Answer:
    """A request and its response; also the Sink of its subscriber."""

    __slots__ = (
        "_carrier",
        "_framing",
        "_held",
        "_large",
        "_pending",
        "_runtime",
        "body_bytes",
        "origin",
        "reader",
        "request",
        "state",
        "write",
        "wrote_at",
    )

    def __init__(self, carrier: Carrier, origin: Origin, request: Request, *, http10: bool = False) -> None:
        # process
        self._runtime = origin.entrance.runtime
        # connection
        self._carrier = carrier
        self.origin = origin
        self.write: Callable[[bytes], None] = carrier.transport.write
        # request
        self.request = request
        # answer
        self.state = AnswerState.OPEN
        self._framing = Framing.UNTIL_CLOSE if http10 else Framing.CHUNKED  # framing of a body without a length
        self._pending: Pending | None = None
        self._large: LargeWrite | None = None  # on its way out, in pieces
        self.reader: Subscriber | None = None
        self.body_bytes = 0  # of an answer that isn't a stream
        self._held: HeldWrites | None = None  # those of this turn, which leave together at its end
        self.wrote_at = 0.0  # the last head, heartbeat or resume: the heartbeat's interval begins

    # -- how far it is

    @property
    def is_open(self) -> bool:
        """Whether the client is there and nothing of the response is written."""
        return self.state is AnswerState.OPEN

    @property
    def is_ending(self) -> bool:
        """Whether the stream has ended, so that only its last bytes remain to be written."""
        return self.reader is not None and self.reader.stream.reason is not None

    @property
    def is_whole_by_close(self) -> bool:
        """Whether a proper close now would make an unfinished body look whole, because nothing else ends it."""
        return self.state is AnswerState.PROXYING and self._framing is Framing.UNTIL_CLOSE

    @property
    def paused(self) -> bool:
        """Whether the client takes nothing for now."""
        return self._carrier.paused

    @property
    def unsent_bytes(self) -> int:
        """Bytes written that the kernel has not taken."""
        return self._carrier.transport.get_write_buffer_size()

    # -- answering later

    def later(self, pending: Pending) -> None:
        """The answer comes later. `pending` hears of the client's departure, and once it proxies of pauses."""
        self._pending = pending

    def settle(self, respond: Callable[[], None]) -> None:
        """The work is done: respond now, unless the client has left.
        A HttpError is a refusal, any other error a bug."""
        if not self.is_open:
            return
        self._pending = None
        try:
            respond()
        except HttpError as problem:
            self.refuse(problem)
        except Exception as error:
            self.crash("answer.settle", error)

    # -- whole answers

    def send(self, status: int, body: bytes = b"", fields: Fields | None = None) -> None:
        """Write a whole answer of streamd's own; the next request follows, or the connection's close.

        No cache may keep it: a stream's state changes, and a cached error outlives its reason (RFC 9111 4.2.2), a 404
        the opening of the stream.
        """
        request = self.request
        self._carrier.begin_answer()
        request.status = status
        request.answered_at = self._runtime.time()
        fields = [*(fields or []), NOT_STORED]
        if status not in (204, 304):
            fields = [*fields, (b"content-length", b"%d" % len(body))]
        if request.method == "HEAD" or status in (204, 304):
            self.write(self._head(fields))
        elif len(body) <= LARGE_ANSWER_BYTES_MIN:
            self.write(self._head(fields) + body)
        else:
            self._send_large(fields, body)
            return
        self.body_bytes = len(body)
        self._carrier.answered(request.reason or CloseReason.COMPLETE)

    def _send_large(self, fields: Fields, body: bytes) -> None:
        """The body is priced as a request's body until the client has taken it. Raises HttpError 503."""
        request = self.request
        self.release_body()  # the request is answered: its own body is not needed any more
        request.body_charge = BodyCharge(self._runtime.admission, self.origin.holders(request))
        self._runtime.hold_body(request.body_charge, len(body))
        self._go(AnswerEvent.WRITE)
        self.body_bytes = len(body)
        self.write_large([self._head(fields), body])

    def refuse(self, problem: HttpError) -> None:
        """Answer with an error, in the shape that the route's clients know; abort if bytes have been sent already."""
        request = self.request
        if not self.is_open:
            self._carrier.abort(problem.reason)
            return
        request.reason = problem.reason
        self._runtime.counters.refused[problem.reason] += 1
        if problem.close:
            request.keep_alive = False
        if problem.status in (429, 503) and _is_event_source(request):
            self._refuse_event_source(problem)
            return
        body = error_body(
            status=problem.status,
            message=problem.message,
            type=problem.type,
            code=problem.code,
            param=problem.param,
            dialect=request.dialect,
        )
        if problem.last_seq is not None:
            body = body[:-1] + b',"last_seq":%d}' % problem.last_seq
        self.send(problem.status, body, [(b"content-type", b"application/json"), *problem.response_headers()])

    def _refuse_event_source(self, problem: HttpError) -> None:
        """Answer 200, with `retry:` and a comment: an EventSource gives up for good at any other status."""
        request, runtime = self.request, self._runtime
        request.keep_alive = False
        request.status = 200
        retry_ms = max(runtime.retry_ms(), round((problem.retry_after_s or 0) * 1000))
        lines = b"retry: %d\n: %b %d %b\n" % (
            retry_ms,
            problem.code.encode(),
            problem.status,
            problem.message.replace("\n", " ").encode(),
        )
        head = self._head([STREAM_TYPE, NOT_STORED, *self._transfer_coding()])
        self.write(head + (encode_chunk(lines) if self._is_chunked else lines))
        self._carrier.close(problem.reason)

    def crash(self, where: str, error: Exception) -> None:
        """A callback raised: count the error, answer it if nothing is written yet, and end this connection alone.

        Never raises. A reader's end waits for a later turn, because this may be within Stream.append().
        """
        runtime = self._runtime
        runtime.bug(where, error)
        if self.is_open and not self.request.status:
            with runtime.guard:
                self.refuse(runtime.problem_of(error))
                return
        self._carrier.cut(reason_of(error))

    def release_body(self) -> None:
        """Free the request's body here; an exchange that may have to send it again has taken over its charge."""
        request = self.request
        request.body, request.json, request.form = b"", None, None
        if request.body_charge is not None:
            request.body_charge.release()
            request.body_charge = None

    # -- streams

    @guarded
    def stream(
        self,
        stream: Stream,
        *,
        seq: int,
        policy: Policy,
        reset: bool = False,
        rest: bytes = b"",
        passed: Sequence[tuple[bytes, bytes]] = (STREAM_TYPE,),
    ) -> None:
        """The answer is a stream, from `seq` on. Writes the head and `retry:`, then subscribes.

        reset: the reader's position belongs to an earlier epoch. rest (raw only): the missing end of event seq - 1.
        passed: the stream's type and the other fields of the upstream's head, if that has come for this request.
        """
        request, runtime, carrier = self.request, self._runtime, self._carrier
        request.status = 200
        fields = [*passed, STREAM_CACHING, (b"x-accel-buffering", b"no"), (b"x-stream-id", stream.id.encode())]
        if stream.upstream:
            fields.append((b"x-upstream", stream.upstream.encode()))
        fields += self._transfer_coding()
        if not self._is_chunked:
            request.keep_alive = False
        head = self._head(fields)
        if request.method == "HEAD":
            self._pending = None
            self.write(head)
            carrier.answered(CloseReason.COMPLETE)
            return
        self.release_body()
        request.head = None
        self._go(AnswerEvent.STREAM)
        # A line, not a block (docs/PROTOCOL.md, section 3): it stands in front of the first event's lines.
        self.share_packets()
        opening = rest if request.raw else b"" if request.data_only else b"retry: %d\n" % runtime.retry_ms()
        self.write(head + (encode_chunk(opening) if self._is_chunked and opening else opening))
        reader = self._subscribe(stream, policy)
        runtime.hub.rejoin(stream, reader)
        self._pending = None  # the stream's source hears of an end through the hub from now on
        if reset:
            reader.announce_reset()
        reader.start(seq, writable=not carrier.paused)
        if runtime.story.is_on:
            runtime.story.tell_of_reader(request, reader, "reader joins", after=seq - 1, policy=policy)

    def share_packets(self) -> None:
        """The writes of this turn of the loop leave together at its end, in a single write.

        A head, the first events and the end of an answer that come in the same turn are three writes of a few hundred
        bytes. As three packets they cost twice the CPU, here and at the client, which is woken three times.
        """
        if self._held is None:
            held = self._held = HeldWrites(self._let_go)
            _write_by(self, held.add)
            self._runtime.loop.call_soon(self._run, self._let_go)

    def _let_go(self) -> None:
        """The turn ends, or the answer does: write what was held. A transport that is closing takes nothing more."""
        held, self._held = self._held, None
        if held is None:
            return
        transport = self._carrier.transport
        _write_by(self, transport.write)
        together = held.joined()
        if together and not transport.is_closing():
            transport.write(together)

    def _subscribe(self, stream: Stream, policy: Policy) -> Subscriber:
        request, runtime, carrier = self.request, self._runtime, self._carrier
        form = _form(chunked=self._is_chunked, raw=request.raw, data_only=request.data_only)
        ring = Ring(runtime.settings.ring_slots, runtime.settings.ring_bytes_max)
        reader = self.reader = Subscriber(stream, self, policy=policy, ring=ring, form=form)
        runtime.counters.subscriptions += 1
        runtime.readers += 1
        self.wrote_at = runtime.time()
        heartbeat_at = self.wrote_at + (request.route.heartbeat_s or NEVER)
        carrier.due_at = min(carrier.due_at, heartbeat_at, self.expires_at)  # a pause may have set it already
        return reader

    def send_away(self, reason: CloseReason, message: str, *, among: int | None = None) -> bool:
        """End a reader's answer in mid-stream, with its position; the stream goes on. False: there is no reader."""
        if self.state is not AnswerState.STREAMING or self.reader is None:
            return False
        if self._large is not None:  # half an event is written: nothing may follow it
            self._carrier.abort(reason)
            return True
        self.reader.farewell(message=message, retry_ms=self._runtime.retry_ms(among))
        self._carrier.close(reason)
        return True

    # -- Sink

    def write_large(self, parts: list[bytes | memoryview]) -> None:
        assert self._large is None
        self._let_go()
        large = LargeWrite(parts)
        while not large.is_over:
            if self._carrier.paused:
                self._large = large
                return
            self.write(large.next_piece())
        if self.state is AnswerState.WRITING:
            self._carrier.answered(self.request.reason or CloseReason.COMPLETE)

    def _write_on(self, large: LargeWrite) -> bool:
        """The transport takes more: write the next pieces. True once all are written and the transport isn't full."""
        while not large.is_over:
            if self._carrier.paused:
                return False
            self.write(large.next_piece())
        self._large = None
        if self.state is AnswerState.WRITING:
            self._carrier.answered(self.request.reason or CloseReason.COMPLETE)
            return False
        return not self._carrier.paused

    def soon(self, turn: Callable[[], None]) -> None:
        self._runtime.loop.call_soon(self._run, turn)

    @guarded
    def _run(self, turn: Callable[[], None]) -> None:
        turn()

    def refused(self, error: Exception) -> None:
        """Called inside Stream.append(), where no reader may leave."""
        self._runtime.bug("reader", error)
        self._carrier.cut(reason_of(error))

    def stream_ended(self, clean: bool) -> None:
        reader = self.reader
        assert reader is not None and reader.stream.reason is not None
        if not clean:
            self._carrier.close_after_error(reader.stream.reason)
            return
        if self._is_chunked:
            self.write(LAST_CHUNK)
        self._let_go()
        if self.state is AnswerState.STREAMING and not self._carrier.paused:  # else the client has still to take it
            self._stream_answered(reader.stream)

    def _stream_answered(self, stream: Stream) -> None:
        """The client's system has taken the last event and the end."""
        failed = stream.reason is CloseReason.UPSTREAM_ERROR  # its event was the last
        self._carrier.answered(CloseReason.UPSTREAM_ERROR if failed else CloseReason.COMPLETE)

    def slow_consumer(self) -> None:
        """The caller may be inside Stream.append(), where no reader may leave."""
        self._carrier.cut(CloseReason.SLOW_CONSUMER)

    # -- an upstream's answer

    @guarded
    def proxy_head(self, head: ResponseHead, fields: Fields) -> None:
        """Pass on the upstream's status, with `fields`, in streamd's framing. proxy_body() and proxy_end() follow."""
        request = self.request
        request.status = head.status
        request.answered_at = self._runtime.time()
        self.release_body()
        out = list(fields)
        if request.method == "HEAD" or head.framing is Framing.NONE:
            self._framing = Framing.NONE
            length = head.get(b"content-length")
            if length is not None and head.status != 204:
                out.append((b"content-length", length))
        elif head.framing is Framing.LENGTH:
            self._framing = Framing.LENGTH
            out.append((b"content-length", b"%d" % head.content_length))
        elif self._is_chunked:
            out += self._transfer_coding()
        else:
            request.keep_alive = False
            # A FIN is this body's proper end: a close before proxy_end() has to be a reset, or it looks whole.
            self._reset_on_close(on=True)
        self._go(AnswerEvent.PROXY)
        self.write(self._head(out, reason=head.reason))

    @guarded
    def proxy_body(self, piece: bytes) -> None:
        if self.state is not AnswerState.PROXYING:
            return  # the head could not be written, and the connection ends
        self.body_bytes += len(piece)
        self.write(encode_chunk(piece) if self._is_chunked else piece)

    @guarded
    def proxy_end(self) -> None:
        """The upstream's answer is complete."""
        if self.state is not AnswerState.PROXYING:
            return
        self._pending = None
        if self._is_chunked:
            self.write(LAST_CHUNK)
        elif not self.request.keep_alive:
            self._reset_on_close(on=False)
        self._carrier.answered(CloseReason.COMPLETE)

    def _reset_on_close(self, *, on: bool) -> None:
        """Whether a close from now on is a reset and not a FIN (SO_LINGER of 0 s)."""
        sock = self._carrier.transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", on, 0))

    def abandon(self, reason: CloseReason) -> None:
        """An answer that has begun can't be completed: abort, because its end must never look clean."""
        if self.state is AnswerState.PROXYING:
            self._pending = None
            self._carrier.abort(reason)

    # -- called by the connection

    def on_paused(self) -> None:
        """The transport takes nothing more for now."""
        if self._large is not None:
            return  # the reader waits for the rest of a large event already
        if self.state is AnswerState.STREAMING:
            if self._reads:  # else the answer's own last bytes filled the transport
                self.reader.pause()  # type: ignore[union-attr]
                if self._runtime.story.is_on:
                    self._tell_of_reader("reader paused")
        elif self.state is AnswerState.PROXYING and self._pending is not None:
            self._pending.on_paused()

    def on_resumed(self, now: float) -> None:
        """The transport takes more."""
        self.wrote_at = now
        if self._large is not None and not self._write_on(self._large):
            return
        if self.state is AnswerState.STREAMING:
            if self._carrier.due_at == NEVER:
                self._carrier.due_at = now  # without a stall_timeout nothing was due while it was paused
            if self._reads:
                if self._runtime.story.is_on:
                    self._tell_of_reader("reader takes more")
                self.reader.resume()  # type: ignore[union-attr]
            elif self.reader is not None and self.reader.stream.reason is not None:
                self._stream_answered(self.reader.stream)
        elif self.state is AnswerState.PROXYING and self._pending is not None:
            self._pending.on_resumed()

    def _tell_of_reader(self, name: str) -> None:
        """A step of the reader, for the log; callers look at `story.is_on` first."""
        if self.reader is not None:
            story, state = self._runtime.story, self.reader.state
            story.tell_of_reader(self.request, self.reader, name, state=state, unsent_bytes=self.unsent_bytes)

    def on_due(self, now: float) -> float:
        """Send a heartbeat if it is due; returns the next time to look."""
        reader, heartbeat_s = self.reader, self.request.route.heartbeat_s
        if reader is None or not heartbeat_s:
            return self.expires_at
        last = max(self.wrote_at, reader.stream.touched_at)
        if now - last >= heartbeat_s:
            reader.heartbeat()
            self.wrote_at = last = now
        return min(last + heartbeat_s, self.expires_at)

    def expire(self, now: float) -> bool:
        """End a reader's answer if its token has expired, and tell it its position. The stream goes on."""
        if now < self.expires_at:
            return False
        return self.send_away(CloseReason.TOKEN_EXPIRED, "The access token expired; get a new one and resume.")

    @property
    def expires_at(self) -> float:
        """When the reader's right to read ends."""
        return (self.reader is not None and self.request.expires_at) or NEVER

    def end(self, reason: CloseReason) -> None:
        """Free the body, end the reader, tell the pending work, note the reason. The connection calls this once."""
        request, reader, pending = self.request, self.reader, self._pending
        guard = self._runtime.guard
        if self._held is not None:
            with guard:
                self._let_go()
        self._go(AnswerEvent.END)
        self._pending = self._large = None
        if request.reason is None:
            request.reason = reason
        self.release_body()
        if reader is not None:
            self._runtime.readers -= 1
            try:
                request.reason = self._reason_of_reader(reader, request.reason)
            except Exception as error:
                guard.caught("answer.reason", error)
            if self._runtime.story.is_on:
                with guard:
                    self._runtime.story.tell_of_reader(request, reader, "reader leaves", reason=request.reason)
            if reader.state is not SubscriberState.ENDED:
                with guard:
                    reader.end()
            try:
                self._runtime.hub.leave(reader, request.reason, self._runtime.time())
            except Exception as error:
                guard.caught("answer.leave", error)
        if pending is not None and reason is not CloseReason.COMPLETE:
            with guard:
                pending.on_gone(reason)

    def _reason_of_reader(self, reader: Subscriber, reason: CloseReason) -> CloseReason:
        """A reader that closes after the stream's last event (`[DONE]`) counts as complete: the OpenAI SDK does so."""
        if reason.by is By.READER and reader.stream.progress.terminal and reader.at_end and not self._carrier.paused:
            return CloseReason.COMPLETE
        return reason

    # -- its parts

    @property
    def _is_chunked(self) -> bool:
        return self._framing is Framing.CHUNKED

    @property
    def _reads(self) -> bool:
        return self.reader is not None and self.reader.state is not SubscriberState.ENDED

    def _transfer_coding(self) -> Fields:
        return [(b"transfer-encoding", b"chunked")] if self._is_chunked else []

    def _head(self, fields: Fields, *, reason: bytes | None = None) -> bytes:
        """The response's head: `fields`, and the standard fields of every answer."""
        request, runtime = self.request, self._runtime
        named = dict(fields)
        fields = [*fields, (b"x-request-id", request.id.encode()), *request.extra_headers]
        if b"date" not in named:
            fields.insert(0, (b"date", runtime.date()))
        if runtime.draining:
            request.keep_alive = False
        if not request.keep_alive:
            fields.append((b"connection", b"close"))
        elif request.http10:  # its default is a close (RFC 9112 9.3)
            fields.append((b"connection", b"keep-alive"))
        bump(runtime.counters.responses, request.status)
        return encode_response_head(request.status, fields, reason=reason)

    def _go(self, event: AnswerEvent) -> None:
        state = TRANSITIONS[self.state].get(event)
        assert state is not None, f"{event} in {self.state}"
        self.state = state


def _write_by(answer: Answer, write: Callable[[bytes], None]) -> None:
    """The answer and its reader write by this function from here on."""
    answer.write = write
    if answer.reader is not None:
        answer.reader.write_by(write)


def _form(*, chunked: bool, raw: bool, data_only: bool) -> Form:
    if raw:
        return Form.RAW_CHUNKED if chunked else Form.RAW_BARE
    if data_only:
        return Form.DATA_CHUNKED if chunked else Form.DATA_BARE
    return Form.CHUNKED if chunked else Form.BARE


def _is_event_source(request: Request) -> bool:
    accept = request.get(b"accept") or b""
    return request.method == "GET" and request.path.startswith("/v1/stream") and b"text/event-stream" in accept
