"""Publishing: applications that make tokens themselves hand them over here, and streamd deals with slow readers.

A published stream is a Stream with another source: a Publisher. Its request bodies become events (wire/publish.py). A
chunked body is published as it arrives, and its events stay published if it breaks off; a body with Content-Length is
all or nothing.

Either way a turn of the loop takes a share of the body (net/turns.py). A body with a length is parsed twice: it is
checked as it arrives, and held as its bytes. Its events, which may take thirty times as much memory, are made when they
are appended. While such a body is being appended, no other request appends to that stream, so its events stay together.

`Expected-Seq` makes a retry exact: no event twice, no event missing. It is compared when the request comes and again
when its first event is appended, because a whole body may take long to come. And it is a fence: a request that knows
the stream's last seq and goes on from there takes over from every request that began before. Without the fence the
bytes of a connection that its publisher has given up for lost could still arrive behind those of its retry.
"""

from __future__ import annotations

import re
import secrets
import urllib.parse
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import orjson

from streamd.api.rights import Rights
from streamd.api.streams import PREFIX, Streams, granted, name_of, query_of, write_interval_of
from streamd.config import Settings
from streamd.core.body_charge import BodyCharge
from streamd.core.limits import Account
from streamd.core.stream import Stream
from streamd.core.terms import Terms
from streamd.core.write_interval import WriteInterval
from streamd.net.answer import Answer, Pending
from streamd.net.application import BodySink, Plan
from streamd.net.http_error import HttpError, bad_json, unsupported_encoding
from streamd.net.request import Request
from streamd.net.runtime import Runtime, head_of
from streamd.net.sweep import NEVER
from streamd.net.turns import CONNECTION_PIECES_MAX, CONTAINERS_PER_PIECE, event_pieces, pieces_of
from streamd.policy import Policy
from streamd.reasons import CloseReason
from streamd.rows import Refused, parse_bytes, parse_duration
from streamd.wire import content_coding
from streamd.wire.dialect import Dialect
from streamd.wire.event_id import valid_name
from streamd.wire.http1 import Framing
from streamd.wire.json_scan import JsonError, Watched, loaded
from streamd.wire.publish import PUBLICATIONS, Publication, PublicationState, PublishError, publication_of

EVENTS = "events"

# The options of a new stream; any other is a 400 with this list in it.
OPTIONS = ("retention", "policy", "log_bytes_max", "log_events_max", "write_interval", "public")
OLD_OPTIONS = {"flush_interval": "write_interval"}  # earlier names, which are still taken
_WATCHED = Watched(dict.fromkeys((*OPTIONS, *OLD_OPTIONS)))
OPTIONS_BYTES_MAX = 16 * 1024
RETENTION_S_MAX = 24 * 3600.0

_seq = re.compile(rb"0|[1-9][0-9]{0,15}").fullmatch


class PublisherPlace(NamedTuple):
    """A Publisher without its stream and its requests."""

    fence: int
    due_at: float


class PublishingPlace(NamedTuple):
    """A publishing request without its answer."""

    media_type: str
    publication: PublicationState
    must_flow: bool
    seal: str
    expected: int | None
    fence: int
    held: bytes
    due_at: float


