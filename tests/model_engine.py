"""A model of the engine: streams with ids that only grow, out of memory, evictions, failovers; turned by the test."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable
from typing import Any

import hiredis

from streamd.engine.connection import EngineError, EngineLost

Id = tuple[int, int]
FIRST, LAST = (-1, -1), (1 << 64, 0)


def id_of(text: bytes) -> Id:
    milliseconds, _, seq = text.partition(b"-")
    return int(milliseconds), int(seq)


def text_of(entry_id: Id) -> bytes:
    return b"%d-%d" % entry_id


class Key:
    """A stream: its entries, and the highest id that it ever had."""

    def __init__(self) -> None:
        self.entries: list[tuple[Id, list[bytes]]] = []
        self.last: Id = (0, 0)


OOM = EngineError("OOM command not allowed when used memory > 'maxmemory'.")
ORDER = EngineError("ERR The ID specified in XADD is equal or smaller than the target stream top item")

# Writes that a failover can lose: seconds of a simulation's, and all of a test's.
WRITTEN_MAX = 1000


class ModelEngine:
    """The data, and the effect of each command."""

    def __init__(self, now: Callable[[], float] = lambda: 0.0) -> None:
        """`now`: the server's clock, in seconds."""
        self.now = now
        self.keys: dict[bytes, Key] = {}
        self.hashes: dict[bytes, dict[bytes, bytes]] = {}
        self.expiries: dict[bytes, int] = {}  # the last that was set, in milliseconds
        self.deadlines: dict[bytes, float] = {}  # of keys that are there, by the server's clock
        self.is_full = False
        self.listeners: dict[bytes, list[Callable[[bytes], None]]] = {}
        self.loses_messages = False  # the members that listen are counted, and hear nothing
        self.written: deque[Callable[[], object]] = deque(maxlen=WRITTEN_MAX)  # how each of the newest is undone

    def execute(self, command: tuple[bytes, ...]) -> Any:
        return getattr(self, f"_{command[0].decode().lower()}")(*command[1:])

    def flush(self) -> None:
        """All data is gone."""
        self.keys.clear()
        self.hashes.clear()
        self.deadlines.clear()
        self.written.clear()

    def evict(self, key: bytes) -> None:
        """The engine needs the memory of this key, or its time is over."""
        self.deadlines.pop(key, None)
        gone = self.keys.pop(key, None)
        if gone is not None:
            self.written.append(lambda: self.keys.__setitem__(key, gone))

    def expire(self) -> None:
        """Remove the keys that have outlived their time."""
        now = self.now()
        for key in [key for key, at in self.deadlines.items() if at <= now]:
            self.evict(key)

    def fail_over(self, lost: int) -> None:
        """Go on as a replica that has never got the last `lost` writes."""
        for _ in range(min(lost, len(self.written))):
            self.written.pop()()
        self.written.clear()

    def replica(self) -> ModelEngine:
        """Another server with the same data."""
        other = ModelEngine(self.now)
        for name, key in self.keys.items():
            copied = other.keys[name] = Key()
            copied.entries, copied.last = list(key.entries), key.last
        other.hashes = {name: dict(fields) for name, fields in self.hashes.items()}
        other.deadlines = dict(self.deadlines)
        return other

    # -- streams

    def _xadd(self, name: bytes, *rest: bytes) -> Any:
        if self.is_full:
            return OOM
        most = 0
        if rest[0] == b"NOMKSTREAM":
            rest = rest[1:]
            if name not in self.keys:
                return None
        elif rest[0] == b"MAXLEN":
            most, rest = int(rest[1]), rest[2:]
        key = self.keys.get(name)
        before = key.last if key is not None else (0, 0)
        if rest[0] == b"*":
            entry_id = max((round(self.now() * 1000), 1), (before[0], before[1] + 1))
        else:
            entry_id = id_of(rest[0])
        if entry_id <= before:
            return ORDER
        if key is None:
            key = self.keys[name] = Key()
        key.entries.append((entry_id, list(rest[1:])))
        key.last = entry_id
        if most:
            del key.entries[:-most]
        self.written.append(lambda: self._take_back(name, entry_id, before))
        return text_of(entry_id)

    def _take_back(self, name: bytes, entry_id: Id, before: Id) -> None:
        """Undo an XADD."""
        key = self.keys.get(name)
        if key is None or key.last != entry_id:
            return
        if key.entries and key.entries[-1][0] == entry_id:
            key.entries.pop()
        key.last = before
        if before == (0, 0):
            del self.keys[name]
            self.deadlines.pop(name, None)

    def _xrange(self, name: bytes, first: bytes, last: bytes, word: bytes = b"COUNT", count: bytes = b"999999") -> Any:
        assert word == b"COUNT"
        beyond = first.startswith(b"(")
        low = FIRST if first == b"-" else id_of(first.removeprefix(b"("))
        high = LAST if last == b"+" else id_of(last)
        entries = self.keys[name].entries if name in self.keys else []
        start = (bisect_right if beyond else bisect_left)(entries, low, key=_id_in)
        end = bisect_right(entries, high, lo=start, key=_id_in)
        return [[text_of(entry_id), list(fields)] for entry_id, fields in entries[start : min(end, start + int(count))]]

    def _xrevrange(self, name: bytes, last: bytes, first: bytes, word: bytes, count: bytes) -> Any:
        assert (word, last, first) == (b"COUNT", b"+", b"-")
        entries = self.keys[name].entries if name in self.keys else []
        return [[text_of(entry_id), list(fields)] for entry_id, fields in reversed(entries[-int(count) :])]

    def _xtrim(self, name: bytes, word: bytes, least: bytes) -> Any:
        assert word == b"MINID"
        key = self.keys.get(name)
        if key is None:
            return 0
        before = key.entries
        key.entries = before[bisect_left(before, id_of(least), key=_id_in) :]
        trimmed = before[: len(before) - len(key.entries)]
        self.written.append(lambda: key.entries.__setitem__(slice(0, 0), trimmed))
        return len(trimmed)

    def _xdel(self, name: bytes, *ids: bytes) -> Any:
        key = self.keys.get(name)
        if key is None:
            return 0
        before, gone = key.entries, {id_of(each) for each in ids}
        key.entries = [entry for entry in before if entry[0] not in gone]
        self.written.append(lambda: setattr(key, "entries", before))
        return len(before) - len(key.entries)

    def _unlink(self, name: bytes) -> Any:
        was = name in self.keys
        self.evict(name)
        return int(was)

    def _pexpire(self, name: bytes, milliseconds: bytes) -> Any:
        self.expiries[name] = int(milliseconds)
        if name not in self.keys:
            return 0
        self.deadlines[name] = self.now() + int(milliseconds) / 1000
        return 1

    # -- hashes

    def _hset(self, name: bytes, field: bytes, value: bytes) -> Any:
        if self.is_full:
            return OOM
        fields = self.hashes.setdefault(name, {})
        before = fields.get(field)
        fields[field] = value

        def undo() -> None:
            if before is None:
                fields.pop(field, None)
            else:
                fields[field] = before

        self.written.append(undo)
        return int(before is None)

    def _hget(self, name: bytes, field: bytes) -> Any:
        return self.hashes.get(name, {}).get(field)

    def _hmget(self, name: bytes, *fields: bytes) -> Any:
        return [self._hget(name, field) for field in fields]

    def _hgetall(self, name: bytes) -> Any:
        return dict(self.hashes.get(name, {}))

    def _hdel(self, name: bytes, field: bytes) -> Any:
        return int(self.hashes.get(name, {}).pop(field, None) is not None)

    # -- messages

    def _pubsub(self, word: bytes, *channels: bytes) -> Any:
        assert word == b"NUMSUB"
        return [part for channel in channels for part in (channel, len(self.listeners.get(channel, [])))]

    def _publish(self, channel: bytes, text: bytes) -> Any:
        listeners = self.listeners.get(channel, [])
        if not self.loses_messages:
            for hear in list(listeners):
                hear(text)
        return len(listeners)


