"""The world of a cluster's run: two to four nodes, the engine that they share, readers, faults, and the judge of all.

The rules, each under its letter where it is checked:

    (a) a reader's events are those of the source, byte for byte, without a hole and without a double
    (b) a reader gets all that there is, or its end, or is told to come back, within a bound after the last disturbance
    (c) the engine's copy, as it is when its owner dies, reaches every reader
    (d) a reader at the owner's node notices nothing: it has each event in the step in which the source gave it
    (e) memory is bounded, and nothing is left when all has ended
    (f) nobody mixes two logs in a copy (sim_engine.py checks each entry)
    (g) nobody is declared lost within the lease after a sign of life, or after a disturbance at the declarer's
"""

from __future__ import annotations

import base64
import gc
import random
from collections import Counter
from collections.abc import Collection
from typing import Any

from sim_client import Client
from sim_cluster_watch import ClusterWatch
from sim_engine import EngineServerModel
from sim_faults import Faults
from sim_generation import Generation
from sim_loop import VirtualLoop, must
from sim_node import Node

from streamd.config import Settings
from streamd.core.admission import _STREAMS
from streamd.core.stream import Stream, Subscriber, SubscriberState
from streamd.engine.connection import EngineConnection
from streamd.engine.entry import Entry
from streamd.engine.follow import SILENT_S, STASH_BYTES_MAX, STASH_MESSAGES_MAX, Follow, FollowState
from streamd.engine.followed import GONE_S
from streamd.engine.link import COMMANDS_MAX, LinkState
from streamd.engine.owner import HELD_S, RENEW_EVERY_S, CopyState, OwnedCopy
from streamd.engine.shards import CopyKeys, owners_of, partition_of
from streamd.engine_url import parse_engine_urls

CHECK_EVERY_S = 1.0
# A quiet cluster: whatever a disturbance began is over. The longest are a renewed copy and a refused one.
HEALED_S = max(RENEW_EVERY_S, HELD_S) + 8.0
# In a quiet cluster: an owner writes once a second, and a follower notices a lost push by its own clock.
WRITTEN_S = 2.6
HEARD_S = SILENT_S + 3.5
# A look at a sign of life comes once a second, over a network that may be slow.
LOOK_S = 2.5

SINGLE, SHARDS, SENTINELS = "a single server", "two shards", "sentinels"

KINDS_LEFT = (Stream, Subscriber, Follow, OwnedCopy, EngineConnection)


