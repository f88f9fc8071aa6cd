"""Exchange: a request carried upstream, its attempts, its time limits, and the use of the upstream's answer.

    CONNECTING  no connection yet: being established, or not taken from the pool
    ASKED       the request is out, the answer's head is awaited
    OPENING     a stream was asked for, and the first bytes of the answer's body are awaited: they tell whether it is a
                stream, whatever its type says (wire/opening.py)
    STREAMING   the answer feeds a stream
    PROXYING    the answer goes through as bytes
    COLLECTING  the reader has a stream's head already (commit_after, or a wrong type), but the answer isn't a stream.
                JSON is read whole and becomes events, or is a stream of lines; an error status is read for its
                text, for a bounded time
    OVER

A second attempt is allowed in three cases only (docs/PROTOCOL.md, section 4): the connection was never established, or
closed at once with the request unread; a *reused* connection ended within a second, without a byte or with a 408
(once); or the upstream answered 429, 503 or 529 while another upstream is free. Never after a time-out: a missing reply
doesn't prove that the upstream did no work, and a generation costs money. Any other answer of an upstream passes as it
is: whether its status is worth a retry is the client's decision.

A request that asks for a stream has its Stream from the start. So a retry of the same request can join it, and a reader
that leaves before the first token can leave it a grace.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from typing import Protocol

from streamd.choice import Choice
from streamd.config import RouteSettings, Settings, UpstreamOrigin, UpstreamSettings
from streamd.core.guard import guarded
from streamd.core.health import REFUSED_STATUSES
from streamd.core.stream import NOT_EVENTS, Stream
from streamd.core.usage import Charge
from streamd.counters import bump
from streamd.net.answer import Answer, Pending
from streamd.net.attempt import Ask, Attempt, why
from streamd.net.collected import ERROR_BYTES_MAX, Collected, coding_of, may_hold_events, undone
from streamd.net.dialer import is_own_shortage
from streamd.net.generation import GenerationWatch
from streamd.net.http_error import HttpError
from streamd.net.reading import PACE, TURN
from streamd.net.request import Request
from streamd.net.runtime import Runtime
from streamd.net.sweep import NEVER
from streamd.net.upstream import Upstream, UpstreamConnection, reason_of
from streamd.net.upstreams import Upstreams
from streamd.policy import Policy
from streamd.reasons import CloseReason
from streamd.wire import active_content, answer_fields, retry_after
from streamd.wire.answer_fields import Fields, Whereabouts
from streamd.wire.dialect import whole_events
from streamd.wire.http1 import Framing, Headers, ResponseHead
from streamd.wire.inner import SentAway, splitter_for
from streamd.wire.opening import BodyKind, has_own_ids
from streamd.wire.sse import EventTooLarge

# Time for an error text to come, once its head is there: the reader waits for nothing else.
COLLECTED_S_MAX = 5.0

# Time after an answer's last event in which more may still come: usage, a second [DONE], the end of the framing. Some
# servers leave the connection open instead.
TERMINAL_GRACE_S = 1.0


# Time for which bytes that wait for their turn put off the verdict that an upstream is silent: turns may be held for a
# tenth of it (handover/freezing.py), and an upstream that floods has bytes waiting at all times.
UNREAD_S_MAX = 1.0

# Interval of the looks at a request that its upstream reads late, while the answer comes already.
UNWRITTEN_LOOK_S = 1.0

_TOO_LARGE = "The upstream sent too much: its answer came whole, and is larger than event_bytes_max."


class ExchangeState(Choice):
    """The state of an exchange; the module's docstring explains each."""

    CONNECTING = "connecting"
    ASKED = "asked"
    OPENING = "opening"
    STREAMING = "streaming"
    PROXYING = "proxying"
    COLLECTING = "collecting"
    OVER = "over"


TRANSITIONS: dict[ExchangeState, frozenset[ExchangeState]] = {
    ExchangeState.CONNECTING: frozenset((ExchangeState.ASKED, ExchangeState.OVER)),
    ExchangeState.ASKED: frozenset(
        (
            ExchangeState.CONNECTING,
            ExchangeState.OPENING,
            ExchangeState.PROXYING,
            ExchangeState.COLLECTING,
            ExchangeState.OVER,
        )
    ),
    ExchangeState.OPENING: frozenset(
        (ExchangeState.STREAMING, ExchangeState.PROXYING, ExchangeState.COLLECTING, ExchangeState.OVER)
    ),
    ExchangeState.STREAMING: frozenset((ExchangeState.OVER,)),
    ExchangeState.PROXYING: frozenset((ExchangeState.OVER,)),
    ExchangeState.COLLECTING: frozenset((ExchangeState.STREAMING, ExchangeState.OVER)),
    ExchangeState.OVER: frozenset(),
}


class ExchangeOwner(Protocol):
    """The possessions of the request of an exchange, in the layer above."""

    def open_unasked(self, *, as_bytes: bool) -> Stream | None:
        """The Stream of an answer that unexpectedly is a stream, or None: its bytes pass, as they do if `as_bytes` says
        so, for a stream with ids of its server's own. Raises HttpError if the client may have no further stream.
        """

    def over(self) -> None:
        """The exchange is over. Called once."""


