"""Members: the workers of all nodes that share the engine, and whether they live.

A member beats: every BEAT_S it writes its field of the hash `<prefix>m`, on every server of the engine, with a number
that grows, its node's name, and a fingerprint of its keys. Fields have no time to live: keys with a time to live are
the first that a full engine evicts, and a stalled engine lets all of them run out at once.

A member is lost for this process if its field hasn't changed for `lease_s` of this process's own clock, or says
`stopped`. Only a process that has a reason looks, at the server of the stream in question. A process whose own link to
that server was disturbed within the last `lease_s`, or whose own beat the server refused (a full engine refuses all of
them), judges no member. No clocks of two machines are compared.

Whether a stream without a copy exists is known to its owner alone. So a seeker asks for the owner's sign of life: an
owner that gives signs writes a copy within a second, and an owner that gives none may have streams that it couldn't
write. An engine that has lost this member's own field has lost the others' fields and copies too.

Every SURVEY_EVERY_S all fields are read: to count the members, to notice nodes with other keys (principals are the ids
of keys, so all nodes need the same), and to remove fields that haven't changed for `forget_s`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import orjson

from streamd.choice import Choice
from streamd.engine.connection import EngineError, Reply, packed
from streamd.engine.link import LinkState
from streamd.engine.owner import RENEW_EVERY_S
from streamd.engine.servers import EngineShard

BEAT_S: Final = 2.0
SURVEY_EVERY_S: Final = 60.0
LOOK_EVERY_S: Final = 1.0

# A field has some 100 B; of a longer field none of streamd's the rest isn't read.
FIELD_BYTES_MAX: Final = 1024

# The owners of copies that are gone have written them anew by then: each looks once a second, and waits if it did so
# a moment before.
HEALED_S: Final = RENEW_EVERY_S + 1.0

# A field that changed between two looks this far apart at most: its member lives now, and not only since.
LATELY_S: Final = 2 * BEAT_S


class Sign(Choice):
    """What the engine tells of another member's life."""

    UNKNOWN = "unknown"  # there is no such member, and there was none lately
    LOST = "lost"  # it has stopped, or given no sign of life for the lease
    LIVES = "lives"  # it has given one since it was looked at, which was just now
    SILENT = "silent"  # it is there, and has given none since it was looked at
    UNSURE = "unsure"  # the engine can't be asked, or has lost what its members wrote


Say = Callable[..., None]
"""Writes a line of the log: its level's word, its name, and its fields by keyword."""


class MemberFacts(NamedTuple):
    """The content of a member's field."""

    node: str
    state: str  # `up` or `stopped`
    keys: str  # a fingerprint of the key file and the issuers of tokens


class _Watched:
    """A member's field on a server, and since when it hasn't changed."""

    __slots__ = ("asked_at", "changed_at", "facts", "gave_sign_at", "taken_at", "value", "watched_since")

    def __init__(self, now: float) -> None:
        self.value: bytes | None = None
        self.facts: MemberFacts | None = None  # in the value; None for one that no member writes
        self.changed_at = self.watched_since = now
        self.asked_at = self.taken_at = self.gave_sign_at = -1e9

    def take(self, value: bytes | None, now: float) -> None:
        if value != self.value:
            if self.value is not None and value is not None and now - self.taken_at <= LATELY_S:
                self.gave_sign_at = now
            self.value, self.facts, self.changed_at = value, _facts_of(value), now
        self.taken_at = now

    @property
    def is_stopped(self) -> bool:
        return self.facts is not None and self.facts.state == "stopped"


