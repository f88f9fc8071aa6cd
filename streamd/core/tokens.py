"""Tokens: a JWT that lets its bearer read or publish some streams until some time.

    {"aud": "streamd", "exp": 1767225600, "sub": "user-17", "streams": ["room-*"], "publish": ["room-17"]}

`streams` and `publish` are lists of patterns (see `patterns`); neither implies the other. `aud` and `exp` are
required, `nbf` is obeyed. PyJWT checks the signature; this module checks time and audience, because time comes in as an
argument here.

The key decides the algorithm, never the token (RFC 8725 3.1): a secret file verifies HS256 and nothing else, an RSA key
RS256, an Ed25519 key EdDSA. So a public key can't be used as an HMAC secret, and `none` is an algorithm without a key.
Two fields of a token's header count, `alg` and `kid`, and they only choose among the configured keys: `jwk`, `jku`,
`x5u` are never followed, `crit` and `b64` are refused.

Before any cryptography come the checks of length, alphabet, header, algorithm and key, so that a string that isn't a
token costs a regular expression.

Rejected: a cache of verified tokens. HS256 takes 35 us, RS256 60, Ed25519 145, once a connection, where the head costs
50 by itself; and when ten thousand readers come back at once, each has its own token.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any, Final

import jwt
import orjson
from cryptography.hazmat.primitives import serialization

from streamd.core.auth import HeadersGet, bearer
from streamd.core.patterns import matches_any
from streamd.core.refusal import Refusal
from streamd.reasons import CloseReason
from streamd.wire.query import parameter

COOKIE: Final = b"streamd_token"
PARAMETER: Final = "access_token"  # RFC 6750 2.3

TOKEN_BYTES_MAX: Final = 8192  # a request target's limit; identity providers' tokens are 1 to 2 KB
HEADER_CHARS_MAX: Final = 1024  # alg, kid, typ: under 200 in practice
SECRET_BYTES_MIN: Final = 32  # RFC 7518 3.2: a key of the hash's size or larger
RSA_BITS_MIN: Final = 2048  # RFC 7518 3.3
JWKS_BYTES_MAX: Final = 256 * 1024  # JWKS_KEYS_MAX keys with certificate chains of 4 KB
JWKS_KEYS_MAX: Final = 64  # two or three in rotation, times twenty
PATTERNS_MAX: Final = 64  # a token of 8 KB has room for them at names of 100 characters
LEEWAY_S_MAX: Final = 300.0

_SHAPE = re.compile(rb"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
# A stream's name (docs/PROTOCOL.md, section 2) with `*` in it. A pattern of any other form could never match, so it is
# refused as a mistake.
_PATTERN = re.compile(r"[A-Za-z0-9._~*-]{1,256}")
# Type and curve of a JWK → the only algorithm that it verifies. Other keys are left out, as RFC 7517 5 asks.
_ALGORITHMS: Final = {"RSA": "RS256", "OKP Ed25519": "EdDSA"}

REQUIRED: Final = Refusal(
    CloseReason.UNAUTHORIZED,
    "token_required",
    f"Send a token: `Authorization: Bearer …`, `?{PARAMETER}=…`, or to read the cookie `{COOKIE.decode()}`.",
)
EXPIRED: Final = Refusal(CloseReason.TOKEN_EXPIRED, "token_expired", "This token has expired: get a new one.")


class TokenKeyError(ValueError):
    """A secret or a key set that can't be used; the text says why, and names the form that is needed."""


@dataclass(frozen=True, slots=True)
class Grant:
    """The rights of a verified token: two lists of patterns, neither of which implies the other."""

    subscribe: tuple[str, ...]
    publish: tuple[str, ...]
    expires_unix: float  # leeway included; a reader with this token is closed then
    subject: str  # `sub`, or ""; for logs

    def may_read(self, stream_id: str) -> bool:
        """Whether the token's `streams` cover the stream (its id or chosen name, no epoch, no seq)."""
        return matches_any(self.subscribe, stream_id)

    def may_publish(self, stream_id: str) -> bool:
        """Whether the token's `publish` covers the stream: open, write, seal and delete it."""
        return matches_any(self.publish, stream_id)


@dataclass(frozen=True, slots=True)
class VerifyKey:
    """A key with the only algorithm that it verifies."""

    algorithm: str
    kid: str | None
    key: Any  # Why: PyJWT's key types are those of cryptography; bytes for HS256


def load_secret(content: bytes) -> VerifyKey:
    """The HS256 key of a secret file's content: all its bytes but, in a text, the line ends at the end."""
    text = content.rstrip(b"\r\n")
    secret = text if text.isascii() and text.decode("ascii").isprintable() else content
    if len(secret) < SECRET_BYTES_MIN:
        raise TokenKeyError(f"the secret has {len(secret)} bytes; HS256 needs {SECRET_BYTES_MIN} random bytes or more")
    if secret.lstrip().startswith(b"-----BEGIN"):
        raise TokenKeyError("the secret is a PEM file; public keys belong into a JWKS file")
    return VerifyKey("HS256", None, secret)


