"""Relays all other requests under /v1/ to an upstream and its answer back, all through the same code.

A request is paid for once. A repeated POST with a Last-Event-ID joins its stream, and so does a POST with a known
Idempotency-Key; neither ever starts a second generation.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from streamd.api import llama
from streamd.api.kept import KeptObjects
from streamd.api.relayed_ask import ask_of, target_of
from streamd.api.relayed_request import RelayedRequest
from streamd.api.rights import Rights
from streamd.api.streams import Streams, accepts_events, policy_of, relayed_last_event_id, write_interval_of
from streamd.core.hub import body_hash
from streamd.core.refusal import Refusal, Retry
from streamd.core.stream import Stream
from streamd.net.answer import Answer
from streamd.net.application import Plan
from streamd.net.exchange import Exchange
from streamd.net.http_error import HttpError, bad_json, not_found, unsupported_encoding
from streamd.net.request import Request
from streamd.net.runtime import Runtime, head_of
from streamd.net.upstreams import Upstreams
from streamd.policy import Policy
from streamd.reasons import CloseReason
from streamd.wire import charset, content_coding
from streamd.wire.dialect import Dialect
from streamd.wire.event_id import EventId
from streamd.wire.form_scan import FormScan
from streamd.wire.http1 import Framing
from streamd.wire.json_scan import JsonError, JsonScan
from streamd.wire.path_models import climbs, model_in_path

_duration = re.compile(rb"[0-9]{1,7}(?:\.[0-9]{1,3})?").fullmatch
_sane_key = re.compile(rb"[\x21-\x7e]{1,255}").fullmatch

DETACHED = Refusal(
    CloseReason.OVER_BUDGET,
    "over_capacity",
    "As many generations run without a reader as detached_max allows. Read the answer here, or try again later.",
    retry=Retry.WITH_ROOM,
)


_POLICIES = {policy.value: policy for policy in Policy}


class Relay:
    """The relayed part of the API."""

    def __init__(
        self, runtime: Runtime, upstreams: Upstreams, streams: Streams, rights: Rights, kept: KeptObjects
    ) -> None:
        self._runtime = runtime
        self._kept = kept
        self._rights = rights
        self._upstreams = upstreams
        self._streams = streams
        self._plan = Plan(answer=self.answer, keeps_body=True, passes_encoded=True)

    def plan(self, request: Request) -> Plan:
        """Refuse requests that no body can make valid. Raises HttpError."""
        if climbs(request.path):
            raise not_found(request.path)
        if request.method in ("TRACE", "CONNECT"):
            raise HttpError(501, f"{request.method} is not relayed.", code="not_relayed")
        if charset.is_foreign(request.get(b"content-type")):
            text = "JSON is UTF-8 (RFC 8259 8.1): leave the charset out of Content-Type, or say utf-8."
            raise HttpError(415, text, code="bad_content_type", param="content-type")
        self._rights.check_relay(request)
        if not self._may_join(request):
            self._rights.check_limits(request)
        if not self._passes_unread(request):
            request.form = FormScan.of(request.get(b"content-type"))
            if request.form is None:
                request.json = JsonScan(self._rights.watched(request))
        return self._plan

    def _passes_unread(self, request: Request) -> bool:
        """Whether a body is encoded, so that only the upstream can read it. Raises HttpError 415 where streamd has to.

        It has to if the key's rights or limits depend on the body, or if a model may have another name upstream.
        """
        coding = request.get(b"content-encoding")
        if coding is None or content_coding.is_plain(coding) or head_of(request).framing is Framing.NONE:
            return False
        key = request.principal.key
        if (key is None or not key.depends_on_bodies) and not any(up.settings.aliases for up in self._upstreams):
            return True
        raise unsupported_encoding(coding)

    def _may_join(self, request: Request) -> bool:
        """Whether a request may turn out to join a generation that is paid for, which no spent limit prevents."""
        if request.method != "POST":
            return False
        key = request.get(b"idempotency-key") or b""
        is_known = self._runtime.hub.by_key(request.principal.id, key.decode("latin-1")) is not None
        return is_known or relayed_last_event_id(request) is not None

    def answer(self, answer: Answer) -> None:
        """The request is whole: join a running generation, or ask an upstream. Raises HttpError."""
        request = answer.request
        head, api = head_of(request), request.dialect.api
        fields = _fields_of(request)
        form = request.form
        models = api.models(head.path, fields) if form is None else form.models(request.body)
        request.model = (models[0] if models else self._model_in(head.path))[:200]
        # A body that can't be read may name any model, also beside a path that names another.
        is_read = request.json is not None or not request.body or (form is not None and form.is_plain)
        self._rights.check_models(request, models if is_read else [])
        wants_stream = api.wants_stream(head.path, head.query, fields)
        request.data_only = api.data_only and not accepts_events(request)
        request.conversation = llama.conversation_of(request) if wants_stream else ""
        wants_whole = not wants_stream and _asks_for_no_stream(request, fields)
        policy = policy_of(request) or _POLICIES[request.route.policy]
        if self._resumes(answer, policy):
            return
        key = _idempotency_key(request)

        def go_on(at: str) -> None:
            if not key or not self._joins(answer, key, policy):
                self._ask(answer, wants_stream, wants_whole, policy, key, at)

        self._kept.find(answer, fields, go_on)

    def _model_in(self, path: str) -> str:
        """The model in a path such as /v1/models/{model}, if an upstream serves it: the others are the first's."""
        model = model_in_path(path)
        return model if model and self._upstreams.names_for(model) else ""

    # -- repeated requests

    def _resumes(self, answer: Answer, policy: Policy) -> bool:
        """A POST with a Last-Event-ID: join its stream, or refuse with 404 or 410; it never starts a generation.

        A GET has nothing to be paid for twice: it joins a stream that has more for it, and else goes upstream.
        """
        request = answer.request
        last = relayed_last_event_id(request)
        if last is None:
            return False
        if request.method != "POST" and not self._has_more(request, last):
            return False
        self._streams.resume(answer, last, policy)
        return True

    def _has_more(self, request: Request, last: EventId) -> bool:
        stream = self._streams.here(last.stream)
        if request.method not in ("GET", "HEAD") or stream is None or stream.terms.owner != request.principal.id:
            return False
        return stream.reason is None or last.seq < stream.events

    def _joins(self, answer: Answer, key: str, policy: Policy) -> bool:
        """The same Idempotency-Key from the same principal: join the generation that runs, or ran."""
        request = answer.request
        kept = self._runtime.hub.by_key(request.principal.id, key)
        if kept is None:
            return False
        if kept.body_hash != _hash_of(request):
            text = "This Idempotency-Key was used with another path, query or body; use a new key for a new request."
            raise HttpError(422, text, code="idempotency_key_reused", param="idempotency-key")
        if kept.stream is None:
            text = "The first request with this Idempotency-Key is still being answered."
            raise HttpError(409, text, code="request_in_progress", param="idempotency-key", should_retry=True)
        if kept.stream.has_failed:  # a retry is a new attempt; by its id the failed stream can still be read
            self._runtime.hub.forget_key(request.principal.id, key)
            return False
        self._streams.join(answer, kept.stream, 1, policy, resumed=True)
        return True

    # -- new requests

    def _ask(self, answer: Answer, wants_stream: bool, wants_whole: bool, policy: Policy, key: str, at: str) -> None:
        """Ask an upstream; if `at` names one, no other. Raises HttpError."""
        request, runtime = answer.request, self._runtime
        detached = _wants_detached(request) and wants_stream
        grace_s = _detach_grace(request, runtime.settings.detach_grace_max_s)
        interval = write_interval_of(request)
        tracing = runtime.tracing
        if tracing is not None:
            tracing.begin(request)
        # Refuse before anything is opened, and count when nothing can refuse any more: a refusal uses up no limit.
        self._check_upstream(request, at)
        if detached and not runtime.hub.make_room_for_grace(request.principal.id, runtime.time()):
            raise runtime.refused(DETACHED)
        self._rights.check_limits(request)
        relayed = RelayedRequest(
            runtime,
            self._rights,
            request,
            policy=policy,
            grace_s=grace_s,
            interval=interval,
            wants_whole=wants_whole,
        )
        runtime.admit_relay(request.principal.id)  # nothing may raise from here to the `try`
        stream: Stream | None = None
        try:
            ask = ask_of(request, runtime.cors, at=at)
            stream = relayed.open() if wants_stream else None
            if tracing is not None and stream is not None:
                tracing.opened(request, stream)
            relayed.keep_key(key, _hash_of(request) if key else b"", stream)
            relayed.charge = self._rights.charge(request)
            exchange = Exchange(
                runtime,
                self._upstreams,
                ask,
                answer=answer,
                request=request,
                stream=stream,
                policy=policy,
                charge=relayed.charge,
                may_be_foreign=request.dialect is Dialect.UNKNOWN and not wants_whole,
                owner=relayed,
                learns=self._kept.reader(request, _fields_of(request)),
            )
            exchange.start()
        except Exception:  # then it has not begun; once it has, it ends by itself
            relayed.over()
            if stream is not None:
                stream.cancel(CloseReason.INTERNAL, runtime.time(), message="The generation could not begin.")
            raise
        if detached and stream is not None and answer.is_open:  # else the exchange failed at once and was answered
            self._accept(exchange, answer, stream, max(grace_s, runtime.settings.detach_grace_max_s))

    def _check_upstream(self, request: Request, at: str) -> None:
        """Check that an upstream can take the request; another principal's grace may end for it. Raises HttpError."""
        now, model, principal = self._runtime.time(), request.model, request.principal.id
        try:
            self._upstreams.choose(model, now, principal=principal, at=at)
        except HttpError as full:
            names = self._upstreams.names_for(model, at)
            if full.status != 503 or not names:
                raise
            if not self._runtime.hub.make_place(principal, now, relayed=True, upstreams=names):
                raise
            self._upstreams.choose(model, now, principal=principal, at=at)

    def _accept(self, exchange: Exchange, answer: Answer, stream: Stream, grace_s: float) -> None:
        """Prefer: respond-async. The generation runs on; its first reader has detach_grace_max to come."""
        if stream.reason is None and not stream.readers:
            self._runtime.hub.orphan(stream, grace_s, CloseReason.READER_GONE, self._runtime.time())
        location = f"/v1/streams/{stream.id}".encode()
        body = orjson.dumps({"id": stream.id, "status": "in_progress"})
        headers = [
            (b"content-type", b"application/json"),
            (b"location", location),
            (b"x-stream-id", stream.id.encode()),
            (b"preference-applied", b"respond-async"),
        ]
        exchange.answer = None
        answer.settle(lambda: answer.send(202, body, headers))


