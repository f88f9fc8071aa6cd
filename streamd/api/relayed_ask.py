"""RelayedAsk: a client's request as it goes upstream. Its head is written anew from the parsed parts; its body stays.

In the body of a model with another name at an upstream only the name is replaced; every other byte stays.
"""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import unquote_plus

from streamd.api.streams import relayed_last_event_id
from streamd.net.attempt import Ask
from streamd.net.http_error import HttpError
from streamd.net.request import Request
from streamd.net.runtime import head_of
from streamd.net.upstream import Upstream
from streamd.wire import content_coding, via
from streamd.wire.cors import Cors
from streamd.wire.dialect import KEY_FIELDS, KEY_OPENING, KEY_PARAMETER, Dialect
from streamd.wire.dialects.api import Api
from streamd.wire.event_id import names_position
from streamd.wire.form_scan import FormScan
from streamd.wire.http1 import Headers, RequestHead, end_to_end
from streamd.wire.json_scan import JsonError, JsonScan, Watched
from streamd.wire.path_models import model_in_path, with_model
from streamd.wire.query import parameter

# Fields that frameworks take for the true method or path of a request (CVE-2018-14773). The rights of a key were judged
# by the method and path that are sent.
_OVERRIDES = (
    b"x-http-method",
    b"x-http-method-override",
    b"x-method-override",
    b"x-original-url",
    b"x-rewrite-url",
)

# Fields that don't go upstream: those that streamd writes itself or acts on, and the client's secrets.
_STREAMD_FIELDS = frozenset(
    (
        b"accept-encoding",
        b"authorization",
        b"content-length",
        b"cookie",
        b"expect",
        b"forwarded",
        b"host",
        b"idempotency-key",
        b"last-event-id",
        b"prefer",
        *_OVERRIDES,
        *KEY_FIELDS,
        b"x-conversation-id",
        b"x-request-id",
        b"x-stream-detach-grace",
        b"x-stream-policy",
        b"x-stream-write-interval",
    )
)

_WRITTEN_UPSTREAM = ((b"accept-encoding", b"identity"), (b"via", via.OWN))

# A client's word about itself and the proxies between: only a proxy in front may be believed about that, by streamd.
_FORWARDED_FIELDS = b"x-forwarded-"


class AskPlace(NamedTuple):
    """A RelayedAsk. The scans of its body are made again."""

    method: str
    model: str
    at: str
    path: str
    query: str
    request_id: bytes
    body: bytes
    is_bodiless: bool
    keeps_position: bool
    secrets: Headers
    passed: Headers


class RelayedAsk(Ask):
    """All of it is values: of the request, and of the settings at the time of its coming."""

    __slots__ = (
        "_api",
        "_body",
        "_form",
        "_is_bodiless",
        "_json",
        "_keeps_position",
        "_passed",
        "_path",
        "_query",
        "_request_id",
        "_secrets",
    )

    def __init__(self, request: Request, cors: Cors, *, at: str) -> None:
        """Of a page that `cors` lets in, the upstream isn't told: it would judge the page once more."""
        super().__init__(request.method, request.model, principal=request.principal.id, at=at)
        head = head_of(request)
        self._api = request.dialect.api
        self._path = head.path
        self._query = head.query
        self._request_id = request.id.encode()
        self._body = request.body
        self._json = request.json
        self._form = request.form
        self._is_bodiless = head.method in ("GET", "HEAD") and not request.body
        # A Last-Event-ID that isn't streamd's is the upstream's own.
        self._keeps_position = request.dialect is Dialect.UNKNOWN and relayed_last_event_id(request) is None
        self._secrets = _secrets(head, self._api)
        passed = [
            field
            for field in end_to_end(head.headers)
            if field[0] not in _STREAMD_FIELDS
            and not field[0].startswith(_FORWARDED_FIELDS)
            and (b"_" not in field[0] or not _is_for_streamd(field[0]))
        ]
        if request.trace is not None:
            passed = request.trace.passed_on(passed)
        if self._keeps_position:
            passed += [field for field in head.headers if field[0] == b"last-event-id"]
        if head.get(b"origin") in cors.origins:
            passed = [field for field in passed if field[0] != b"origin"]
        self._passed = passed

    def place(self) -> AskPlace:
        """The argument of another process's continued()."""
        return AskPlace(
            self.method,
            self.model,
            self.at,
            self._path,
            self._query,
            self._request_id,
            self._body,
            self._is_bodiless,
            self._keeps_position,
            self._secrets,
            tuple(self._passed),
        )

    @classmethod
    def continued(cls, request: Request, place: AskPlace, watched: Watched) -> RelayedAsk:
        """The ask of a request that another process has sent, for the case that it has to be sent once more."""
        ask = cls.__new__(cls)
        Ask.__init__(ask, place.method, place.model, principal=request.principal.id, at=place.at)
        ask._api = request.dialect.api
        ask._path, ask._query, ask._request_id = place.path, place.query, place.request_id
        ask._body, ask._is_bodiless, ask._keeps_position = place.body, place.is_bodiless, place.keeps_position
        ask._secrets, ask._passed = place.secrets, list(place.passed)
        fields = dict(place.passed)
        ask._json, ask._form = None, None
        if place.body and content_coding.is_plain(fields.get(b"content-encoding")):
            ask._form = FormScan.of(fields.get(b"content-type"))
            ask._json = JsonScan(watched) if ask._form is None else None
            ask._scan()
        return ask

    def _scan(self) -> None:
        """Find the members of the body that have other names at some upstream."""
        scan = self._form or self._json
        assert scan is not None
        try:
            scan.feed(bytearray(self._body), last=True)
        except JsonError:
            self._json = None

    def target(self, upstream: Upstream) -> bytes:
        return target_of(self._renamed(upstream)[0], self._query, self._api, keeps_position=self._keeps_position)

    def fields(self, upstream: Upstream, length: int) -> list[tuple[bytes, bytes]]:
        settings, clients = upstream.settings, self._passed
        out = [(b"host", settings.origin.authority.encode())]
        if settings.headers:
            own = {_hyphened(name.lower().encode()) for name in settings.headers}
            clients = [field for field in clients if _hyphened(field[0]) not in own]
        out += clients
        out.append((b"x-request-id", self._request_id))
        out += [(name.lower().encode(), value.encode()) for name, value in settings.headers.items()]
        out += _WRITTEN_UPSTREAM
        if settings.key:
            out += self._api.credentials(settings.key.encode())
        elif settings.pass_client_key:
            out += self._secrets
        if not self._is_bodiless:
            out.append((b"content-length", b"%d" % length))
        return out

    def body(self, upstream: Upstream) -> bytes:
        renamed, body = self._renamed(upstream)[1], self._body
        if not renamed:
            return body
        if self._form is not None:
            return self._form.with_names(body, renamed)
        return body if self._json is None else self._json.with_names(body, "model", renamed)

    def _renamed(self, upstream: Upstream) -> tuple[str, dict[str, str]]:
        """The path, and the body's names that are others at this upstream."""
        alias = upstream.settings.aliases.get(self.model) if self.model else None
        if alias is None:
            return self._path, {}
        path, names = self._api.renamed(self._path, self.model, alias)
        return (with_model(path, alias) if model_in_path(path) == self.model else path), names


