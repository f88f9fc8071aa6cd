"""KeyLimits: the limits of keys over all nodes.

A node writes what it has spent of a key into a field of its own, and reads the fields of all others:

    <prefix>{p}:k:<hash of the key's id>    a hash; its fields `<life>.<session>`, their values
                                            [requests, tokens, streams at once, a number that grows, levels]

A write repeats harmlessly, so a lost reply costs nothing, and an emptied engine is filled again by those who are there.
What others have spent goes into the ledger of other nodes (daemon/shared.py), where all workers of the node count it
like their own: an admission looks at memory alone. One worker of a node speaks for all, the first that is ready.

SESSIONS. Only growth counts, field by field. What a field holds when this node begins to watch a key is history; a
field that comes later began with nothing, so all of it counts. So a field lasts as long as its node uses the key
(UNUSED_S longer), and the next use has a new field. A field that falls gives back; a field that is gone, with the
engine's memory, changes nothing: it is remembered until it was silent for FORGET_S. Streams at once count while the
field changes: those of a node that died go after the lease.

A node that begins to watch a key knows nothing of the minute before. So its buckets go down once to the levels that
another node tells in a field that has just changed.

OVERSHOOT. Nodes hear of each other every QUICK_S, in clusters of more than FEW_NODES every READ_S. In between each node
admits what its bucket holds. All nodes take off all that was spent, so what was too much is paid back, and the average
is the limit.

ALONE. Where the engine can't be asked for the lease, each node that was seen last has an even share of a limit
(`limits_alone = share`), or goes on with all of it (`full`).

Only keys with limits are written. All that is read is untrusted: a field that no node writes is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple, Protocol

import orjson

from streamd.core.auth import Key
from streamd.core.guard import Guard
from streamd.core.limits import NOTHING, TOTAL_MAX, KeyLevels, Spent
from streamd.engine.connection import Reply, packed
from streamd.engine.servers import EngineShard

# A second of knowledge is what a limit of a minute may lack; in a small cluster a quarter costs nothing.
READ_EVERY_S: Final = 1.0
QUICK_S: Final = 0.25
FEW_NODES: Final = 8
# A key that only others use is read so often: its tokens must not come as a lump.
WATCH_EVERY_S: Final = 5.0
# Time after the last use in which a bucket is full again, unless it has debts.
UNUSED_S: Final = 60.0
FORGET_S: Final = 2 * UNUSED_S
# Time in which a node that begins to watch a key takes over a lower level.
LEARN_S: Final = 3.0
KEPT_MS: Final = 2 * 3600 * 1000
RENEW_EVERY_S: Final = 600.0

# Keys looked at in a turn, some 2 us each.
SLICE_MAX: Final = 250
FIELDS_MAX: Final = 4096
FIELD_BYTES_MAX: Final = 256


class NodeBoard(Protocol):
    """The counts of a node's workers (daemon/shared.py)."""

    @property
    def life(self) -> int:
        """A number that no other node has, and this node after a restart neither."""

    def is_first(self, now: float) -> bool:
        """Whether this worker speaks for the node."""

    def spent_here(self, key_hash: int) -> Spent:
        """The counts of a key over all workers of the node."""

    def heard_of(self, key_hash: int) -> Spent:
        """The counts of other nodes that were shown last."""

    def set_elsewhere(self, key_hash: int, spent: Spent, sharers: int) -> None:
        """Show the workers the counts of other nodes, and how many nodes share the limits."""


class LimitedKeys(NamedTuple):
    """The keys of this node, and their accounts, as this module uses them."""

    keys: Callable[[], Iterable[Key] | None]  # the same object as long as no key changes
    hash_of: Callable[[str], int]
    refresh: Callable[[Key], KeyLevels]  # bring the buckets up to date
    lower: Callable[[Key, KeyLevels], None]  # go on from these levels where they are lower


class _Field:
    """What another node has spent in a session."""

    __slots__ = ("changed_at", "spent", "text")

    def __init__(self) -> None:
        self.spent = NOTHING
        self.text = b""
        self.changed_at = 0.0


class _Tally:
    """A key with limits, here and in the fields of other nodes."""

    __slots__ = (
        *("answered_at", "asked_at", "fields", "hash", "heard_at", "is_asking", "is_watching", "key", "learns_until"),
        *("name", "own", "renewed_at", "requests", "seen", "shard", "sharers", "start", "streams", "tokens", "used_at"),
    )

    def __init__(self, key: Key, key_hash: int, name: bytes, shard: EngineShard, known: Spent, here: Spent) -> None:
        self.key = key
        self.hash = key_hash
        self.name = name
        self.shard = shard
        # here
        self.seen = here  # the node's counts at the last look
        self.used_at = -FORGET_S  # when they changed
        self.own = b""  # the field of the session; empty: there is none
        self.start = NOTHING  # the node's counts when the session began
        self.renewed_at = -RENEW_EVERY_S
        # elsewhere
        self.fields: dict[bytes, _Field] = {}
        self.is_watching = False
        self.heard_at = -FORGET_S  # when a field changed
        self.requests, self.tokens, self.streams = known
        self.sharers = 1
        self.learns_until = 0.0
        # the engine
        self.is_asking = False
        self.asked_at = self.answered_at = 0.0