def load_jwks(content: bytes) -> tuple[VerifyKey, ...]:
    """The usable keys of a JWK set (RFC 7517): RSA, Ed25519. TokenKeyError if it has none of them, or a private key."""
    if len(content) > JWKS_BYTES_MAX:
        raise TokenKeyError(f"the key set is over {JWKS_BYTES_MAX} bytes")
    try:
        rows = orjson.loads(content)["keys"]
    except (ValueError, TypeError, KeyError):
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TokenKeyError('the key set is not a JSON object with a list "keys"')
    if len(rows) > JWKS_KEYS_MAX:
        raise TokenKeyError(f"the key set has more than {JWKS_KEYS_MAX} keys")
    keys = tuple(key for key in map(_jwk, rows) if key is not None)
    if not keys:
        raise TokenKeyError("the key set has no usable key: RSA (RS256) or OKP with Ed25519 (EdDSA), for signatures")
    if len({(key.algorithm, key.kid) for key in keys}) < len(keys):
        raise TokenKeyError("two keys of the set have the same type and `kid`; each needs its own")
    return keys


def _jwk(row: dict[str, Any]) -> VerifyKey | None:
    kid = row.get("kid")
    name = f"key {kid!r}"
    if not isinstance(kid, str | None):
        raise TokenKeyError(f"{name}: `kid` has to be a string")
    if "d" in row:
        raise TokenKeyError(f"{name} is a private key; only the public part belongs here")
    algorithm = _ALGORITHMS.get(f"{row.get('kty')} {row.get('crv', '')}".strip())
    if algorithm is None or row.get("alg", algorithm) != algorithm or row.get("use", "sig") != "sig":
        return None
    if row.get("key_ops", ["verify"]) != ["verify"]:
        return None
    try:
        key = jwt.PyJWK(row, algorithm).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError) as error:
        raise TokenKeyError(f"{name} can't be read: {error}") from None
    if algorithm == "RS256" and key.key_size < RSA_BITS_MIN:
        raise TokenKeyError(f"{name} has {key.key_size} bits; RS256 needs {RSA_BITS_MIN} or more")
    return VerifyKey(algorithm, kid, key)


def _material(key: Any) -> bytes:
    """The bytes of a key: a secret as it is, a public key by RFC 5280."""
    if isinstance(key, bytes):
        return key
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return bytes(key.public_bytes(serialization.Encoding.DER, form))