def ask_of(request: Request, cors: Cors, *, at: str = "") -> RelayedAsk:
    """The request for an upstream, or for the one named `at` alone. Raises HttpError 508 if it goes in a circle."""
    if via.passes(head_of(request).get(b"via")) >= via.PASSES_MAX:
        text = f"This request has passed streamd {via.PASSES_MAX} times: the URL of an upstream leads back to streamd."
        raise HttpError(508, text, code="loop_detected")
    return RelayedAsk(request, cors, at=at)


def _is_for_streamd(name: bytes) -> bool:
    """Whether a field stays here. A server behind WSGI or CGI reads `_` as `-`, so both spellings count."""
    name = _hyphened(name)
    return name in _STREAMD_FIELDS or name.startswith(_FORWARDED_FIELDS)


def _hyphened(name: bytes) -> bytes:
    """The name as servers behind WSGI, CGI and PHP read it, for which `_` and `-` are the same."""
    return name.replace(b"_", b"-")


def _secrets(head: RequestHead, api: Api) -> Headers:
    """The client's own credentials. A key in the query goes on in the API's field, where no log shows it."""
    fields = [field for field in head.headers if field[0] in (b"authorization", *KEY_FIELDS)]
    in_query = [key for key in parameter(head.query, KEY_PARAMETER) if _is_key(key, api)]
    plain = (key.encode() for key in in_query if key.isascii() and key.isprintable())
    return (*fields, *(field for key in plain for field in api.credentials(key)))


def _is_key(value: str, api: Api) -> bool:
    """Whether a query parameter `key` holds a key: on the paths of an API that has it there, else by its shape."""
    return api.key_parameter == KEY_PARAMETER or value.startswith(KEY_OPENING)


def target_of(path: str, query: str, api: Api, *, keeps_position: bool = False) -> bytes:
    """Path and query for the upstream, without the parameters that are for streamd only.

    keeps_position: a Last-Event-ID is the upstream's own.

    Names are decoded as in wire/query.py, or `access%5Ftoken=` would be read here and leak there. `;` separates too, as
    some servers have it.
    """

    if not query:
        return path.encode("ascii")

    def is_for_streamd(part: str) -> bool:
        for field in part.split(";"):
            name, _, value = (unquote_plus(piece) for piece in field.partition("="))
            if name == "access_token" or (name == KEY_PARAMETER and _is_key(value, api)):
                return True
            if not keeps_position and names_position(name):
                return True
        return False

    kept = "&".join(part for part in query.split("&") if not is_for_streamd(part))
    return (path + (f"?{kept}" if kept else "")).encode("ascii")