class Members:
    """This process's own field, and its view of the other members'."""

    def __init__(
        self,
        servers: Sequence[EngineShard],
        key: bytes,
        member: str,
        *,
        node: str,
        fingerprint: Callable[[], str],
        time: Callable[[], float],
        say: Say,
        lease_s: float,
        forget_s: float,
    ) -> None:
        self._servers = servers
        self._key = key
        self._member = member
        self._node = node
        self._fingerprint = fingerprint
        self._time = time
        self._say = say
        self._lease_s = lease_s
        self._forget_s = forget_s
        self._state = "up"
        self._beats = 0
        self._nodes = 1
        self._beat_at = self._survey_at = 0.0
        self._whole_since = [time()] * len(servers)  # when the link was last seen disturbed
        self._incomplete_until = [0.0] * len(servers)  # copies may be missing before: their owners write them
        self._has_field = [False] * len(servers)  # the server has taken this member's beat
        self._watched: list[dict[str, _Watched]] = [{} for _ in servers]  # of all fields
        self._told_keys: set[tuple[str, str]] = set()  # nodes with other keys that were named in the log

    def use(self, *, lease_s: float, forget_s: float) -> None:
        """New settings, from the next judgement on."""
        self._lease_s, self._forget_s = lease_s, forget_s

    # -- this member

    def tick(self, now: float) -> None:
        """Beat, and look around; the sweep calls it four times a second."""
        for number, server in enumerate(self._servers):
            if server.link.state is not LinkState.UP:
                self._whole_since[number] = now
        if now >= self._beat_at:
            self._beat_at = now + BEAT_S
            self._beat()
        if now >= self._survey_at:
            self._survey_at = now + SURVEY_EVERY_S
            for number, server in enumerate(self._servers):
                if server.link.has_room:
                    server.link.ask(packed("HGETALL", self._key), lambda reply, k=number: self._surveyed(k, reply))  # type: ignore[misc]

    def up(self, server: EngineShard) -> None:
        """A link is up: beat at once, and look around soon. No tick may have seen that it was down."""
        number, now = self._servers.index(server), self._time()
        self._beat_at = 0.0
        self._survey_at = min(self._survey_at, now + LOOK_EVERY_S)
        self._whole_since[number] = now
        if server.link.times_up > 1:
            self._lacks(number)

    def stop(self) -> None:
        """This member ends in order: others needn't wait for `lease_s`."""
        self._state = "stopped"
        self._beat()

    def _beat(self) -> None:
        self._beats += 1
        facts = MemberFacts(self._node, self._state, self._fingerprint())._asdict()
        value = orjson.dumps({"beat": self._beats, **facts})
        for number, server in enumerate(self._servers):
            if server.link.has_room:
                command = packed("HSET", self._key, self._member, value)
                server.link.ask(command, functools.partial(self._beaten, number))

    def _beaten(self, number: int, reply: Reply) -> None:
        if isinstance(reply, EngineError):
            self._whole_since[number] = self._time()
            self._lacks(number)
        elif reply == 1 and self._has_field[number]:
            self._lacks(number)  # the field was there: the engine has lost it
        else:
            self._has_field[number] = True

    def lacks_copies(self, server: EngineShard) -> None:
        """The engine has lost a copy of this process, so it may have lost others'."""
        self._lacks(self._servers.index(server))

    def _lacks(self, number: int) -> None:
        self._incomplete_until[number] = self._time() + max(self._lease_s, HEALED_S)

    # -- the others

    def is_lost(self, server: EngineShard, member: str) -> bool:
        """Whether the member is lost; asks the engine if it hasn't been asked lately, for the next call to know."""
        number, now = self._servers.index(server), self._time()
        if member == self._member or now - self._whole_since[number] < self._lease_s:
            return False
        known = self._watched[number].get(member)
        if known is None:
            known = self._watched[number][member] = _Watched(now)
        if now - known.asked_at >= LOOK_EVERY_S and server.link.has_room:
            if now - known.asked_at > 3 * LOOK_EVERY_S:
                known.watched_since = now  # not looked at lately: an old value says nothing
            known.asked_at = now
            server.link.ask(packed("HGET", self._key, member), lambda reply: self._looked(known, reply))
        return known.is_stopped or now - max(known.changed_at, known.watched_since) >= self._lease_s

    def may_lack_copies(self, server: EngineShard) -> bool:
        """Whether a copy that isn't there may be another member's all the same, which has still to write it: the server
        came back lately, perhaps empty, or is full.
        """
        return self._time() < self._incomplete_until[self._servers.index(server)]

    def ask_for_sign(self, server: EngineShard, member: str, answer: Callable[[Sign], None]) -> None:
        """Ask the engine for a member's sign of life; `answer` may be called at once."""
        if server.link.has_room:
            command = packed("HMGET", self._key, self._member, member)
            server.link.ask(command, lambda reply: answer(self._sign(server, member, reply)))
        else:
            answer(Sign.UNSURE)

    def _sign(self, server: EngineShard, member: str, reply: Reply) -> Sign:
        """The sign of life in a reply of this member's own field, and the other's."""
        number, now = self._servers.index(server), self._time()
        if not isinstance(reply, list) or len(reply) != 2:
            return Sign.UNSURE
        own, value = reply
        if not isinstance(own, bytes):
            self._lacks(number)
            return Sign.UNSURE
        if not isinstance(value, bytes):
            return Sign.UNSURE if self.may_lack_copies(server) else Sign.UNKNOWN
        known = self._watched[number].get(member)
        if known is None:
            known = self._watched[number][member] = _Watched(now)
        known.take(value, now)
        is_whole = now - self._whole_since[number] >= self._lease_s
        if known.is_stopped or (is_whole and now - known.changed_at >= self._lease_s):
            return Sign.LOST
        return Sign.LIVES if now - known.gave_sign_at <= LATELY_S else Sign.SILENT

    def _looked(self, known: _Watched, reply: Reply) -> None:
        if reply is None or isinstance(reply, bytes):
            known.take(reply, self._time())

    def _surveyed(self, number: int, reply: Reply) -> None:
        """All fields of a server."""
        fields = _fields_of(reply)
        if fields is None:
            return
        now, watched, server = self._time(), self._watched[number], self._servers[number]
        for member in [each for each in watched if each not in fields]:
            del watched[member]
        for member, value in fields.items():
            known = watched.get(member)
            if known is None:
                known = watched[member] = _Watched(now)
            known.take(value, now)
            if now - known.changed_at > self._forget_s and server.link.has_room:
                server.link.ask(packed("HDEL", self._key, member), _ignore)
        self._nodes = len({facts.node for facts in self.shown().values() if facts.state == "up"})
        self._compare_keys()

    def _compare_keys(self) -> None:
        own = self._fingerprint()
        for member, facts in self.shown().items():
            differs = member != self._member and facts.state == "up" and facts.keys != own
            if differs and (facts.node, facts.keys) not in self._told_keys:
                self._told_keys.add((facts.node, facts.keys))
                self._say(
                    "warning",
                    "key files or token issuers differ: a principal of one node may have no rights at the other",
                    node=facts.node,
                    own_node=self._node,
                )

    def nodes_seen(self) -> int:
        """The number of nodes at the last survey that the engine answered."""
        return self._nodes

    def shown(self) -> dict[str, MemberFacts]:
        """The members that are known to live, as of the last survey, on the first server."""
        now = self._time()
        living = {
            member: known.facts
            for member, known in self._watched[0].items()
            if now - known.changed_at < SURVEY_EVERY_S + self._lease_s
        }
        return {member: facts for member, facts in living.items() if facts is not None}


def _fields_of(reply: Any) -> dict[str, bytes] | None:
    """The fields of the hash; fields that no member writes are left out. None: a reply that is no hash."""
    if not isinstance(reply, dict):
        return None
    return {
        name.decode("ascii"): value
        for name, value in reply.items()
        if isinstance(name, bytes) and isinstance(value, bytes) and name.isascii() and len(name) <= 64
    }


def _facts_of(value: bytes | None) -> MemberFacts | None:
    """The content of a field; None for one that no member writes."""
    if value is None or len(value) > FIELD_BYTES_MAX:
        return None
    try:
        given = orjson.loads(value)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(given, dict):
        return None
    texts = [given.get(name) for name in MemberFacts._fields]
    return MemberFacts(*map(str, texts)) if all(type(text) is str for text in texts) else None


def _ignore(reply: Reply) -> None:
    """The reply to a command that needs none."""
