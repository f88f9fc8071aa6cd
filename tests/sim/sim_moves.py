"""Moves in the simulation: at random steps units are frozen, and go on: thawed, or as new objects made from records.

The oracle of a run knows nothing of moves: readers, upstreams and all rules see a world in which none happens. While
units are frozen the world goes on around them, and must not touch them.
"""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING, Any

from sim_loop import Violation

from streamd.core.stream import Policy, Stream, SubscriberState
from streamd.handover.freezing import Freezer, FrozenUnit
from streamd.handover.landing import House, build, go_on
from streamd.handover.record import pack, unpack
from streamd.handover.unit import Unit, unit_of_client, unit_of_exchange, unit_of_stream
from streamd.handover.units import UNIT, UnitState, unit_state
from streamd.net.client import ClientConnection, ClientState
from streamd.net.exchange import Exchange, ExchangeState
from streamd.net.frozen import NotNow
from streamd.net.upstream import UpstreamConnection

if TYPE_CHECKING:
    from sim_transport import Transport
    from sim_world import World

REQUEST_STATES = (ExchangeState.ASKED, ExchangeState.OPENING, ExchangeState.PROXYING)
STREAM_STATES = (ExchangeState.ASKED, ExchangeState.OPENING, ExchangeState.STREAMING, ExchangeState.COLLECTING)
READER_STATES = (SubscriberState.LIVE, SubscriberState.PAUSED, SubscriberState.BEHIND, SubscriberState.FOLLOWING)

SITUATIONS = (
    *(
        f"{what} is {done}"
        for what in (
            *(f"a client in {at.value}" for at in (ClientState.FRESH, ClientState.HEAD, ClientState.BODY)),
            *(f"a request in {state.value}" for state in REQUEST_STATES),
            *(f"a stream in {state.value}" for state in STREAM_STATES),
            "a published stream",
            "a sealed stream",
            "an upstream in idle",
        )
        for done in ("moved", "thawed")
    ),
    *(f"a reader that is {state.value} is moved" for state in READER_STATES),
    *(f"a reader under {policy.value} is moved" for policy in Policy),
    "a publishing request is moved",
    "a detached generation is moved",
    "a stream with a dispatcher is moved",
    "a stream with several readers is moved",
    "a request whose body may be sent again is moved",
    "bytes that the client has not taken are moved",
    "bytes that wait for a slow reader are moved",
    "a frozen connection is lost",
)
"""Each has to come up in a long search."""

EVERY_STEPS = 50  # the mean between two freezes
UNITS_MAX = 4  # frozen at once
PAUSES_S = (0.0, 0.001, 0.02, 0.05)  # for which they stay frozen


def details(unit: Unit, transports: list[Transport]) -> list[str]:
    """The situations of a unit that moves, beside its kind."""
    stream, link, found = unit.stream, unit.link, []
    for reader in stream.readers if stream is not None else ():
        found += [f"a reader that is {reader.state.value} is moved", f"a reader under {reader.policy.value} is moved"]
    if stream is not None:
        found += ["a detached generation is moved"] * bool(stream.grace_until)
        found += ["a stream with a dispatcher is moved"] * (stream.fanout is not None)
        found += ["a stream with several readers is moved"] * (len(stream.readers) > 1)
    exchange: Any = unit.exchange
    if exchange is not None and exchange._ask is not None and exchange._ask.place().body:
        found.append("a request whose body may be sent again is moved")
    found += ["a publishing request is moved"] * bool(unit.publishings())
    found += ["bytes that the client has not taken are moved"] * any(transport.kernel for transport in transports)
    found += ["bytes that wait for a slow reader are moved"] * (link is not None and link._read is not None)
    return found


class Mover:
    """Freezes units of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = random.Random(world.seed + 2)
        self.freezer: Freezer | None = None
        self._next_step = EVERY_STEPS
        self._is_stopped = False
        self._free_until = 0.0  # after units were frozen for a time, none is for as long
        self._moved_states: dict[FrozenUnit, UnitState] = {}  # of units that were built, and are frozen

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
        if self.rng.random() < 0.5:
            self._move_all(freezer)
        pause_s = self.rng.choice(PAUSES_S) if loop.now >= self._free_until else 0.0
        self._free_until = max(self._free_until, loop.now + 2 * pause_s)
        if pause_s:
            loop.io(pause_s, self._end)
        else:
            self._end()

    def _freeze(self, freezer: Freezer, unit: Unit) -> None:
        with contextlib.suppress(ValueError):  # it can't be frozen now, or stays
            freezer.freeze(unit)

    def stop(self) -> None:
        """Move nothing any more: the worker drains."""
        self._is_stopped = True
        self._end()

    def frozen_streams(self) -> dict[str, Stream]:
        """The streams that are frozen, by their ids."""
        units = [frozen.unit for frozen in self.freezer.frozen] if self.freezer is not None else []
        return {unit.stream.id: unit.stream for unit in units if unit.stream is not None}

    def _end(self) -> None:
        """Move the units that are frozen, or some of them, and thaw all."""
        freezer, self.freezer = self.freezer, None
        if freezer is None:
            return
        if self.rng.random() < 0.5:
            self._move_all(freezer)
        moved, self._moved_states = self._moved_states, {}
        for frozen in freezer.frozen:
            if frozen not in moved:
                self.world.seen[f"{name_of(frozen.unit)} is thawed"] += 1
            self.world.seen["a frozen connection is lost"] += not frozen.is_whole
        freezer.end()
        for frozen, state in moved.items():
            go_on(frozen.unit, state)

    def _move_all(self, freezer: Freezer) -> None:
        """Make new objects of the frozen units, from their records alone; they are frozen as well."""
        units = freezer.frozen
        for k, frozen in enumerate(units):
            if frozen not in self._moved_states:
                units[k] = self._moved(frozen)

    def _moved(self, frozen: FrozenUnit) -> FrozenUnit:
        world, what = self.world, name_of(frozen.unit)
        runtime = world.worker.runtime
        old = transports_of(frozen.unit)
        if not frozen.is_whole or any(transport.is_closing() for transport in old):
            return frozen
        for transport in old:
            transport.kernel += transport.buffer
            transport.buffer.clear()
        try:
            state: UnitState = unpack(UNIT, pack(UNIT, unit_state(runtime.hub, frozen.unit)))
        except NotNow as reason:
            raise Violation(f"{what} is frozen, and can't be told: {reason}") from None
        world.seen.update(details(frozen.unit, old))
        heirs = [transport.heir() for transport in old]
        frozen.give_away(runtime)
        new = build(self.house(), state, heirs)
        for transport, heir in zip(old, heirs, strict=True):
            world.inherit(transport, heir)
        self._moved_states[new] = state
        if frozen.unit.stream is not None:
            for reader in world.readers:  # the model of a reader looks at its stream
                if reader.answer is not None and reader.answer.stream is frozen.unit.stream:
                    reader.answer.stream = new.unit.stream
        world.seen[f"{what} is moved"] += 1
        return new

    def house(self) -> House:
        """The worker, as units land in it."""
        worker = self.world.worker
        return House(
            worker.runtime,
            worker.application,
            worker.upstreams,
            worker.rights,
            worker.streams,
            worker.kept,
            lambda listener, price, tunnelled: worker.entrance(listener, price, is_tunnelled=tunnelled),
        )

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


def transports_of(unit: Unit) -> list[Transport]:
    """The transports of the unit's connections, in the order of its record."""
    links = [unit.link] if unit.link is not None else []
    found: list[Any] = [each.transport for each in (*unit.clients, *links)]
    return found


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
