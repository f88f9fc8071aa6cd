"""Servers: the engine as its URLs name it, a link and channels for each, and the server of each stream."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

from streamd.core.guard import Guard
from streamd.engine.channels import Channels
from streamd.engine.connection import EngineFault
from streamd.engine.link import Link, LinkOwner, LinkTerms
from streamd.engine.owner import EngineServer
from streamd.engine.sentinels import Sentinels
from streamd.engine.shards import owners_of, partition_of
from streamd.engine_url import EngineUrl, ServerAddress


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

    def use(self, terms: LinkTerms, on_refused: Callable[[str], None]) -> None:
        """As Link.use(), for all links of the shard; `on_refused` hears of a refusal once."""
        if self.sentinels is not None:
            self.sentinels.link.use(terms, lambda words: on_refused(f"a sentinel: {words}"))
        self.link.use(terms, on_refused)
        self.channels.link.use(terms, lambda words: None)  # the same server says the same

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
