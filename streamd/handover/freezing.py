"""Freezing: units that nothing touches, neither a timer nor the sweep, a turn or a scheduled call.

It is a property of each object, and not of the process: a frozen object is in no registry that acts by itself.

    clients          not among the process's, so no drain and no table finds them; a stand-in hears of their sockets
    upstreams        neither in the pool nor at rest; likewise a stand-in
    all with times   not in the sweep
    a stream         set aside by the hub

What an object has scheduled for a later turn is the reason for which it can't be frozen yet (unit.check()): bytes that
wait for a turn, a catch-up, a pass over readers, writes that leave at the turn's end, a connection that is being
established. And no new work may begin on a frozen stream: while anything is frozen, input waits in net/turns.py, for
milliseconds. Tokens of all other streams go on.

All places in the books stay taken. So thaw() gives the process back what it had, and nothing shows: a rehearsal and a
move that was called off leave no trace.
"""

from __future__ import annotations

from streamd.handover.leaving import leave
from streamd.handover.unit import Unit, check
from streamd.net.client import ClientConnection
from streamd.net.frozen import StandIn
from streamd.net.runtime import Runtime
from streamd.net.sweep import Due
from streamd.net.upstream import UpstreamConnection, UpstreamState


class FrozenUnit:
    """A unit that is frozen, and what thaw() needs."""

    __slots__ = ("_members", "_stand_ins", "unit")

    def __init__(self, runtime: Runtime, unit: Unit, *, is_checked: bool = False) -> None:
        """Raises as unit.check() does, with nothing changed. `is_checked`: a unit that was just built."""
        if not is_checked:
            check(unit)
        self.unit = unit
        self._members: list[Due] = []  # of the sweep
        self._stand_ins: list[StandIn] = []
        for client in unit.clients:
            self._take_out(runtime, client)
            runtime.clients.discard(client)
            self._stand_ins.append(StandIn(client, is_full=client.paused))
        for member in (*unit.publishings(), *unit.waits(), unit.exchange, unit.publisher):
            if member is not None:
                self._take_out(runtime, member)
        if unit.link is not None:
            unit.link.upstream.forget(unit.link)
            self._stand_ins.append(StandIn(unit.link, is_full=bool(unit.link.unwritten_bytes)))
            runtime.pacing.end_rest(unit.link)
        if unit.stream is not None:
            runtime.hub.set_aside(unit.stream)

    def _take_out(self, runtime: Runtime, member: Due) -> None:
        due_at = member.due_at
        runtime.sweep.discard(member)
        member.due_at = due_at  # as it is told
        self._members.append(member)

    def thaw(self, runtime: Runtime) -> None:
        """The unit goes on here."""
        unit = self.unit
        if unit.stream is not None:
            runtime.hub.take_back(unit.stream)
        for member in self._members:
            runtime.sweep.add(member)
            if isinstance(member, ClientConnection):
                runtime.clients.add(member)
        if unit.link is not None and unit.link.at is UpstreamState.IDLE:
            unit.link.upstream.unfreeze(unit.link)
        for stand_in in self._stand_ins:
            stand_in.thaw()

    def give_away(self, runtime: Runtime) -> None:
        """The unit goes on in another process: give back all that it holds here."""
        if self.unit.stream is not None:
            runtime.hub.take_back(self.unit.stream)
        leave(runtime, self.unit)

    @property
    def is_whole(self) -> bool:
        """Whether all connections are still there."""
        return not any(stand_in.is_lost for stand_in in self._stand_ins)

    @property
    def unsent(self) -> list[ClientConnection | UpstreamConnection]:
        """The connections whose last bytes the kernel hasn't taken."""
        connections: list[ClientConnection | UpstreamConnection] = [*self.unit.clients]
        if self.unit.link is not None:
            connections.append(self.unit.link)
        return [each for each in connections if each.transport.get_write_buffer_size()]


class Freezer:
    """The frozen units of a process, all thawed or given away together."""

    def __init__(self, runtime: Runtime) -> None:
        """From here on input waits."""
        self._runtime = runtime
        self.frozen: list[FrozenUnit] = []
        runtime.turns.hold()

    def freeze(self, unit: Unit) -> FrozenUnit:
        """Raises as unit.check() does, with nothing changed."""
        frozen = FrozenUnit(self._runtime, unit)
        self.frozen.append(frozen)
        return frozen

    def end(self) -> None:
        """Thaw what is left, and let input go on."""
        frozen, self.frozen = self.frozen, []
        try:
            for each in frozen:
                each.thaw(self._runtime)
        finally:
            self._runtime.turns.release()
