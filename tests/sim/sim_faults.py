"""Faults of the simulated cluster: storms of them, and between them the quiet in which all has to heal."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from sim_loop import must

from streamd.engine.link import LinkState
from streamd.reasons import CloseReason

if TYPE_CHECKING:
    from sim_cluster import SimCluster
    from sim_engine import EngineServerModel, Session
    from sim_node import Node

# A link notices a stall of a second at its next look, if a command was on its way.
NOTICED_S = 2.8
# The longest time for which an old primary goes on beside its successor.
SPLIT_S = (0.0, 1.0, 5.0, 10.9)
STORM_S = (2.0, 10.0, 20.0)
LOST_WRITES = (0, 0, 1, 3, 10, 40, 200)


class Faults:
    """The faults of a run, their times, and the nodes that can have noticed them."""

    def __init__(self, cluster: SimCluster, names: Collection[str]) -> None:
        self.cluster = cluster
        self._weights = {name: weight for name, (weight, _) in FAULTS.items() if not names or name in names}
        self.rng = cluster.rng
        self.loop = cluster.loop
        self._active = 0  # faults that aren't over
        self._is_storm = False
        self._disturbed: dict[tuple[str, str], float] = {}  # node and server: the end of the last disturbance
        self._unusable: dict[tuple[str, int], float] = {}  # node and link: since when it isn't up
        self._is_over = False

    # -- questions of the judge

    @property
    def is_disturbed(self) -> bool:
        """Whether something is wrong now."""
        return self._active > 0

    def disturbed_at(self, node: Node, session: Session) -> float:
        """The end of the last disturbance that the node can have noticed on its way to the server."""
        return max(session.began_at, self._disturbed.get((node.name, session.server.name), 0.0))

    def cut_off_s(self, node: Node, link: Any) -> float:
        """For how long the node's link hasn't been up."""
        key = (node.name, id(link))
        if link.state is LinkState.UP:
            self._unusable.pop(key, None)
            return 0.0
        since = self._unusable.setdefault(key, self.loop.now)
        return self.loop.now - max(since, node.thawed_at)

    # -- storms

    def begin(self) -> None:
        """Begin with some quiet."""
        self.loop.io(self.rng.uniform(1, 5), self._storm)

    def end(self) -> None:
        """No fault begins any more."""
        self._is_over = True
        if not self.cluster.nodes:
            self.cluster.add_node()

    def _storm(self) -> None:
        if self._is_over:
            return
        rng, loop = self.rng, self.loop
        lasts_s = rng.choice(STORM_S)
        for _ in range(rng.choice((1, 2, 3, 6, 12))):
            loop.io(rng.random() * lasts_s, self._strike)
        rest_s = rng.choice((1.0, 5.0, 30.0, 45.0))
        loop.io(lasts_s + rest_s, self._storm)

    def _strike(self) -> None:
        if self._is_over:
            return
        (name,) = self.rng.choices(list(self._weights), list(self._weights.values()))
        self._enter()
        if FAULTS[name][1](self):
            self.cluster.seen[f"fault: {name}"] += 1
        self._leave()

    def _enter(self) -> None:
        self._active += 1

    def _leave(self) -> None:
        self._active -= 1
        self.cluster.disturbed_at = self.loop.now
        must(self._active >= 0, "faults that end twice")

    def _for(self, seconds: float, undo: Callable[[], object]) -> bool:
        """The fault lasts for this time."""

        def over() -> None:
            undo()
            self._leave()

        self._enter()
        self.loop.io(seconds, over)
        return True

    def _note(self, server: EngineServerModel, node: Node | None = None) -> None:
        """Nodes may have noticed that this server didn't answer; it does from now on."""
        for each in self.cluster.nodes if node is None else [node]:
            was_there = not each.loop.is_frozen and self.loop.now - each.thawed_at > NOTICED_S
            if was_there:
                self._disturbed[each.name, server.name] = self.loop.now

    # -- choices

    def _server(self) -> EngineServerModel:
        return self.rng.choice(self.cluster.data_servers)

    def _node(self) -> Node | None:
        return self.rng.choice(self.cluster.nodes) if self.cluster.nodes else None

    # -- the engine

    def stalls(self) -> bool:
        server, seconds = self._server(), self.rng.choice((0.3, 2.0, 4.0, 8.0, 15.0))
        if server.is_frozen:
            return False
        server.is_frozen = True

        def go_on() -> None:
            server.is_frozen = False
            if seconds > NOTICED_S:
                self._note(server)
            server.flow()

        return self._for(seconds, go_on)

    def dies_and_is_empty(self) -> bool:
        server = self._server()
        if not server.is_up:
            return False
        server.is_up = False
        server.cut_all()
        server.flush()
        server.data.is_full = False
        return self._for(self.rng.choice((0.05, 1.5, 6.0, 20.0)), lambda: setattr(server, "is_up", True))

    def is_emptied(self) -> bool:
        self._server().flush()
        return True

    def evicts(self) -> bool:
        server = self._server()
        data, server.lost_at = server.data, self.loop.now
        names = [name for name in data.keys if b":l:" in name]
        for name in self.rng.sample(names, self.rng.randint(min(1, len(names)), len(names))):
            data.evict(name)
        return bool(names)

    def is_full(self) -> bool:
        data = self._server().data
        data.is_full = True
        return self._for(self.rng.choice((0.5, 3.0, 15.0)), lambda: setattr(data, "is_full", False))

    def denies(self) -> bool:
        server = self._server()
        server.denies = True
        return self._for(self.rng.choice((0.5, 3.0, 12.0)), lambda: setattr(server, "denies", False))

    def loses_messages(self) -> bool:
        server = self._server()
        server.loss = self.rng.choice((0.05, 0.5, 1.0))
        return self._for(self.rng.choice((1.0, 5.0, 20.0)), lambda: setattr(server, "loss", 0.0))

    def is_far(self) -> bool:
        server = self._server()
        server.is_far = True

        return self._for(self.rng.choice((2.0, 10.0)), lambda: setattr(server, "is_far", False))

    def clock_jumps(self) -> bool:
        server = self._server()
        server.clock_ahead_s += self.rng.choice((-100.0, -5.0, 5.0, 100.0))
        server.lost_at = self.loop.now  # times to live run out
        return True

    def fails_over(self) -> bool:
        """A replica takes the server's address."""
        cluster = self.cluster
        if cluster.sentinels:
            return self._switches()
        server = self._server()
        server.cut_all()  # commands on the way reach the old server, if any
        server.succeed(self.rng.choice(LOST_WRITES))
        return True

    def _switches(self) -> bool:
        """The sentinels choose a new primary; the old one goes on for a while."""
        cluster, rng = self.cluster, self.rng
        old = cluster.primary_of_sentinels
        new = next(server for server in cluster.data_servers if server is not old)
        if old.is_frozen or new.is_frozen or not new.is_up or new.role == "master" or old.role != "master":
            return False
        went_on = old.data.replica()
        went_on.listeners, old.data.listeners = old.data.listeners, new.data.listeners
        old.succeed(rng.choice(LOST_WRITES))
        new.lost_at = self.loop.now
        new.data, old.data = old.data, went_on
        new.data.now, new.beaten_at, new.back_at = new._clock, dict(old.beaten_at), dict(old.back_at)
        new.role = "master"
        cluster.primary_of_sentinels = new
        told_s = rng.choice((0.0, 0.8, 3.0))
        for sentinel in cluster.sentinels:
            if rng.random() < 0.7:
                self.loop.io(told_s, self._tell_of_switch, sentinel, old, new)
        split_s = max(told_s, rng.choice(SPLIT_S))
        cluster.seen["a split brain"] += split_s > 2.0

        def demote() -> None:
            old.role = "slave"
            old.cut_all()
            old.data.is_full = False

        return self._for(split_s, demote)

    def _tell_of_switch(self, sentinel: EngineServerModel, old: EngineServerModel, new: EngineServerModel) -> None:
        text = b"streams %b 6379 %b 6379" % (old.name.encode(), new.name.encode())
        sentinel.data.execute((b"PUBLISH", b"+switch-master", text))

    # -- the network

    def cuts(self) -> bool:
        server = self._server()
        sessions = list(server.sessions)
        if not sessions:
            return False
        self.rng.choice(sessions).cut()
        return True

    def cuts_pushes(self) -> bool:
        sessions = [s for server in self.cluster.data_servers for s in server.sessions if s.channels]
        if not sessions:
            return False
        self.rng.choice(sessions).cut()
        return True

    def cuts_all(self) -> bool:
        self._server().cut_all()
        return True

    def has_a_hole(self) -> bool:
        server, node = self.rng.choice(list(self.cluster.servers.values())), self._node()
        if node is None or (node.name, server.name) in self.cluster.holes:
            return False
        hole, seconds = (node.name, server.name), self.rng.choice((1.0, 4.0, 12.0, 20.0, 30.0))
        self.cluster.holes.add(hole)

        def mend() -> None:
            self.cluster.holes.discard(hole)
            if seconds > NOTICED_S:
                self._note(server, node)
            server.flow()

        return self._for(seconds, mend)

    # -- nodes

    def node_is_killed(self) -> bool:
        node = self._node()
        if node is None or node.is_stopping:
            return False
        cluster = self.cluster
        cluster.nodes.remove(node)
        node.kill()
        for client in tuple(cluster.clients):
            if client.node is node:
                client.broken()
        return self._for(self.rng.choice((0.5, 5.0, 15.0)), cluster.add_node)

    def node_stops(self) -> bool:
        node = self._node()
        if node is None or node.is_stopping or node.loop.is_frozen:
            return False
        cluster = self.cluster
        node.is_stopping = True

        def stop() -> None:
            for client in tuple(cluster.clients):
                if client.node is node and (client.connection is None or not client.connection.is_open):
                    client.broken()
                elif client.node is node and client.connection is not None:
                    client.connection.send_away(CloseReason.DRAINING, "The node restarts.")
            for generation in tuple(cluster.generations.values()):
                if generation.node is node:
                    generation.stop()
            node.loop.create_task(node.stop())

        node.loop.arrives(stop)

        def gone() -> None:
            cluster.nodes.remove(node)
            node.kill()
            for client in tuple(cluster.clients):
                if client.node is node:
                    client.broken()
            cluster.add_node()

        return self._for(self.rng.choice((3.0, 8.0)), gone)

    def node_stands_still(self) -> bool:
        node, seconds = self._node(), self.rng.choice((0.5, 3.0, 8.0, 15.0, 20.0))
        if node is None or node.loop.is_frozen or node.is_stopping:
            return False
        node.loop.is_frozen = True

        def go_on() -> None:
            node.thawed_at = self.loop.now
            node.loop.go_on()

        return self._for(seconds, go_on)

    def wall_clock_jumps(self) -> bool:
        node = self._node()
        if node is not None:
            node.wall_ahead_s += self.rng.choice((-86_400.0, -10.0, 10.0, 86_400.0))
        return node is not None


FAULTS: dict[str, tuple[int, Callable[[Faults], bool]]] = {
    "the engine stalls": (4, Faults.stalls),
    "the engine dies and comes back empty": (3, Faults.dies_and_is_empty),
    "the engine is emptied": (2, Faults.is_emptied),
    "the engine evicts copies": (3, Faults.evicts),
    "the engine is full": (3, Faults.is_full),
    "the engine refuses writes": (1, Faults.denies),
    "the engine loses messages": (4, Faults.loses_messages),
    "the engine is far away": (2, Faults.is_far),
    "the engine's clock jumps": (1, Faults.clock_jumps),
    "the engine fails over": (6, Faults.fails_over),
    "a connection is cut": (4, Faults.cuts),
    "a connection for pushes is cut": (3, Faults.cuts_pushes),
    "all connections are cut": (3, Faults.cuts_all),
    "a node is cut off from a server": (8, Faults.has_a_hole),
    "a node is killed": (3, Faults.node_is_killed),
    "a node stops in order": (2, Faults.node_stops),
    "a node stands still": (4, Faults.node_stands_still),
    "a node's wall clock jumps": (1, Faults.wall_clock_jumps),
}
