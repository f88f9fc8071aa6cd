"""The request log: a line per request, written at its end, with its numbers but no prompt, answer, key or query.

Lines are written at the end of the loop's turn, because a line costs 10 us of formatting and a system call: when a
thousand readers leave at once, their thousand upstreams are cut before the first line is written.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Final, Protocol

from streamd.core.auth import ANONYMOUS
from streamd.core.stream import Stream
from streamd.counters import observe
from streamd.daemon import logs
from streamd.net.answer import Answer
from streamd.net.request import Request
from streamd.net.runtime import Runtime
from streamd.net.served import Served
from streamd.reasons import By, CloseReason

# Lines for refused requests without a key, a second: what a person can read, and 20 MB an hour at most. A flood of such
# requests would push all other lines out of a journal of limited size.
STRANGERS_LINES_PER_S_MAX: Final = 20

# Warnings a minute for requests that a server is at fault for, over all workers: a flood of failures shows its first
# lines, and the rest goes at level INFO.
FAULT_LINES_PER_MINUTE_MAX: Final = 6
MINUTE_S: Final = 60.0

# Ends on the upstream's side without a fault of a server: a good end, a publisher's, a limit of streamd's own.
_NO_FAULT: Final = frozenset(
    (
        CloseReason.COMPLETE,
        CloseReason.SEALED,
        CloseReason.PUBLISHER_GONE,
        CloseReason.FAILED,
        CloseReason.UPSTREAM_STREAM_TIMEOUT,
    )
)

# The beginning of a key (streamd's and OpenAI's, Anthropic's; Google's) or of a JWT, plain or percent-encoded, and all
# that follows it up to the next delimiter. A client with a wrong base URL has it in the path.
_SECRET = re.compile(
    r"(?:(?<![A-Za-z0-9])|(?<=%[0-9A-Fa-f]{2}))(?P<key>(?:s|%(?:25)*73)(?:k|%(?:25)*6[Bb])(?:[-_]|%(?:25)*2[Dd])|AIza)"
    r"[^/?&#;=\s]+"
    # Stream ids are base64url, too, and have no dot: within a word, only a dot makes a JWT.
    r"|(?:(?<![A-Za-z0-9_-])|(?<=%[0-9A-Fa-f]{2})|(?=[A-Za-z0-9_%-]+(?:\.|%(?:25)*2[Ee])))"
    r"(?:e|%(?:25)*65)(?:y|%(?:25)*79)(?:J|%(?:25)*4[Aa])[^/?&#;=\s]{4,}"
)


def without_secrets(text: str) -> str:
    """The text without anything that begins as a key or a token."""
    if "sk" not in text and "eyJ" not in text and "AIza" not in text and "%" not in text:
        return text
    return _SECRET.sub(lambda found: "sk-***" if found["key"] else "eyJ***", text)


def shown_id(stream: Stream) -> str:
    """A stream's id for the log. A name of a client's choice may be a token by mistake; a generated id isn't."""
    return without_secrets(stream.id) if stream.epoch else stream.id


class LateLines:
    """Log lines that wait for the end of the loop's turn; at most a line per request and stream that ended in it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lines: list[tuple[int, str, dict[str, logs.Value], bool]] = []

    def info(self, name: str, /, **fields: logs.Value) -> None:
        """Do logs.event() at level INFO, at the end of the turn."""
        self.event(logs.INFO, name, **fields)

    def event(self, level: int, name: str, is_watched: bool = False, /, **fields: logs.Value) -> None:
        """Do logs.event(), at the end of the turn; whatever the lowest level is, if it `is_watched`."""
        if not self._lines:
            self._loop.call_soon(self.flush)
        self._lines.append((level, name, fields, is_watched))

    def flush(self) -> None:
        """Write the waiting lines now."""
        lines, self._lines = self._lines, []
        with logs.together():
            for level, name, fields, is_watched in lines:
                (logs.always if is_watched else logs.event)(level, name, **fields)


def write_step(name: str, request: Request, stream: Stream | None, fields: dict[str, logs.Value]) -> None:
    """A step of a request (net/story.py), at once: its reader wants to see where the request is now."""
    shown = shown_id(stream) if stream is not None else None
    logs.always(logs.DEBUG, name, id=without_secrets(request.id), stream=shown, **fields)


class FaultBoard(Protocol):
    """The warnings of all workers about each server (daemon/shared.py)."""

    def warned_elsewhere(self, upstream: str, minute: int) -> int:
        """The other workers' warnings in this minute of the common clock."""

    def set_warned(self, upstream: str, minute: int, count: int) -> None:
        """Publish this worker's number of warnings in this minute."""


