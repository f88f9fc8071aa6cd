"""CORS (WHATWG Fetch 3.2): which pages' scripts may read streamd's answers. Header lists in, header lists out.

Exact origins only, of any scheme. No `*`, because a wildcard on something that spends GPU time is a mistake sooner or
later, and no `null`, which any sandboxed frame can claim to be. Off means no header at all.

CORS doesn't keep a page from sending a request, only from reading the answer. Keys and tokens decide which clients may
send requests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

HeaderList = list[tuple[bytes, bytes]]

METHODS: Final = b"GET, POST, PUT, DELETE, HEAD"
EXPOSED: Final = b"X-Stream-Id, X-Request-Id, X-Upstream, Retry-After"
MAX_AGE_S: Final = 7200  # Chromium's own maximum; Firefox takes up to a day
# A preflight names the headers that a script set: the SDKs' X-Stainless-* and streamd's come to about 15 names and 300
# bytes.
REQUESTED_NAMES_MAX: Final = 64
REQUESTED_BYTES_MAX: Final = 2048

# An upstream's CORS headers are about its own pages. With CORS on, streamd removes them before it adds its own.
REPLACED: Final = frozenset(
    b"access-control-" + name
    for name in (
        b"allow-origin",
        b"allow-credentials",
        b"allow-headers",
        b"allow-methods",
        b"allow-private-network",
        b"expose-headers",
        b"max-age",
    )
)

# Pages inside apps have schemes of their own: tauri://localhost, capacitor://localhost, chrome-extension://<id>.
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_NAMES = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+(?:[ \t]*,[ \t]*[!#$%&'*+.^_`|~0-9A-Za-z-]+)*")


def parse_origin(text: str) -> bytes:
    """An exact origin of any scheme as browsers write it: lower case, no path, no default port.

    ValueError names the allowed form.
    """
    shape = _ORIGIN.fullmatch(text.lower().removesuffix("/"))
    if shape is None:
        raise ValueError(
            f"{text!r} is no origin; give scheme and host as in https://chat.example.com or tauri://localhost"
        )
    scheme, host, port = shape.groups()
    suffix = f":{int(port)}" if port and int(port) != _DEFAULT_PORTS.get(scheme) else ""
    return f"{scheme}://{host}{suffix}".encode()


@dataclass(frozen=True, slots=True)
class Cors:
    """The origins whose pages may read, from `parse_origin`. No origins: off."""

    origins: frozenset[bytes] = frozenset()
    credentials: bool = False  # cookies and the browser's own authentication may come along
    max_age_s: int = MAX_AGE_S

    @classmethod
    def of(cls, origins: Iterable[str], *, credentials: bool) -> Cors:
        """The rules of the settings. ValueError for a text that isn't an origin."""
        return cls(frozenset(map(parse_origin, origins)), credentials)

    def response_headers(self, origin: bytes | None) -> HeaderList:
        """The headers of every answer, errors included, to a request with this `Origin` (None: without).

        `Vary` also where nothing is allowed: a cache must not give an answer for one page to another (Fetch 3.2.5).
        """
        if not self.origins:
            return []
        if origin not in self.origins:
            return [(b"Vary", b"Origin")]
        assert origin is not None
        return [(b"Vary", b"Origin"), *self._allow(origin), (b"Access-Control-Expose-Headers", EXPOSED)]

    def preflight_headers(self, headers_get: Callable[[bytes], bytes | None]) -> HeaderList:
        """The headers of the 204 to an OPTIONS request. A browser takes a missing header as a no.

        `headers_get` gives a header by its lowercase name. Requested header names are echoed if all of them are tokens
        (RFC 9110 5.6.2), and not at all otherwise.
        """
        if not self.origins:
            return []
        vary = (b"Vary", b"Origin, Access-Control-Request-Method, Access-Control-Request-Headers")
        origin = headers_get(b"origin")
        if origin not in self.origins or not is_preflight(headers_get):
            return [vary]
        assert origin is not None
        allowed = [vary, *self._allow(origin), (b"Access-Control-Allow-Methods", METHODS)]
        names = headers_get(b"access-control-request-headers")
        if names and _may_echo(names):
            allowed.append((b"Access-Control-Allow-Headers", names))
        if headers_get(b"access-control-request-private-network") == b"true":
            # Chromium asks so for a page of a public site and a server of the local network.
            allowed.append((b"Access-Control-Allow-Private-Network", b"true"))
        allowed.append((b"Access-Control-Max-Age", b"%d" % self.max_age_s))
        return allowed

    def _allow(self, origin: bytes) -> HeaderList:
        allowed = [(b"Access-Control-Allow-Origin", origin)]
        if self.credentials:
            allowed.append((b"Access-Control-Allow-Credentials", b"true"))
        return allowed


def is_preflight(headers_get: Callable[[bytes], bytes | None]) -> bool:
    """Whether an OPTIONS request is a preflight (Fetch 3.2.2): it has an Origin and asks for a method."""
    return headers_get(b"origin") is not None and headers_get(b"access-control-request-method") is not None


def _may_echo(names: bytes) -> bool:
    return (
        len(names) <= REQUESTED_BYTES_MAX
        and names.count(b",") < REQUESTED_NAMES_MAX
        and _NAMES.fullmatch(names) is not None
    )