class Publisher:
    """The source of a published stream: counts its publishing requests, and limits the time until the next request."""

    __slots__ = ("_runtime", "appending", "due_at", "fence", "stream", "under_way")

    watch = None  # figures of firsts are those of generations

    needs_reader = False  # readers come and go; the publisher goes on

    def __init__(self, runtime: Runtime, stream: Stream) -> None:
        self._runtime = runtime
        self.stream = stream
        self.under_way = 0
        self.fence = 0  # requests with an earlier fence may publish no more
        self.appending: Publishing | None = None  # the request whose whole body is being appended, over several turns
        self.due_at = runtime.time() + (runtime.settings.publisher_idle_timeout_s or NEVER)
        runtime.sweep.add(self)

    def place(self) -> PublisherPlace:
        """The argument of another process's continued()."""
        return PublisherPlace(self.fence, self.due_at)

    @classmethod
    def continued(cls, runtime: Runtime, stream: Stream, place: PublisherPlace) -> Publisher:
        """The source of a published stream that goes on from another process, in the place that it gave."""
        publisher = cls(runtime, stream)
        runtime.admission.adopt_stream()
        publisher.fence, publisher.due_at = place.fence, place.due_at
        stream.source = publisher
        return publisher

    def leave(self) -> None:
        """The stream goes on in another process."""
        self._leave()

    def begin(self) -> None:
        """A publishing request has begun."""
        self.under_way += 1
        self.due_at = NEVER

    def end(self, *, broken: bool) -> None:
        """A publishing request has ended. `broken`: in the middle, so the stream waits for publisher_grace only."""
        self.under_way -= 1
        if self.under_way or self.stream.reason is not None:
            return
        settings = self._runtime.settings
        wait_s = settings.publisher_grace_s if broken else settings.publisher_idle_timeout_s or NEVER
        self.due_at = self._runtime.time() + wait_s

    def on_terminal(self, now: float) -> None:
        """A publisher ends its stream by itself."""

    def cancel(self, reason: CloseReason) -> None:
        """The stream was stopped; requests under way find it sealed."""
        self._leave()

    def on_due(self, now: float) -> float:
        """No request came in time to publish the rest."""
        stream = self.stream
        stream.source = None
        self._leave()
        if stream.reason is None:
            text = "The publisher broke off and did not come back in time."
            stream.fail(CloseReason.PUBLISHER_GONE, now, message=text)
        return NEVER

    def crash(self, where: str, error: Exception) -> None:
        """on_due() raised: count the error, and end the stream. Never raises."""
        self._runtime.bug(where, error)
        stream = self.stream
        if stream.reason is None:
            stream.cancel(CloseReason.INTERNAL, self._runtime.time(), message="streamd made a mistake.")

    def _leave(self) -> None:
        self._runtime.sweep.discard(self)
        self._runtime.admission.release_stream()

    def seal(self, *, failed: bool) -> None:
        """The publisher has ended its stream."""
        self.stream.source = None
        self._leave()
        now = self._runtime.time()
        if failed:
            self.stream.fail(CloseReason.FAILED, now, message="The publisher reported that the stream failed.")
        else:
            self.stream.seal(CloseReason.SEALED, now, clean=True)


