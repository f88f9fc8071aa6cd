"""Cluster: a worker's part in a cluster of nodes that share an engine.

A worker is a member of its own, with two connections to each server of the engine. It owns the streams that it carries
and writes their copies (engine/owner.py), follows streams of other members that have readers here (engine/followed.py),
gives signs of life (engine/members.py), and tells in the log how the engine is (engine/condition.py).

Nothing here is awaited by a stream, a head or an admission. The sweep calls tick() four times a second, and the hub
calls grown() once a second for each live stream, in its slices.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Callable
from typing import Any, Final

from streamd.config import Settings
from streamd.core.hub import Gone
from streamd.core.stream import Stream
from streamd.engine.condition import Condition
from streamd.engine.facts import facts_of, pack_facts
from streamd.engine.followed import FollowedStreams
from streamd.engine.key_limits import KeyLimits, LimitedKeys
from streamd.engine.link import LinkTerms
from streamd.engine.members import Members, Say
from streamd.engine.notes import ClusterNote, NoteKind, Notes
from streamd.engine.owner import SLICE_MAX, CopyOwner, EngineServer, OwnedCopy, lag_of
from streamd.engine.remote_readers import RemoteReaders
from streamd.engine.servers import EngineServers, EngineShard
from streamd.engine.shards import CopyKeys
from streamd.engine_url import parse_engine_urls
from streamd.net.runtime import Runtime
from streamd.reasons import CloseReason

# The last words to the engine at an end: a write and its reply. systemd waits longer, and a dead engine is no reason
# to keep it waiting.
FLUSH_S: Final = 2.0
_POLL_S: Final = 0.01

# The loss window in metrics is as old as this at most. A copy takes a microsecond.
SCAN_EVERY_S: Final = 1.0
SCAN_SLICE_MAX: Final = 250

# Memory of a copy's object and its place, for the budget of finished streams (make bench-engine).
COPY_BYTES: Final = 250


class Cluster:
    """The engine, as a worker uses it."""

    def __init__(
        self,
        runtime: Runtime,
        settings: Settings,
        terms: LinkTerms,
        *,
        node: str,
        fingerprint: Callable[[], str],
        limited: LimitedKeys,
        say: Say,
        rng: random.Random,
    ) -> None:
        """`fingerprint`: of the keys in use; `limited`: those with limits; `say` writes a line of the log."""
        self._runtime = runtime
        self._settings = settings
        self._say = say
        self._push_s = settings.engine_push_s
        self._push_timer: asyncio.TimerHandle | None = None
        self._lag_s = self._scan_at = 0.0
        runtime.hub.record_bytes += COPY_BYTES
        self.node = node
        self.member = runtime.hub.member
        guard, time = runtime.guard, runtime.time
        keys = CopyKeys(settings.engine_prefix)
        self.servers = EngineServers(
            runtime.loop, parse_engine_urls(settings.engine), terms, guard, rng, on_up=self._server_up
        )
        shards = self.servers.shards
        self._by_server = {id(shard.server): shard for shard in shards}
        self.owner = CopyOwner(
            [shard.server for shard in shards],
            lambda stream_id: self.servers.shard_of(stream_id).server,
            member=self.member,
            keys=keys,
            guard=guard,
            time=time,
            soon=runtime.loop.call_soon,
            facts=self._facts,
            live_ttl_s=settings.engine_live_ttl_s,
            on_followed=self._push_soon,
            on_gone=lambda server: self.members.lacks_copies(self._by_server[id(server)]),
        )
        self.members = Members(
            shards,
            keys.members(),
            self.member,
            node=node,
            fingerprint=fingerprint,
            time=time,
            say=say,
            lease_s=settings.engine_lease_s,
            forget_s=settings.engine_live_ttl_s,
        )
        self.notes = Notes(shards, keys, self.member, guard=guard, time=time)
        self.followed = FollowedStreams(runtime, settings, self.servers, keys, self.members, self.notes)
        self.remote_readers = RemoteReaders(runtime.hub, time, self.owner.wanted)
        self.notes.on(NoteKind.SYNC, self._take_sync)
        self.notes.on(NoteKind.FOLLOW, self.remote_readers.take_follow)
        self.notes.on(NoteKind.LEFT, self.remote_readers.take_left)
        self.key_limits = self._new_key_limits(limited, keys)
        probe_key = keys.probe(self.member)
        self.conditions = {
            shard.url.name: Condition(shard, probe_key=probe_key, members_key=keys.members(), time=time, say=say)
            for shard in shards
        }

    def _new_key_limits(self, limited: LimitedKeys, keys: CopyKeys) -> KeyLimits:
        runtime, settings = self._runtime, self._settings
        return KeyLimits(
            limited,
            shard_of=self.servers.shard_of,
            name_of=keys.spending,
            member=self.member,
            nodes=self.members.nodes_seen,
            guard=runtime.guard,
            time=runtime.time,
            soon=runtime.loop.call_soon,
            lease_s=settings.engine_lease_s,
            shares_alone=settings.limits_alone == "share",
        )

    def _facts(self, stream: Stream) -> bytes:
        return pack_facts(facts_of(stream, self._runtime.time(), self._runtime.unix_time()))

    # -- life

    def start(self) -> None:
        """Begin to connect."""
        self.key_limits.tick(self._runtime.time())  # before a request is counted
        self.servers.start()
        self.notes.start()

    def reload(self, settings: Settings, terms: LinkTerms) -> None:
        """Use new settings and terms from now on; connections and copies stay as they are."""
        self._push_s = settings.engine_push_s
        self.owner.use(live_ttl_s=settings.engine_live_ttl_s)
        self.members.use(lease_s=settings.engine_lease_s, forget_s=settings.engine_live_ttl_s)
        self.followed.use(settings)
        for shard in self.servers.shards:
            shard.use(terms, functools.partial(self._refused, shard.url.name))

    def _refused(self, engine: str, words: str) -> None:
        self._say(
            "error",
            "engine refuses the new user or password; the old ones stay in use: correct them, and reload again",
            engine=engine,
            error=words,
        )

    def tick(self, now: float, lag_s: float) -> None:
        """The sweep's work: each part's is bounded by itself."""
        self.servers.tick(now)
        self.owner.tick(now)
        self.members.tick(now)
        self.notes.tick(now)
        self.remote_readers.tick(now)
        self.followed.tick(now)
        self.key_limits.tick(now)
        for condition in self.conditions.values():
            condition.tick(now)
        if now >= self._scan_at:
            self._scan_at = now + SCAN_EVERY_S
            copies = [copy for shard in self.servers.shards for copy in shard.server.copies.values()]
            self._scan(copies, 0, 0.0)

    def _scan(self, copies: list[OwnedCopy], start: int, longest_s: float) -> None:
        """Look for the oldest event that the engine lacks, a slice a turn."""
        piece = copies[start : start + SCAN_SLICE_MAX]
        longest_s = max(longest_s, lag_of(piece, self._runtime.time()))
        if start + SCAN_SLICE_MAX < len(copies):
            self._runtime.loop.call_soon(self._scan, copies, start + SCAN_SLICE_MAX, longest_s)
        else:
            self._lag_s = longest_s

    def _server_up(self, server: EngineServer) -> None:
        """A link is up, perhaps to another server than before, or to an empty one."""
        shard = self._by_server[id(server)]
        self.owner.server_up(server)
        self.members.up(shard)
        self.conditions[shard.url.name].check()

    async def flush(self) -> None:
        """The worker ends: write what the engine lacks, wait for it for FLUSH_S, and say that this member is gone."""
        runtime = self._runtime
        for stream in runtime.hub:
            if not stream.terms.is_copy:
                self.owner.grown(stream)
        deadline = runtime.time() + FLUSH_S
        while self._has_unwritten() and runtime.time() < deadline:
            self.owner.tick(runtime.time())
            await asyncio.sleep(_POLL_S)
        self.key_limits.stop()
        self.members.stop()
        while self._has_unanswered() and runtime.time() < deadline:  # noqa: ASYNC110 (as above)
            await asyncio.sleep(_POLL_S)

    def _has_unanswered(self) -> bool:
        return any(shard.link.is_up and shard.link.pending for shard in self.servers.shards)

    def _has_unwritten(self) -> bool:
        up = [shard.server for shard in self.servers.shards if shard.link.is_up]
        return any(copy.is_behind for server in up for copy in server.copies.values())

    def stop(self) -> None:
        """Close all connections, and leave other members' streams to them."""
        if self._push_timer is not None:
            self._push_timer.cancel()
            self._push_timer = None
        self.followed.stop()
        self.notes.stop()
        self.servers.stop()

    # -- streams of this worker

    def grown(self, stream: Stream) -> None:
        """As core/hub.py's StreamCopies: a second of the live stream's life is over."""
        if not stream.terms.is_copy:
            self.owner.grown(stream)

    def sealed(self, stream: Stream) -> None:
        """The stream has its end: write it at once."""
        if not stream.terms.is_copy:
            self.owner.grown(stream)
            self.remote_readers.ended(stream)

    def need(self, stream: Stream) -> bool:
        """As core/hub.py's StreamCopies: whether the finished stream has to stay, because its copy lacks its end."""
        return not stream.terms.is_copy and self.owner.need(stream)

    def removed(self, stream: Stream) -> None:
        """The hub has removed the stream. A copy of it in the engine ends by its own time to live."""
        if stream.terms.is_copy:
            self.followed.removed(stream)
        else:
            self.owner.removed(stream)

    def forget(self, stream: Stream) -> None:
        """A client wants the finished stream to be forgotten: its copy goes at once."""
        if not stream.terms.is_copy:
            self.owner.forget(stream)

    def left(self, stream: Stream, reason: CloseReason) -> None:
        """The last reader here of a live stream has left, and its source needs none."""
        if stream.terms.is_copy:
            self.followed.left(stream, reason)

    def is_read_elsewhere(self, stream: Stream) -> bool:
        """Whether a stream of this worker has readers at other nodes."""
        return self.remote_readers.has(stream)

    def _take_sync(self, note: ClusterNote) -> None:
        """A member looks for the copy of a stream of this worker."""
        try:
            stream = self._runtime.hub.get(note.body.decode())
        except Gone:
            return
        if stream is not None and not stream.terms.is_copy:
            self.owner.wanted(stream)

    # -- pushes

    def _push_soon(self) -> None:
        if self._push_timer is None:
            self._push_timer = self._runtime.loop.call_later(self._push_s, self._push)

    def _push(self) -> None:
        """Push all followed streams, a slice a turn; then wait for the next time, while there are some."""
        self._push_timer = None
        self._push_slice(max(len(shard.server.followed) for shard in self.servers.shards))

    def _push_slice(self, left: int) -> None:
        with self._runtime.guard:
            self.owner.push()
        if left > SLICE_MAX:
            self._runtime.loop.call_soon(self._push_slice, left - SLICE_MAX)
        elif any(shard.server.followed for shard in self.servers.shards):
            self._push_soon()

    # -- reports

    def count(self) -> None:
        """Bring the worker's counters up to date."""
        counters, owned = self._runtime.counters, self.owner.counts
        counters.engine_writes = {
            "delta": owned.writes_delta,
            "start": owned.writes_start,
            "end": owned.writes_end,
        }
        counters.engine_written_bytes = owned.written_bytes
        counters.engine_verifies = {found.value: count for found, count in owned.found.items()}
        counters.engine_refused = {
            "full": owned.refused_full,
            "order": owned.refused_order,
            "gone": owned.refused_gone,
            "other": owned.refused_other,
        }
        counters.engine_revived, counters.engine_pushes = owned.revived, owned.pushes
        follows = self.followed.counts
        counters.engine_lookups, counters.engine_lost = self.followed.lookups, self.followed.lost
        counters.engine_reads, counters.engine_holes = follows.reads, follows.holes
        notes = self.notes.counts
        counters.engine_notes_sent, counters.engine_notes_read = notes.sent, notes.read
        counters.engine_notes_lost = notes.refused + notes.broken + notes.unanswered

    def gauges(self) -> dict[str, int]:
        """The gauges of net/totals.py's NO_ENGINE."""
        shards = self.servers.shards
        return {
            "engine_servers": len(shards),
            "engine_down": sum(not (shard.link.is_up and shard.channels.link.is_up) for shard in shards),
            "engine_lag_ms": round(self._lag_s * 1000),
            "engine_round_trip_us": round(max(shard.link.round_trip_s for shard in shards) * 1e6),
            "engine_pending": sum(shard.link.pending for shard in shards),
            "engine_copies": sum(len(shard.server.copies) for shard in shards),
            "engine_unsettled": sum(len(shard.server.unsettled) for shard in shards),
            "engine_pushed": sum(len(shard.server.followed) for shard in shards),
            "engine_follows": len(self.followed),
            "engine_remote": len(self.remote_readers),
            "engine_members": len(self.members.shown()),
        }

    def status(self) -> dict[str, Any]:
        """The cluster as /status shows it: this worker's view."""
        now = self._runtime.time()
        return {
            "node": self.node,
            "member": self.member,
            "lag_s": round(self.owner.lag_s(now), 3),
            "copies": sum(len(shard.server.copies) for shard in self.servers.shards),
            "followed": len(self.followed),
            "engine": {shard.url.name: self._shown(shard) for shard in self.servers.shards},
            "members": {
                member: {"node": facts.node, "state": facts.state} for member, facts in self.members.shown().items()
            },
        }

    def _shown(self, shard: EngineShard) -> dict[str, Any]:
        link = shard.link
        return {
            "state": self.conditions[shard.url.name].state.value,
            "version": link.version or None,
            "pushes": shard.channels.link.is_up,
            "round_trip_ms": round(link.round_trip_s * 1000, 2),
            "error": None if link.is_up else link.fault_text or link.fault.value,
            "unsettled": len(shard.server.unsettled),
            "followed_elsewhere": len(shard.server.followed),
        }
