"""Levels: the log levels that hold now, their changes, and the lines that tell of these.

The parent has the daemon's, and tells the workers; a worker without a parent has its own.
"""

from __future__ import annotations

from streamd.daemon import logs
from streamd.log_levels import LevelChange, LogLevels, Watch


class Levels:
    """The levels of this process. `tick` ends what is due."""

    def __init__(self, level: str) -> None:
        self.now = LogLevels.of(level)

    def change(self, change: LevelChange, now: float) -> None:
        """An operator wants another level, or watches a key or a stream."""
        self.now = self.now.changed(change, now)
        logs.set_level(self.now.level)
        fields = {"key": change.key or None, "stream": change.stream or None, "for_s": change.for_s or None}
        if not change.is_watch:
            logs.event(logs.INFO, "log level changed", level=change.level, **fields)
        else:
            logs.event(logs.INFO, "watched step by step" if change.for_s else "watch ends", **fields)

    def reload(self, level: str) -> None:
        """The settings were read again: their level holds, and watches go on."""
        self.now = LogLevels.of(level, self.now.watches)
        logs.set_level(level)

    def tick(self, now: float) -> bool:
        """From time to time. True: something has ended."""
        before, self.now = self.now, self.now.at(now)
        if self.now is before:
            return False
        if before.until and not self.now.until:
            logs.set_level(self.now.level)
            logs.event(logs.INFO, "log level changed", level=self.now.level)
        for watch in set(before.watches) - set(self.now.watches):
            _tell_end(watch)
        return True


def _tell_end(watch: Watch) -> None:
    logs.event(logs.INFO, "watch ends", key=watch.key or None, stream=watch.stream or None)
