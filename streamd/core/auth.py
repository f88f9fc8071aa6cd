"""Principal and Key: the identity of a client, and its rights.

`keys` proves keys, `tokens` proves tokens, `limits` knows how much of a key's limits is left. All of them answer with a
value below or a Refusal, and none of them reads a clock or a file.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from streamd.core.patterns import matches_any
from streamd.core.refusal import Refusal
from streamd.reasons import CloseReason
from streamd.wire.dialect import KEY_FIELDS
from streamd.wire.query import parameter

HeadersGet = Callable[[bytes], bytes | None]
"""A request's header by its lowercase name; None if it is missing."""


@dataclass(frozen=True, slots=True)
class Key:
    """A row of the key file: how the key is recognised, and its rights. None as a limit is no limit."""

    id: str
    name: str  # for people; goes to logs and `streamd keys list`
    salt: bytes
    digest: bytes  # SHA-256 over salt and the whole key
    routes: tuple[str, ...] = ("*",)  # patterns over the path
    models: tuple[str, ...] = ("*",)  # patterns over the model's name as the client wrote it
    streams_max: int | None = None  # at once
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    expires_unix: float | None = None  # seconds since 1970, UTC

    @property
    def depends_on_bodies(self) -> bool:
        """Whether a right or a limit of the key is about a member of bodies: the model, or the wish for a stream."""
        return self.models != ("*",) or self.streams_max is not None or self.tokens_per_minute is not None

    @property
    def is_limited(self) -> bool:
        """Whether the key has fewer models, or less of anything, than a key without limits."""
        return self.depends_on_bodies or self.requests_per_minute is not None

    def refuse_route(self, path: str) -> Refusal | None:
        """None if the key may use `path` (decoded and without dot segments: the path that is acted on)."""
        if matches_any(self.routes, path):
            return None
        return Refusal(CloseReason.FORBIDDEN, "route_not_allowed", "This API key may not use this path.")

    def refuse_model(self, model: str | None) -> Refusal | None:
        """None if the key may use `model`.

        `model` is None if the body names no model, or if streamd can't read the body: such a body may name any model,
        so a key that is limited to some models is refused. Requests without a body aren't checked.
        """
        if "*" in self.models or (model is not None and matches_any(self.models, model)):
            return None
        if model is None:
            text = "This API key is limited to some models: send a body with `model`, as JSON or a plain form."
        else:
            text = "This API key may not use this model."
        return Refusal(CloseReason.FORBIDDEN, "model_not_allowed", text)


@dataclass(frozen=True, slots=True)
class Principal:
    """The owner of a request. Its possessions (idempotency keys, streams, limits) are found by `id`."""

    id: str
    key: Key | None = None  # None without a key file, and for the admin surface
    admin: bool = False


ANONYMOUS: Final = Principal("anonymous")
ADMIN: Final = Principal("admin", admin=True)
# A key with such an id would own the requests and streams of that principal. Ids made from a header begin with
# `h-`, and no key's id holds a `-`.
RESERVED_IDS: Final = frozenset({ANONYMOUS.id, ADMIN.id})


def bearer(headers_get: HeadersGet) -> bytes | None:
    """The credential after `Authorization: Bearer`, or None; the scheme in any case (RFC 9110 11.1)."""
    scheme, _, credential = (headers_get(b"authorization") or b"").strip().partition(b" ")
    if scheme.lower() != b"bearer":
        return None
    return credential.strip() or None


def presented_keys(headers_get: HeadersGet, query: str = "", key_parameter: str = "") -> Iterator[bytes]:
    """The API keys in a request, the most usual place first.

    Bearer (OpenAI's SDKs), other APIs' header fields, then the query parameter that this API has for keys. Clients
    send several at once: a gateway's key beside an old one of the provider.
    """
    in_fields = bearer(headers_get), *((headers_get(field) or b"").strip() for field in KEY_FIELDS)
    yield from filter(None, in_fields)
    in_query = parameter(query, key_parameter) if key_parameter else ()
    yield from (key.encode("utf-8", "replace") for key in in_query[:1] if key)


def principal_without_keys(headers_get: HeadersGet, query: str = "", key_parameter: str = "") -> Principal:
    """The principal when there is no key file: a hash of the credential, of any kind, else `anonymous`.

    128 bits of SHA-256, the same in every worker and after a restart. The credential itself is stored nowhere.
    """
    credential = next(presented_keys(headers_get, query, key_parameter), None) or headers_get(b"authorization")
    if not credential:
        return ANONYMOUS
    digest = hashlib.sha256(credential).digest()[:16]
    return Principal("h-" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode())
