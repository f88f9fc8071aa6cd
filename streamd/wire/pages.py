"""Web pages that reach streamd through the browser on its own machine: the host that they asked for, and their origin.

A browser sends a request for any page to any address, loopback too. Two fields that no page can choose tell on it:

    Host                a page at http://evil.example whose name was rebound to 127.0.0.1 is of the same origin as
                        streamd, but its requests still carry its own name. A loopback name can't be bound by others,
                        and an address isn't bound at all
    Origin,             the page's origin, and its relation to the request's (Fetch 3.2, Fetch Metadata 2.3). Programs
    Sec-Fetch-Site      other than browsers send neither
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Final

from streamd.wire.forwarded import parse_address

HeadersGet = Callable[[bytes], bytes | None]
"""A request's header by its lowercase name; None if it is missing."""

# RFC 6761 6.3: these names are this machine, whatever a resolver says.
LOCALHOST: Final = "localhost"

_PORT: Final = re.compile(r":[0-9]*\Z")
# A browser sends `none` for a request that its user made (an address typed, a bookmark).
_OWN_SITES: Final = (b"same-origin", b"none")
_DEFAULT_PORTS: Final = {"http": ":80", "https": ":443"}


def host_of(authority: bytes) -> str:
    """The host of a Host field: lower case, without port, brackets and the dot of the root. "" if there is none."""
    host = _PORT.sub("", authority.decode("latin-1").lower())
    return host.removeprefix("[").removesuffix("]").removesuffix(".")


def is_local(host: str, allowed: Collection[str], *, plain_names: bool) -> bool:
    """Whether nobody but this machine's owner can bind the host: a loopback name, an address, one that is allowed.

    `plain_names`: names without a dot count too. No host at all counts: a browser always sends its own.
    """
    if not host or host == LOCALHOST or host.endswith("." + LOCALHOST) or parse_address(host) is not None:
        return True
    return host in allowed or (plain_names and "." not in host)


def is_of_another_page(field: HeadersGet, authority: bytes) -> bool:
    """Whether a browser sends the request for a page of another origin, or for a page that hides its origin.

    Where the browser says that the page is of the request's own origin, this holds: a proxy in front may have changed
    Host since.
    """
    site, origin = field(b"sec-fetch-site"), field(b"origin")
    if site is not None and site.strip().lower() not in _OWN_SITES:
        return True
    if origin is None or (site is not None and site.strip().lower() == b"same-origin"):
        return False
    scheme, _, place = origin.decode("latin-1").lower().partition("://")
    asked = authority.decode("latin-1").lower()
    default = _DEFAULT_PORTS.get(scheme)
    return default is None or place.removesuffix(default) != asked.removesuffix(default)
