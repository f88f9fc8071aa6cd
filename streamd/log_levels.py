"""Log levels: how much the daemon logs now, for all requests and for watched keys and streams, and until when.

A level is the settings' own, or one that an operator has asked for: until the next reload, or for a time. A watch has
the steps of the requests of a key, or of a stream, in the log for a time, at any level. All processes hold the same
LogLevels: the parent changes them, and tells the workers. Times are monotonic seconds, which all processes share.
"""

from __future__ import annotations

from typing import Final, NamedTuple

LEVELS: Final = ("debug", "info", "warning", "error")

# Time for which a key or a stream is watched unless the operator says otherwise: a person tries something and looks.
WATCH_S: Final = 300.0

# Longest time, for a level too: a forgotten debug level fills a journal within hours.
FOR_S_MAX: Final = 3600.0

# Each request is compared with all watches; a person follows a few.
WATCHES_MAX: Final = 16


class Watch(NamedTuple):
    """A key, by its id, or a stream, by its id or name: its requests are told step by step. The other text is ""."""

    key: str
    stream: str
    until: float


class LevelChange(NamedTuple):
    """An operator's wish. With a key or a stream: watch it for `for_s`, 0 ends the watch; else the level of all."""

    level: str
    for_s: float = 0.0  # 0: until the next reload
    key: str = ""
    stream: str = ""

    @property
    def is_watch(self) -> bool:
        """Whether it is about a key or a stream."""
        return bool(self.key or self.stream)


class LogLevels(NamedTuple):
    """The levels at a time."""

    usual: str  # the settings' own
    level: str
    until: float = 0.0  # when the usual level returns; 0: with the next reload
    watches: tuple[Watch, ...] = ()

    @classmethod
    def of(cls, level: str, watches: tuple[Watch, ...] = ()) -> LogLevels:
        """The settings' own level; watches outlast a reload."""
        return cls(level, level, 0.0, watches)

    def has_room(self, change: LevelChange) -> bool:
        """Whether the change asks for no watch too many."""
        return not change.is_watch or len(self._others(change)) < WATCHES_MAX

    def changed(self, change: LevelChange, now: float) -> LogLevels:
        """The levels after an operator's wish. A watch too many takes the place of the oldest."""
        if not change.is_watch:
            return self._replace(level=change.level, until=now + change.for_s if change.for_s else 0.0)
        others = self._others(change)
        if not change.for_s:
            return self._replace(watches=others)
        watch = Watch(change.key, change.stream, now + change.for_s)
        return self._replace(watches=(*others, watch)[-WATCHES_MAX:])

    def _others(self, change: LevelChange) -> tuple[Watch, ...]:
        return tuple(each for each in self.watches if (each.key, each.stream) != (change.key, change.stream))

    def at(self, now: float) -> LogLevels:
        """The levels at this time: ends that are due have come."""
        if not self.watches and not self.until:
            return self
        watches = tuple(each for each in self.watches if each.until > now)
        if self.until and self.until <= now:
            return LogLevels(self.usual, self.usual, 0.0, watches)
        return self if len(watches) == len(self.watches) else self._replace(watches=watches)