class Learner(Protocol):
    """Learns from a good answer what the upstream has made."""

    def learn(self, upstream: str, piece: bytes) -> None:
        """The next bytes of an answer of the upstream with this name, or the head of a stream's chunks."""


class Exchange(Pending):
    """A request on its way. `answer` is None once its reader has left or has its stream."""

    __slots__ = (
        "__weakref__",
        "_ask",
        "_attempt",
        "_body_charge",
        "_charge",
        "_collected",
        "_ends_at",
        "_learns",
        "_may_be_foreign",
        "_owner",
        "_request",
        "_route",
        "_runtime",
        "_stale_links",
        "_started_at",
        "_state",
        "_tried",
        "_upstreams",
        "answer",
        "due_at",
        "policy",
        "stream",
        "watch",
    )

    def __init__(
        self,
        runtime: Runtime,
        upstreams: Upstreams,
        ask: Ask | None,
        *,
        answer: Answer | None,
        request: Request,
        stream: Stream | None,
        policy: Policy,
        charge: Charge | None,
        may_be_foreign: bool,
        owner: ExchangeOwner,
        learns: Learner | None = None,
    ) -> None:
        """`may_be_foreign`: the answer may be a stream with ids of its server's own. `ask`: None where another process
        has sent the request, and it won't be sent again.
        """
        # process
        self._runtime = runtime
        self._upstreams = upstreams
        self.watch = GenerationWatch(runtime.counters, upstreams.served, request)  # before anything is taken over
        # request
        self._ask = ask
        self._body_charge, request.body_charge = request.body_charge, None  # as long as it may be sent again
        self._request = request
        self._route = request.route
        self.answer = answer
        self.policy = policy
        self.stream = stream
        self._may_be_foreign = may_be_foreign
        self._owner = owner
        self._charge = charge  # to the client's key, if it has one
        self._learns = learns
        # tries
        self._state = ExchangeState.CONNECTING
        self._tried: tuple[Upstream, ...] = ()
        self._attempt: Attempt | None = None  # the attempt under way
        self._stale_links = 0  # pooled connections that ended without a byte; the request is sent again after the first
        # time
        self._started_at = runtime.time()
        self.due_at = NEVER
        self._ends_at = NEVER  # TERMINAL_GRACE_S after the answer's last event, COLLECTED_S_MAX after an error's head
        # answer
        self._collected: Collected | None = None  # in OPENING and COLLECTING

    # -- going upstream

    def start(self) -> None:
        """Choose an upstream and ask it. If that fails, the answer is refused and everything taken is given back."""
        try:
            if self.answer is not None:
                self.answer.later(self)
            if self.stream is not None:
                self.stream.source = self
            self._runtime.sweep.add(self)
            self._try(self._choose())
        except HttpError as problem:
            self._fail(problem)
        except Exception as error:
            self.crash("exchange.start", error)

    def _choose(self) -> Upstream:
        assert self._ask is not None
        ask, now = self._ask, self._runtime.time()
        principal_id = self._request.principal.id
        chosen = self._upstreams.choose(ask.model, now, principal=principal_id, at=ask.at, without=self._tried)
        if self._runtime.story.is_on:
            _tell(
                self,
                "upstream chosen",
                upstream=chosen.settings.name,
                model=ask.model or None,
                in_flight=chosen.in_flight,
                others=self._upstreams.explain(chosen, ask.model, now, principal_id, ask.at) or None,
                tried=tuple(each.settings.name for each in self._tried) or None,
            )
        return chosen

    def _try(self, upstream: Upstream) -> None:
        assert self._ask is not None
        self._request.upstream = upstream.settings.name
        if self.stream is not None:
            self.stream.upstream = upstream.settings.name
        try:
            attempt = self._attempt = Attempt(self._runtime, upstream, self._ask, self)
            attempt.start(pooled=not self._stale_links)
        except Exception as error:  # in a callback nobody else would end the exchange, and it would wait for ever
            self.crash("exchange.try", error)
            return
        if attempt.is_connecting:
            if self._runtime.story.is_on:
                _tell(self, "connecting", upstream=upstream.settings.name)
            self.due_at = min(attempt.connect_by, self._commit_at())

    def on_asked(self, attempt: Attempt) -> None:
        self._go(ExchangeState.ASKED)
        if self._charge is not None:
            self._charge.asked()
        bump(self._runtime.counters.upstream_requests, attempt.upstream.settings.name)
        if self._runtime.story.is_on:
            name, waited_s = attempt.upstream.settings.name, round(attempt.asked_at - attempt.began_at, 4)
            _tell(
                self,
                "request sent",
                upstream=name,
                connected_s=waited_s,
                reused=attempt.is_reused,
            )
        self.due_at = self._next_due()

    # -- when it doesn't get there

    def on_unreachable(self, attempt: Attempt, error: BaseException) -> None:
        """No connection was established, or none that was read: the upstream did no work, and another may be tried."""
        upstream = attempt.upstream
        if is_own_shortage(error):
            attempt.end()
            self._fail(self._runtime.refused(self._runtime.admission.refuse_descriptors()))
            return
        attempt.failed(CloseReason.UPSTREAM_CONNECT, why(error))
        if self._runtime.story.is_on:
            _tell(self, "no connection", upstream=upstream.settings.name, error=why(error))
        attempt.end()
        if self._try_another(upstream, CloseReason.UPSTREAM_CONNECT.word):
            return
        self._fail(
            HttpError(
                502,
                f"The upstream {upstream.settings.name} can't be reached ({why(error)}).",
                code="upstream_unreachable",
                reason=CloseReason.UPSTREAM_CONNECT,
                should_retry=True,
            )
        )

    def _try_another(self, failed: Upstream, why: str) -> bool:
        """Go on with an upstream that has not been tried yet. False: there is none."""
        self._tried = (*self._tried, failed)
        try:
            upstream = self._choose()
        except HttpError:
            return False
        _note_retry(self, failed, why)
        if self._state is ExchangeState.ASKED:
            self._go(ExchangeState.CONNECTING)
        self._try(upstream)
        return True

    # -- Asker

    def on_head(self, link: UpstreamConnection, head: ResponseHead) -> None:
        attempt = self._attempt
        assert attempt is not None
        self._runtime.counters.upstream_first_byte_s.observe(self._runtime.time() - attempt.asked_at)
        if self._runtime.story.is_on:
            media_type = (head.get(b"content-type") or b"").decode("latin-1")
            _tell(
                self,
                "answer begins",
                upstream=attempt.upstream.settings.name,
                status=head.status,
                type=media_type,
            )
        if self._request.trace is not None:
            self._request.trace.status = head.status
        if head.status == 408 and attempt.is_stale and not self._stale_links:
            self._ask_again(attempt)
            return
        attempt.judge(head.status)
        if head.status in REFUSED_STATUSES and self._elsewhere(attempt, head.status):
            return
        self._request.upstream_id = answer_fields.request_id_of(head.headers, self._request.id.encode())
        is_unasked = self.stream is None and _is_event_stream(head)
        if is_unasked and self._may_be_foreign and not _is_inner(head):
            self._open(None, link, head, attempt.asked_at)
            return
        if is_unasked and not self._open_unasked(as_bytes=False):
            return
        answer = self.answer if self.answer is not None and self.answer.is_open else None
        head, coding = (head, None) if answer is not None else undone(head)
        if self.stream is not None and may_hold_events(head) and (head.status == 200 or answer is None):
            self._open(self.stream, link, head, attempt.asked_at, coding)
        elif answer is not None:
            link.take_body(head)
            self._proxy(link, attempt.upstream, head, answer)
        elif self.stream is not None:
            self._go(ExchangeState.COLLECTING)
            self._collected = Collected(self._runtime.admission, head, ERROR_BYTES_MAX)
            self._ends_at = _at_latest(self._runtime.time() + COLLECTED_S_MAX, self._started_at, self._runtime.settings)
            link.take_body(head, coding)
            self.due_at = self._next_due()
        else:
            self.cancel(CloseReason.READER_GONE)

    def _elsewhere(self, attempt: Attempt, status: int) -> bool:
        """Try a free upstream: this one refused the request before it began, so asking another costs nothing."""
        if self._ask is None:
            return False
        tried = (*self._tried, attempt.upstream)
        ask, now, principal_id = self._ask, self._runtime.time(), self._request.principal.id
        if self._upstreams.free(ask.model, now, principal=principal_id, at=ask.at, without=tried) is None:
            return False
        attempt.end()
        if self._runtime.story.is_on:
            _tell(self, "asked elsewhere", refused_by=attempt.upstream.settings.name)
        return self._try_another(attempt.upstream, f"status {status}")

    def _ask_again(self, attempt: Attempt) -> None:
        """Ask the same upstream on a fresh connection."""
        self._stale_links += 1
        attempt.end()
        if self._runtime.story.is_on:
            _tell(self, "asked again on a fresh connection", upstream=attempt.upstream.settings.name)
        _note_retry(self, attempt.upstream, "stale connection")
        self._go(ExchangeState.CONNECTING)
        self._try(attempt.upstream)

    def _open_unasked(self, *, as_bytes: bool) -> bool:
        """Open the stream of an answer that is one unasked, or count its bytes as one. False: the client may have no
        more streams, and is refused.
        """
        try:
            self.stream = self._owner.open_unasked(as_bytes=as_bytes)
        except HttpError as problem:
            # The request didn't look like a request for a stream, so the limit is held here: the generation is cut.
            bump(self._runtime.counters.upstream_cancels, self._request.upstream)
            problem.should_retry = False
            self._fail(problem)
            return False
        return True

    def _open(
        self,
        stream: Stream | None,
        link: UpstreamConnection,
        head: ResponseHead,
        asked_at: float,
        coding: bytes | None = None,
    ) -> None:
        """The first bytes of the body decide. A head that says that it is a stream is passed on at once; without a
        stream yet, on a route of no known dialect, it waits for the first event, which tells whose ids the events have.
        """
        self._let_ask_go()
        self._runtime.counters.added_s.observe(asked_at - self._request.started_at)
        self._go(ExchangeState.OPENING)
        collected = Collected(self._runtime.admission, head, self._runtime.settings.event_bytes_max)
        self._collected = collected
        link.take_opening(head, coding)
        # For a stream no deadline comes earlier by this step, but for the look at a request that wasn't read yet.
        if self._body_charge is not None or stream is None:
            self.due_at = self._next_due()
        if stream is not None:
            stream.source, stream.upstream = self, self._request.upstream
            if collected.is_typed:
                self._attach(stream, head)

    def _decide(self, link: UpstreamConnection, *, at_end: bool, is_late: bool = False) -> None:
        """The answer's first bytes are there, or all of it: is it a stream, JSON, or neither? At the end the link is
        free already. is_late: a stream whose first event doesn't come passes as its bytes.
        """
        opened, attempt = self._collected, self._attempt
        assert opened is not None and attempt is not None
        if self.stream is None:
            as_bytes = has_own_ids(bytes(opened.body), at_end=at_end, is_late=is_late)
            if as_bytes is None or not self._open_unasked(as_bytes=as_bytes):
                return
            if self.stream is not None:
                self.stream.source, self.stream.upstream = self, self._request.upstream
        stream = self.stream
        answer = self.answer if self.answer is not None and self.answer.is_open else None
        if answer is None:
            opened.skip_blanks()
        kind = opened.kind(at_end=at_end) if stream is not None else BodyKind.BYTES
        if kind is None:
            return
        if kind is not BodyKind.EVENTS and not at_end:
            link.read_body()
        if kind is BodyKind.EVENTS and stream is not None:
            self._go(ExchangeState.STREAMING)
            if self._route.idle_timeout_s:
                self.due_at = min(self.due_at, self._runtime.time() + self._route.idle_timeout_s)
            self._attach(stream, opened.head)
            first, self._collected = opened.let_go(), None
            stream.log.shapes = self._runtime.hub.shapes.of(stream.upstream, stream.terms.model)
            if not at_end:
                link.read_events(stream, first, is_inner=_is_inner(opened.head))
                if self._runtime.story.is_on:
                    _tell(
                        self,
                        "first event" if stream.events else "stream begins",
                        upstream=self._request.upstream,
                    )
            else:
                end = _append_whole(stream, first, opened.head, self._runtime)
                if end is not None:
                    self._truncated(*reason_of(end))
        elif answer is not None:
            first, self._collected = opened.let_go(), None
            self._proxy(link, attempt.upstream, opened.head, answer)
            if first:
                self.on_piece(first)
        elif kind is BodyKind.JSON and stream is not None:
            self._go(ExchangeState.COLLECTING)
            self._collect(opened, stream, link if not at_end else None)
            self.due_at = self._next_due()
        elif stream is not None:
            self._refuse(opened, stream)
        else:
            self.cancel(CloseReason.READER_GONE)

    def _attach(self, stream: Stream, head: ResponseHead | None = None) -> None:
        """Make the client that sent the request a reader of the stream, if it still waits; `head` is the upstream's."""
        answer, self.answer = self.answer, None
        if answer is None or not answer.is_open:
            return
        if head is None:
            answer.stream(stream, seq=1, policy=self.policy)
        elif self._attempt is not None:
            fields = _passed(answer_fields.of_stream, head, self._request, self._attempt.upstream.settings)
            answer.stream(stream, seq=1, policy=self.policy, passed=fields)

    def _proxy(self, link: UpstreamConnection, upstream: Upstream, head: ResponseHead, answer: Answer) -> None:
        """Pass on the answer as its bytes; the link reads its body already."""
        self._let_ask_go()
        self._go(ExchangeState.PROXYING)
        if not 200 <= head.status < 300 or head.get(b"content-encoding") is not None:
            self._learns = None
        else:
            self.watch.whole_answer(head)
        runtime, settings = self._runtime, upstream.settings
        fields = _passed(answer_fields.of_answer, head, self._request, settings)
        if head.status >= 400:
            fields = _with_bounded_waits(fields, runtime.settings.upstream_retry_after_max_s, runtime.unix_time())
        if self.stream is not None:
            self._drop_stream(self.stream)
        if answer.paused:
            link.pause(answer.unsent_bytes)
        self.due_at = self._next_due()
        answer.proxy_head(head, [*fields, (b"x-upstream", settings.name.encode()), *_holding(head)])

    def _drop_stream(self, stream: Stream) -> None:
        """The answer isn't a stream. Readers that joined it meanwhile are told; without readers it is removed."""
        stream.source = None
        self.stream = None
        if self._request.trace is not None:
            self._request.trace.stream = None
        now = self._runtime.time()
        message = "The upstream answered with a complete response, not with a stream of events."
        stream.fail(CloseReason.UPSTREAM_REFUSED, now, message=message)
        if not stream.readers:
            self._runtime.hub.remove(stream)

    def on_piece(self, piece: bytes) -> None:
        opened = self._collected
        if opened is None:
            if self._charge is not None:
                self._charge.passed(piece)
            self.watch.passed(piece)
            if self._state is ExchangeState.PROXYING and self.answer is not None:
                if self._learns is not None:
                    self._learns.learn(self._request.upstream, piece)
                self.answer.proxy_body(piece)
            return
        has_room = opened.take(piece)
        if self._state is ExchangeState.OPENING:
            assert self._attempt is not None and self._attempt.link is not None
            self._decide(self._attempt.link, at_end=False)
        elif self._state is ExchangeState.COLLECTING and self.stream is not None:
            if has_room and not opened.is_error:
                self._collect(opened, self.stream, self._attempt.link if self._attempt is not None else None)
            elif opened.is_error and not has_room:
                self._refuse(opened, self.stream)
            elif not has_room:
                self._truncated(CloseReason.EVENT_TOO_LARGE, _TOO_LARGE)

    def on_end(self, link: UpstreamConnection) -> None:
        if self._state is ExchangeState.OPENING:
            self._decide(link, at_end=True)
        state, stream, answer = self._state, self.stream, self.answer
        if state is ExchangeState.OVER:
            return
        if state is ExchangeState.PROXYING and answer is not None:
            self._over()
            answer.proxy_end()
        elif state is ExchangeState.COLLECTING and stream is not None and self._collected is not None:
            if not self._deliver(self._collected, stream):
                self._refuse(self._collected, stream)
        elif stream is not None and stream.progress.complete and stream.events:
            self._complete(stream)
        else:
            self._truncated(CloseReason.UPSTREAM_TRUNCATED, "The upstream ended its answer before it was complete.")

    def on_broken(self, link: UpstreamConnection, reason: CloseReason, text: str) -> None:
        attempt = self._attempt
        assert attempt is not None
        is_unanswered = self._state is ExchangeState.ASKED and not link.any_byte
        if is_unanswered and attempt.is_stale and not self._stale_links:
            self._ask_again(attempt)
            return
        if is_unanswered and link.turned_away:
            self.on_unreachable(attempt, ConnectionResetError(errno.ECONNRESET, "closed with the request unread"))
            return
        stream, collected = self.stream, self._collected
        if stream is not None and stream.progress.terminal:  # nothing can be missing, however the framing ended
            self._complete(stream)
            return
        is_collecting = self._state is ExchangeState.COLLECTING
        if is_collecting and collected is not None and stream is not None and self._deliver(collected, stream):
            return
        attempt.failed(reason, text)
        if self._runtime.story.is_on:
            _tell(
                self,
                "answer broke off",
                upstream=attempt.upstream.settings.name,
                reason=reason,
                error=text,
            )
        if self._state in (ExchangeState.ASKED, ExchangeState.OPENING):
            self._fail(HttpError(502, text, code=reason.word, reason=reason, should_retry=False))
        elif is_collecting and collected is not None and stream is not None and collected.is_error:
            self._refuse(collected, stream)
        else:
            self._truncated(reason, text)

    def crash(self, where: str, error: Exception) -> None:
        """A callback raised: count the error, and end this exchange alone. Never raises, and acts once."""
        runtime = self._runtime
        runtime.bug(where, error)
        if self._state is ExchangeState.OVER:
            return
        problem = runtime.problem_of(error)
        if self._state is not ExchangeState.CONNECTING:
            problem.should_retry = False  # the upstream may have worked on it
        with runtime.guard:
            if self._state in (ExchangeState.STREAMING, ExchangeState.PROXYING):
                self._truncated(problem.reason, problem.message)
            else:
                self._fail(problem)

    on_bug = crash  # as the Asker of its connection

    # -- ends

    def on_terminal(self, now: float) -> None:
        """The stream has its last event. The framing's end is awaited for a moment, and not needed."""
        self._ends_at = self.due_at = _at_latest(now + TERMINAL_GRACE_S, self._started_at, self._runtime.settings)
        if self.stream is not None:
            _learn_of(self.stream, self._learns)

    def _collect(self, collected: Collected, stream: Stream, link: UpstreamConnection | None) -> None:
        """JSON behind a stream's head, as far as it has come. Lines are events from here on. Other JSON that may be
        whole is read as soon as no more comes: its own end is enough, whatever the framing does.
        """
        if link is not None and collected.has_lines(stream.dialect.api):
            self._go(ExchangeState.STREAMING)
            first, self._collected, self._ends_at = collected.let_go(), None, NEVER
            self.due_at = self._next_due()
            link.read_events(stream, first, has_lines=True)
        elif collected.may_be_whole:
            at = self._runtime.time() + TERMINAL_GRACE_S
            self._ends_at = self.due_at = _at_latest(at, self._started_at, self._runtime.settings)

    def _end_in_time(self) -> None:
        """The rest of the answer is not awaited any longer: its last event is there, or enough of its error text."""
        collected, stream = self._collected, self.stream
        self._ends_at = NEVER
        if stream is None:
            return
        if collected is None:
            self._complete(stream)
        elif collected.is_error:
            self._refuse(collected, stream)
        else:
            self._deliver(collected, stream)

    def _deliver(self, collected: Collected, stream: Stream) -> bool:
        """A whole answer to a reader that has a stream's head: its events follow. False: it is no whole JSON."""
        if len(collected.body) > self._runtime.settings.event_bytes_max:
            self._truncated(CloseReason.EVENT_TOO_LARGE, _TOO_LARGE)
            return True
        events = [] if collected.is_error else whole_events(stream.dialect, bytes(collected.body))
        if not events:
            return False
        stream.append_pieces(events, self._runtime.time())
        if stream.progress.complete:
            self._complete(stream)
        else:
            text = "The upstream answered with JSON that is no whole answer of this API."
            self._truncated(CloseReason.UPSTREAM_REFUSED, text)
        return True

    def _refuse(self, collected: Collected, stream: Stream) -> None:
        """A reader that has a stream's head is told an upstream's error, or that the answer is no stream."""
        if self._charge is not None:
            self._charge.passed(bytes(collected.body))
        runtime = self._runtime
        now, most_s = runtime.time(), runtime.settings.upstream_retry_after_max_s
        failure = collected.failure(retry_after.wait_s_in(collected.head.headers, most_s, runtime.unix_time()))
        self._over()
        stream.fail(CloseReason.UPSTREAM_REFUSED, now, message=failure.message, failure=failure)

    def _complete(self, stream: Stream) -> None:
        """The answer has all its events; the last may be the upstream's own error, behind which nothing is added."""
        attempt = self._attempt
        reason = CloseReason.UPSTREAM_ERROR if stream.progress.failed else CloseReason.COMPLETE
        if stream.progress.failed and attempt is not None:
            bump(self._runtime.counters.upstream_failures, (attempt.upstream.settings.name, reason))
        self._over()
        _learn_of(stream, self._learns)
        stream.seal(reason, self._runtime.time(), clean=True)

    def _truncated(self, reason: CloseReason, text: str) -> None:
        """The answer has begun and can't be completed: its end must never look clean."""
        answer, stream = self.answer, self.stream
        self._over()
        if stream is not None:
            strays, code = stream.progress.strays, ""
            if strays is not None:
                text = f"{text} Dropped: {strays.told()}."
                code = NOT_EVENTS if reason is CloseReason.UPSTREAM_TRUNCATED and not stream.events else ""
            stream.fail(reason, self._runtime.time(), message=text, code=code)
        elif answer is not None:
            answer.abandon(reason)

    def _fail(self, problem: HttpError) -> None:
        """No usable answer came: send an error status if no byte has been sent yet, else an error event."""
        answer, stream = self.answer, self.stream
        self._over()
        is_awaited = answer is not None and answer.is_open
        if stream is not None:
            stream.source = None
            stream.fail(problem.reason, self._runtime.time(), message=problem.message, code=problem.code)
            if is_awaited and not stream.readers:
                self._runtime.hub.remove(stream)
        if answer is not None:
            answer.settle(lambda: answer.refuse(problem))

    def _over(self) -> None:
        """Leave the registries of the process; cut the request under way upstream."""
        if self._state is ExchangeState.OVER:
            return
        guard = self._runtime.guard
        self._go(ExchangeState.OVER)
        self._runtime.sweep.discard(self)
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            try:
                attempt.end()
            except Exception as error:
                guard.caught("exchange.end_attempt", error)
        if self._ask is not None or self._body_charge is not None:
            with guard:
                self._let_ask_go()
        if self._collected is not None:
            self._collected.let_go()
        if self._charge is not None:
            with guard:
                self._charge.over()
        try:
            self.watch.over()
        except Exception as error:
            guard.caught("exchange.watch_over", error)
        try:
            self._owner.over()
        except Exception as error:
            guard.caught("exchange.owner_over", error)

    def _let_ask_go(self) -> None:
        """The request won't be sent again: free its body. It stays in the books while the upstream doesn't read it."""
        self._ask = None
        charge, attempt = self._body_charge, self._attempt
        if charge is not None:
            link = attempt.link if attempt is not None else None
            charge.resize(min(charge.held_bytes, link.unwritten_bytes if link is not None else 0))
            self._body_charge = charge if charge.held_bytes else None
        if self.answer is not None:
            self.answer.release_body()

    # -- Pending: told by the answer

    @guarded
    def on_gone(self, reason: CloseReason) -> None:
        """The reader left before its answer was complete."""
        self.answer = None
        stream = self.stream
        if stream is None:
            self.cancel(reason)
        elif not stream.readers and stream.reason is None:
            hub = self._runtime.hub
            hub.orphan(stream, stream.grace_s(reason), reason, self._runtime.time())

    def on_paused(self) -> None:
        if self._attempt is not None and self._attempt.link is not None and self.answer is not None:
            self._attempt.link.pause(self.answer.unsent_bytes)

    def on_resumed(self) -> None:
        if self._attempt is not None and self._attempt.link is not None:
            self._attempt.link.resume()

    # -- Source: called by the stream

    @property
    def needs_reader(self) -> bool:
        """False while the asking client still waits for its first byte: other readers may come and go meanwhile."""
        return self.answer is None or not self.answer.is_open

    @guarded
    def cancel(self, reason: CloseReason) -> None:
        """No client wants the answer: end it upstream now."""
        if self._runtime.story.is_on:
            _tell(self, "cancelled upstream", upstream=self._request.upstream or None, reason=reason)
        if self._attempt is not None:
            bump(self._runtime.counters.upstream_cancels, self._attempt.upstream.settings.name)
        answer = self.answer
        self._over()
        if answer is not None:
            text = "The generation was stopped before it began to answer."
            problem = HttpError(409, text, code=reason.word, reason=reason, should_retry=False)
            answer.settle(lambda: answer.refuse(problem))

    # -- deadlines

    def on_due(self, now: float) -> float:
        attempt = self._attempt
        if attempt is None:
            return NEVER
        if self._ask is None and self._body_charge is not None:
            self._let_ask_go()
        if attempt.is_connecting and now >= attempt.connect_by:
            attempt.time_out()
            return self._next_due()
        if now >= self._ends_at:
            self._end_in_time()
            return self._next_due()
        reason = self._time_out(now, attempt)
        if reason is not None:
            self._timed_out(reason)
            return NEVER
        if self.stream is not None and now >= self._commit_at():
            # A long prefill: the reader gets 200 now, and heartbeats, so that no proxy in between gives up.
            self._attach(self.stream, self._collected.head if self._collected is not None else None)
        elif self._state is ExchangeState.OPENING and attempt.link is not None and now >= self._commit_at():
            self._decide(attempt.link, at_end=False, is_late=True)
        return self._next_due()

    def _time_out(self, now: float, attempt: Attempt) -> CloseReason | None:
        settings, route = self._runtime.settings, self._route
        if settings.stream_timeout_s and now - self._started_at >= settings.stream_timeout_s:
            return CloseReason.UPSTREAM_STREAM_TIMEOUT
        if self._state is ExchangeState.CONNECTING:
            return None
        if attempt.link is not None and attempt.link.pauses & TURN:
            now -= UNREAD_S_MAX  # bytes have come, and wait for their turn
        if self._before_first():
            return CloseReason.UPSTREAM_TTFT_TIMEOUT if now >= _first_by(attempt, route, settings) else None
        late = route.idle_timeout_s and now - self._last_sign(attempt) >= route.idle_timeout_s
        return CloseReason.UPSTREAM_IDLE_TIMEOUT if late and not self._reader_is_slow() else None

    def _before_first(self) -> bool:
        """ttft_timeout runs until the first event, because some servers send their head at once."""
        if self._state is ExchangeState.STREAMING:
            return self.stream is not None and not self.stream.events
        return self._state in (ExchangeState.ASKED, ExchangeState.OPENING)

    def _last_sign(self, attempt: Attempt) -> float:
        touched_at = attempt.link.touched_at if attempt.link is not None else attempt.asked_at
        if attempt.link is not None and attempt.link.pauses & PACE:
            return self._runtime.time()  # bytes may have come, and wait to be read
        if self._state is ExchangeState.STREAMING and self.stream is not None:
            return max(self.stream.touched_at, touched_at)
        return touched_at

    def _reader_is_slow(self) -> bool:
        """Whether the answer is proxied and the upstream isn't read, because the client is slow."""
        return self._state is ExchangeState.PROXYING and self.answer is not None and self.answer.paused

    def _timed_out(self, reason: CloseReason) -> None:
        text = _TIME_OUT_TEXTS[reason]
        if self._runtime.story.is_on:
            _tell(self, "timed out", upstream=self._request.upstream or None, reason=reason)
        if self._attempt is not None and reason is not CloseReason.UPSTREAM_STREAM_TIMEOUT:  # streamd's own limit
            self._attempt.failed(reason, text)
        if self._state in (ExchangeState.STREAMING, ExchangeState.PROXYING):
            self._truncated(reason, text)
        else:
            self._fail(HttpError(504, text, code=reason.word, reason=reason, should_retry=False))

    def _commit_at(self) -> float:
        """When the reader gets its 200, without waiting for the upstream's answer any longer."""
        is_stream = self.stream is not None or self._state is ExchangeState.OPENING
        is_awaited = is_stream and self.answer is not None and self.answer.is_open
        return self._started_at + self._route.commit_after_s if is_awaited else NEVER

    def _next_due(self) -> float:
        settings, route, attempt = self._runtime.settings, self._route, self._attempt
        if attempt is None:
            return NEVER
        if self._ends_at < NEVER:
            return self._ends_at
        due = self._commit_at()
        if self._ask is None and self._body_charge is not None:
            due = min(due, self._runtime.time() + UNWRITTEN_LOOK_S)
        if settings.stream_timeout_s:
            due = min(due, self._started_at + settings.stream_timeout_s)
        if self._state is ExchangeState.CONNECTING:
            return min(due, attempt.connect_by)
        before_first = self._before_first()
        if before_first:
            due = min(due, _first_by(attempt, route, settings))
        if not route.idle_timeout_s:
            return due
        # Idle time begins with the first event, which stores nothing here and may come at once. A slow reader's idle
        # time begins anew when it reads again. Until then no idle time is running, so the earliest end is idle_timeout
        # from now.
        since = self._runtime.time() if before_first or self._reader_is_slow() else self._last_sign(attempt)
        return min(due, since + route.idle_timeout_s)

    def _go(self, state: ExchangeState) -> None:
        assert state in TRANSITIONS[self._state], f"{self._state} to {state}"
        self._state = state

    @property
    def state(self) -> ExchangeState:
        """How far the exchange has come."""
        return self._state