class Verifier:
    """Verifies tokens against fixed keys and a fixed audience. Immutable: changed key files make a new Verifier."""

    __slots__ = ("_audience", "_by_algorithm", "_jws", "_leeway_s")

    def __init__(self, keys: tuple[VerifyKey, ...], *, audience: str, leeway_s: float = 0.0) -> None:
        """`keys` from `load_secret` and `load_jwks`; the issuer's clock may be `leeway_s` off, either way."""
        assert keys and audience and 0 <= leeway_s <= LEEWAY_S_MAX
        self._audience = audience
        self._leeway_s = leeway_s
        self._jws = jwt.PyJWS()
        self._by_algorithm: dict[str, tuple[VerifyKey, ...]] = {}
        for key in keys:
            self._by_algorithm[key.algorithm] = (*self._by_algorithm.get(key.algorithm, ()), key)

    def fingerprint(self) -> str:
        """A text that differs for other keys or another audience, and tells nothing about them."""
        keys = [key for some in self._by_algorithm.values() for key in some]
        rows = sorted(f"{key.algorithm} {key.kid} {_material(key.key).hex()}" for key in keys)
        return hashlib.blake2b("\n".join((self._audience, *rows)).encode(), digest_size=8).hexdigest()

    def verify(self, token: bytes, now_unix: float) -> Grant | Refusal:
        """The rights of a token at `now_unix` (seconds since 1970), or a refusal (401) that names the mistake.

        A refusal says nothing about a token's claims unless the signature is valid.
        """
        if len(token) > TOKEN_BYTES_MAX:
            return _refuse(f"it is over {TOKEN_BYTES_MAX} bytes")
        if not _SHAPE.fullmatch(token):
            return _refuse("it is not a JWT")
        key = self._key(token)
        if isinstance(key, Refusal):
            return key
        try:
            payload = self._jws.decode(token, key.key, algorithms=[key.algorithm])
        except (jwt.PyJWTError, ValueError):
            return _refuse("its signature is wrong")
        return self._grant(payload, now_unix)

    def _key(self, token: bytes) -> VerifyKey | Refusal:
        """The configured key that the token's header asks for."""
        header = _header(token.partition(b".")[0])
        if header is None:
            return _refuse("its header is not that of a JWT")
        keys = self._by_algorithm.get(header.get("alg", ""))
        if keys is None:
            return _refuse(f"its algorithm (`alg`) has to be one of {', '.join(self._by_algorithm)}")
        kid = header.get("kid")
        # A key without an id matches every `kid`; a token without a `kid` is taken if there is only one key to choose.
        named = [key for key in keys if key.kid == kid] or [key for key in keys if key.kid is None or kid is None]
        if len(named) != 1:
            return _refuse("its `kid` is not that of a configured key")
        return named[0]

    def _grant(self, payload: bytes, now_unix: float) -> Grant | Refusal:
        try:
            claims = orjson.loads(payload)
        except ValueError:
            claims = None
        if not isinstance(claims, dict):
            return _refuse("its payload is not a JSON object")
        if not self._is_for_us(claims.get("aud")):
            return _refuse(f'its `aud` has to be, or to hold, "{self._audience}"')
        expires, not_before = _time(claims.get("exp")), _time(claims.get("nbf", 0))
        if expires is None or not_before is None:
            return _refuse("`exp` has to be there, `nbf` may be; both are numbers of seconds since 1970")
        if now_unix >= expires + self._leeway_s:
            return EXPIRED
        if now_unix < not_before - self._leeway_s:
            return _refuse("it is not valid yet: its `nbf` is in the future")
        subscribe, publish = _patterns(claims.get("streams", [])), _patterns(claims.get("publish", []))
        if subscribe is None or publish is None:
            return _refuse(
                f"`streams` and `publish` have to be lists of up to {PATTERNS_MAX} patterns (letters, digits, `._~-*`)"
            )
        subject = claims.get("sub", "")
        if not isinstance(subject, str):
            return _refuse("`sub` has to be a string")
        return Grant(subscribe, publish, expires + self._leeway_s, subject)

    def _is_for_us(self, audience: object) -> bool:
        """RFC 7519 4.1.3: one string, or a list that holds it. Compared whole and with case."""
        if isinstance(audience, list):
            return self._audience in audience
        return audience == self._audience


def token_to_read(headers_get: HeadersGet, query: str) -> bytes | None:
    """The token a reader presents: header, else `?access_token=`, else cookie (purpose before habit); None if none.

    b"", which never verifies, if the parameter or the cookie comes twice: no guess is made which of the two is meant.
    """
    token = token_to_publish(headers_get, query)
    return token if token is not None else _only(_cookies(headers_get(b"cookie") or b""))


def token_to_publish(headers_get: HeadersGet, query: str) -> bytes | None:
    """The token a publisher presents: header, else `?access_token=`.

    Never the cookie: a browser sends it along with any page's form (CSRF), and CORS keeps a page from reading the
    answer, not from the effect of a write.
    """
    token = bearer(headers_get)
    if token is not None and not token.startswith(b"sk-"):  # an API key may stand beside a token
        return token
    return _only([value.encode() for value in parameter(query, PARAMETER)])


def _only(values: list[bytes]) -> bytes | None:
    if not values:
        return None
    return values[0] if len(values) == 1 else b""


def _cookies(header: bytes) -> list[bytes]:
    """The values of `COOKIE` in a Cookie header (RFC 6265 4.2.1); quotes around a value aren't part of it."""
    found = []
    for pair in header.split(b";"):
        name, equals, value = pair.strip().partition(b"=")
        if equals and name == COOKIE:
            found.append(value.strip(b'"'))
    return found


def _header(segment: bytes) -> dict[str, str] | None:
    """A JOSE header, if each value is a string: `crit`, `jwk`, `x5c` and `b64` (RFC 7797) are refused unread."""
    if len(segment) > HEADER_CHARS_MAX:
        return None
    try:
        header = orjson.loads(base64.urlsafe_b64decode(segment + b"=" * (-len(segment) % 4)))
    except (ValueError, binascii.Error):
        return None
    if not isinstance(header, dict) or not all(isinstance(value, str) for value in header.values()):
        return None
    return header


def _time(value: object) -> float | None:
    """A NumericDate (RFC 7519 2); None for any other value."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


def _patterns(value: object) -> tuple[str, ...] | None:
    if not isinstance(value, list) or len(value) > PATTERNS_MAX:
        return None
    if not all(isinstance(pattern, str) and _PATTERN.fullmatch(pattern) for pattern in value):
        return None
    return tuple(value)


def _refuse(fault: str) -> Refusal:
    return Refusal(CloseReason.UNAUTHORIZED, "invalid_token", f"This token is not valid: {fault}.")