class Publish:
    """PUT /v1/streams/{name}, POST /v1/streams, PUT and POST /v1/streams/{id}/events."""

    def __init__(self, runtime: Runtime, streams: Streams, rights: Rights) -> None:
        self._runtime = runtime
        self._streams = streams
        self._rights = rights
        take = Plan(take_body=self.take_events)
        self._events = {"POST": take, "PUT": take}  # curl -T sends PUT
        open_named = Plan(
            answer=self.open_named, keeps_body=True, check=self._check_named, body_bytes_max=OPTIONS_BYTES_MAX
        )
        open_any = Plan(answer=self.open_any, keeps_body=True, check=self._check_any, body_bytes_max=OPTIONS_BYTES_MAX)
        self._open_named = {"PUT": open_named}
        self._open_any = {"POST": open_any}

    def routes(self, request: Request) -> dict[str, Plan] | None:
        """Methods in addition to those of api/streams.py for the same path."""
        if request.path == PREFIX[:-1]:
            return self._open_any
        if not request.path.startswith(PREFIX):
            return None
        name, slash, below = request.path[len(PREFIX) :].partition("/")
        if not slash:
            return self._open_named
        return self._events if name and below == EVENTS else None

    # -- opening

    def _check_named(self, request: Request) -> None:
        """Whether the sender may open a stream of this name, before the body is read. Raises HttpError."""
        name = name_of(request)
        if not valid_name(name.encode("utf-8", "replace")):
            text = "A stream's name is 1 to 128 of A-Z a-z 0-9 . _ ~ -, not beginning with s_, and not . or .."
            raise HttpError(400, text, code="bad_name", param="name")
        self._rights.check_publish(request, name)

    def _check_any(self, request: Request) -> None:
        """Whether the sender may open a stream of a generated id, before the body is read. Raises HttpError."""
        self._rights.check_publish(request, "")

    def open_named(self, answer: Answer) -> None:
        """Open a stream under a name that the publisher has chosen."""
        request = answer.request
        name = name_of(request)
        self._rights.check_still(request)
        options = _options(request.body, self._runtime.settings)
        known = self._runtime.hub.get(name)
        if known is not None:
            self._rights.check_write(request, name, known)
            if known.reason is None or known.readers:
                state = "is live" if known.reason is None else "still has readers"
                raise HttpError(409, f"The stream {name} {state}.", code="stream_exists", param="name")
            self._runtime.hub.remove(known)
        self._answer_opened(answer, self._open(request, name, options))

    def open_any(self, answer: Answer) -> None:
        """Open a stream under a generated id."""
        request = answer.request
        self._rights.check_still(request)
        options = _options(request.body, self._runtime.settings)
        self._answer_opened(answer, self._open(request, "", options))

    def _open(self, request: Request, name: str, options: dict[str, Any]) -> Stream:
        runtime, settings = self._runtime, self._runtime.settings
        interval = write_interval_of(request)
        if "write_interval" in options:
            interval = granted(request, options["write_interval"])
        terms = Terms(
            owner=request.principal.id,
            account=self._admit(request),
            name_public=bool(options.get("public", False)),
            published=True,
            policy=Policy(options.get("policy", request.route.policy)),
            catchup_bytes_max=settings.catchup_bytes_max,
            retention_s=options.get("retention", settings.retention_s),
            write_interval=interval,
        )
        stream: Stream | None = None
        try:
            stream = runtime.hub.open(
                Dialect.UNKNOWN,
                runtime.time(),
                name=name,
                epoch=secrets.token_urlsafe(5)[:6] if name else "",
                log_bytes_max=options.get("log_bytes_max", 0),
                log_events_max=options.get("log_events_max", 0),
                terms=terms,
            )
            stream.source = Publisher(runtime, stream)
        except Exception:
            if stream is not None:
                runtime.hub.remove(stream)
            if terms.account is not None:
                terms.account.close_stream()
            runtime.admission.release_stream()
            raise
        runtime.counters.streams_opened += 1
        self._streams.wake_waiting(stream)
        return stream

    def _admit(self, request: Request) -> Account | None:
        """Reserve a stream: of the key's limit, then of the process. Raises HttpError, and then holds no place."""
        account = self._rights.open_stream(request)
        try:
            self._runtime.admit_stream(request.principal.id)
        except HttpError:
            if account is not None:
                account.close_stream()
            raise
        return account

    def _answer_opened(self, answer: Answer, stream: Stream) -> None:
        location = f"{PREFIX}{stream.id}".encode()
        body = orjson.dumps({"id": stream.id, "epoch": stream.epoch or None, "last_seq": 0})
        headers = [
            (b"content-type", b"application/json"),
            (b"location", location),
            (b"x-stream-id", stream.id.encode()),
        ]
        answer.send(201, body, headers)

    # -- events

    def take_events(self, answer: Answer) -> BodySink:
        """Check, before the body, that the sender may write to the stream and that Expected-Seq matches."""
        request = answer.request
        head = head_of(request)
        name = urllib.parse.unquote(request.path[len(PREFIX) : -len(EVENTS) - 1])
        stream = self._streams.writable(request, name, below=f"/{EVENTS}")
        publisher = stream.source
        if stream.reason is not None:
            raise _with_last_seq(409, f"The stream has ended ({stream.reason.word}).", "stream_sealed", stream)
        if not isinstance(publisher, Publisher):
            raise HttpError(409, "This stream is a relayed generation; it takes no events.", code="not_published")
        media_type = (request.get(b"content-type") or b"text/plain").split(b";")[0].strip().lower().decode("latin-1")
        make = publication_of(media_type)
        if make is None:
            text = f"Publish {', '.join(PUBLICATIONS)}, not {media_type[:100]}."
            raise HttpError(415, text, code="bad_content_type", param="content-type")
        if not content_coding.is_plain(request.get(b"content-encoding")):
            raise unsupported_encoding(request.get(b"content-encoding") or b"")
        seal = query_of(request).get("seal")
        if seal not in (None, "finished", "failed"):
            raise HttpError(400, "seal is finished or failed.", code="bad_seal", param="seal")
        expected = _expected(request)
        _check_expected(expected, stream)
        whole = head.framing is not Framing.CHUNKED
        if whole and head.content_length > self._runtime.settings.body_bytes_max:
            text = f"The body is larger than {self._runtime.settings.body_bytes_max} bytes; send it chunked."
            raise HttpError(413, text, code="body_too_large", reason=CloseReason.BODY_TOO_LARGE)
        return Publishing(
            self._runtime, self._rights, answer, publisher, make, whole=whole, seal=seal, expected=expected
        )