def _append_whole(stream: Stream, body: bytes, head: ResponseHead, runtime: Runtime) -> EventTooLarge | SentAway | None:
    """All of a small stream has come. Returns the thing in it that ends it, if there is one."""
    heartbeat, size = stream.dialect.api.heartbeat, runtime.settings.event_bytes_max
    splitter = splitter_for(heartbeat, is_inner=_is_inner(head), event_bytes_max=size, strays=stream)
    try:
        stream.append_pieces(splitter.feed(body), runtime.time())
        stream.append_pieces(splitter.finish(), runtime.time())
    except (EventTooLarge, SentAway) as end:
        stream.append_pieces(end.before, runtime.time())
        return end
    return None


def _tell(exchange: Exchange, name: str, /, **fields: object) -> None:
    """A step for the log; callers look at `story.is_on` first."""
    exchange._runtime.story.tell(exchange._request, exchange.stream, name, **fields)


def _note_retry(exchange: Exchange, upstream: Upstream, why: str) -> None:
    """An event for the generation's span: it goes on after a try of this upstream, which ended so."""
    trace = exchange._request.trace
    if trace is not None:
        trace.note(exchange._runtime.time(), "retry", upstream=upstream.settings.name, reason=why)


def _learn_of(stream: Stream, learns: Learner | None) -> None:
    """A stream of chat completions has all its events: their head holds the id of a completion that is kept."""
    if learns is not None and stream.progress.chunk_head:
        learns.learn(stream.upstream, b"{%b}" % stream.progress.chunk_head)


