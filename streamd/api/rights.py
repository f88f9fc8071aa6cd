"""Rights: the principal of a request, and its rights to a stream (docs/PROTOCOL.md, section 2; docs/ACCESS.md).

    a generated id             knowing it is the right to read, unless `[streams] auth = "token"`
    a chosen name              reading takes a key or a token, unless it was opened as public or there is no key file
    writing and stopping       the principal that opened it, a publish token, the admin surface; without a key file
                               all clients

A client without the right to read a stream isn't told whether the stream is there: its answer depends on its key or
token and on the name, and on nothing else. So each check of a stream takes the id that was asked for and the stream, or
None, and both are looked up in the same way.

A right holds until the request is answered, not only when its head comes: a body may take as long as it likes, and a
key or token that expires meanwhile, or leaves the file, opens nothing any more.

Keys and tokens are replaced as a whole when their files change; clients that are being served go on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamd.core.auth import ADMIN, ANONYMOUS, Key, Principal, presented_keys, principal_without_keys
from streamd.core.keys import EXPIRED, REQUIRED, Keys
from streamd.core.limits import Account, Accounts, AccountState, KeyLevels, KeyUsage, SpendingBoard
from streamd.core.refusal import Refusal
from streamd.core.stream import Stream
from streamd.core.usage import Charge
from streamd.net.answer import Answer
from streamd.net.http_error import HttpError, stream_not_found
from streamd.net.request import Request
from streamd.net.runtime import Runtime, head_of
from streamd.reasons import CloseReason
from streamd.wire import pages
from streamd.wire.dialect import APIS, KEY_OPENING, generates
from streamd.wire.json_scan import Watched
from streamd.wire.other_models import models_beside, watched_with
from streamd.wire.path_models import models_in_path
from streamd.wire.query import fields as query_fields

if TYPE_CHECKING:
    from streamd.core.tokens import Grant, Verifier


# What is watched in the bodies of a key that is limited to some models.
_WATCHED_CLOSELY = {api: watched_with(api.watched) for api in APIS}

STREAM_PATH = (
    "/v1/streams/"  # of a stream's own path; the routes of a key are about it, however the stream is asked for
)


class Rights:
    """The single place where rights are decided."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._accounts = Accounts()
        self.keys: Keys | None = None  # None: no key file
        self.verifier: Verifier | None = None  # None: no tokens

    def take_keys(self, keys: Keys | None) -> None:
        """Use the keys of a key file that was read, for the first time or again."""
        self.keys = keys
        if keys is not None:
            self._accounts.retain(keys)

    def take_verifier(self, verifier: Verifier | None) -> None:
        """Use a verifier of tokens, after the files of its keys were read. None: no token opens a stream."""
        self.verifier = verifier

    # -- pages

    def check_page(self, answer: Answer) -> None:
        """Refuse a request that a browser on this machine sends for a page that isn't streamd's. Raises HttpError.

        Without keys a name rebound to 127.0.0.1 would read everything; on the admin surface any page's form would do.
        """
        head, origin = head_of(answer.request), answer.origin
        is_admin = origin.listener == "admin"
        if is_admin and pages.is_of_another_page(head.get, head.authority):
            text = "A page of another origin asks for this; the admin surface answers its own pages and programs alone."
            raise HttpError(403, text, code="cross_origin", reason=CloseReason.FORBIDDEN)
        settings = self._runtime.settings
        is_keyless = self.keys is None and not settings.insecure_public
        if not is_keyless and origin.listener not in ("admin", "metrics"):
            return
        if not origin.may_be_rebound(answer.request):
            return
        host = pages.host_of(head.authority)
        allowed = [name.lower().removesuffix(".") for name in settings.hosts]
        if not pages.is_local(host, allowed, plain_names=is_admin and origin.is_unix):
            text = "Without keys this server answers only for loopback names, addresses, and the names in `hosts`."
            raise HttpError(421, text, code="misdirected_request", reason=CloseReason.FORBIDDEN, param="hosts")

    # -- principals

    def identify(self, answer: Answer) -> Principal:
        """The principal of a request; ANONYMOUS if it brings no key. Raises HttpError 401 if none of its keys is valid.

        Of several keys the first that is valid counts (docs/ACCESS.md).
        """
        request = answer.request
        if answer.origin.listener == "admin":
            return ADMIN
        query = request.head.query if request.head is not None else ""
        parameter = request.dialect.api.key_parameter
        if self.keys is None:
            return principal_without_keys(request.get, query, parameter)
        refusal: Refusal | None = None
        may_be_token = False
        for presented in presented_keys(request.get, query, parameter):
            if not presented.startswith(KEY_OPENING.encode()):
                may_be_token = True  # the check of the stream looks at that
                continue
            found = self.keys.authenticate(presented, self._runtime.unix_time())
            if isinstance(found, Principal):
                return found
            refusal = found if refusal is None or found is EXPIRED else refusal
        if refusal is None or may_be_token:
            return ANONYMOUS
        raise self._runtime.refused(refusal)

    def check_still(self, request: Request) -> None:
        """Check that the key or token has not expired, or left its file, since the head came. Raises HttpError 401."""
        key = request.principal.key
        refusal = None
        if key is not None and self.keys is not None:
            refusal = self.keys.refuse_later(key, self._runtime.unix_time())
        if refusal is None and request.expires_at and self._runtime.time() >= request.expires_at:
            refusal = self.expired(request)
        if refusal is not None:
            raise self._runtime.refused(refusal)

    def expired(self, request: Request) -> Refusal:
        """The refusal of a request whose key or token has expired."""
        if request.principal.key is not None:
            return EXPIRED
        from streamd.core import tokens  # Why here: it needs the cryptography package, which no other feature does

        return tokens.EXPIRED

    def check_relay(self, request: Request, path: str = "") -> None:
        """A request for an upstream needs a key, if there is a key file. Raises HttpError.

        `path`: the path that is acted on, if it isn't the request's own.
        """
        principal = request.principal
        if self.keys is None or principal.admin:
            return
        if principal.key is None:
            raise self._runtime.refused(REQUIRED)
        refusal = principal.key.refuse_route(path or request.path)
        if refusal is not None:
            raise self._runtime.refused(refusal)

    def check_conversations(self, request: Request) -> None:
        """Conversations belong to keys, if there is a key file: without a key there are none. Raises HttpError."""
        if self.keys is not None and request.principal.key is None and not request.principal.admin:
            raise self._runtime.refused(REQUIRED)

    def watched(self, request: Request) -> Watched:
        """The members of the request's body that are acted on."""
        key, api = request.principal.key, request.dialect.api
        return api.watched if key is None or "*" in key.models else _WATCHED_CLOSELY[api]

    def check_models(self, request: Request, models: list[str]) -> None:
        """Check the key, and its models, once the body is there. Raises HttpError.

        `models` are those that the body names: none of them if it isn't parsed. The path and the query may name more.
        """
        self.check_still(request)
        key = request.principal.key
        if key is None or "*" in key.models:
            return
        named: list[str | None] = [*models] if models or not request.body else [None]
        named += request.dialect.api.models(request.path, {}) or models_in_path(request.path)
        named += [value for name, value in query_fields(head_of(request).query) if name.casefold() == "model"]
        for model in named:
            refusal = key.refuse_model(model)
            if refusal is not None:
                raise self._runtime.refused(refusal)
        for member, model in models_beside(request.json, request.body) if request.json is not None else ():
            if model is None or key.refuse_model(model) is not None:
                text = f"This API key is limited to some models: `{member}` may be a list of names of these alone."
                raise HttpError(403, text, code="model_not_allowed", reason=CloseReason.FORBIDDEN, param=member)

    def answer_preflight(self, answer: Answer) -> None:
        """Answer OPTIONS of a browser. It carries no key (WHATWG Fetch 3.2.2), so none is asked for."""
        request = answer.request
        request.extra_headers = self._runtime.cors.preflight_headers(request.get)
        answer.send(204)

    # -- keys, for operators

    def key_of(self, principal_id: str) -> Key | None:
        """The key of a principal; None if it has none, or its key has left the file."""
        return self.keys.get(principal_id) if self.keys is not None else None

    def name_of(self, principal_id: str) -> str | None:
        """The name of a principal's key."""
        key = self.key_of(principal_id)
        return key.name if key is not None else None

    def principals_named(self, word: str) -> tuple[str, ...]:
        """The principals that an operator means by this word: an id, and the keys of this name."""
        named = [key.id for key in self.keys or () if key.name == word and key.id != word]
        return (word, *named)

    def usage_of(self, key: Key) -> KeyUsage:
        """The key's counts over all workers, and the rest of its limits."""
        return self._accounts.usage(key, self._runtime.time())

    # -- what goes on from another process

    def principal_again(self, principal_id: str, key_id: str, *, is_admin: bool) -> Principal:
        """The principal that another process knew by these facts. Raises ValueError if its key isn't here any more."""
        if not key_id:
            return ADMIN if is_admin else ANONYMOUS if principal_id == ANONYMOUS.id else Principal(principal_id)
        key = self.key_of(key_id)
        if key is None or key.id != principal_id:
            raise ValueError(f"the key {key_id} isn't in the key file any more")
        return Principal(key.id, key)

    def account_of(self, key_id: str) -> Account:
        """The account of this key. Raises ValueError if it isn't in the key file."""
        key = self.key_of(key_id)
        if key is None:
            raise ValueError(f"the key {key_id} isn't in the key file any more")
        return self._accounts.of(key)

    def account_states(self) -> tuple[tuple[str, AccountState], ...]:
        """The accounts of all keys, for another process, which gives each to account_of()."""
        return self._accounts.states()

    # -- limits

    def share(self, board: SpendingBoard) -> None:
        """Count limits over all workers together: `board` shows each worker's counts to the others."""
        self._accounts.board = board

    def publish(self, now: float) -> None:
        """Bring all buckets up to date, and publish this worker's spending to the other workers. For the sweep."""
        self._accounts.publish(now)

    def refresh(self, key: Key) -> KeyLevels:
        """Bring the buckets of a key up to date."""
        return self._accounts.of(key).refresh(key, self._runtime.time())

    def lower(self, key: Key, levels: KeyLevels) -> None:
        """Another node has found these levels of a key's buckets: go on from them where they are lower."""
        self._accounts.of(key).lower(key, levels, self._runtime.time())

    def check_limits(self, request: Request) -> None:
        """Whether the key's requests and tokens of the minute are spent. Counts nothing. Raises HttpError 429."""
        key = request.principal.key
        if key is None:
            return
        refusal = self._accounts.of(key).refuse_request(key, self._runtime.time())
        if refusal is not None:
            raise self._runtime.refused(refusal)

    def charge(self, request: Request) -> Charge | None:
        """Count a request that goes upstream now; None if it has no key. Nothing may refuse it any more."""
        key = request.principal.key
        if key is None:
            return None
        pays = key.tokens_per_minute is not None and generates(request.method, request.path)
        return Charge(self._accounts.of(key), key, pays_tokens=pays)

    def open_stream(self, request: Request, *, replacing: Stream | None = None) -> Account | None:
        """Reserve a concurrent stream of the key; the account's close_stream() frees it. Raises HttpError 429.

        `replacing`: the caller ends this stream then.
        """
        key = request.principal.key
        if key is None:
            return None
        account = self._accounts.of(key)
        frees = replacing is not None and replacing.reason is None and replacing.terms.account is account
        refusal = account.open_stream(key, replacing=int(frees))
        if refusal is not None:
            raise self._runtime.refused(refusal)
        return account

    # -- streams

    def check_read(self, request: Request, stream_id: str, stream: Stream | None) -> None:
        """Check the right to read streams of this id, and set the time at which it ends. Raises HttpError.

        `stream` is the stream of this id; None if there is none. A stream that this client may not read counts as none.
        """
        refusal = self.why_not_read(request, stream_id, stream)
        if refusal is not None:
            raise refusal

    def why_not_read(self, request: Request, stream_id: str, stream: Stream | None) -> HttpError | None:
        """As check_read(), but returns the error: a reader that waits for a name gets it at the end of its wait."""
        try:
            self.check_still(request)
            self._check_read(request, stream_id, stream)
        except HttpError as refusal:
            return refusal
        return None

    def _check_read(self, request: Request, stream_id: str, stream: Stream | None) -> None:
        principal = request.principal
        if principal.admin:
            return
        if self._runtime.settings.streams_auth == "token":
            # A generation that is over has no owner any more: its opener, like any key, is told that it is over. To
            # ask for it takes its id, which only its opener was told.
            is_over = stream is None and stream_id.startswith("s_") and self._may_own(principal)
            if not is_over and (stream is None or not self._owns(principal, stream)):
                self._check_token(request, stream_id)
            return
        if self.keys is None or stream_id.startswith("s_") or (stream is not None and stream.terms.name_public):
            return
        if principal.key is None:
            self._check_token(request, stream_id)
        elif (refusal := principal.key.refuse_route(STREAM_PATH + stream_id)) is not None:
            raise self._runtime.refused(refusal)

    def check_publish(self, request: Request, name: str) -> None:
        """Check the right to open a stream of that name ("": a generated id). Raises HttpError."""
        self.check_still(request)
        principal = request.principal
        if principal.admin or self.keys is None:
            return
        if principal.key is not None:
            refusal = principal.key.refuse_route(STREAM_PATH + name if name else request.path)
            if refusal is not None:
                raise self._runtime.refused(refusal)
            return
        self._check_publish_token(request, name)

    def check_write(self, request: Request, stream_id: str, stream: Stream | None, *, below: str = "") -> None:
        """Check the right to publish to the stream of this id (`below`: /events) or to stop it. Raises HttpError.

        `stream` as in check_read(). Sets the time at which the right ends.
        """
        self.check_still(request)
        principal = request.principal
        if principal.admin or self.keys is None:
            return
        key = principal.key
        if key is None:
            self._check_publish_token(request, stream_id)
            return
        if below or not stream_id.startswith("s_"):  # to stop a generation of one's own takes its id alone
            refusal = key.refuse_route(STREAM_PATH + stream_id + below)
            if refusal is not None:
                raise self._runtime.refused(refusal)
        if stream is not None and not self._owns(principal, stream):
            self._refuse_write(request, stream)
        if key.expires_unix is not None:
            request.expires_at = self._runtime.time() + key.expires_unix - self._runtime.unix_time()

    def _refuse_write(self, request: Request, stream: Stream) -> None:
        """Another key's stream: a client that may not even read it isn't told that it is there. Raises HttpError."""
        if self.why_not_read(request, stream.id, stream) is not None:
            raise stream_not_found(self._runtime.settings.retention_s)
        text = "This stream belongs to another key."
        raise HttpError(403, text, code="not_the_owner", reason=CloseReason.FORBIDDEN)

    def shown_to(self, principal: Principal) -> tuple[str, ...] | None:
        """The owners of the streams in a list, None for all: ids are rights, so each principal sees only its own."""
        if principal.admin:
            return None
        return () if self.keys is not None and principal.key is None else (principal.id,)

    def _owns(self, principal: Principal, stream: Stream) -> bool:
        """Whether the principal owns the stream."""
        return self._may_own(principal) and principal.id == stream.terms.owner

    def _may_own(self, principal: Principal) -> bool:
        """With a key file only a key owns streams; ANONYMOUS never does."""
        return principal is not ANONYMOUS and (self.keys is None or principal.key is not None)

    def _check_token(self, request: Request, stream_id: str) -> None:
        grant = self._grant(request, publish=False)
        if not grant.may_read(stream_id):
            raise HttpError(403, "This token is not for this stream.", code="wrong_token", reason=CloseReason.FORBIDDEN)
        self._end_with(request, grant)

    def _check_publish_token(self, request: Request, name: str) -> None:
        grant = self._grant(request, publish=True)
        if not grant.may_publish(name):
            text = "This token may not publish to this stream."
            raise HttpError(403, text, code="wrong_token", reason=CloseReason.FORBIDDEN)
        self._end_with(request, grant)

    def _end_with(self, request: Request, grant: Grant) -> None:
        """The right of the request ends when its token expires."""
        request.expires_at = self._runtime.time() + grant.expires_unix - self._runtime.unix_time()

    def _grant(self, request: Request, *, publish: bool) -> Grant:
        """The rights of the request's token. Raises HttpError 401."""
        if self.verifier is None:
            raise self._runtime.refused(REQUIRED)
        from streamd.core import tokens  # Why here: it needs the cryptography package, which no other feature does

        query = request.head.query if request.head is not None else ""
        find = tokens.token_to_publish if publish else tokens.token_to_read
        token = find(request.get, query)
        if token is None:
            raise self._runtime.refused(tokens.REQUIRED)
        found = self.verifier.verify(token, self._runtime.unix_time())
        if isinstance(found, Refusal):
            raise self._runtime.refused(found)
        return found