class Publishing(Pending):
    """A publishing request: a BodySink. A chunked body goes out as it comes, any other body as a whole at its end."""

    __slots__ = (
        "_answer",
        "_charge",
        "_expected",
        "_fence",
        "_held",
        "_held_bytes",
        "_make",
        "_over",
        "_publication",
        "_publisher",
        "_rights",
        "_runtime",
        "_seal",
        "due_at",
        "must_flow",
    )

    def __init__(
        self,
        runtime: Runtime,
        rights: Rights,
        answer: Answer,
        publisher: Publisher,
        make: Callable[[int], Publication],
        *,
        whole: bool,
        seal: str | None,
        expected: int | None,
    ) -> None:
        self._runtime = runtime
        self._rights = rights
        self._answer = answer
        self._publisher = publisher
        self._make = make
        self._publication = self._begin()
        self.must_flow = whole  # all or nothing: the body is checked, held, and appended once it is complete
        self._seal = seal
        self._expected = expected  # until the first event is appended
        # whole: bounded by body_bytes_max, which its length was checked against
        self._held: deque[bytes] = deque()
        self._held_bytes = 0  # of the pieces that came
        self._charge = BodyCharge(runtime.admission, answer.origin.holders(answer.request))  # whole, or a begun event
        self._over = False
        self.due_at = answer.request.expires_at or NEVER  # when the right to publish ends
        if self.due_at != NEVER:
            runtime.sweep.add(self)
        publisher.begin()
        if expected is not None:
            publisher.fence += 1
        self._fence = publisher.fence

    def place(self) -> PublishingPlace:
        """The argument of another process's continued()."""
        media_type = next(each for each, make in PUBLICATIONS.items() if make is self._make)
        state, held = self._publication.state(), b"".join(self._held)
        return PublishingPlace(
            media_type, state, self.must_flow, self._seal or "", self._expected, self._fence, held, self.due_at
        )

    @classmethod
    def continued(
        cls, runtime: Runtime, rights: Rights, answer: Answer, publisher: Publisher, place: PublishingPlace
    ) -> Publishing:
        """A publishing request that goes on from another process. Raises ValueError for a state that none has."""
        make = publication_of(place.media_type)
        if make is None or place.fence > publisher.fence:
            raise ValueError("a publication of no type, or from the future")
        publishing = cls(
            runtime,
            rights,
            answer,
            publisher,
            make,
            whole=place.must_flow,
            seal=place.seal or None,
            expected=None,
        )
        publishing._publication.go_on_from(place.publication)
        publishing._expected, publishing._fence, publishing.due_at = place.expected, place.fence, place.due_at
        if place.held:
            publishing._held.append(place.held)
            publishing._held_bytes = len(place.held)
        publishing._charge.adopt(publishing._held_bytes + publishing._publication.held_bytes)
        return publishing

    def leave(self) -> None:
        """The request goes on in another process."""
        self._over = True
        self._runtime.sweep.discard(self)
        self._charge.release()

    def _begin(self) -> Publication:
        return self._make(self._runtime.settings.event_bytes_max)

    @property
    def is_blocked(self) -> bool:
        """Whether another request's whole body is being appended to the stream."""
        appending = self._publisher.appending
        return appending is not None and appending is not self

    def body_piece(self, piece: bytes) -> int:
        """The next bytes of the body; returns the work done, in pieces. Raises HttpError for bytes that can't be
        published.
        """
        if self.must_flow:
            self._held.append(piece)
            self._held_bytes += len(piece)
        spent = self._read(piece, appends=not self.must_flow)
        # What checks a whole body holds the bytes of a begun event once more.
        self._runtime.hold_body(self._charge, self._held_bytes + self._publication.held_bytes)
        return spent

    def body_end(self) -> None:
        """The body is complete: publish the rest, seal if asked, answer with the last seq. Raises HttpError."""
        try:
            self._read(None, appends=not self.must_flow)
            if self.must_flow:
                self._begin_appending()
                return
            self._seal_if_asked()
        except Exception:
            self._end(broken=True)
            raise
        self._end(broken=False)
        self._answer_published()

    def body_lost(self, reason: CloseReason) -> None:
        """The publisher broke off, or was refused in the middle."""
        self._end(broken=True)

    def on_due(self, now: float) -> float:
        """The key or token has expired while the body was open: the request ends with what came until then."""
        self._answer.refuse(self._runtime.refused(self._rights.expired(self._answer.request)))
        return NEVER

    def crash(self, where: str, error: Exception) -> None:
        """on_due() or a turn raised: the request ends, and what came until then is published. Never raises."""
        self._runtime.sweep.discard(self)
        with self._runtime.guard:
            self._end(broken=True)
        self._answer.crash(where, error)

    # -- appending a whole body

    def _begin_appending(self) -> None:
        self._publication = self._begin()
        self._runtime.sweep.discard(self)  # it came while the right to publish held, and goes out as a whole
        self._answer.later(self)
        if self.work():
            self._runtime.turns.wait(self)

    @property
    def share(self) -> str:
        """The principal of the request: its connection may be gone."""
        return f"key {self._answer.request.principal.id}"

    def work(self) -> bool:
        """Append a turn's share of a whole body. True: more is left. The publisher may have left meanwhile."""
        if self.is_blocked:
            return True
        self._publisher.appending = self
        try:
            if self._append_held():
                return True
            self._read(None, appends=True)
            self._seal_if_asked()
        except HttpError as problem:
            self._end(broken=True)
            self._answer.settle(partial(self._answer.refuse, problem))
        except Exception as error:
            self._end(broken=True)
            self._answer.settle(partial(self._answer.crash, "publishing.work", error))
        else:
            self._end(broken=False)
            self._answer.settle(self._answer_published)
        return False

    def _append_held(self) -> bool:
        left = CONNECTION_PIECES_MAX
        while self._held and left > 0:
            spent = self._read(self._held.popleft(), appends=True)
            left -= spent
            self._runtime.turns.spend(spent)
        return bool(self._held)

    def _seal_if_asked(self) -> None:
        if (self._publication.done or self._seal is not None) and self._publisher.stream.reason is None:
            self._publisher.seal(failed=self._seal == "failed")

    def _answer_published(self) -> None:
        body = orjson.dumps({"last_seq": self._publisher.stream.events})
        self._answer.send(200, body, [(b"content-type", b"application/json")])

    def _read(self, piece: bytes | None, *, appends: bool) -> int:
        """Parse the next bytes, or the end (None), and append their events unless they are only checked.

        In a chunked body the events before a mistake are published. Returns the work done, in pieces.
        """
        publication, stream = self._publication, self._publisher.stream
        if self._publisher.appending is not self:
            self._rights.check_still(self._answer.request)
        if stream.reason is not None and not publication.done:
            raise _with_last_seq(409, f"The stream has ended ({stream.reason.word}).", "stream_sealed", stream)
        if self._fence != self._publisher.fence and self._publisher.appending is not self:
            text = (
                "A newer request with the right Expected-Seq has taken over this stream; the rest of this body is not "
                "published. Go on after last_seq."
            )
            raise _with_last_seq(409, text, "superseded", stream)
        containers = publication.containers
        try:
            pieces = publication.finish() if piece is None else publication.feed(piece)
        except PublishError as error:
            if appends:
                self._append(error.before)
            raise _with_last_seq(error.status, str(error), error.code, stream) from None
        if appends:
            self._append(pieces)
        scanned = (publication.containers - containers) // CONTAINERS_PER_PIECE
        return len(pieces) * event_pieces(stream) + pieces_of(len(piece or b"")) + scanned

    def _append(self, pieces: list[bytes]) -> None:
        """Publish events and comments, unless the stream has moved on meanwhile."""
        stream, now = self._publisher.stream, self._runtime.time()
        if pieces:
            _check_expected(self._expected, stream)
            self._expected = None
        self._runtime.held_back(stream).append_pieces(pieces, now)
        self._runtime.counters.event_writes += stream.direct and bool(pieces)
        if self._publication.done and not self.must_flow and stream.reason is None:
            self._publisher.seal(failed=False)

    def _end(self, *, broken: bool) -> None:
        if not self._over:
            self._over = True
            self._runtime.sweep.discard(self)
            if self._publisher.appending is self:
                self._publisher.appending = None
            self._held.clear()
            self._charge.release()
            self._publisher.end(broken=broken)


