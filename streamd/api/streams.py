"""/v1/streams: list, read, resume, watch and stop streams by their ids."""

from __future__ import annotations

import builtins
import heapq
import re
import urllib.parse
from typing import Any, NamedTuple

import orjson

from streamd.api.gather import Gathered, all_others, gather
from streamd.api.rights import Rights
from streamd.api.seeking import Seeking, holder_of
from streamd.core.hub import Gone
from streamd.core.refusal import Refusal, Retry
from streamd.core.shares import Shares
from streamd.core.stream import Stream
from streamd.core.write_interval import WriteInterval
from streamd.net.answer import Answer, Pending
from streamd.net.application import Plan
from streamd.net.http_error import HttpError, stream_not_found
from streamd.net.request import Request
from streamd.net.runtime import Runtime
from streamd.net.sweep import NEVER
from streamd.policy import Policy
from streamd.reasons import CloseReason
from streamd.rows import Refused
from streamd.wire.dialect import Dialect
from streamd.wire.event_id import EventId, names_position, valid_last_event_id, valid_name
from streamd.wire.query import fields

PREFIX = "/v1/streams/"
JSON = (b"content-type", b"application/json")
LIST = "streams"  # the kind of question to other workers

# A page of the list: 200 B a stream, so 20 KB; a client that wants all pages goes on with ?after=.
PAGE_STREAMS = 100
PAGE_STREAMS_MAX = 1000

_seq = re.compile(r"[1-9][0-9]{0,15}").fullmatch
_seconds = re.compile(r"[0-9]{1,4}(?:\.[0-9]{1,3})?").fullmatch


WAITERS = Refusal(
    CloseReason.OVER_BUDGET,
    "over_capacity",
    "As many readers as there is room for wait for streams to be opened. Try again later.",
    retry=Retry.WITH_ROOM,
)

ListPosition = tuple[float, str]
"""The time at which a stream was opened, and its id: the order of lists. All workers' clocks are the same."""

Entry = tuple[float, str, dict[str, Any]]
"""A stream in a list: its place, and its state."""


class Wanted(NamedTuple):
    """A page of the list."""

    owners: tuple[str, ...] | None  # principals that own the streams; None: all
    state: str | None
    limit: int
    after: ListPosition | None


