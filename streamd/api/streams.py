"""/v1/streams: resume, watch and stop a stream by its id."""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass

from streamd.core.hub import Gone
from streamd.core.stream import Policy, Stream
from streamd.net.client import ClientConnection
from streamd.net.problem import Problem
from streamd.net.request import Plan, Request
from streamd.net.runtime import Runtime
from streamd.reasons import CloseReason
from streamd.wire.event_id import EventId, valid_last_event_id

PREFIX = "/v1/streams/"

_seq = re.compile(r"[1-9][0-9]{0,15}").fullmatch


@dataclass(frozen=True, slots=True)
class Position:
    """Where a reader wants to begin: the seq of the first event it has not got."""

    seq: int


class Streams:
    """Routes of streams that exist. Their ids say enough: to know one is the right to read it."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._one = {"GET": Plan(answer=self.read), "DELETE": Plan(answer=self.stop)}

    def routes(self, request: Request) -> dict[str, Plan] | None:
        if request.path.startswith(PREFIX) and "/" not in request.path[len(PREFIX) :]:
            return self._one
        return None

    # -- reading

    def read(self, connection: ClientConnection, request: Request) -> None:
        """The stream from a position on, live if it still runs."""
        stream = self.find(request)
        last = last_event_id(request)
        seq = self.position(request, stream, last)
        policy = policy_of(request) or stream.policy
        self.join(connection, request, stream, seq, policy, resumed=last is not None)

    def join(
        self, connection: ClientConnection, request: Request, stream: Stream, seq: int, policy: Policy, *, resumed: bool
    ) -> None:
        """Subscribe the connection; past the end of a sealed stream 204, the only polite way to stop an EventSource."""
        request.model = request.model or stream.model
        request.upstream = stream.upstream
        if stream.reason is not None and seq >= stream.log.seq_next:
            connection.answer(204, headers=[(b"x-stream-id", stream.id.encode())])
            return
        if resumed:
            self._runtime.counters.resumes += 1
        connection.begin_stream(stream, seq=seq, policy=policy)

    def find(self, request: Request) -> Stream:
        """The stream that the path names. Raises Problem: 404, or 410 where it was and can't be any more."""
        return self.get(urllib.parse.unquote(request.path[len(PREFIX) :]))

    def get(self, stream_id: str) -> Stream:
        try:
            stream = self._runtime.hub.get(stream_id)
        except Gone:
            text = "The stream ended with the process that carried it; start it again."
            raise Problem(410, text, code="stream_gone", reason=CloseReason.NOT_FOUND) from None
        if stream is None:
            seconds = self._runtime.settings.retention_s
            text = f"There is no such stream, or it ended more than {seconds:g} s ago (retention)."
            raise Problem(404, text, code="stream_not_found", reason=CloseReason.NOT_FOUND)
        return stream

    def position(self, request: Request, stream: Stream, last: EventId | None) -> int:
        """The first seq to send. Raises Problem 400 for another stream's id or a position that was never reached."""
        if last is not None:
            if last.stream != stream.id or (last.epoch or "") != stream.epoch:
                raise Problem(
                    400, "Last-Event-ID belongs to another stream.", code="wrong_stream", param="last_event_id"
                )
            seq = last.seq + 1
        else:
            seq = _from(request)
        if seq > stream.log.seq_next and stream.reason is None:
            text = f"The stream has not got as far as {seq}: its last event is {stream.log.seq_next - 1}."
            raise Problem(400, text, code="position_not_reached", param="last_event_id")
        return min(seq, stream.log.seq_next)

    # -- stopping

    def stop(self, connection: ClientConnection, request: Request) -> None:
        """End a generation now: its upstream is aborted, its readers are told. A sealed one is forgotten."""
        stream = self.find(request)
        if stream.reason is None:
            now = self._runtime.time()
            stream.cancel(CloseReason.CANCELLED, now, message="The stream was stopped by request (DELETE).")
        elif not stream.readers:
            self._runtime.hub.remove(stream)
        connection.answer(204)


def last_event_id(request: Request) -> EventId | None:
    """What the reader has seen: the header, or the query for clients that can't set one. Raises Problem 400."""
    raw = request.get(b"last-event-id")
    if raw is None:
        given = query_of(request).get("last_event_id")
        raw = given.encode("utf-8", "surrogatepass") if given is not None else None
    if raw is None or raw == b"":
        return None  # an EventSource without an id sends none, a fetch wrapper an empty one
    parsed = valid_last_event_id(raw)
    if parsed is None:
        text = "Last-Event-ID has to be an id as streamd sent it: <stream id>:<seq>."
        raise Problem(400, text, code="bad_last_event_id", param="last_event_id")
    return parsed


def policy_of(request: Request) -> Policy | None:
    """X-Stream-Policy. Raises Problem 400 for a word that is none."""
    given = request.get(b"x-stream-policy")
    if given is None:
        return None
    try:
        return Policy(given.decode("latin-1"))
    except ValueError:
        words = ", ".join(policy.value for policy in Policy)
        raise Problem(400, f"X-Stream-Policy is one of {words}.", code="bad_policy", param="x-stream-policy") from None


def query_of(request: Request) -> dict[str, str]:
    """The query's fields, the first of each name."""
    head = request.head
    if head is None or not head.query:
        return {}
    fields: dict[str, str] = {}
    for name, value in urllib.parse.parse_qsl(head.query, keep_blank_values=True, max_num_fields=None):
        fields.setdefault(name, value)
    return fields


def _from(request: Request) -> int:
    given = query_of(request).get("from")
    if given is None:
        return 1
    if not _seq(given):
        raise Problem(400, "from is the seq of the first event wanted, 1 or more.", code="bad_from", param="from")
    return int(given)
