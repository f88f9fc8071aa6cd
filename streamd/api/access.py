"""Access: who is asking, and what they may do with a stream (docs/PROTOCOL.md, section 2; docs/ACCESS.md).

    an id that streamd made    to know it is the right to read it, unless `[streams] auth = "token"`
    a chosen name              reading takes a key or a token, unless it was opened as public or there is no key file
    writing and stopping       the principal that opened it, a publish token, the admin surface; without a key file
                               everybody

Keys and tokens are replaced as a whole when their files change; who is being served goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamd.core.auth import ADMIN, ANONYMOUS, Principal, presented_key, principal_without_keys
from streamd.core.keys import REQUIRED, Keys
from streamd.core.limits import Account, Accounts, Board
from streamd.core.refusal import Refusal
from streamd.core.stream import Stream
from streamd.core.usage import UsageTail
from streamd.net.answer import Answer
from streamd.net.problem import Problem
from streamd.net.request import Request
from streamd.net.runtime import Runtime
from streamd.reasons import CloseReason

if TYPE_CHECKING:
    from streamd.core.tokens import Grant, Verifier


class Access:
    """The one place where rights are decided."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._accounts = Accounts()
        self.keys: Keys | None = None  # None: no key file
        self.verifier: Verifier | None = None  # None: no tokens

    def take_keys(self, keys: Keys | None) -> None:
        """A key file was read, for the first time or anew."""
        self.keys = keys
        if keys is not None:
            self._accounts.retain(keys)

    def take_verifier(self, verifier: Verifier | None) -> None:
        """The files of the tokens' keys were read; None: there are none, and no token opens anything."""
        self.verifier = verifier

    # -- who

    def identify(self, answer: Answer) -> Principal:
        """Whose request it is; ANONYMOUS for one that brings nothing. Raises Problem 401 for a key that is no good."""
        request = answer.request
        if answer.origin.listener == "admin":
            return ADMIN
        query = request.head.query if request.head is not None else ""
        parameter = request.dialect.api.key_parameter
        if self.keys is None:
            return principal_without_keys(request.get, query, parameter)
        presented = presented_key(request.get, query, parameter)
        if presented is None or not presented.startswith(b"sk-"):
            return ANONYMOUS  # a token, if anything: the stream's own check looks at it
        found = self.keys.authenticate(presented, self._runtime.unix_time())
        if isinstance(found, Refusal):
            raise self._runtime.refused(found)
        return found

    def check_relay(self, request: Request) -> None:
        """A request for an upstream takes a key, where there are keys. Raises Problem."""
        principal = request.principal
        if self.keys is None or principal.admin:
            return
        if principal.key is None:
            raise self._runtime.refused(REQUIRED)
        refusal = principal.key.refuse_route(request.path)
        if refusal is not None:
            raise self._runtime.refused(refusal)

    def check_models(self, request: Request, models: list[str]) -> None:
        """Empty: a body that names none, or that isn't parsed. Raises Problem."""
        key = request.principal.key
        if key is None:
            return
        for refusal in [key.refuse_model(model) for model in models] or [key.refuse_model(None)]:
            if refusal is not None:
                raise self._runtime.refused(refusal)

    def answer_preflight(self, answer: Answer) -> None:
        """OPTIONS of a browser, before any key is asked for: it sends none along (WHATWG Fetch 3.2.2)."""
        request = answer.request
        request.extra_headers = self._runtime.cors.preflight_headers(request.get)
        answer.send(204)

    # -- how much

    def share(self, board: Board) -> None:
        """Limits hold for all workers together: what each has counted stands there."""
        self._accounts.board = board

    def publish(self) -> None:
        """Show the other workers what was spent. For the sweep."""
        self._accounts.publish()

    def admit_request(self, request: Request) -> None:
        """Count a request against its key's limits. Raises Problem 429."""
        key = request.principal.key
        if key is None:
            return
        accounts = self._accounts
        refusal = accounts.of(key).admit_request(key, self._runtime.time(), accounts.elsewhere(key))
        if refusal is not None:
            raise self._runtime.refused(refusal)

    def open_stream(self, request: Request) -> Account | None:
        """Reserve one of the key's streams at once; its account's close_stream() gives it back. Raises Problem 429."""
        key = request.principal.key
        if key is None:
            return None
        account = self._accounts.of(key)
        refusal = account.open_stream(key, self._accounts.elsewhere(key))
        if refusal is not None:
            raise self._runtime.refused(refusal)
        return account

    def usage_of(self, request: Request) -> UsageTail | None:
        """What charges the tokens of an answer that is no stream to the request's key, where they are limited."""
        key = request.principal.key
        if key is None or key.tokens_per_minute is None:
            return None
        return UsageTail(self._accounts.of(key), request.dialect.api)

    def note_stream(self, request: Request) -> Account | None:
        """The same for an answer that turned out to be a stream: it runs already, so it counts and isn't refused."""
        key = request.principal.key
        if key is None:
            return None
        account = self._accounts.of(key)
        account.note_stream()
        return account

    # -- streams

    def check_read(self, request: Request, stream: Stream) -> None:
        """May this request read the stream? Sets the time at which it may no longer. Raises Problem."""
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
        """May this request open a stream of that name ("": one of ours)? Raises Problem."""
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
        """May this request publish to the stream, or stop it? Raises Problem."""
        principal = request.principal
        if principal.admin or self.keys is None or self._owns(principal, stream):
            return
        if principal.key is not None:
            text = "This stream belongs to another key."
            raise Problem(403, text, code="not_the_owner", reason=CloseReason.FORBIDDEN)
        self._check_publish_token(request, stream.id)

    def shown_to(self, principal: Principal) -> tuple[str, ...] | None:
        """Whose streams a list shows, None for everybody's: ids are rights, so each sees only their own."""
        if principal.admin:
            return None
        return () if self.keys is not None and principal.key is None else (principal.id,)

    def _owns(self, principal: Principal, stream: Stream) -> bool:
        """Whether the stream is its. With keys only a key owns; nobody in particular never does."""
        if principal is ANONYMOUS or (self.keys is not None and principal.key is None):
            return False
        return principal.id == stream.terms.owner

    def _check_token(self, request: Request, stream_id: str) -> None:
        grant = self._grant(request, publish=False)
        if not grant.may_read(stream_id):
            raise Problem(403, "This token is not for this stream.", code="wrong_token", reason=CloseReason.FORBIDDEN)
        request.expires_at = self._runtime.time() + grant.expires_unix - self._runtime.unix_time()

    def _check_publish_token(self, request: Request, name: str) -> None:
        grant = self._grant(request, publish=True)
        if not grant.may_publish(name):
            text = "This token may not publish to this stream."
            raise Problem(403, text, code="wrong_token", reason=CloseReason.FORBIDDEN)

    def _grant(self, request: Request, *, publish: bool) -> Grant:
        """The rights of the token that the request brings. Raises Problem 401."""
        if self.verifier is None:
            raise self._runtime.refused(REQUIRED)
        from streamd.core import tokens  # Why here: it needs the cryptography package, which only tokens do

        query = request.head.query if request.head is not None else ""
        find = tokens.token_to_publish if publish else tokens.token_to_read
        token = find(request.get, query)
        if token is None:
            raise self._runtime.refused(tokens.REQUIRED)
        found = self.verifier.verify(token, self._runtime.unix_time())
        if isinstance(found, Refusal):
            raise self._runtime.refused(found)
        return found