class Streams:
    """Routes of existing streams."""

    def __init__(self, runtime: Runtime, rights: Rights) -> None:
        self._runtime = runtime
        self._rights = rights
        self._waiting: dict[str, dict[WaitForName, None]] = {}  # in the order of their coming
        self._waiters: Shares[WaitForName] = Shares()
        self.seeking = Seeking(runtime)
        self._stream_plans = {"GET": Plan(answer=self.read), "DELETE": Plan(answer=self.stop)}
        self._list_plans = {"GET": Plan(answer=self.list)}

    def routes(self, request: Request) -> dict[str, Plan] | None:
        if request.path == PREFIX[:-1]:
            return self._list_plans
        if request.path.startswith(PREFIX) and "/" not in request.path[len(PREFIX) :]:
            return self._stream_plans
        return None

    # -- reading

    def read(self, answer: Answer) -> None:
        """Send the stream from a position on, live if it still runs; or its state, if JSON is asked for."""
        request = answer.request
        last, wait_s = last_event_id(request), self._wait_s(request)
        name = name_of(request)
        stream = self.here(name)
        refusal = self._rights.why_not_read(request, name, stream)
        if (stream is None or refusal is not None) and wait_s and valid_name(name.encode("utf-8", "replace")):
            self._wait(answer, name, wait_s, refusal)
            return
        if refusal is not None:
            raise refusal
        if stream is None and self.seeking.may_be_elsewhere(name):
            self.seeking.seek(answer, name, lambda found: self._read_found(answer, name, found, last))
            return
        self._send(answer, stream or self.get(name), last)

    def _read_found(self, answer: Answer, name: str, found: Stream | None, last: EventId | None) -> None:
        """Another node's stream was looked for: answer as if it had been here from the start. Raises HttpError."""
        self._send(answer, self.readable(answer.request, name), last)

    def read_from(self, answer: Answer, stream: Stream, last: EventId | None) -> None:
        """Answer with the stream, after `last` if given. Raises HttpError."""
        self._rights.check_read(answer.request, stream.id, stream)
        self._send(answer, stream, last)

    def readable(self, request: Request, stream_id: str) -> Stream:
        """The stream, if the client may read it. Raises HttpError: the same if it may not and if there is none."""
        stream = self.here(stream_id)
        self._rights.check_read(request, stream_id, stream)
        return stream or self.get(stream_id)

    def writable(self, request: Request, stream_id: str, *, below: str = "") -> Stream:
        """The stream, if the client may publish to it (`below`: /events) or stop it. Raises HttpError as readable()."""
        stream = self.here(stream_id)
        self._rights.check_write(request, stream_id, stream, below=below)
        if stream is not None and stream.terms.is_copy:
            text = "The stream is another node's: publish to it, or stop it, at the node that opened it."
            raise HttpError(409, text, code="stream_elsewhere")
        return stream or self.get(stream_id)

    def _send(self, answer: Answer, stream: Stream, last: EventId | None) -> None:
        request = answer.request
        if _wants_json(request):
            body = orjson.dumps(state_of(stream, self._runtime))
            answer.send(200, body, [JSON, (b"x-stream-id", stream.id.encode())])
            return
        policy = policy_of(request) or stream.terms.policy
        reset = last is not None and last.stream == stream.id and (last.epoch or "") != stream.epoch
        seq = 1 if reset else self.position(request, stream, last)
        is_told = last is not None and last.told
        self.join(answer, stream, seq, policy, resumed=last is not None, reset=reset, is_told=is_told)

    def resume(self, answer: Answer, last: EventId, policy: Policy) -> None:
        """Go on with the stream behind a position, wherever the stream is. Raises HttpError."""
        request = answer.request

        def go_on(found: Stream | None) -> None:
            stream = self.readable(request, last.stream)
            seq = self.position(request, stream, last)
            self.join(answer, stream, seq, policy, resumed=True, is_told=last.told)

        here = self.here(last.stream)
        if here is None and self.seeking.may_be_elsewhere(last.stream):
            self._rights.check_read(request, last.stream, None)
            self.seeking.seek(answer, last.stream, go_on)
        else:
            go_on(here)

    def join(
        self,
        answer: Answer,
        stream: Stream,
        seq: int,
        policy: Policy,
        *,
        resumed: bool,
        reset: bool = False,
        is_told: bool = False,
    ) -> None:
        """Subscribe the client. Past a sealed stream's end answer 204: the only polite way to stop an EventSource.

        `is_told`: the client knows already that the stream's node is lost.
        """
        request = answer.request
        self.seeking.check_followed(stream)
        if stream.terms.is_copy and seq > stream.log.seq_next and stream.reason is None:
            again = lambda: self.join(answer, stream, seq, policy, resumed=resumed, is_told=is_told)  # noqa: E731
            self.seeking.wait_for_copy(answer, stream, seq, again)
            return
        request.model = request.model or stream.terms.model
        request.upstream = stream.upstream
        is_owed_a_word = stream.reason is CloseReason.NODE_LOST and not is_told
        if stream.reason is not None and seq >= stream.log.seq_next and not (reset or is_owed_a_word):
            answer.send(204, fields=[(b"x-stream-id", stream.id.encode())])
            return
        if resumed:
            self._runtime.resumed(stream)
        answer.stream(stream, seq=seq, policy=policy, reset=reset)

    def here(self, stream_id: str) -> Stream | None:
        """The stream, if it is here, before any right was checked: get() says why not, afterwards."""
        try:
            return self._runtime.hub.get(stream_id)
        except Gone:
            return None

    def known(self, stream_id: str) -> Stream | None:
        """The stream, if it is here. Raises HttpError 410 if it was here and can't come back."""
        try:
            return self._runtime.hub.get(stream_id)
        except Gone:
            text = "The stream ended with the process that carried it; start it again."
            raise HttpError(410, text, code="stream_gone", reason=CloseReason.NOT_FOUND) from None

    def get(self, stream_id: str) -> Stream:
        """The stream. Raises HttpError: 404, or 410 if it was here and can't come back."""
        stream = self.known(stream_id)
        if stream is None:
            raise stream_not_found(self._runtime.settings.retention_s)
        return stream

    def position(self, request: Request, stream: Stream, last: EventId | None) -> int:
        """The first seq to send. Raises HttpError 400 for another stream's id or a position that was never reached."""
        if last is not None:
            if last.stream != stream.id or (last.epoch or "") != stream.epoch:
                text = "Last-Event-ID belongs to another stream."
                raise HttpError(400, text, code="wrong_stream", param="last_event_id")
            seq = last.seq + 1
        else:
            seq = _from(request)
        if stream.terms.is_copy:
            return seq  # join() waits for a position that the copy hasn't reached yet
        if seq > stream.log.seq_next and stream.reason is None:
            text = f"The stream has not got as far as {seq}: its last event is {stream.log.seq_next - 1}."
            raise HttpError(400, text, code="position_not_reached", param="last_event_id")
        return min(seq, stream.log.seq_next)

    # -- waiting for a name

    def _wait_s(self, request: Request) -> float:
        given = query_of(request).get("wait")
        if given is None:
            return 0.0
        if not _seconds(given):
            raise HttpError(400, "wait has to be a number of seconds, at most 60.", code="bad_wait", param="wait")
        return min(float(given), self._runtime.settings.wait_max_s)

    def _wait(self, answer: Answer, name: str, wait_s: float, refusal: HttpError | None) -> None:
        owner = holder_of(answer)
        if self._waiters.total >= self._runtime.admission.waiters_max:
            yielding = self._waiters.yielding(owner, lambda waiting: True)
            if yielding is None:
                raise self._runtime.refused(WAITERS)
            yielding.give_way()
        waiting = WaitForName(self._runtime, self, answer, name, wait_s, refusal, owner)
        self._waiting.setdefault(name, {})[waiting] = None
        self._waiters.add(owner, waiting)

    def wait_on(self, answer: Answer, name: str, until: float) -> WaitForName:
        """A reader of another process goes on waiting for a stream of this name, with the place that it had there."""
        waiting = WaitForName(
            self._runtime,
            self,
            answer,
            name,
            until - self._runtime.time(),
            self._rights.why_not_read(answer.request, name, None),
            holder_of(answer),
        )
        self._waiting.setdefault(name, {})[waiting] = None
        self._waiters.add(waiting.owner, waiting)
        return waiting

    def wake_waiting(self, stream: Stream) -> None:
        """A stream was opened: answer the readers that wait for its name, and may read it."""
        waiting = self._waiting.pop(stream.id, {})
        left = {each: None for each in waiting if each.refusal is not None and not stream.terms.name_public}
        if left:
            self._waiting[stream.id] = left
        for each in waiting:
            if each.refusal is None or stream.terms.name_public:
                self._waiters.discard(each.owner, each)
                each.opened(stream)

    def forget_waiting(self, waiting: WaitForName) -> None:
        self._waiters.discard(waiting.owner, waiting)
        others = self._waiting.get(waiting.name, {})
        others.pop(waiting, None)
        if not others:
            self._waiting.pop(waiting.name, None)

    # -- stopping

    def stop(self, answer: Answer) -> None:
        """End a stream now: its upstream is aborted, its readers are told. A sealed stream is forgotten."""
        request = answer.request
        name = name_of(request)
        stream = self.here(name)
        self._rights.check_write(request, name, stream)
        if stream is None and self.seeking.may_be_elsewhere(name):
            self.seeking.seek(answer, name, lambda found: self._stop_found(answer, name))
        else:
            self._stop(answer, stream or self.get(name))

    def _stop_found(self, answer: Answer, name: str) -> None:
        """Another node's stream was looked for: answer as if it had been here from the start. Raises HttpError."""
        stream = self.here(name)
        self._rights.check_write(answer.request, name, stream)
        self._stop(answer, stream or self.get(name))

    def _stop(self, answer: Answer, stream: Stream) -> None:
        if stream.terms.is_copy:
            self.seeking.stop(answer, stream)
        else:
            self.stop_stream(stream)
            answer.send(204)

    def stop_stream(self, stream: Stream) -> None:
        if stream.reason is None:
            now = self._runtime.time()
            stream.cancel(CloseReason.CANCELLED, now, message="The stream was stopped by request (DELETE).")
        elif not stream.readers:
            if self.seeking.cluster is not None:
                self.seeking.cluster.forget(stream)
            self._runtime.hub.remove(stream)

    # -- listing

    def list(self, answer: Answer) -> None:
        """The caller's streams, oldest first; all on the admin surface. ?state=live|sealed, ?limit=, ?after=<id>.

        With several workers each lists its own streams; the worker that owns `after` answers the request.
        """
        request = answer.request
        query = query_of(request)
        state, limit = query.get("state"), query.get("limit", str(PAGE_STREAMS))
        if state not in (None, "live", "sealed"):
            raise HttpError(400, "state has to be live or sealed.", code="bad_state", param="state")
        if not _seq(limit) or int(limit) > PAGE_STREAMS_MAX:
            raise HttpError(
                400, f"limit has to be a number from 1 to {PAGE_STREAMS_MAX}.", code="bad_limit", param="limit"
            )
        owners, after = self._rights.shown_to(request.principal), query.get("after")
        wanted = Wanted(owners, state, int(limit), self._position_of(after, owners) if after is not None else None)
        question = orjson.dumps(tuple(wanted))

        def finish(others: Gathered) -> None:
            entries = self._listed(wanted)
            for each in others.answers:
                entries += orjson.loads(each)
            entries.sort(key=lambda entry: (entry[0], entry[1]))
            page = [entry[2] for entry in entries[: wanted.limit]]
            more = len(entries) > len(page)
            fields = {"data": page, "has_more": more, "last_id": page[-1]["id"] if page else None}
            if others.missing:
                fields["workers_missing"] = len(others.missing)
            answer.send(200, orjson.dumps(fields), [JSON])

        gather(self._runtime, answer, LIST, all_others(self._runtime, question), finish)

    def answer_list(self, question: bytes) -> bytes:
        """Answer another worker's question: this worker's part of the page."""
        owners, state, limit, after = orjson.loads(question)
        place = (after[0], after[1]) if after is not None else None
        return orjson.dumps(self._listed(Wanted(None if owners is None else tuple(owners), state, limit, place)))

    def _position_of(self, after: str, owners: tuple[str, ...] | None) -> ListPosition:
        """The position after which a list goes on. Raises HttpError 400 for a stream that isn't in the list."""
        stream = self.known(after)
        if stream is None or (owners is not None and stream.terms.owner not in owners):
            raise HttpError(
                400,
                "after has to be the id of a stream in this list; begin again without it.",
                code="bad_after",
                param="after",
            )
        return stream.opened_at, stream.id

    def _listed(self, wanted: Wanted) -> builtins.list[Entry]:
        """This worker's streams of a page, and the next stream if there are more."""
        shown = (
            (stream.opened_at, stream.id, stream)
            for stream in self._runtime.hub
            if not stream.terms.is_copy
            and (wanted.owners is None or stream.terms.owner in wanted.owners)
            and wanted.state in (None, state_word(stream))
            and (wanted.after is None or (stream.opened_at, stream.id) > wanted.after)
        )
        page = heapq.nsmallest(wanted.limit + 1, shown)
        return [(opened_at, name, state_of(stream, self._runtime)) for opened_at, name, stream in page]