def _at_latest(at: float, started_at: float, settings: Settings) -> float:
    """This time, or that at which stream_timeout ends an exchange that has started then, if it comes before."""
    return min(at, started_at + settings.stream_timeout_s) if settings.stream_timeout_s else at


def _first_by(attempt: Attempt, route: RouteSettings, settings: Settings) -> float:
    """When the first event is late: ttft_timeout after the request, or after the last comment of a server that keeps
    the request in its queue; with comments after queue_timeout at the latest.
    """
    ttft_s, queue_s = route.ttft_timeout_s, settings.queue_timeout_s
    if not ttft_s:
        return NEVER
    asked_at = attempt.asked_at
    touched_at = attempt.link.touched_at if attempt.link is not None else asked_at
    latest = asked_at + max(ttft_s, queue_s) if queue_s else NEVER
    return min(max(asked_at, touched_at) + ttft_s, latest)


_TIME_OUT_TEXTS = {
    CloseReason.UPSTREAM_TTFT_TIMEOUT: "The upstream sent no event in ttft_timeout, or only comments in queue_timeout.",
    CloseReason.UPSTREAM_IDLE_TIMEOUT: "The upstream fell silent in the middle of its answer.",
    CloseReason.UPSTREAM_STREAM_TIMEOUT: "The answer took longer than stream_timeout allows.",
}