class SimCluster:
    """A run. `play()` raises Violation, or an exception that the code under test must not raise."""

    def __init__(self, seed: int, *, faults: Collection[str] = ()) -> None:
        """`faults`: of the table of sim_faults.py, the only ones that happen; all of them if there are none."""
        self.seed = seed
        self.rng = rng = random.Random(f"cluster {seed}")
        self.loop = VirtualLoop(rng)
        self.loop.after = self._after
        self.seen: Counter[str] = Counter()
        self.results: Counter[str] = Counter()
        self.keys = CopyKeys()
        self.topology = rng.choice((SINGLE, SINGLE, SHARDS, SENTINELS))
        self.seen[f"the engine: {self.topology}"] += 1
        self.settings = self._settings()
        self.servers: dict[str, EngineServerModel] = {}
        self.primary_of_sentinels: EngineServerModel
        self._shards: list[str] = []
        self._make_servers()
        urls = parse_engine_urls(self.settings.engine)
        self._owners = owners_of([url.name for url in urls])
        self.holes: set[tuple[str, str]] = set()
        self._incarnations = 0
        self.is_winding_down = False
        self.disturbed_at = self.loop.now  # the end of the last disturbance
        self.generations: dict[str, Generation] = {}
        self.clients: dict[Client, None] = {}
        self.generations_max = rng.choice((3, 8, 20))
        self.nodes: list[Node] = [Node(self, f"n{k}", self.settings) for k in range(rng.choice((2, 2, 3, 4)))]
        self._names = len(self.nodes)
        self.faults = Faults(self, faults)
        self.steps = 0

    def _settings(self) -> Settings:
        pick = self.rng.choice
        engine = {
            SINGLE: ("valkey://10.0.0.1",),
            SHARDS: ("valkey://10.0.0.1", "valkey://10.0.0.2"),
            SENTINELS: ("sentinel://10.0.1.1,10.0.1.2,10.0.1.3/streams",),
        }[self.topology]
        return Settings(
            engine=engine,
            engine_push_s=pick((0.005, 0.03, 0.03, 0.2)),
            engine_timeout_s=pick((2.0, 5.0)),
            engine_patience_s=pick((5.0, 12.0)),
            engine_lease_s=pick((6.0, 10.0)),
            engine_live_ttl_s=pick((60.0, 3600.0)),
            log_bytes_max=pick((4 * 1024, 32 * 1024, 1 << 20)),
            log_events_max=pick((64, 1000, 100_000)),
        )

    def _make_servers(self) -> None:
        names = {SINGLE: 1, SHARDS: 2, SENTINELS: 2}[self.topology]
        for k in range(names):
            self.servers[f"10.0.0.{k + 1}"] = EngineServerModel(self, f"10.0.0.{k + 1}")
        self._shards = list(self.servers)
        if self.topology == SENTINELS:
            self.primary_of_sentinels = self.servers["10.0.0.1"]
            self.servers["10.0.0.2"].role = "slave"
            for k in range(3):
                self.servers[f"10.0.1.{k + 1}"] = EngineServerModel(self, f"10.0.1.{k + 1}", role="sentinel")

    def incarnation(self) -> str:
        """Of the next process."""
        self._incarnations += 1
        return base64.urlsafe_b64encode(self._incarnations.to_bytes(3, "big")).decode()

    # -- the parts

    @property
    def data_servers(self) -> list[EngineServerModel]:
        """The servers that hold data."""
        return [server for server in self.servers.values() if server.role != "sentinel"]

    @property
    def sentinels(self) -> list[EngineServerModel]:
        """The sentinels, if there are some."""
        return [server for server in self.servers.values() if server.role == "sentinel"]

    def server_of(self, stream_id: str) -> EngineServerModel:
        """The server that has the copy of a stream now."""
        if self.topology == SENTINELS:
            return self.primary_of_sentinels
        return self.servers[self._shards[self._owners[partition_of(stream_id)]]]

    def node_of(self, member: str) -> Node | None:
        """A living node, by its member's id."""
        return next((node for node in self.nodes if node.member == member), None)

    def add_node(self) -> None:
        """Another process begins to serve."""
        if not self.is_winding_down or not self.nodes:
            self.nodes.append(Node(self, f"n{self._names}", self.settings))
            self._names += 1

    # -- play

    def play(self, steps: int) -> None:
        """Play this number of steps with everything going on, then until everything has ended."""
        before = _alive(collect=True)
        gc.disable()
        watch = ClusterWatch(self)
        try:
            self._play(steps)
        finally:
            watch.remove()
            self.loop.abandon()
            gc.enable()
        self.steps = self.loop.steps
        self._check_freed(before)

    def _play(self, steps: int) -> None:
        loop, rng = self.loop, self.rng
        for _ in range(self.generations_max):
            loop.io(rng.random() * 5, self._generate)
        loop.io(0.5, self._check)
        loop.io(1.0, self._expire)
        self.faults.begin()
        loop.run(lambda: loop.steps < steps)
        self.is_winding_down = True
        self.faults.end()
        until = loop.now + 300
        loop.run(lambda: loop.now < until and bool(self.clients or self._streams_left()))
        must(not self.clients, "readers that never end", *[client._where() for client in self.clients])
        must(not self._streams_left(), "streams that are kept", self._streams_left())
        for node in self.nodes:
            self._check_nothing_left(node)
            node.is_stopping = True
            node.loop.arrives(lambda node=node: node.loop.create_task(node.stop()))  # type: ignore[misc]
        until = loop.now + 10
        loop.run(lambda: loop.now < until)
        self._after()

    def _streams_left(self) -> list[str]:
        return [stream.id for node in self.nodes for stream in node.hub]

    def _after(self) -> None:
        if self.loop.failed:
            raise self.loop.failed[0]

    def _expire(self) -> None:
        for server in self.data_servers:
            server.data.expire()
        self.loop.io(1.0, self._expire)

    # -- streams and readers

    def _generate(self) -> None:
        """A stream begins, and gets readers at all nodes."""
        rng, loop = self.rng, self.loop
        serving = [node for node in self.nodes if node.is_serving and not node.loop.is_frozen]
        if self.is_winding_down:
            return
        running = sum(each.reason is None and each.is_owned for each in self.generations.values())
        if serving and running < self.generations_max:
            generation = Generation(self, rng.choice(serving))
            self.generations[generation.id] = generation
            for _ in range(rng.choice((0, 1, 1, 2, 3))):
                self._join(generation, rng.choice((0.0, 0.05, 0.3, 1.0, 5.0)))
        loop.io(rng.expovariate(1 / 0.5), self._generate)
        if rng.random() < 0.3:
            self._prune()
        if self.generations and rng.random() < 0.3:
            self._join(rng.choice(list(self.generations.values())[-2 * self.generations_max :]), 0.0)
        if self.clients and rng.random() < 0.2:
            rng.choice(list(self.clients)).leave()

    def _join(self, generation: Generation, after_s: float) -> None:
        client = Client(self, generation, raw=self.rng.random() < 0.3)
        self.loop.io(after_s * self.rng.random(), client.ask)

    def _prune(self) -> None:
        """Forget streams that nobody can ask for any more."""
        now = self.loop.now
        for generation in list(self.generations.values()):
            is_over = generation.is_removed or not generation.is_owned
            last = max(generation.ended_at, generation.times[-1] if generation.times else 0.0)
            if is_over and not generation.clients and now - last > 60:
                del self.generations[generation.id]

    # -- (d)

    def check_local(self, generation: Generation) -> None:
        """The source gave something: the readers at its node have it."""
        whole = len(generation.events) + 1
        for client in tuple(generation.clients):
            connection = client.connection
            if connection is None or client.node is not generation.node or not connection.is_open:
                continue
            reader = connection.reader
            live = reader is not None and reader.state in (SubscriberState.LIVE, SubscriberState.FOLLOWING)
            if live and not connection.is_paused:
                must(client.position == whole, "a reader at the owner's waits", client._where(), whole)
                must(generation.reason is None, "a reader at the owner's has no end", client._where())

    # -- (c), (f), (g): entries that the engine took

    def entry_taken(self, server: EngineServerModel, node: Node, key: bytes, entry: Entry) -> None:
        """An entry was added to a copy."""
        generation = self.generations.get(key.rpartition(b":")[2].decode())
        if generation is None:
            return
        if entry.end is not None and entry.end.reason == "node_lost":
            generation.declared += 1
            self.seen["a death is declared"] += 1
        elif node is not generation.node:
            must(False, "a member writes to another's copy", node.name, generation.id)
        most = len(generation.events)
        must(entry.last_seq <= most, "an entry beyond the truth", generation.id, entry.last_seq, most)

    def declares(self, node: Node, follow: Follow) -> None:
        """(g) A node is about to declare an owner lost."""
        assert follow.stream is not None
        generation = self.generations.get(follow.stream.id)
        if generation is None:
            return
        link: Any = follow._place.link
        session = link._connection._transport.peer
        if session is None:
            return
        lease_s, now = self.settings.engine_lease_s, self.loop.now
        where = f"{generation.id} of {generation.node.name} at {node.name}"
        if follow.gone_at:
            gone_s = node.loop.time() - follow.gone_at
            is_nowhere = gone_s >= GONE_S and generation.is_removed
            self.seen["a stream that its owner has no more is declared lost"] += is_nowhere
            if is_nowhere:
                return
        if node is generation.node:
            must(generation.is_removed, "an owner declares itself lost", where)
        elif not generation.node.is_stopping:
            server, member = session.server, generation.node.member
            beaten_s = now - server.beaten_at.get(member, 0.0)
            is_new = now - server.back_at.get(member, 0.0) < LOOK_S  # the declarer may not have seen it yet
            must(beaten_s > lease_s - LOOK_S or is_new, "a living owner is declared lost", where, beaten_s)
        if node is generation.node:
            return
        since_s = now - self.faults.disturbed_at(node, session)
        must(since_s > lease_s - 0.8, "a death is declared within the lease of a disturbance", where, since_s)

    def told_of_loss(self, client: Client, stream: Stream) -> None:
        """(c) A reader is told that its stream's node is lost."""
        generation = client.generation
        if generation.is_owned:
            self.seen["a living owner's reader is told of its loss"] += 1
            return
        server = self.server_of(stream.id)
        if server.lost_at > generation.node.over_at - HEALED_S:
            return  # the one double fault: the owner died before it had healed the copy
        newest = server.newest(generation.key)
        if newest is not None and newest.end is not None:
            kept = newest.last_seq
            must(client.position > kept, "what the engine has is kept from a reader", client._where(), kept)

    # -- answers

    @property
    def quiet_s(self) -> float:
        """For how long nothing has disturbed the cluster."""
        return 0.0 if self.faults.is_disturbed else self.loop.now - self.disturbed_at

    def judge_gone(self, client: Client) -> None:
        """410: right for a stream that ended with its node, or whose retention is over."""
        generation = client.generation
        self.seen["410"] += 1
        if generation.is_removed or not generation.is_owned:
            return
        age_s = self.loop.now - generation.times[0] if generation.times else 0.0
        is_right = age_s < 3.0 or self.quiet_s < HEALED_S
        self.seen["410 for a stream that lives"] += age_s >= 3.0
        must(is_right, "a living stream is gone", client._where(), age_s, self.quiet_s)

    def judge_refusal(self, client: Client, code: str) -> None:
        """503: right while a node can't know."""
        node = client.node
        assert node is not None
        quiet_s = min(self.quiet_s, self.loop.now - node.began_at)
        is_trimmed = client.generation.stream.log.seq_first > 1
        bound_s = self.settings.engine_lease_s + HEALED_S + 5.0
        must(quiet_s < bound_s or is_trimmed, "a quiet cluster refuses", client._where(), code)

    def judge_sent_away(self, client: Client) -> None:
        """`reconnect`: right where the engine couldn't be asked, or events between are gone."""
        node = client.node
        assert node is not None
        is_trimmed = client.generation.stream.log.seq_first > 1
        bound_s = self.settings.engine_patience_s + 5.0
        must(self.quiet_s < bound_s or is_trimmed, "a reader is sent away without a cause", client._where())

    # -- (b), (e): at any time

    def _check(self) -> None:
        """Once a second."""
        self.loop.io(CHECK_EVERY_S, self._check)
        for node in self.nodes:
            self._check_bounds(node)
        if self.quiet_s > HEALED_S:
            self.seen["a quiet cluster is checked"] += 1
            for generation in self.generations.values():
                if generation.is_owned and not generation.node.is_stopping:
                    self._check_copy(generation)
            for client in tuple(self.clients):
                self._check_progress(client)
        for client in tuple(self.clients):
            self._check_told(client)

    def _check_bounds(self, node: Node) -> None:
        """(e) The things that a node holds."""
        cluster = node.cluster
        follows = cluster.followed._by_id
        places = sum(known.has_place for known in follows.values())
        must(node.runtime.admission._row[_STREAMS] == places, "places of followed streams", places)
        own = sum(not stream.terms.is_copy for stream in node.hub)
        copies = 0
        for shard in cluster.servers.shards:
            server = shard.server
            copies += len(server.copies)
            for part in (server.unsettled, server.followed):
                must(part.keys() <= server.copies.keys(), "a copy that was removed is kept")
            must(shard.link.pending <= COMMANDS_MAX + 300, "commands in flight", shard.link.pending)
        must(copies <= own, "copies of streams that are gone", copies, own)
        for known in follows.values():
            follow = known.follow
            messages, size = len(follow._stash), follow._stash_bytes
            must(messages <= STASH_MESSAGES_MAX and size <= STASH_BYTES_MAX, "the stash", messages, size)

    def _check_copy(self, generation: Generation) -> None:
        """(b) A living owner's copy has all that the owner had a moment ago."""
        stream, now = generation.stream, self.loop.now
        if generation.is_removed:
            return
        wanted = generation.seq_at(now - WRITTEN_S)
        server = self.server_of(generation.id)
        newest = server.newest(generation.key)
        is_sealed = stream.reason is not None and now - generation.ended_at > WRITTEN_S
        if not wanted and not is_sealed:
            return
        where = f"{generation.id} of {generation.node.name}"
        copies = generation.node.cluster.servers.shard_of(generation.id).server.copies
        copy = copies.get(generation.id)
        state = copy.state if copy is not None else None
        if newest is None and self._is_lost_in_silence(generation):
            self.seen["a copy is lost, and its owner has nothing to write"] += 1
            return
        if state is CopyState.NEW and copy is not None and copy.not_before > generation.node.loop.time():
            return  # once in ten seconds
        must(newest is not None, "a copy isn't there", where, state)
        assert newest is not None
        must(newest.last_seq >= wanted, "a copy is behind", where, newest.last_seq, wanted, state)
        if is_sealed and now - generation.ended_at < max(10.0, generation.retention_s) - 1:
            must(newest.end is not None, "a copy without its end", where, state)
            must(newest.end == (stream.reason.word, stream.ended_clean), "a copy with another end", where, newest.end)  # type: ignore[union-attr]
            must(state is CopyState.DONE, "an owner that doesn't know of its end", where, state)

    def _is_lost_in_silence(self, generation: Generation) -> bool:
        """Whether the owner can't know that the copy is lost: it had nothing to write, and nobody has asked for it."""
        copies = generation.node.cluster.servers.shard_of(generation.id).server.copies
        copy = copies.get(generation.id)
        lately = self.loop.now - WRITTEN_S
        has_end = generation.reason is None or generation.ended_at > lately or (copy and copy.state is CopyState.DONE)
        return copy is not None and copy.confirmed_seq >= generation.seq_at(lately) and bool(has_end)

    def _check_progress(self, client: Client) -> None:
        """(b) A reader in a quiet cluster has all that its stream had a moment ago, and its end."""
        connection, generation, now = client.connection, client.generation, self.loop.now
        if connection is None or connection.is_paused or not connection.is_open:
            return
        node = client.node
        assert node is not None
        quiet_s = min(self.quiet_s, now - client.joined_at)
        owner_s = self.settings.engine_lease_s + HEALED_S + 5.0
        if not generation.is_owned or generation.node.is_stopping:
            must(quiet_s < owner_s, "a reader of a dead node waits", client._where(), quiet_s)
            return
        if quiet_s < HEARD_S:
            return
        if generation.is_removed:  # its copy is gone as well, or will be
            bound_s = GONE_S + HEARD_S + 10.0
            must(
                quiet_s < bound_s + generation.retention_s,
                "a reader waits for a stream that is nowhere",
                client._where(),
            )
            return
        wanted = generation.seq_at(now - HEARD_S)
        must(client.position > wanted, "a reader waits for events", client._where(), wanted)
        ended = generation.reason is not None and now - generation.ended_at > HEARD_S
        must(not ended, "a reader waits for the end", client._where())

    def _check_told(self, client: Client) -> None:
        """(b) A reader at a node that can't ask the engine is told to come back."""
        node, connection = client.node, client.connection
        if node is None or connection is None or not connection.is_open or node.loop.is_frozen:
            return
        known = node.cluster.followed._by_id.get(client.generation.id)
        if known is None or client.node is client.generation.node:
            return
        # Pushes have a link of their own: a reader that they serve is told nothing.
        heard_s = node.loop.time() - known.follow._heard_at
        since_s = min(self.faults.cut_off_s(node, known.shard.link), heard_s)
        bound_s = self.settings.engine_patience_s + 2.5
        is_asked = known.follow.state not in (FollowState.ENDED, FollowState.OVER)
        must(since_s < bound_s or not is_asked, "a reader is left alone", client._where(), since_s, known.follow.state)

    def _check_nothing_left(self, node: Node) -> None:
        """(e) All streams have ended."""
        cluster = node.cluster
        must(not cluster.followed._by_id, "followed streams left", list(cluster.followed._by_id))
        for shard in cluster.servers.shards:
            must(not shard.server.copies, "copies left", list(shard.server.copies))
            must(len(shard.channels) <= 1, "channels beside the inbox's are left", len(shard.channels))
            must(shard.link.state is LinkState.UP, "a link that doesn't come back", shard.link.state)

    def _check_freed(self, before: Counter[type]) -> None:
        """(e) Ended objects were freed by their reference counts: the collector hardly runs in a worker."""
        seen, results, steps, seed = self.seen, self.results, self.steps, self.seed
        self.__dict__.clear()
        self.seen, self.results, self.steps, self.seed = seen, results, steps, seed
        after = _alive(collect=True)
        for kind in KINDS_LEFT:
            must(after[kind] <= before[kind], f"{kind.__name__} left behind", after[kind] - before[kind])


def _alive(*, collect: bool) -> Counter[type]:
    while collect and gc.collect():
        pass
    return Counter(type(each) for each in gc.get_objects() if type(each) in KINDS_LEFT)
