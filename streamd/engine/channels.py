"""Channels: the channels of a server of the engine, over a link of its own.

The engine closes a connection whose pushes it can't get rid of (client-output-buffer-limit pubsub). So pushes have a
connection apart from the commands'.

A message can be lost at any time: with the connection, at a failover, in the engine. A receiver hears by `on_ready`
that its channel is subscribed, again after each connection: what was sent before it may be missing. A channel is ready
only when the engine has confirmed it, not when SUBSCRIBE was sent: messages between the two are lost.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from streamd.core.guard import Guard
from streamd.engine.connection import EngineFault, packed
from streamd.engine.link import Link, LinkOwner, LinkTerms
from streamd.engine_url import ServerAddress

# Channels of a SUBSCRIBE, and of a turn: after a failover of thousands of followed streams the engine isn't stormed,
# and the loop isn't held. Some 30 KB.
CHANNELS_TURN_MAX: Final = 512


class ChannelReceiver(NamedTuple):
    """The receiver of a channel's messages."""

    on_ready: Callable[[], None]
    on_text: Callable[[bytes], None]


def _nothing() -> None:
    """The link is up; a channel hears it by itself."""


class Channels:
    """The channels that a process listens to at a server."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        address: Callable[[], ServerAddress | None],
        terms: LinkTerms,
        guard: Guard,
        rng: random.Random,
    ) -> None:
        self._loop = loop
        self._guard = guard
        self._receivers: dict[bytes, ChannelReceiver] = {}
        self._unsent: dict[bytes, None] = {}  # channels to subscribe to, in order
        self.link = Link(loop, address, terms, LinkOwner(self._up, self._down, self._pushed), guard, rng)

    def __len__(self) -> int:
        return len(self._receivers)

    def subscribe(self, channel: bytes, receiver: ChannelReceiver) -> None:
        """Listen to a channel until unsubscribe(). A channel has one receiver."""
        assert channel not in self._receivers
        self._receivers[channel] = receiver
        if self.link.is_up:
            self._send_soon({channel: None})

    def unsubscribe(self, channel: bytes) -> None:
        """No message of the channel reaches its receiver any more."""
        if self._receivers.pop(channel, None) is None:
            return
        if self._unsent.pop(channel, self) is self and self.link.is_up:  # it was sent
            self.link.tell(packed("UNSUBSCRIBE", channel))

    def _send_soon(self, channels: dict[bytes, None]) -> None:
        if not self._unsent:
            self._loop.call_soon(self._send)
        self._unsent.update(channels)

    def _send(self) -> None:
        """Subscribe to a turn's share of the channels."""
        if not self.link.is_up:
            self._unsent.clear()
            return
        share = list(itertools.islice(self._unsent, CHANNELS_TURN_MAX))
        if not share:
            return
        for channel in share:
            del self._unsent[channel]
        self.link.tell(packed("SUBSCRIBE", *share))
        if self._unsent:
            self._loop.call_soon(self._send)

    def _up(self) -> None:
        self._unsent.clear()
        self._send_soon(dict.fromkeys(self._receivers))

    def _down(self, fault: EngineFault) -> None:
        self._unsent.clear()

    def _pushed(self, push: list[Any]) -> None:
        if len(push) != 3:
            return
        receiver = self._receivers.get(push[1])
        if receiver is None:
            return  # unsubscribed meanwhile
        if push[0] == b"message":
            receiver.on_text(push[2])
        elif push[0] == b"subscribe":
            receiver.on_ready()
