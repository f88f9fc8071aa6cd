"""Servers: the engine as its URLs name it, a link and channels for each, and the server of each stream.

    redis://HOST[:PORT]                      a single server; rediss:// with TLS. valkey:// and valkeys:// are the same
    sentinel://A[:PORT],B[:PORT]…/NAME       the primary that these sentinels call NAME; sentinels:// with TLS
    several URLs                             shards: each has a part of the streams (engine/shards.py)

A shard's name, which decides about its part, is its URL's server, or its sentinels' NAME: it has to be the same on all
nodes, and doesn't change with a failover, with TLS, or with another sentinel in the list.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from streamd.addresses import HOST_NAME, parse_address
from streamd.core.guard import Guard
from streamd.engine.channels import Channels
from streamd.engine.connection import EngineFault
from streamd.engine.link import Link, LinkOwner, LinkTerms, ServerAddress
from streamd.engine.owner import EngineServer
from streamd.engine.sentinels import Sentinels
from streamd.engine.shards import owners_of, partition_of
from streamd.rows import Refused

# Addresses in a URL: sentinels are three, five or seven.
ADDRESSES_MAX: Final = 16
# Shards of a cluster: 100 nodes with 10,000 streams each need fifteen.
SHARDS_MAX: Final = 64

ENGINE_URL: Final = (
    "redis://HOST[:PORT], rediss://… with TLS, or sentinel://HOST[:PORT],…/NAME (sentinels://… with TLS), "
    "without user, password, database and query"
)

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


def parse_engine_urls(texts: Sequence[str]) -> list[EngineUrl]:
    """The shards of the engine. Raises Refused for a URL that is none, and for two of the same name."""
    urls = [parse_engine_url(text) for text in texts]
    if len({url.name for url in urls}) < len(urls) or len({url.tls for url in urls}) > 1 or len(urls) > SHARDS_MAX:
        raise Refused("different servers, all of them with TLS or none")
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


class EngineShard:
    """A server of the engine: its link, its channels, and the sentinels that name it."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        url: EngineUrl,
        terms: LinkTerms,
        guard: Guard,
        rng: random.Random,
        *,
        on_up: Callable[[EngineShard], None],
    ) -> None:
        self.url = url
        self.sentinels: Sentinels | None = None
        if url.primary:
            self.sentinels = Sentinels(loop, url.addresses, url.primary, terms, guard, rng, on_moved=self._moved)
        owner = LinkOwner(lambda: on_up(self), self._down, _unasked)
        self.link = Link(loop, self._address, terms, owner, guard, rng)
        self.channels = Channels(loop, self._address, terms, guard, rng)
        self.server = EngineServer(self.link)

    def _address(self) -> ServerAddress | None:
        return self.url.addresses[0] if self.sentinels is None else self.sentinels.primary

    def _moved(self) -> None:
        """The sentinels name another server."""
        self.link.moved()
        self.channels.link.moved()

    def _down(self, fault: EngineFault) -> None:
        """Nothing to do: each copy is looked at when the link is up again."""

    def start(self) -> None:
        """Begin to connect."""
        if self.sentinels is not None:
            self.sentinels.start()
        self.link.start()
        self.channels.link.start()

    def stop(self) -> None:
        """Close all connections, for good."""
        if self.sentinels is not None:
            self.sentinels.stop()
        self.link.stop()
        self.channels.link.stop()

    def tick(self, now: float) -> None:
        """Judge by the clock; the sweep calls it four times a second."""
        if self.sentinels is not None:
            self.sentinels.tick(now)
        self.link.tick(now)
        self.channels.link.tick(now)


class EngineServers:
    """All servers of the engine. `on_up` hears of each link that is up, and may lead to an empty server."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        urls: Sequence[EngineUrl],
        terms: LinkTerms,
        guard: Guard,
        rng: random.Random,
        *,
        on_up: Callable[[EngineServer], None],
    ) -> None:
        def up(shard: EngineShard) -> None:
            on_up(shard.server)

        self.shards = [EngineShard(loop, url, terms, guard, rng, on_up=up) for url in urls]
        self._owners = owners_of([url.name for url in urls])

    def shard_of(self, stream_id: str) -> EngineShard:
        """The shard of a stream's id or chosen name."""
        return self.shards[self._owners[partition_of(stream_id)]]

    def start(self) -> None:
        """Begin to connect to all."""
        for shard in self.shards:
            shard.start()

    def stop(self) -> None:
        """Close all connections, for good."""
        for shard in self.shards:
            shard.stop()

    def tick(self, now: float) -> None:
        """Judge by the clock; the sweep calls it four times a second."""
        for shard in self.shards:
            shard.tick(now)


def _unasked(push: list[object]) -> None:
    """A link of commands subscribes to nothing."""
