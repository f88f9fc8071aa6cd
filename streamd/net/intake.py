"""Intake: the incoming body of a request: kept as a whole, given to a sink piece by piece, or thrown away.

A body that is kept or thrown away must come at its least rate in every window of some seconds. So the bytes that came
quickly buy no time for the rest: a body that stops a byte before its end would hold its memory for hours.
"""

from __future__ import annotations

from streamd.config import Settings
from streamd.core.body_charge import BodyCharge
from streamd.net.answer import Answer
from streamd.net.application import BodySink, Plan
from streamd.net.http_error import HttpError, bad_json, unsupported_encoding
from streamd.net.request import Request
from streamd.net.runtime import Runtime
from streamd.net.sweep import NEVER
from streamd.net.turns import STEP_SIZES_BYTES, pieces_of, step_bytes
from streamd.reasons import CloseReason
from streamd.wire import content_coding
from streamd.wire.chunked import BodyDecoder, LengthDecoder, decoder_for
from streamd.wire.http1 import RequestHead
from streamd.wire.json_scan import JsonError

# JSON, or a form, is scanned whenever so much of it is new: often enough for no loop turn to be long, and rarely enough
# for a body in tiny pieces.
SCANNED_BYTES = 16 * 1024

# Opening brackets in a step of a published body: up to 3 us each in a long line, which is scanned.
STEP_CONTAINERS_MAX = 1024

# Windows in which a body must bring its minimum are body_grace long, and at least this: TCP's retransmissions after
# a loss come within 1 + 2 s.
WINDOW_S_MIN = 5.0


