"""URLs of the engine: the Valkey or Redis servers that hold copies of streams.

    valkey://HOST[:PORT]                     a single server; valkeys:// with TLS. redis:// and rediss:// are the same
    sentinel://A[:PORT],B[:PORT]…/NAME       the primary that these sentinels call NAME; sentinels:// with TLS
    several URLs                             shards: each has a part of the streams (engine/shards.py)

A shard's name, which decides about its part, is its URL's server, or its sentinels' NAME: it has to be the same on all
nodes, and doesn't change with a failover, with TLS, or with another sentinel in the list.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from streamd.addresses import HOST_NAME, parse_address
from streamd.rows import Refused

# Addresses in a URL: sentinels are three, five or seven.
ADDRESSES_MAX: Final = 16
# Shards of a cluster: 100 nodes with 10,000 streams each need fifteen.
SHARDS_MAX: Final = 64

ENGINE_URL: Final = (
    "valkey://HOST[:PORT], valkeys://… with TLS (redis:// and rediss:// are the same), or "
    "sentinel://HOST[:PORT],…/NAME (sentinels://… with TLS), without user, password, database and query"
)
ENGINE_URLS: Final = "different servers, all of them with TLS or none"

_PORT: Final = 6379
_SENTINEL_PORT: Final = 26379
_SCHEMES: Final = {
    "redis": (False, False),
    "valkey": (False, False),
    "rediss": (True, False),
    "valkeys": (True, False),
    "sentinel": (False, True),
    "sentinels": (True, True),
}
_is_name = re.compile(r"[A-Za-z0-9._-]{1,128}", re.A).fullmatch


class ServerAddress(NamedTuple):
    """Where a server listens."""

    host: str
    port: int


class EngineUrl(NamedTuple):
    """A URL taken apart."""

    tls: bool
    addresses: tuple[ServerAddress, ...]  # of the server, or of its sentinels
    primary: str  # the name by which the sentinels know the server; "": there are none

    @property
    def name(self) -> str:
        """The shard's name."""
        return self.primary or f"{self.addresses[0].host}:{self.addresses[0].port}"


def parse_engine_url(text: str) -> EngineUrl:
    """Take a URL of the engine apart. Raises Refused: no passwords, which would stand in lists of processes."""
    scheme, found, rest = text.partition("://")
    if not found or scheme not in _SCHEMES:
        raise Refused(ENGINE_URL)
    tls, has_sentinels = _SCHEMES[scheme]
    hosts, _, primary = rest.partition("/")
    if has_sentinels != bool(_is_name(primary)) or (not has_sentinels and primary):
        raise Refused(ENGINE_URL)
    names = hosts.split(",")
    if len(names) > (ADDRESSES_MAX if has_sentinels else 1):
        raise Refused(ENGINE_URL)
    port = _SENTINEL_PORT if has_sentinels else _PORT
    return EngineUrl(tls, tuple([_address(name, port) for name in names]), primary)


def check_engine_url(text: str) -> None:
    """Refuse a text that is no URL of an engine."""
    parse_engine_url(text)


def parse_engine_urls(texts: Sequence[str]) -> list[EngineUrl]:
    """The shards of the engine. Raises Refused for a URL that is none, and for two of the same name."""
    urls = [parse_engine_url(text) for text in texts]
    if len({url.name for url in urls}) < len(urls) or len({url.tls for url in urls}) > 1 or len(urls) > SHARDS_MAX:
        raise Refused(ENGINE_URLS)
    return urls


def _address(text: str, port: int) -> ServerAddress:
    if not re.search(r":[0-9]+\Z", text) or text.endswith("]"):
        text = f"{text}:{port}"
    try:
        address = parse_address(text)
    except Refused:
        raise Refused(ENGINE_URL) from None
    if address.is_unix or not address.port or not (HOST_NAME.fullmatch(address.host) or ":" in address.host):
        raise Refused(ENGINE_URL)
    return ServerAddress(address.host.lower(), address.port)
