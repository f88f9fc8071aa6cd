"""A model of the engine: streams with ids that only grow, out of memory, evictions, failovers; turned by the test."""

from __future__ import annotations

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


class ModelEngine:
    """The data, and what each command does to it."""

    def __init__(self) -> None:
        self.keys: dict[bytes, Key] = {}
        self.expiries: dict[bytes, int] = {}  # the last that was set, in milliseconds
        self.is_full = False
        self.listeners: dict[bytes, list[Callable[[bytes], None]]] = {}
        self.loses_messages = False  # the members that listen are counted, and hear nothing
        self.written: list[tuple[bytes, ...]] = []  # commands that changed something, for failovers

    def execute(self, command: tuple[bytes, ...]) -> Any:
        reply = getattr(self, f"_{command[0].decode().lower()}")(*command[1:])
        if not isinstance(reply, EngineError) and command[0] in (b"XADD", b"XTRIM"):
            self.written.append(command)
        return reply

    def flush(self) -> None:
        self.keys.clear()
        self.written.clear()

    def evict(self, key: bytes) -> None:
        self.keys.pop(key, None)
        self.written = [command for command in self.written if command[1] != key]

    def fail_over(self, lost: int) -> None:
        """Go on as a replica that has never got the last `lost` commands."""
        history = self.written[: len(self.written) - lost]
        self.flush()
        full, self.is_full = self.is_full, False
        for command in history:
            self.execute(command)
        self.is_full = full

    def _xadd(self, name: bytes, *rest: bytes) -> Any:
        if self.is_full:
            return EngineError("OOM command not allowed when used memory > 'maxmemory'.")
        if rest[0] == b"NOMKSTREAM":
            rest = rest[1:]
            if name not in self.keys:
                return None
        entry_id = id_of(rest[0])
        key = self.keys.get(name) or Key()
        if entry_id <= key.last:
            return EngineError("ERR The ID specified in XADD is equal or smaller than the target stream top item")
        self.keys[name] = key
        key.entries.append((entry_id, list(rest[1:])))
        key.last = entry_id
        return rest[0]

    def _xrange(self, name: bytes, first: bytes, last: bytes, word: bytes = b"COUNT", count: bytes = b"999999") -> Any:
        assert word == b"COUNT"
        beyond = first.startswith(b"(")
        low = FIRST if first == b"-" else id_of(first.removeprefix(b"("))
        high = LAST if last == b"+" else id_of(last)
        key = self.keys.get(name) or Key()
        found = [entry for entry in key.entries if low <= entry[0] <= high and not (beyond and entry[0] == low)]
        return [[text_of(entry_id), list(fields)] for entry_id, fields in found[: int(count)]]

    def _xrevrange(self, name: bytes, last: bytes, first: bytes, word: bytes, count: bytes) -> Any:
        assert word == b"COUNT"
        return self._xrange(name, first, last)[::-1][: int(count)]

    def _xtrim(self, name: bytes, word: bytes, least: bytes) -> Any:
        assert word == b"MINID"
        key = self.keys.get(name)
        if key is None:
            return 0
        before = len(key.entries)
        key.entries = [entry for entry in key.entries if entry[0] >= id_of(least)]
        return before - len(key.entries)

    def _pubsub(self, word: bytes, *channels: bytes) -> Any:
        assert word == b"NUMSUB"
        return [part for channel in channels for part in (channel, len(self.listeners.get(channel, [])))]

    def _publish(self, channel: bytes, text: bytes) -> Any:
        if self.loses_messages:
            return 1
        for hear in self.listeners.get(channel, []):
            hear(text)
        return len(self.listeners.get(channel, []))

    def _pexpire(self, name: bytes, milliseconds: bytes) -> Any:
        self.expiries[name] = int(milliseconds)
        return int(name in self.keys)


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