class WaitForName(Pending):
    """A reader that came before its stream was opened (?wait=), or that may not read it: the two look alike to it."""

    __slots__ = ("_answer", "_runtime", "_streams", "due_at", "name", "owner", "refusal")

    def __init__(
        self,
        runtime: Runtime,
        streams: Streams,
        answer: Answer,
        name: str,
        wait_s: float,
        refusal: HttpError | None,
        owner: str,
    ) -> None:
        """`refusal`: why the reader may not read a stream of this name that isn't public; None: it may.

        `owner`: the principal, or for anonymous readers the address, whose share of the waiters this is.
        """
        self._runtime = runtime
        self._streams = streams
        self._answer = answer
        self.name = name
        self.refusal = refusal
        self.owner = owner
        self.due_at = runtime.time() + wait_s
        answer.later(self)
        runtime.sweep.add(self)

    def opened(self, stream: Stream) -> None:
        """The stream is there: answer as if it had been open from the start."""
        answer = self._answer
        last = last_event_id(answer.request)  # from an earlier stream of the same name, if the reader has read it
        self._runtime.sweep.discard(self)
        answer.settle(lambda: self._streams.read_from(answer, stream, last))

    def on_due(self, now: float) -> float:
        """The stream did not come in time."""
        self.on_gone(CloseReason.NOT_FOUND)
        self._answer.settle(self._refuse)
        return NEVER

    def leave(self) -> None:
        """The reader goes on waiting in another process."""
        self._runtime.sweep.discard(self)
        self._streams.forget_waiting(self)

    def give_way(self) -> None:
        """There are too many waiters, and this one's owner has most of them."""
        self.on_gone(CloseReason.OVER_BUDGET)
        self._answer.settle(lambda: self._answer.refuse(self._runtime.refused(WAITERS)))

    def crash(self, where: str, error: Exception) -> None:
        """on_due() raised: the request ends. Never raises."""
        self._runtime.sweep.discard(self)
        self._answer.crash(where, error)

    def _refuse(self) -> None:
        if self.refusal is not None:
            raise self.refusal
        self._streams.get(self.name)

    def on_gone(self, reason: CloseReason) -> None:
        self._runtime.sweep.discard(self)
        self._streams.forget_waiting(self)


