"""RelayedRequest: the possessions of a request on its way upstream: its place in the books, its Idempotency-Key, and
the stream that it asked for, or that its answer turned out to be.

An exchange has it as its owner. All of it is values, so the exchange's state can be told by name.
"""

from __future__ import annotations

from typing import NamedTuple

from streamd.api.rights import Rights
from streamd.core.hub import IdempotentRequest
from streamd.core.limits import Account
from streamd.core.stream import Stream
from streamd.core.terms import Terms
from streamd.core.usage import Charge
from streamd.core.write_interval import WriteInterval
from streamd.net.request import Request
from streamd.net.runtime import Runtime
from streamd.policy import Policy
from streamd.reasons import CloseReason
from streamd.wire.dialect import generates


class RelayedPlace(NamedTuple):
    """A RelayedRequest without its request and its charge."""

    policy: Policy
    grace_s: float
    interval_s: float
    is_adaptive: bool
    wants_whole: bool
    key: str
    body_hash: bytes  # of a key that has no stream


class RelayedRequest:
    """The ExchangeOwner of a relayed request (net/exchange.py). over() gives back the place of admit_relay()."""

    __slots__ = (
        "_grace_s",
        "_interval",
        "_key",
        "_policy",
        "_request",
        "_rights",
        "_runtime",
        "_wants_whole",
        "charge",
    )

    def __init__(
        self,
        runtime: Runtime,
        rights: Rights,
        request: Request,
        *,
        policy: Policy,
        grace_s: float,
        interval: WriteInterval,
        wants_whole: bool,
    ) -> None:
        """`wants_whole`: the client has said that it wants no stream."""
        # process
        self._runtime = runtime
        self._rights = rights
        # request
        self._request = request
        self._policy = policy
        self._grace_s = grace_s
        self._interval = interval
        self._wants_whole = wants_whole
        self._key = ""  # the Idempotency-Key, once it is kept
        self.charge: Charge | None = None  # to the client's key, if it has one

    def keep_key(self, key: str, body_hash: bytes, stream: Stream | None) -> None:
        """Keep the Idempotency-Key, unless it is "", until the stream is removed or the answer is over."""
        self._key = key
        if key:
            self._runtime.hub.keep_key(self._request.principal.id, key, body_hash, stream)

    def place(self) -> RelayedPlace:
        """The argument of another process's continued()."""
        kept = self._own_key()
        body_hash = kept.body_hash if kept is not None else b""
        own = self._interval
        return RelayedPlace(
            self._policy, self._grace_s, own.least_s, own.adaptive, self._wants_whole, self._key, body_hash
        )

    @classmethod
    def continued(cls, runtime: Runtime, rights: Rights, request: Request, place: RelayedPlace) -> RelayedRequest:
        """Go on from another process, in the place that it gave."""
        relayed = cls(
            runtime,
            rights,
            request,
            policy=place.policy,
            grace_s=place.grace_s,
            interval=WriteInterval(place.interval_s, place.is_adaptive),
            wants_whole=place.wants_whole,
        )
        runtime.admission.adopt_relay()
        relayed._key = place.key
        if place.body_hash:
            relayed.keep_key(place.key, place.body_hash, None)
        return relayed

    def _own_key(self) -> IdempotentRequest | None:
        """The kept key, while it has no stream."""
        kept = self._runtime.hub.by_key(self._request.principal.id, self._key) if self._key else None
        return kept if kept is not None and kept.stream is None else None

    def over(self) -> None:
        """The exchange is over, or hasn't begun: give back the place, and the key that has no stream."""
        self._runtime.admission.release_relay()
        if self._own_key() is not None:
            self._runtime.hub.forget_key(self._request.principal.id, self._key)

    # -- streams

    def open(self) -> Stream:
        """Open the stream that was asked for. Raises HttpError 429."""
        request, hub, now = self._request, self._runtime.hub, self._runtime.time()
        old = hub.by_conversation(request.principal.id, request.conversation) if request.conversation else None
        account = self._rights.open_stream(request, replacing=old)
        terms = self._terms(account)
        self._runtime.counters.streams_opened += 1
        try:
            if not request.conversation:
                return hub.open(request.dialect, now, terms=terms)
            if old is not None:  # a conversation has a single generation
                old.cancel(CloseReason.CANCELLED, now, message="The conversation went on with another request.")
            return hub.open_conversation(request.dialect, now, conversation=request.conversation, terms=terms)
        except Exception:
            if terms.account is not None:
                terms.account.close_stream()
            raise

    def open_unasked(self, *, as_bytes: bool) -> Stream | None:
        """The answer is a stream, and no stream was asked for: open a stream; or, if the client wants none or the
        bytes pass as they are, count them as one of its streams. Raises HttpError 429.
        """
        if self._wants_whole or as_bytes:
            refusal = self.charge.open_stream() if self.charge is not None else None
            if refusal is not None:
                raise self._runtime.refused(refusal)
            return None
        request, hub = self._request, self._runtime.hub
        terms = self._terms(self._rights.open_stream(request))
        self._runtime.counters.streams_opened += 1
        stream = hub.open(request.dialect, self._runtime.time(), terms=terms)
        kept = hub.by_key(request.principal.id, self._key) if self._key else None
        if kept is not None:  # from now on a retry of the request joins the stream
            hub.keep_key(request.principal.id, self._key, kept.body_hash, stream)
        if self._runtime.tracing is not None:
            self._runtime.tracing.opened(request, stream)
        return stream

    def _terms(self, account: Account | None) -> Terms:
        """The terms of a stream, from its request and the present settings."""
        request, settings = self._request, self._runtime.settings
        return Terms(
            owner=request.principal.id,
            account=account,
            pays_tokens=generates(request.method, request.path),
            model=request.model,
            policy=self._policy,
            catchup_bytes_max=settings.catchup_bytes_max,
            detach_grace_s=self._grace_s,
            resume_grace_s=settings.resume_grace_s,
            retention_s=settings.retention_s,
            write_interval=self._interval,
        )
