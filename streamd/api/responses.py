"""OpenAI Responses' own way to resume: GET /v1/responses/{id}?stream=true&starting_after=N, over the same log.

A stream is known by the id of its `response.created`, to the principal that asked for it; a request with an unknown id
goes upstream like any other. So does a request for a generation that ended for lack of readers: if it was made with
`background`, it has gone on there, and the upstream knows the rest.

`starting_after` is the dialect's sequence_number, not streamd's seq: the events with a greater number follow. An
upstream may number as it likes as long as it counts upwards, so the place is searched for, not computed.

POST /v1/responses/{id}/cancel always goes upstream: it is for `background` responses, which live there; a cancelled
response's stream ends by itself. A generation that runs for its readers alone is stopped with DELETE /v1/streams/{id}.
"""

from __future__ import annotations

import re

import orjson

from streamd.api.rights import Rights
from streamd.api.streams import Streams, accepts_events, last_event_id, policy_of, query_of
from streamd.core.replay import ReplayLog
from streamd.core.stream import Stream
from streamd.net.answer import Answer
from streamd.net.application import Plan
from streamd.net.http_error import HttpError
from streamd.net.peers import Note
from streamd.net.request import Request
from streamd.net.runtime import Runtime
from streamd.reasons import By, CloseReason
from streamd.wire.dialect import sequence_number_of

_path = re.compile(r"/v1/responses/([^/]+)").fullmatch
_number = re.compile(r"[0-9]{1,15}").fullmatch

# Events without a number are rare (streamd's error event after an unnumbered event). The search for a number skips at
# most this many.
UNNUMBERED_MAX = 8

# Bound of the responses of other workers that a worker remembers: those of a minute at 200 a second, 300 B each.
ELSEWHERE_MAX = 12_000

# The kinds of notes to other workers.
LEARNED, FORGOTTEN = "response", "response over"


class ResponsesRoute:
    """The only route of this dialect that the log can answer."""

    def __init__(self, runtime: Runtime, streams: Streams, rights: Rights) -> None:
        self._runtime = runtime
        self._streams = streams
        self._rights = rights
        self._plan = Plan(answer=self.read)
        self._elsewhere: dict[tuple[str, str], int] = {}  # principal and id -> the worker that has it, oldest first

    # -- several workers

    def owner(self, request: Request) -> int | None:
        """The slot of another worker that knows the response; None: no other worker does."""
        found = _found(request)
        return self._elsewhere.get((request.principal.id, found)) if found is not None else None

    def learned(self, stream: Stream) -> None:
        """A stream of this worker has its response id: tell the other workers."""
        self._tell(LEARNED, stream)

    def forgotten(self, stream: Stream) -> None:
        """A stream of this worker was removed: tell the other workers."""
        if stream.progress.response_id is not None:
            self._tell(FORGOTTEN, stream)

    def _tell(self, kind: str, stream: Stream) -> None:
        peers = self._runtime.peers
        if peers is not None:
            body = orjson.dumps([stream.terms.owner, stream.progress.response_id])
            for slot in peers.others():
                peers.tell(slot, kind, body)

    def take(self, note: Note) -> bool:
        """Whether a note belongs here; if so, record it."""
        if note.kind not in (LEARNED, FORGOTTEN):
            return False
        principal_id, response_id = orjson.loads(note.body)
        key = (str(principal_id), str(response_id))
        known = self._elsewhere.pop(key, None)
        if note.kind == LEARNED:
            if len(self._elsewhere) >= ELSEWHERE_MAX:
                del self._elsewhere[next(iter(self._elsewhere))]
            self._elsewhere[key] = note.slot
        elif known is not None and known != note.slot:
            self._elsewhere[key] = known  # a later request for it runs there
        return True

    # -- reading

    def plan(self, request: Request) -> Plan | None:
        """The plan for a response that is known here; None: other routes decide."""
        return self._plan if _found(request) is not None and self._known(request) is not None else None

    def _known(self, request: Request) -> Stream | None:
        found = _path(request.path)
        stream = self._runtime.hub.by_response_id(request.principal.id, found[1]) if found else None
        if stream is None or (stream.reason is not None and stream.reason.by in (By.READER, By.NETWORK, By.STREAMD)):
            return None
        return stream

    def read(self, answer: Answer) -> None:
        """Send the stream, after `starting_after` or Last-Event-ID if given. Raises HttpError.

        An EventSource asks for the same URL, starting_after included, each time it comes back: its Last-Event-ID is
        newer. At the end it gets 204; SDKs, which know the end by its event, get a stream without events.
        """
        request = answer.request
        stream = self._known(request)
        if stream is None:  # the stream ended while the request was read
            raise HttpError(404, "The response is not known any more.", code="not_found", reason=CloseReason.NOT_FOUND)
        self._rights.check_read(request, stream.id, stream)
        given = query_of(request).get("starting_after")
        if given is not None and not _number(given):
            text = "starting_after has to be the sequence_number of the last event that you have."
            raise HttpError(400, text, code="bad_starting_after", param="starting_after")
        last, policy = last_event_id(request), policy_of(request) or stream.terms.policy
        if last is not None:
            seq = self._streams.position(request, stream, last)
        else:
            seq = 1 if given is None else _seq_after(stream, int(given))
        if last is not None or accepts_events(request):
            self._streams.join(answer, stream, seq, policy, resumed=True)
            return
        request.model, request.upstream = stream.terms.model, stream.upstream
        self._runtime.resumed(stream)
        answer.stream(stream, seq=seq, policy=policy)


def _found(request: Request) -> str | None:
    """The id of the response that a request wants to read as a stream; None: it doesn't."""
    found = _path(request.path)
    if found is None or request.method not in ("GET", "HEAD"):
        return None
    return found[1] if query_of(request).get("stream") in ("true", "1") else None


def _seq_after(stream: Stream, number: int) -> int:
    """The first seq to send; a seq below the log's first is announced as a gap. Raises HttpError 400."""
    log = stream.log
    first = _number_at(log, log.seq_first)
    if first is None:
        text = "The events of this response have no sequence_number; read it without starting_after."
        raise HttpError(400, text, code="no_sequence_numbers", param="starting_after")
    if first > number:
        lost = first - number - 1
        return max(1, log.seq_first - lost)
    # Invariant: the number at `seq` is `last` <= number; the number at `end` is greater, or there is none.
    seq, last, end = log.seq_first, first, log.seq_next
    while end - seq > 1:
        middle = (seq + end) // 2
        found = _number_at(log, middle)
        if found is None or found > number:
            end = middle
        else:
            seq, last = middle, found
    if stream.reason is None and last < number and _number_at(log, end) is None:
        text = f"The response has not got as far as {number}: its last sequence_number is {last}."
        raise HttpError(400, text, code="position_not_reached", param="starting_after")
    return end


def _number_at(log: ReplayLog, seq: int) -> int | None:
    """The sequence_number of the event, or of the next numbered event within UNNUMBERED_MAX; None: there is none."""
    for each in range(seq, min(seq + UNNUMBERED_MAX, log.seq_next)):
        number = sequence_number_of(log.read(log.seek(each), bytes_max=1)[0][1])
        if number is not None:
            return number
    return None