def _id_in(entry: tuple[Id, list[bytes]]) -> Id:
    return entry[0]


class ModelChannels:
    """The channels of a member at a model: what is sent reaches it at once, while its connection stands."""

    def __init__(self, engine: ModelEngine) -> None:
        self.engine = engine
        self.is_up = True
        self._receivers: dict[bytes, Any] = {}
        self._unready: list[bytes] = []

    def subscribe(self, channel: bytes, receiver: Any) -> None:
        assert channel not in self._receivers
        self._receivers[channel] = receiver
        self._unready.append(channel)

    def unsubscribe(self, channel: bytes) -> None:
        receiver = self._receivers.pop(channel, None)
        if receiver is not None and receiver.on_text in self.engine.listeners.get(channel, []):
            self.engine.listeners[channel].remove(receiver.on_text)

    def turn(self) -> None:
        """The engine confirms channels."""
        unready, self._unready = self._unready if self.is_up else [], [] if self.is_up else self._unready
        for channel in unready:
            receiver = self._receivers.get(channel)
            if receiver is not None:
                self.engine.listeners.setdefault(channel, []).append(receiver.on_text)
                receiver.on_ready()

    def cut(self) -> None:
        """The connection ends, and comes back when the test says so."""
        self.is_up = False
        for channel, receiver in self._receivers.items():
            heard = self.engine.listeners.get(channel, [])
            if receiver.on_text in heard:
                heard.remove(receiver.on_text)
            if channel not in self._unready:
                self._unready.append(channel)


class ModelShard:
    """A member's ways to a model."""

    def __init__(self, engine: ModelEngine) -> None:
        self.link = ModelLink(engine, lambda: None)
        self.link.up()
        self.channels = ModelChannels(engine)

    def turn(self) -> None:
        """Let the engine carry out all that was asked."""
        self.channels.turn()
        if self.link.is_up:
            self.link.turn()


class ModelLink:
    """A link to a model: commands wait until the test lets the engine carry them out."""

    def __init__(self, engine: ModelEngine, on_up: Callable[[], None]) -> None:
        self.engine = engine
        self.on_up = on_up
        self.is_up = False
        self.room = True
        self.asked: deque[tuple[tuple[bytes, ...], Callable[[Any], None]]] = deque()
        self.commands: list[tuple[bytes, ...]] = []

    @property
    def has_room(self) -> bool:
        return self.is_up and self.room

    def ask(self, command: bytes, on_reply: Callable[[Any], None]) -> None:
        assert self.is_up
        reader = hiredis.Reader()
        reader.feed(command)
        parts = tuple(reader.gets())
        self.commands.append(parts)
        self.asked.append((parts, on_reply))

    def turn(self, count: int = 1 << 30) -> None:
        """Let the engine carry out commands, and those that their replies bring about."""
        while self.asked and count:
            count -= 1
            command, on_reply = self.asked.popleft()
            on_reply(self.engine.execute(command))

    def cut(self, carried_out: int = 0) -> None:
        """The connection ends; some of the commands in flight were carried out, and all replies are lost."""
        lost = list(self.asked)
        self.asked.clear()
        self.is_up = False
        for number, (command, on_reply) in enumerate(lost):
            if number < carried_out:
                self.engine.execute(command)
            on_reply(EngineLost("LOST"))

    def up(self) -> None:
        self.is_up = True
        self.on_up()