def _expected(request: Request) -> int | None:
    """Expected-Seq: the last seq that the publisher knows of. Raises HttpError 400."""
    given = request.get(b"expected-seq")
    if given is None:
        return None
    if not _seq(given):
        text = "Expected-Seq is the last seq that you know of, 0 if none."
        raise HttpError(400, text, code="bad_expected_seq", param="expected-seq")
    return int(given)


def _check_expected(expected: int | None, stream: Stream) -> None:
    """The stream's last seq must equal `expected`. Raises HttpError 409 with the actual seq."""
    if expected is not None and expected != stream.events:
        text = f"The stream's last seq is {stream.events}, not {expected}: send what comes after it."
        raise _with_last_seq(409, text, "unexpected_seq", stream)


def _with_last_seq(status: int, text: str, code: str, stream: Stream) -> HttpError:
    """A refusal that gives the stream's last seq, so that a retry can be exact."""
    return HttpError(status, text, code=code, param="events", last_seq=stream.events)


def _options(body: bytes, settings: Settings) -> dict[str, Any]:
    """Parse the JSON body of an opening request. Raises HttpError 400 that names the key and its allowed values."""
    if not body.strip():
        return {}
    try:
        options = loaded(body, _WATCHED)
    except JsonError as error:
        raise bad_json(error) from None
    if not isinstance(options, dict):
        raise HttpError(400, "The body is a JSON object.", code="bad_json")
    options = {OLD_OPTIONS.get(key, key): _checked(key, value) for key, value in options.items()}
    _check_within(options, "log_bytes_max", 16 * 1024, settings.log_bytes_max)
    _check_within(options, "log_events_max", 1, settings.log_events_max)
    return options


