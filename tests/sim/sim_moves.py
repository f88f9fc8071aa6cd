"""Moves in the simulation: at random steps units are frozen, and go on: thawed, or as new objects made from records.

The oracle of a run knows nothing of moves: readers, upstreams and all rules see a world in which none happens. While
units are frozen the world goes on around them, and must not touch them.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from streamd.core.stream import Stream
from streamd.handover.freezing import Freezer
from streamd.handover.unit import Unit, unit_of_client, unit_of_exchange, unit_of_stream
from streamd.net.client import ClientConnection
from streamd.net.exchange import Exchange
from streamd.net.frozen import NotNow
from streamd.net.upstream import UpstreamConnection

if TYPE_CHECKING:
    from sim_world import World

EVERY_STEPS = 50  # the mean between two freezes
UNITS_MAX = 4  # frozen at once
PAUSES_S = (0.0, 0.001, 0.02, 0.05)  # for which they stay frozen


class Mover:
    """Freezes units of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = random.Random(world.seed + 2)
        self.freezer: Freezer | None = None
        self._next_step = EVERY_STEPS
        self._is_stopped = False

    def after_step(self) -> None:
        """Called after each step: now and then freeze some units."""
        loop = self.world.loop
        if loop.steps < self._next_step or self.freezer is not None or self._is_stopped:
            return
        self._next_step = loop.steps + self.rng.randrange(1, 2 * EVERY_STEPS)
        freezer = Freezer(self.world.worker.runtime)
        for _ in range(self.rng.randrange(1, UNITS_MAX + 1)):
            unit = self._unit()
            if unit is not None:
                self._freeze(freezer, unit)
        self.freezer = freezer
        pause_s = self.rng.choice(PAUSES_S)
        if pause_s:
            loop.io(pause_s, self._go_on)
        else:
            self._go_on()

    def _freeze(self, freezer: Freezer, unit: Unit) -> None:
        seen, what = self.world.seen, name_of(unit)
        try:
            freezer.freeze(unit)
        except NotNow as reason:
            seen[f"{what} can't be frozen now: {reason}"] += 1
        except ValueError as reason:
            seen[f"{what} stays: {reason}"] += 1
        else:
            seen[f"{what} is frozen"] += 1

    def stop(self) -> None:
        """Move nothing any more: the worker drains."""
        self._is_stopped = True
        self._go_on()

    def frozen_streams(self) -> dict[str, Stream]:
        """The streams that are frozen, by their ids."""
        units = [frozen.unit for frozen in self.freezer.frozen] if self.freezer is not None else []
        return {unit.stream.id: unit.stream for unit in units if unit.stream is not None}

    def _go_on(self) -> None:
        freezer, self.freezer = self.freezer, None
        if freezer is not None:
            freezer.end()

    def _unit(self) -> Unit | None:
        """A random unit of the world, which may be frozen already."""
        runtime = self.world.worker.runtime
        members = list(runtime.sweep._members)
        kind = self.rng.randrange(4)
        if kind == 0:
            streams = list(runtime.hub)
            return unit_of_stream(runtime, self.rng.choice(streams)) if streams else None
        if kind == 1:
            idle = [link for upstream in self.world.worker.upstreams for link in upstream._idle]
            return Unit(link=self.rng.choice(idle)) if idle else None
        found: Any = self.rng.choice(members) if members else None
        if isinstance(found, ClientConnection):
            return unit_of_client(runtime, found)
        return unit_of_exchange(runtime, found) if isinstance(found, Exchange) else None


def name_of(unit: Unit) -> str:
    """The kind and the state of a unit, as situations name them."""
    exchange, stream = unit.exchange, unit.stream
    if exchange is not None:
        return f"{'a stream' if stream is not None else 'a request'} in {exchange.state.value}"
    if stream is not None:
        return "a sealed stream" if stream.reason is not None else "a published stream"
    if unit.clients:
        return f"a client in {unit.clients[0].at.value}"
    assert isinstance(unit.link, UpstreamConnection)
    return f"an upstream in {unit.link.at.value}"