def _fields_of(request: Request) -> dict[str, Any]:
    """The watched members of the JSON in the body; {} for other bodies. Raises HttpError 400 for an odd value."""
    if request.json is None or not request.body:
        return {}
    try:
        return request.json.fields(request.body)
    except JsonError as error:
        if request.declares_json:
            raise bad_json(error) from None
        request.json = None
        return {}


def _asks_for_no_stream(request: Request, fields: dict[str, Any]) -> bool:
    """Whether the body was read and its `stream` is absent, false or null. Other values may mean yes to a server."""
    stream = fields.get("stream")
    return request.json is not None and request.body != b"" and (stream is None or stream is False)


def _idempotency_key(request: Request) -> str:
    given = request.get(b"idempotency-key")
    if given is None or request.method != "POST":
        return ""
    if not _sane_key(given):
        text = "Idempotency-Key takes 1 to 255 printable ASCII characters."
        raise HttpError(400, text, code="bad_idempotency_key", param="idempotency-key")
    return given.decode()


def _wants_detached(request: Request) -> bool:
    """Prefer: respond-async (RFC 7240 4.1): start the generation without reading it here."""
    given = request.get(b"prefer")
    if given is None:
        return False
    preferences = given.lower().split(b",")
    return any(preference.split(b";")[0].strip() == b"respond-async" for preference in preferences)


def _detach_grace(request: Request, max_s: float) -> float:
    """Time for which the generation may go on without a reader: the request's own wish, bounded, or the route's.

    A conversation gets the longest time that is allowed: its clients leave and come back as they like.
    """
    given = request.get(b"x-stream-detach-grace")
    if given is None:
        return max_s if request.conversation else request.route.detach_grace_s
    if not _duration(given):
        text = "X-Stream-Detach-Grace is a number of seconds."
        raise HttpError(400, text, code="bad_detach_grace", param="x-stream-detach-grace")
    return min(float(given), max_s)


def _hash_of(request: Request) -> bytes:
    """Equal for equal requests with an Idempotency-Key: method, path and query as they go upstream, and body.

    Gemini's path names the model, and its query says whether the answer is a stream.
    """
    target = target_of(request.path, head_of(request).query, request.dialect.api)
    return body_hash(b"%b %b\n%b" % (request.method.encode(), target, request.body))