class FaultWarnings:
    """Decides which requests that a server is at fault for get a warning; the next warning counts the others."""

    def __init__(self) -> None:
        self.board: FaultBoard | None = None  # of several workers
        self._minute = 0
        self._warned: dict[str, int] = {}  # by server, in this minute
        self._others: dict[str, int] = {}  # by server, since its last warning; both bounded by the settings' servers

    def more(self, upstream: str, now: float) -> int | None:
        """None: this request gets no warning. Else the number of requests like it since the last warning."""
        minute = int(now / MINUTE_S)
        if minute != self._minute:
            self._minute = minute
            self._warned.clear()
        own = self._warned.get(upstream, 0)
        elsewhere = self.board.warned_elsewhere(upstream, minute) if self.board is not None else 0
        if own + elsewhere >= FAULT_LINES_PER_MINUTE_MAX:
            self._others[upstream] = self._others.get(upstream, 0) + 1
            return None
        self._warned[upstream] = own + 1
        if self.board is not None:
            self.board.set_warned(upstream, minute, own + 1)
        return self._others.pop(upstream, 0)


def is_at_fault(reason: CloseReason, status: int, upstream: str) -> bool:
    """Whether a request with this end shows a fault of the server, or that no server is left to take it.

    `status` is the answer's; an error of the server's own that was passed on as it is has the reason COMPLETE.
    """
    if reason is CloseReason.NO_UPSTREAM:
        return True
    if not upstream:
        return False
    if reason is CloseReason.COMPLETE:
        return status >= 500
    return reason.by is By.UPSTREAM and reason not in _NO_FAULT


def is_look(answer: Answer) -> bool:
    """Whether an operator, or a program that watches, looked at the daemon and got what it asked for.

    Such a program asks each second or more often, which would push all other lines out of a journal of limited size:
    these lines are at level DEBUG.
    """
    request = answer.request
    is_good = request.method in ("GET", "HEAD") and 200 <= request.status < 300
    return is_good and answer.origin.is_operators and answer.reader is None and not request.upstream


class RequestLog:
    """Counts each request that has ended, and writes its line."""

    def __init__(self, runtime: Runtime, lines: LateLines, served: Callable[[str, str], Served]) -> None:
        """`served` names the upstream and the model of a request for its metrics."""
        self._runtime = runtime
        self._lines = lines
        self.faults = FaultWarnings()
        self._served = served
        # refused strangers
        self._second = 0
        self._lines_of_second = 0
        self._left_out = 0  # lines, since the last that was written

    def _is_left_out(self, answer: Answer, now: float) -> bool:
        """Whether the line of a refused stranger is one too many in this second."""
        request = answer.request
        if request.principal is not ANONYMOUS or 200 <= request.status < 400:
            return False
        if int(now) != self._second:
            self._second, self._lines_of_second = int(now), 0
        self._lines_of_second += 1
        return self._lines_of_second > STRANGERS_LINES_PER_S_MAX

    def request_ended(self, answer: Answer) -> None:
        request, reader = answer.request, answer.reader
        if self._runtime.tracing is not None:
            with self._runtime.guard:  # the count and the line follow in any case
                self._runtime.tracing.ended(request, reader)
        counters, now = self._runtime.counters, self._runtime.time()
        duration_s = now - request.started_at
        assert request.reason is not None
        counters.requests_ended[request.reason] += 1
        counters.request_s.observe(duration_s)
        is_generation = request.method == "POST" and request.upstream and 200 <= request.status < 300
        is_whole = reader is None or reader.seq_start == 1  # else the request resumes an answer
        if is_generation and is_whole and request.reason is CloseReason.COMPLETE:
            observe(counters.e2e_s, self._served(request.upstream, request.model), duration_s)
        stream = reader.stream if reader is not None else None
        events = delivered = dropped = None
        first_s = request.answered_at - request.started_at if request.answered_at else None
        if reader is not None and stream is not None:
            events, delivered, dropped = reader.events_delivered, reader.bytes_delivered, reader.dropped
            counters.delivered_events += events
            counters.delivered_bytes += delivered
            counters.dropped_events += dropped
            first_s = None
            if stream.first_event_at and reader.seq_start == 1:
                first_s = max(0.0, stream.first_event_at - request.started_at)
        if self._is_left_out(answer, now):
            self._left_out += 1
            return
        level, left_out = logs.DEBUG, 0
        if not is_look(answer):
            level = logs.INFO
            left_out, self._left_out = self._left_out, 0
        upstream = request.upstream or (stream.upstream if stream is not None else "")
        is_fault = is_at_fault(request.reason, request.status, upstream)
        more = self.faults.more(upstream, now) if is_fault else None
        self._lines.event(
            level if more is None else logs.WARNING,
            "request",
            self._runtime.story.is_on and self._runtime.story.is_watched(request, stream),
            id=without_secrets(request.id),
            peer=answer.origin.peer(request),
            method=without_secrets(request.method),
            path=without_secrets(request.path),
            status=request.status,
            reason=request.reason,
            duration_s=round(duration_s, 4),
            first_s=round(first_s, 4) if first_s is not None else None,
            events=events,
            bytes=delivered if delivered is not None else answer.body_bytes,
            dropped=dropped or None,
            stream=shown_id(stream) if stream is not None else None,
            upstream=request.upstream or None,
            upstream_id=without_secrets(request.upstream_id) or None,
            model=without_secrets(request.model) or None,
            principal=request.principal.id if request.principal is not ANONYMOUS else None,
            key_name=request.principal.key.name if request.principal.key is not None else None,
            traceparent=request.traceparent or None,
            left_out=left_out or None,
            more=more or None,
        )