class KeyLimits:
    """The limits of this node's keys, as far as other nodes are concerned."""

    def __init__(
        self,
        limited: LimitedKeys,
        *,
        shard_of: Callable[[str], EngineShard],
        name_of: Callable[[str], bytes],
        member: str,
        nodes: Callable[[], int],
        guard: Guard,
        time: Callable[[], float],
        soon: Callable[[Callable[[], None]], object],
        lease_s: float,
        shares_alone: bool,
    ) -> None:
        """`nodes` counts those that live, as last seen; `soon` runs a call in a later turn of the loop."""
        self._limited = limited
        self._shard_of = shard_of
        self._name_of = name_of
        self._member = member
        self._nodes = nodes
        self._guard = guard
        self._time = time
        self._soon = soon
        self._lease_s = lease_s
        self._shares_alone = shares_alone
        self.board: NodeBoard | None = None
        self._keys: Iterable[Key] | None = None
        self._tallies: dict[str, _Tally] = {}
        self._sessions = 0
        self._slices: list[_Tally] = []

    # -- the clock

    def tick(self, now: float) -> None:
        """Tell and ask, if this worker speaks for the node; the sweep calls it four times a second."""
        board = self.board
        if board is None or self._slices:
            return
        if not board.is_first(now):
            self._tallies.clear()
            self._keys = None
            return
        if self._limited.keys() is not self._keys:
            self._take_keys(board)
        self._slices = list(self._tallies.values())
        self._slice()

    def _take_keys(self, board: NodeBoard) -> None:
        self._keys = self._limited.keys()
        tallies = self._tallies
        self._tallies = {}
        for key in self._keys or ():
            if (key.requests_per_minute, key.tokens_per_minute, key.streams_max) == (None, None, None):
                continue
            tally = tallies.get(key.id)
            if tally is None:
                key_hash = self._limited.hash_of(key.id)
                text = f"{key_hash:016x}"
                known, here = board.heard_of(key_hash), board.spent_here(key_hash)
                tally = _Tally(key, key_hash, self._name_of(text), self._shard_of(text), known, here)
            tally.key = key
            self._tallies[key.id] = tally

    def _slice(self) -> None:
        board, now = self.board, self._time()
        assert board is not None
        piece, self._slices = self._slices[:SLICE_MAX], self._slices[SLICE_MAX:]
        for tally in piece:
            with self._guard:
                self._look(board, tally, now)
        if self._slices:
            self._soon(self._slice)

    def _look(self, board: NodeBoard, tally: _Tally, now: float) -> None:
        spent = board.spent_here(tally.hash)
        if spent != tally.seen or spent.streams_now:
            tally.used_at = now
        if tally.own and now - tally.asked_at > UNUSED_S:
            tally.own = b""  # it couldn't be told for so long that others may have forgotten it
        if not tally.own and spent != tally.seen:
            self._sessions += 1
            tally.own = b"%x.%b.%d" % (board.life, self._member.encode(), self._sessions)
            tally.start = tally.seen
        tally.seen = spent
        unused_s = now - tally.used_at
        if tally.own and unused_s > UNUSED_S:
            own, tally.own = tally.own, b""
            if tally.shard.link.has_room:
                tally.shard.link.ask(packed("HDEL", tally.name, own), _ignore)
        if min(unused_s, now - tally.heard_at) > UNUSED_S:
            tally.is_watching = False
            return
        if tally.is_asking or not tally.shard.link.has_room:
            self._alone(board, tally, now)
            return
        if now - tally.asked_at >= self._every_s(tally, unused_s):
            self._ask(tally, now)

    def _every_s(self, tally: _Tally, unused_s: float) -> float:
        if unused_s > UNUSED_S:
            return WATCH_EVERY_S
        is_quick = unused_s < READ_EVERY_S and len(tally.fields) < FEW_NODES
        return QUICK_S if is_quick else READ_EVERY_S

    # -- telling and asking

    def _ask(self, tally: _Tally, now: float) -> None:
        link = tally.shard.link
        if tally.own:
            self._tell(tally, tally.seen, now)
            if now - tally.renewed_at >= RENEW_EVERY_S:
                tally.renewed_at = now
                link.ask(packed("PEXPIRE", tally.name, KEPT_MS), _ignore)
        tally.is_asking = True
        tally.asked_at = now
        link.ask(packed("HGETALL", tally.name), lambda reply: self._heard(tally, reply))

    def _tell(self, tally: _Tally, spent: Spent, now: float) -> None:
        start, levels = tally.start, self._limited.refresh(tally.key)
        counts = (spent.requests_total - start.requests_total, spent.tokens_total - start.tokens_total)
        value = orjson.dumps([*counts, spent.streams_now, round(now * 1000), *levels])
        tally.shard.link.ask(packed("HSET", tally.name, tally.own, value), _ignore)

    def stop(self) -> None:
        """This worker ends, and no stream of the node counts any more until another worker speaks for it."""
        for tally in self._tallies.values():
            if tally.own and tally.shard.link.has_room:
                self._tell(tally, tally.seen._replace(streams_now=0), self._time())
        self._tallies.clear()
        self._slices.clear()
        self.board = None

    def _heard(self, tally: _Tally, reply: Reply) -> None:
        tally.is_asking = False
        board, now = self.board, self._time()
        if board is None or self._tallies.get(tally.key.id) is not tally or not isinstance(reply, dict):
            return  # the next look asks again
        tally.answered_at = now
        gained = False
        levels: KeyLevels | None = None
        for name, text in reply.items():
            if not isinstance(name, bytes) or name.startswith(b"%x." % board.life):
                continue
            told = self._take(tally, name, text, now)
            gained = gained or told is not None
            levels = _lowest(levels, told)
        self._forget(tally, reply, now)
        if tally.is_watching and levels is not None and now < tally.learns_until:
            tally.learns_until = 0.0
            self._limited.lower(tally.key, levels)
        if not tally.is_watching:
            tally.is_watching = True
            tally.learns_until = now + LEARN_S
        streams = [field.spent.streams_now for field in tally.fields.values() if now - field.changed_at < self._lease_s]
        tally.streams = min(TOTAL_MAX, sum(streams))
        tally.sharers = 1
        self._show(board, tally)
        if gained:
            tally.heard_at = now
            self._limited.refresh(tally.key)

    def _take(self, tally: _Tally, name: bytes, text: Any, now: float) -> KeyLevels | None:
        """A field of another node. Returns the levels that it found, if the field has changed since the last look."""
        field = tally.fields.get(name)
        if field is not None and field.text == text:
            return None
        told = _told(text)
        if told is None or (field is None and len(tally.fields) >= FIELDS_MAX):
            return None
        spent, levels = told
        if field is None:
            field = tally.fields[name] = _Field()
        if tally.is_watching:
            tally.requests = _grown(tally.requests, spent.requests_total - field.spent.requests_total)
            tally.tokens = _grown(tally.tokens, spent.tokens_total - field.spent.tokens_total)
        field.spent, field.text = spent, text
        # When this node begins to watch, a field may be a dead node's: only a change shows that it lives.
        field.changed_at = now
        return levels

    def _forget(self, tally: _Tally, present: dict[Any, Any], now: float) -> None:
        """Remove the fields of nodes that ended, and forget them once they are gone."""
        silent = [name for name, field in tally.fields.items() if now - field.changed_at > FORGET_S]
        for name in silent:
            if name not in present:
                del tally.fields[name]
            elif tally.shard.link.has_room:
                tally.shard.link.ask(packed("HDEL", tally.name, name), _ignore)

    def _show(self, board: NodeBoard, tally: _Tally) -> None:
        board.set_elsewhere(tally.hash, Spent(tally.requests, tally.tokens, tally.streams), tally.sharers)

    # -- alone

    def _alone(self, board: NodeBoard, tally: _Tally, now: float) -> None:
        """The engine can't be asked now: after the lease each node has its share."""
        since = tally.asked_at if tally.is_asking else tally.answered_at
        if tally.sharers > 1 or now - since < self._lease_s:
            return
        tally.streams = 0
        tally.sharers = max(1, self._nodes()) if self._shares_alone else 1
        self._show(board, tally)


def _told(text: Any) -> tuple[Spent, KeyLevels] | None:
    """A field's content; None for one that no node writes."""
    if not isinstance(text, bytes) or len(text) > FIELD_BYTES_MAX:
        return None
    try:
        row = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(row, list) or len(row) != 6:
        return None
    if not all(type(number) is int and abs(number) <= TOTAL_MAX for number in row[:4]) or row[2] < 0:
        return None
    if not all(level is None or type(level) is float for level in row[4:]):
        return None
    return Spent(*row[:3]), KeyLevels(*row[4:])


def _grown(total: int, count: int) -> int:
    return max(0, min(TOTAL_MAX, total + count))


def _lowest(known: KeyLevels | None, told: KeyLevels | None) -> KeyLevels | None:
    if known is None or told is None:
        return known or told
    pairs = zip(known, told, strict=True)
    return KeyLevels(*(min((level for level in pair if level is not None), default=None) for pair in pairs))


def _ignore(reply: Reply) -> None:
    """The reply to a command that needs none."""
