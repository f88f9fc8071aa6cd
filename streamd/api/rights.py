"""Rights: the principal of a request, and its rights to a stream (docs/PROTOCOL.md, section 2; docs/ACCESS.md).

    a generated id             knowing it is the right to read, unless `[streams] auth = "token"`
    a chosen name              reading takes a key or a token, unless it was opened as public or there is no key file
    writing and stopping       the principal that opened it, a publish token, the admin surface; without a key file
                               all clients

Keys and tokens are replaced as a whole when their files change; clients that are being served go on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamd.core.auth import ADMIN, ANONYMOUS, Principal, presented_key, principal_without_keys
from streamd.core.keys import REQUIRED, Keys
from streamd.core.limits import Account, Accounts, SpendingBoard
from streamd.core.refusal import Refusal
from streamd.core.stream import Stream
from streamd.core.usage import Charge
from streamd.net.answer import Answer
from streamd.net.http_error import HttpError
from streamd.net.request import Request
from streamd.net.runtime import Runtime
from streamd.reasons import CloseReason
from streamd.wire.dialect import generates

if TYPE_CHECKING:
    from streamd.core.tokens import Grant, Verifier


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

    # -- principals

    def identify(self, answer: Answer) -> Principal:
        """The principal of a request; ANONYMOUS if it brings no key. Raises HttpError 401 for an invalid key."""
        request = answer.request
        if answer.origin.listener == "admin":
            return ADMIN
        query = request.head.query if request.head is not None else ""
        parameter = request.dialect.api.key_parameter
        if self.keys is None:
            return principal_without_keys(request.get, query, parameter)
        presented = presented_key(request.get, query, parameter)
        if presented is None or not presented.startswith(b"sk-"):
            return ANONYMOUS  # it may be a token: the check of the stream looks at that
        found = self.keys.authenticate(presented, self._runtime.unix_time())
        if isinstance(found, Refusal):
            raise self._runtime.refused(found)
        return found

    def check_relay(self, request: Request) -> None:
        """A request for an upstream needs a key, if there is a key file. Raises HttpError."""
        principal = request.principal
        if self.keys is None or principal.admin:
            return
        if principal.key is None:
            raise self._runtime.refused(REQUIRED)
        refusal = principal.key.refuse_route(request.path)
        if refusal is not None:
            raise self._runtime.refused(refusal)

    def check_models(self, request: Request, models: list[str]) -> None:
        """Check the key's models. `models` is empty if the body names none or isn't parsed. Raises HttpError."""
        key = request.principal.key
        if key is None:
            return
        for refusal in [key.refuse_model(model) for model in models] or [key.refuse_model(None)]:
            if refusal is not None:
                raise self._runtime.refused(refusal)

    def answer_preflight(self, answer: Answer) -> None:
        """Answer OPTIONS of a browser. It carries no key (WHATWG Fetch 3.2.2), so none is asked for."""
        request = answer.request
        request.extra_headers = self._runtime.cors.preflight_headers(request.get)
        answer.send(204)

    # -- limits

    def share(self, board: SpendingBoard) -> None:
        """Count limits over all workers together: `board` shows each worker's counts to the others."""
        self._accounts.board = board

    def publish(self, now: float) -> None:
        """Bring all buckets up to date, and publish this worker's spending to the other workers. For the sweep."""
        self._accounts.publish(now)

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
        return Charge(self._accounts.of(key), pays_tokens=pays)

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

    def check_read(self, request: Request, stream: Stream) -> None:
        """Check the right to read the stream, and set the time at which it ends. Raises HttpError."""
        principal = request.principal
        if principal.admin:
            return
        if self._runtime.settings.streams_auth == "token":
            if not self._owns(principal, stream):
                self._check_token(request, stream.id)
            return
        if self.keys is None or stream.id.startswith("s_") or stream.terms.name_public:
            return
        if principal.key is None:
            self._check_token(request, stream.id)
        elif (refusal := principal.key.refuse_route(request.path)) is not None:
            raise self._runtime.refused(refusal)

    def check_publish(self, request: Request, name: str) -> None:
        """Check the right to open a stream of that name ("": a generated id). Raises HttpError."""
        principal = request.principal
        if principal.admin or self.keys is None:
            return
        if principal.key is not None:
            refusal = principal.key.refuse_route(request.path)
            if refusal is not None:
                raise self._runtime.refused(refusal)
            return
        self._check_publish_token(request, name)

    def check_write(self, request: Request, stream: Stream) -> None:
        """Check the right to publish to the stream or to stop it. Raises HttpError."""
        principal = request.principal
        if principal.admin or self.keys is None or self._owns(principal, stream):
            return
        if principal.key is not None:
            text = "This stream belongs to another key."
            raise HttpError(403, text, code="not_the_owner", reason=CloseReason.FORBIDDEN)
        self._check_publish_token(request, stream.id)

    def shown_to(self, principal: Principal) -> tuple[str, ...] | None:
        """The owners of the streams in a list, None for all: ids are rights, so each principal sees only its own."""
        if principal.admin:
            return None
        return () if self.keys is not None and principal.key is None else (principal.id,)

    def _owns(self, principal: Principal, stream: Stream) -> bool:
        """Whether the principal owns the stream. With a key file only a key owns streams; ANONYMOUS never does."""
        if principal is ANONYMOUS or (self.keys is not None and principal.key is None):
            return False
        return principal.id == stream.terms.owner

    def _check_token(self, request: Request, stream_id: str) -> None:
        grant = self._grant(request, publish=False)
        if not grant.may_read(stream_id):
            raise HttpError(403, "This token is not for this stream.", code="wrong_token", reason=CloseReason.FORBIDDEN)
        request.expires_at = self._runtime.time() + grant.expires_unix - self._runtime.unix_time()

    def _check_publish_token(self, request: Request, name: str) -> None:
        grant = self._grant(request, publish=True)
        if not grant.may_publish(name):
            text = "This token may not publish to this stream."
            raise HttpError(403, text, code="wrong_token", reason=CloseReason.FORBIDDEN)

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