def state_word(stream: Stream) -> str:
    """`live` or `sealed`."""
    return "live" if stream.reason is None else "sealed"


def state_of(stream: Stream, runtime: Runtime) -> dict[str, Any]:
    """The state of a stream, for publishers and operators. Lag is in events, over the readers of this second."""
    now = runtime.time()
    lag = runtime.lags.of(stream, now)
    return {
        "id": stream.id,
        "epoch": stream.epoch or None,
        "state": state_word(stream),
        "reason": stream.reason.word if stream.reason is not None else None,
        "first_seq": stream.log.seq_first,
        "last_seq": stream.events,
        "log_bytes": stream.log.bytes_held,
        "text_events": stream.text_events,
        "text_bytes": stream.text_bytes,
        "subscribers": len(stream.readers),
        "lag_max": lag.most,
        "lag_median": lag.median,
        "dropped_events": stream.drops + lag.dropped,
        "age_s": round(now - stream.opened_at, 3),
        "policy": stream.terms.policy.value,
        "model": stream.terms.model or None,
        "upstream": stream.upstream or None,
    }


def name_of(request: Request) -> str:
    """The stream that the path names, percent-encoding undone."""
    return urllib.parse.unquote(request.path[len(PREFIX) :])


def last_event_id(request: Request) -> EventId | None:
    """The reader's position: from the header, or from the query for clients that can't set it. Raises HttpError 400."""
    raw = _position_given(request)
    if not raw:
        return None
    parsed = valid_last_event_id(raw)
    if parsed is None:
        text = "Last-Event-ID has to be an id as streamd sent it: <stream id>:<seq>."
        raise HttpError(400, text, code="bad_last_event_id", param="last_event_id")
    return parsed