def _checked(key: str, value: object) -> object:
    try:
        if key == "retention":
            return _within(parse_duration(value), RETENTION_S_MAX)
        if OLD_OPTIONS.get(key, key) == "write_interval":
            return WriteInterval.parse(value)
        if key == "log_bytes_max":
            return parse_bytes(value)
        if key == "log_events_max" and type(value) is int:
            return value
        if key == "policy" and value in [policy.value for policy in Policy]:
            return value
        if key == "public" and isinstance(value, bool):
            return value
    except Refused as refused:
        raise HttpError(400, f"{key}: {refused}.", code="bad_option", param=key) from None
    if key in OPTIONS:
        raise HttpError(400, f"{key} does not take {str(value)[:50]!r}.", code="bad_option", param=key)
    text = f"There is no option {key[:50]!r}; there are {', '.join(OPTIONS)}."
    raise HttpError(400, text, code="bad_option", param=key[:50])


def _within(seconds: float, most: float) -> float:
    if not 0 <= seconds <= most:
        raise Refused(f"a duration up to {most:g}s")
    return seconds


def _check_within(options: dict[str, Any], key: str, least: int, most: int) -> None:
    if key in options and not least <= options[key] <= most:
        raise HttpError(400, f"{key} is from {least} to {most} here.", code="bad_option", param=key)