class Intake:
    """From a request's head until the request is whole or refused. Its bytes are the request's charge."""

    __slots__ = (
        "_body_bytes_max",
        "_came_bytes",
        "_decoder",
        "_plan",
        "_request",
        "_runtime",
        "_sink",
        "_spent",
        "_thrown_bytes",
        "_windows",
        "held",
        "rest",
    )

    def __init__(self, runtime: Runtime, head: RequestHead) -> None:
        self._runtime = runtime
        self._decoder: BodyDecoder | None = decoder_for(head.framing, head.content_length)  # None: broken off
        self._plan: Plan | None = None
        self._request: Request
        self._body_bytes_max = 0
        self._sink: BodySink | None = None
        self._came_bytes = 0  # of the body, in this window
        self._thrown_bytes = 0  # of a body that is thrown away
        self._windows = 0  # windows that are over
        self.held: bytearray | None = None  # None: a sink has the body, or it is thrown away
        self.rest = b""  # bytes behind the body
        self._spent = 0  # pieces of work since the last spent()

    @property
    def is_whole(self) -> bool:
        """Whether all of the body was read."""
        return self._decoder is not None and self._decoder.done

    def begin(self, plan: Plan, answer: Answer, content_length: int) -> None:
        """Prepare for the body. Raises HttpError for a body that is too large or encoded, before it is read."""
        self._plan = plan
        self._request = answer.request
        if plan.take_body is not None:
            self._sink = plan.take_body(answer)
            return
        self._body_bytes_max = plan.body_bytes_max or self._runtime.settings.body_bytes_max
        if content_length > self._body_bytes_max:
            raise self._too_large()
        if plan.keeps_body:
            coding = self._request.get(b"content-encoding")
            if not plan.passes_encoded and not content_coding.is_plain(coding) and not self.is_whole:
                raise unsupported_encoding(coding or b"")
            self.held = bytearray()
            self._request.body_charge = BodyCharge(self._runtime.admission, answer.origin.holders(self._request))

    @property
    def is_blocked(self) -> bool:
        """Whether the sink takes nothing in this turn."""
        return self._sink is not None and self._sink.is_blocked

    def step_bytes(self, data: bytes) -> int:
        """How many of the first bytes of `data` to feed at once, so that the work on them is bounded."""
        if self._sink is None and type(self._decoder) is LengthDecoder:
            return STEP_SIZES_BYTES[0]  # copied as they are
        size = step_bytes(data)
        while self._sink is not None and size > STEP_SIZES_BYTES[-1] and _containers(data, size) > STEP_CONTAINERS_MAX:
            size //= 4
        return size

    def spent(self) -> int:
        """The pieces of work that were done since the last call."""
        spent, self._spent = self._spent, 0
        return spent

    def feed(self, data: bytes) -> bool:
        """Take the next bytes; True once the body is whole, and then `rest` has the bytes behind it.
        Raises HttpError."""
        decoder = self._decoder
        assert decoder is not None
        if decoder.done:
            self.rest = data
            return True
        self._spent += pieces_of(len(data))
        for piece in decoder.feed(data) if data else ():
            self._spent += 1
            self._keep(piece)
            if self._decoder is None:
                return False
        self.rest = decoder.rest
        return decoder.done

    def _keep(self, piece: bytes) -> None:
        self._came_bytes += len(piece)
        if self._sink is not None:
            self._spent += self._sink.body_piece(piece)
            return
        held = self.held
        if held is None:
            self._thrown_bytes += len(piece)
            if self._thrown_bytes > self._body_bytes_max:
                raise self._too_large()
            return
        charge = self._request.body_charge
        assert charge is not None
        self._runtime.hold_body(charge, len(held) + len(piece))
        try:
            held += piece
        except MemoryError:
            charge.resize(len(held))
            raise
        if len(held) > self._body_bytes_max:
            raise self._too_large()
        scan = self._request.json or self._request.form
        if scan is not None and len(held) - scan.position >= SCANNED_BYTES:
            self._scan(held, last=False)

    def _scan(self, held: bytearray, *, last: bool) -> None:
        """Read on in the JSON or the form. Raises HttpError 400, unless the body doesn't say that it is JSON."""
        scan = self._request.json or self._request.form
        if scan is None or not held:
            return
        try:
            scan.feed(held, last=last)
        except JsonError as error:
            if self._request.declares_json:
                raise bad_json(error) from None
            self._request.json = None

    def dispatch(self, answer: Answer) -> None:
        """The body is whole: call the plan's answer or end the sink. Raises HttpError."""
        plan, sink, held = self._plan, self._sink, self.held
        self._sink = None
        if sink is not None:
            sink.body_end()
            return
        assert plan is not None and plan.answer is not None
        if held is None:
            plan.answer(answer)
            return
        self._scan(held, last=True)
        answer.request.body = bytes(held)
        plan.answer(answer)

    def break_off(self, reason: CloseReason) -> None:
        """The rest of the body isn't wanted, or will not come."""
        self._decoder = self.held = None
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.body_lost(reason)

    def go_on_from(self, held: bytes | None, came_bytes: int, thrown_bytes: int, windows: int) -> None:
        """After begin(): the body has come so far, in another process. Raises ValueError where it would be held in one
        process and not in the other.
        """
        if (held is None) is not (self.held is None):
            raise ValueError("a body that is held in one process alone")
        if held and self.held is not None and self._request.body_charge is not None:
            self._request.body_charge.adopt(len(held))
            self.held += held
            self._scan(self.held, last=False)
        self._came_bytes, self._thrown_bytes, self._windows = came_bytes, thrown_bytes, windows

    def next_window(self, settings: Settings) -> float | None:
        """A window is over: the length of the next. None: the body came at less than body_bytes_per_s_min in it.

        The first window is body_grace, in which a body may come at any rate.
        """
        if self._sink is not None and not self._sink.must_flow:
            return NEVER
        window_s = max(settings.body_grace_s, WINDOW_S_MIN)
        came, self._came_bytes = self._came_bytes, 0
        self._windows += 1
        return window_s if self._windows == 1 or came >= window_s * settings.body_bytes_per_s_min else None

    def _too_large(self) -> HttpError:
        return HttpError(
            413,
            f"The request's body is larger than {self._body_bytes_max} bytes.",
            code="body_too_large",
            reason=CloseReason.BODY_TOO_LARGE,
        )


def _containers(data: bytes, size: int) -> int:
    """The number of opening brackets in the first bytes, in texts as well."""
    return data.count(b"[", 0, size) + data.count(b"{", 0, size)
