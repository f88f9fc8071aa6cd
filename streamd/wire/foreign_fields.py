"""Fields of an upstream's answer that speak to browsers for a whole origin, or to the proxies in front.

The origin is streamd's and its pages', not the inference server's: a cookie, a redirection of all traffic or a report
address that a server sets would hold for everything there, and longer than the answer. And a proxy in front takes its
orders (send that file, cache that long) from streamd alone. Fields that describe the answer pass.
"""

from __future__ import annotations

from typing import Final

_NAMES: Final = frozenset(
    (
        # what a browser keeps for the origin
        b"accept-ch",
        b"activate-storage-access",
        b"alt-svc",
        b"clear-site-data",
        b"critical-ch",
        b"expect-ct",
        b"nel",
        b"origin-agent-cluster",
        b"public-key-pins",
        b"public-key-pins-report-only",
        b"refresh",
        b"report-to",
        b"reporting-endpoints",
        b"secure-session-registration",
        b"sec-session-registration",
        b"service-worker-allowed",
        b"set-cookie",
        b"set-cookie2",
        b"set-login",
        b"strict-transport-security",
        # what a proxy in front obeys (RFC 9213 and its forerunners)
        b"cdn-cache-control",
        b"edge-control",
        b"x-reproxy-url",
    )
)
_BEGINNINGS: Final = (
    b"access-control-",
    b"surrogate-",
    b"x-accel-",
    b"x-lighttpd-",
    b"x-litespeed-",
    b"x-reproxy-",
    b"x-sendfile",
)
_ENDS: Final = (b"-cdn-cache-control",)


def is_foreign(name: bytes) -> bool:
    """Whether a field of an upstream's answer, by its lower-case name, goes no further unless a setting names it."""
    # Some proxies and servers read `_` as `-`.
    name = name.replace(b"_", b"-")
    return name in _NAMES or name.startswith(_BEGINNINGS) or name.endswith(_ENDS)
