"""Sentinels: they name the server that is the primary now.

A link to one of them asks for the primary's address, every ASK_EVERY_S and whenever the link is new, and listens to
`+switch-master`. That message counts: at an orderly failover the old primary goes on acknowledging for ten seconds what
the new primary never gets. If a sentinel can't be reached, the next is tried.

Whether the named server is a primary by its own words is judged by its link (HELLO's role).
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any, Final

from streamd.core.guard import Guard
from streamd.engine.connection import EngineFault, Reply, packed
from streamd.engine.link import Link, LinkOwner, LinkTerms
from streamd.engine_url import ServerAddress

# Half of the least down-after-milliseconds that operators use: a lost message costs no more than that.
ASK_EVERY_S: Final = 2.0

_SWITCHED: Final = b"+switch-master"


class Sentinels:
    """The way to a primary's address. `on_moved` is called whenever it has changed."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        addresses: Sequence[ServerAddress],
        name: str,
        terms: LinkTerms,
        guard: Guard,
        rng: random.Random,
        *,
        on_moved: Callable[[], None],
    ) -> None:
        self._name = name
        self._on_moved = on_moved
        self._turns = itertools.cycle(addresses)
        self._ask_at = 0.0
        self.primary: ServerAddress | None = None
        owner = LinkOwner(self._up, self._down, self._pushed)
        self.link = Link(loop, lambda: next(self._turns), terms, owner, guard, rng, role="sentinel")

    def start(self) -> None:
        """Begin to ask."""
        self.link.start()

    def stop(self) -> None:
        """Ask no more."""
        self.link.stop()

    def tick(self, now: float) -> None:
        """Judge by the clock, and ask again; the sweep calls it four times a second."""
        self.link.tick(now)
        if self.link.is_up and now >= self._ask_at:
            self._ask_at = now + ASK_EVERY_S
            self.link.ask(packed("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._name), self._named)

    def _up(self) -> None:
        self._ask_at = 0.0
        self.link.tell(packed("SUBSCRIBE", _SWITCHED))
        self.link.ask(packed("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._name), self._named)

    def _down(self, fault: EngineFault) -> None:
        """The primary that was named last stays: it may well be in order."""

    def _named(self, reply: Reply) -> None:
        if isinstance(reply, list) and len(reply) == 2:
            self._take(reply[0], reply[1])

    def _pushed(self, push: list[Any]) -> None:
        if len(push) == 3 and push[:2] == [b"message", _SWITCHED]:
            words = push[2].split()
            if len(words) == 5 and words[0] == self._name.encode():
                self._take(words[3], words[4])

    def _take(self, host: bytes, port: bytes) -> None:
        """Use this address from now on. A sentinel that says nonsense is not believed."""
        if not port.isdigit() or not 0 < int(port) < 65536 or not host.isascii() or not host:
            return
        primary = ServerAddress(host.decode(), int(port))
        if primary != self.primary:
            self.primary = primary
            self._on_moved()