def _is_inner(head: ResponseHead) -> bool:
    """Whether the answer is the stream of another streamd."""
    return head.get(b"x-stream-id") is not None


def _is_event_stream(head: ResponseHead) -> bool:
    """200, text/event-stream and not compressed; a compressed answer passes as bytes."""
    if head.status != 200 or head.framing is Framing.NONE:
        return False
    return answer_fields.is_event_stream(head.get(b"content-type")) and coding_of(head) is None


def _holding(head: ResponseHead) -> Headers:
    """The fields that keep an answer with a body from running in a browser as a page of streamd's."""
    is_empty = head.framing is Framing.NONE or (head.framing is Framing.LENGTH and not head.content_length)
    return () if is_empty else active_content.holding(head.get(b"content-type"))


@functools.lru_cache(maxsize=64)
def _passing(pass_fields: tuple[str, ...], origin: UpstreamOrigin) -> tuple[frozenset[bytes], Whereabouts]:
    """An upstream's foreign fields that may pass, and its place."""
    named = frozenset(name.lower().encode() for name in pass_fields)
    return named, Whereabouts(origin.authority.encode(), origin.base.encode(), origin.version)


def _passed(
    of: Callable[[Headers, frozenset[bytes], Whereabouts], Fields],
    head: ResponseHead,
    request: Request,
    settings: UpstreamSettings,
) -> Fields:
    """The fields of the upstream's head that reach the client, in an answer of the kind that `of` makes."""
    named, place = _passing(settings.pass_fields, settings.origin)
    fields = of(head.headers, named, place)
    request_id = head.get(b"x-request-id")
    if request_id is not None and request_id.decode("latin-1") == request.upstream_id:
        fields.append((b"x-upstream-request-id", request_id))
    return fields


def _with_bounded_waits(fields: Fields, most_s: float, unix_now: float) -> Fields:
    """The fields with waits of at most upstream_retry_after_max: SDKs ignore more than a minute."""
    values = ((name, retry_after.bounded(name, value, most_s, unix_now)) for name, value in fields)
    return [(name, value) for name, value in values if value is not None]