def relayed_last_event_id(request: Request) -> EventId | None:
    """The same for a request that may go upstream. Raises HttpError 400.

    On a route of no known dialect the upstream may count its own events (MCP's servers do): there only the id of a
    relayed stream is streamd's, and any other text is the upstream's.
    """
    if request.dialect is not Dialect.UNKNOWN:
        return last_event_id(request)
    parsed = valid_last_event_id(_position_given(request))
    return parsed if parsed is not None and parsed.epoch is None else None


def _position_given(request: Request) -> bytes:
    """The header, which a browser keeps up to date, else the last spelling in the query: polyfills append theirs.

    Empty if there is none: an EventSource without an id sends no header, a fetch wrapper an empty header.
    """
    header, head = request.get(b"last-event-id"), request.head
    if header or head is None or not head.query:
        return header or b""
    given = [value for name, value in fields(head.query) if value and names_position(name)]
    return given[-1].encode("utf-8", "surrogatepass") if given else b""


def accepts_events(request: Request) -> bool:
    """Whether the client names text/event-stream among the types that it takes, as an EventSource does."""
    return b"text/event-stream" in (request.get(b"accept") or b"").lower()


def policy_of(request: Request) -> Policy | None:
    """The policy of X-Stream-Policy, if given. Raises HttpError 400 for an unknown word."""
    given = request.get(b"x-stream-policy")
    if given is None:
        return None
    try:
        return Policy(given.decode("latin-1"))
    except ValueError:
        words = ", ".join(policy.value for policy in Policy)
        raise HttpError(
            400, f"X-Stream-Policy has to be one of {words}.", code="bad_policy", param="x-stream-policy"
        ) from None


def write_interval_of(request: Request) -> WriteInterval:
    """The write interval of a stream that the request opens: its route's, which X-Stream-Write-Interval may raise, and
    lower where the route allows that. Raises HttpError 400 for a value that is no interval.
    """
    given = request.get(b"x-stream-write-interval")
    if given is None:
        return WriteInterval.of_setting(request.route.write_interval_s)
    try:
        asked = WriteInterval.parse(given.decode("latin-1").strip())
    except Refused as refused:
        text = f"X-Stream-Write-Interval has to be {refused}."
        raise HttpError(400, text, code="bad_write_interval", param="x-stream-write-interval") from None
    return granted(request, asked)


def granted(request: Request, asked: WriteInterval) -> WriteInterval:
    """The write interval that a request gets which asks for this one."""
    route = request.route
    own = WriteInterval.of_setting(route.write_interval_s)
    return asked if route.write_interval_lower else own.raised_to(asked)


def query_of(request: Request) -> dict[str, str]:
    """The query's fields, the first of each name."""
    head = request.head
    if head is None or not head.query:
        return {}
    return dict(reversed(fields(head.query)))


def _from(request: Request) -> int:
    given = query_of(request).get("from")
    if given is None:
        return 1
    if not _seq(given):
        raise HttpError(
            400, "from has to be the seq of the first event wanted, 1 or more.", code="bad_from", param="from"
        )
    return int(given)


def _wants_json(request: Request) -> bool:
    accept = request.get(b"accept") or b""
    return b"application/json" in accept and b"text/event-stream" not in accept
