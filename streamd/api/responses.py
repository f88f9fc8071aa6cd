"""OpenAI Responses' own way to resume: GET /v1/responses/{id}?stream=true&starting_after=N, over the same log.

A stream is known by the id of its `response.created`, to the principal that asked for it; an id that isn't known goes
upstream like any other request. So does one whose generation ended because nobody read it: where the request was a
`background` one it has gone on there, and the upstream knows the rest.

`starting_after` is the dialect's sequence_number, not our seq: what follows are the events with a greater one. An
upstream may number as it likes as long as it counts upwards, so the place is searched for, not computed.

POST /v1/responses/{id}/cancel always goes upstream: it is for `background` responses, which live there, and whose
stream then ends by itself. What runs for its readers alone is stopped with DELETE /v1/streams/{id}.
"""

from __future__ import annotations

import re

from streamd.api.access import Access
from streamd.api.streams import policy_of, query_of
from streamd.core.replay import ReplayLog
from streamd.core.stream import Stream
from streamd.net.client import ClientConnection
from streamd.net.problem import Problem
from streamd.net.request import Plan, Request
from streamd.net.runtime import Runtime
from streamd.reasons import By, CloseReason
from streamd.wire.dialect import sequence_number_of

_path = re.compile(r"/v1/responses/([^/]+)").fullmatch
_number = re.compile(r"[0-9]{1,15}").fullmatch

# Events without a number are rare (our own error event behind an unnumbered one): so many are looked past.
UNNUMBERED_MAX = 8


class Responses:
    """The one route of this dialect that the log can answer."""

    def __init__(self, runtime: Runtime, access: Access) -> None:
        self._runtime = runtime
        self._access = access
        self._plan = Plan(answer=self.read)

    def plan(self, request: Request) -> Plan | None:
        """None: not ours to answer."""
        if request.method not in ("GET", "HEAD") or query_of(request).get("stream") not in ("true", "1"):
            return None
        return self._plan if self._known(request) is not None else None

    def _known(self, request: Request) -> Stream | None:
        found = _path(request.path)
        stream = self._runtime.hub.by_response_id(request.principal.id, found[1]) if found else None
        if stream is None or (stream.reason is not None and stream.reason.by in (By.READER, By.NETWORK, By.STREAMD)):
            return None
        return stream

    def read(self, connection: ClientConnection, request: Request) -> None:
        """The stream, after `starting_after` if given. Raises Problem."""
        stream = self._known(request)
        if stream is None:  # it ended while the request was read
            raise Problem(404, "The response is not known any more.", code="not_found", reason=CloseReason.NOT_FOUND)
        self._access.check_read(request, stream)
        given = query_of(request).get("starting_after")
        if given is not None and not _number(given):
            text = "starting_after is the sequence_number of the last event that you have."
            raise Problem(400, text, code="bad_starting_after", param="starting_after")
        seq = 1 if given is None else _seq_after(stream, int(given))
        request.model, request.upstream = stream.model, stream.upstream
        self._runtime.counters.resumes += 1
        connection.begin_stream(stream, seq=seq, policy=policy_of(request) or stream.policy)


def _seq_after(stream: Stream, number: int) -> int:
    """The first seq to send; below the log's first it will be announced as a gap. Raises Problem 400."""
    log = stream.log
    first = _number_at(log, log.seq_first)
    if first is None:
        text = "The events of this response have no sequence_number; read it without starting_after."
        raise Problem(400, text, code="no_sequence_numbers", param="starting_after")
    if first > number:
        lost = first - number - 1
        return max(1, log.seq_first - lost)
    seq, end = log.seq_first, log.seq_next  # number_at(seq) <= number; at end it is greater, or nothing is there
    while end - seq > 1:
        middle = (seq + end) // 2
        found = _number_at(log, middle)
        if found is None or found > number:
            end = middle
        else:
            seq = middle
    last = _number_at(log, seq)
    if end == log.seq_next and stream.reason is None and last is not None and last < number:
        text = f"The response has not got as far as {number}: its last sequence_number is {last}."
        raise Problem(400, text, code="position_not_reached", param="starting_after")
    return end


def _number_at(log: ReplayLog, seq: int) -> int | None:
    """The sequence_number of the event, or of the next that has one; None if there is none near."""
    for each in range(seq, min(seq + UNNUMBERED_MAX, log.seq_next)):
        number = sequence_number_of(log.read(log.seek(each), bytes_max=1)[0][1])
        if number is not None:
            return number
    return None
